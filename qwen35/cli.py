"""The common parts of all command lines: types of arguments, printing, one-line errors, exit statuses,
`--debug`."""

import argparse
import errno
import json
import os
import re
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qwen35.errors import InputError, shortened
from qwen35.threads import MOST_THREADS, set_threads

if TYPE_CHECKING:
    import torch

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHECKPOINT = "a checkpoint's folder, a hub id, or `tiny`, the embedded model (default: tiny)"


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, `--debug` and `--version`.

    computes: also add `--threads`, which `run` obeys. `set_defaults(threads=...)` sets its default.
    """

    def __init__(self, prog: str, description: str, *, computes: bool = True) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        # Before Python 3.14 argparse takes -1e-3 for an option, unlike -0.001.
        self._negative_number_matcher = re.compile(r"-\.?\d")
        for kind, read in ((int, integer), (float, number), (Path, path)):
            self.register("type", kind, read)  # whose errors say what was expected
        self.add_argument(
            "--debug",
            action="store_true",
            help="print the traceback of an error, not only its line",
        )
        self.add_argument("--version", action="version", version=f"qwen35 {installed('qwen35')}")
        if computes:
            self.add_argument("--threads", type=thread_count, metavar="N",
                              help="use N threads of torch on a CPU (default: OMP_NUM_THREADS if it is "
                              "set, one for a hidden size below 1,024, otherwise torch's own "
                              "choice)")  # fmt: skip

    def add_model(
        self, help: str = CHECKPOINT, *, alone: bool = True, default: str | None = "tiny"
    ) -> None:
        """Add `--model`, which names the checkpoint in every command. alone: MODEL may also be given
        without the option, because the command takes no other positional argument."""
        default = None if default is None else _Default(default)
        if alone:
            self.add_argument("model", metavar="MODEL", nargs="?", action=_Once, default=default,
                              help=help)  # fmt: skip
        self.add_argument("--model", metavar="MODEL", action=_Once, default=default,
                          help="name the model by an option, in place of "
                          "MODEL" if alone else help)  # fmt: skip

    def error(self, message: str) -> NoReturn:
        self.exit(2, None if _is_told_elsewhere() else f"{self.prog}: {one_line(message)}\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help or the version. Unlike argparse's own method it fails on a full disk."""
        if file is not sys.stdout:
            super()._print_message(message, file)
        elif not _is_told_elsewhere():
            print(message, end="", flush=True)


class _Once(argparse.Action):
    """Stores a value that two arguments can set, and refuses two different values."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest, None)
        if values is None or isinstance(values, _Default):
            return  # argparse makes this call too if the positional argument is not given
        if before != values and not isinstance(before, _Default | None):
            parser.error(f"two models are given, {before!r} and {values!r}; one is expected")
        setattr(namespace, self.dest, values)


class _Default(str):
    """A default value. It differs from the same text given by the user."""


def _is_told_elsewhere() -> bool:
    """Whether another process has the same arguments, and prints what there is to say about them.

    All processes of one torchrun have the same arguments, so the first one of each host speaks for
    them. Ranks that something else has started may have different ones, so each speaks for itself.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"


def installed(package: str) -> str:
    """The version of a package, or "not installed". This package is not installed if it runs from a
    folder."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def one_line(text: object) -> str:
    """A message as one line that is safe in a terminal: control characters are written as
    escapes."""
    words = shortened(" ".join(str(text).split()))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def counted(count: int, noun: str) -> str:
    """`1 token`, `2 tokens`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def parse_ids(text: str) -> list[int]:
    """Token ids written as `1,2,3`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"ids {text!r}; expected numbers with commas between, as in 1,2,3"
        ) from None


DIGITS = 18  # of an integer on a command line; it fits into 64 bits
MOST = 10**9  # of anything that is counted: more of it would take years


def integer(text: str) -> int:
    """Parse an integer of at most DIGITS digits. It is the type `int` of every option."""
    if not re.fullmatch(r"[+-]?\d+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r}; expected an integer")
    if len(text.lstrip("+-")) > DIGITS:
        raise argparse.ArgumentTypeError(f"{text!r}; expected at most {DIGITS} digits")
    return int(text)


def number(text: str) -> float:
    """Parse a number with or without a decimal point. It is the type `float` of every option."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number") from None


def path(text: str) -> Path:
    """Parse the name of a file or folder. It is the type `Path` of every option."""
    return Path(named(text))


