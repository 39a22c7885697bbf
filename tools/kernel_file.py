"""Load launches of a user's own kernels from a function in a Python file (`--kernel FILE:NAME`)."""

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fast.launch import Launch
from qwen35.errors import InputError
from qwen35.user_file import load_file


def launches_of(kernel: str) -> Callable[[str], Iterable[Launch]]:
    """The function NAME of a Python file, for kernel "FILE:NAME". It takes a target and returns
    launches.

    InputError if there is no such function, or if the file raises; then the message has the line.
    """
    file, _, name = kernel.rpartition(":")
    path = Path(file)
    if not (name.isidentifier() and path.suffix == ".py" and path.is_file()):
        raise InputError(f"--kernel {kernel!r}; expected FILE.py:NAME, of a file that exists")
    with _blamed(kernel, path):
        module = load_file(file)
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"--kernel {kernel!r}: {path} has no function {name}")

    call: Any = function  # its results are checked below

    def launches(target: str) -> list[Launch]:
        with _blamed(kernel, path):
            found: list[Any] = list(call(target))
        if strange := [one for one in found if not isinstance(one, Launch)]:
            kind = type(strange[0]).__name__
            raise InputError(f"--kernel {kernel!r} gives {kind}; expected fast.launch.Launch")
        return found

    return launches


@contextmanager
def _blamed(kernel: str, path: Path) -> Iterator[None]:
    """Turn any exception of the user's file into an InputError that names the line of the file."""
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path.absolute())]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
        where = f" at line {line} of {path}" if line else ""
        raise InputError(f"--kernel {kernel!r}: {type(error).__name__}{where}: {error}") from error