def named(text: str) -> str:
    """Parse a name, which may be `-`. The empty one would stand for the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("''; expected the name of a file or folder")
    return text


def output_file(text: str) -> Path:
    """Parse the name of a file that is written at the end. It is an error at once if that cannot work."""
    file = path(text)
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; expected the name of a file")
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}; expected a file in a folder that exists")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a file that can be written")
    return file


def folder_name(text: str) -> Path:
    """Parse the name of a folder, which need not be there yet."""
    if (found := path(text)).exists() and not found.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file; expected the name of a folder")
    return found


def output_folder(text: str) -> Path:
    """Parse the name of a folder that is written to at the end, and made if it is not there. It is an
    error at once if that cannot work."""
    found = folder_name(text)
    place = next(p for p in (found.absolute(), *found.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r}; {place} is no folder that can be written")
    return found


def at_least_one(text: str) -> int:
    """Parse an integer that is at least 1."""
    return _at_least(1, text)


def at_least_two(text: str) -> int:
    """Parse an integer that is at least 2."""
    return _at_least(2, text)


def thread_count(text: str) -> int:
    """Parse a number of threads or processes, at most MOST_THREADS."""
    count = at_least_one(text)
    if count > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number of at most {MOST_THREADS:,}")
    return count


def at_least_zero(text: str) -> int:
    """Parse an integer that is at least 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not re.fullmatch(r"\d+", text, re.ASCII) or (found := integer(text)) < least:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number of at least {least}")
    if found > MOST:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number of at most {MOST:,}")
    return found


SIZE_RULE = "4GB is 4 x 1000^3 bytes, 4GiB and 4G are 4 x 1024^3; K, M and T likewise"


def size(text: str) -> int:
    """Bytes, written as 4000000, 64M, 64MiB or 64MB, by SIZE_RULE."""
    match = re.fullmatch(r"(\d{1,18})(?:([KMGT])(iB|B)?)?", text, re.ASCII)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r}; expected a number of bytes, as in 4000000, 64M, 4GiB or 4GB"
        )
    base = 1000 if match[3] == "B" else 1024
    return int(match[1]) * base ** " KMGT".index(match[2] or " ")


def device(text: str) -> "torch.device":
    """Parse `--device`: a device that can compute here, such as `cpu` or `cuda:1`."""
    from qwen35.arguments import as_device  # here: most commands have no use for torch

    try:
        return as_device(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def print_json(document: Any) -> None:
    """Print one document on one line. Characters that the output's encoding lacks are escaped."""
    text = json.dumps(document, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = json.dumps(document)
    print(text, flush=True)


def run(
    parser: Parser, main: Callable[[argparse.Namespace], int], argv: list[str] | None = None
) -> NoReturn:
    """Parse the arguments, set the threads, run `main`, and exit.

    Exit statuses: 0 success, 1 a check failed, 2 bad input or a crash, 130 interrupted.
    `args.command` is the whole command line, quoted for a shell.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see qwen35/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _open_closed_streams()
    _never_fail_to_print()
    debug = False
    try:
        args = parser.parse_args(argv)
        debug = args.debug
        args.command = f"{parser.prog} {shlex.join(sys.argv[1:] if argv is None else argv)}".strip()
        if hasattr(args, "threads"):
            set_threads(args.threads, getattr(args, "model", None))
        warnings.showwarning = lambda message, *_, **__: print(
            f"{parser.prog}: warning: {one_line(message)}", file=sys.stderr
        )
        status = main(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        parser.exit(130, "\n")
    except BrokenPipeError:  # the reader of stdout went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except Exception as error:
        reason = None if debug else reason_of(error)
        if reason is None:  # the interpreter would exit with 1, "a check failed"
            parser.exit(2, traceback.format_exc())
        parser.exit(2, f"{parser.prog}: {one_line(reason)}\n")
    parser.exit(status)


def reason_of(error: BaseException) -> str | None:
    """The one-line message of an exception, or None if it needs its traceback."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError):  # a name that is too long, a folder that may not be read
        # Whatever else this project writes to names itself (weights.storage.whole).
        nameless = "standard output" if error.errno in DISK_IS_FULL else "error"
        return f"{error.filename or nameless}: {error.strerror or error}"
    if _is_out_of_memory(error):
        return ". ".join(one_line(error).split(". ")[:3])  # then follows advice on allocators
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the CPU ran out of memory. For the CPU, torch has no specific exception."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _open_closed_streams() -> None:
    """Replace standard streams that were closed before the process began by the null device. `<&-`
    and some supervisors close them, and Python then has None for them."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _never_fail_to_print() -> None:
    """Print `?` on standard output, and an escape on standard error, for characters that the
    encoding lacks."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stderr, TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")
