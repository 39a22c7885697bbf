"""Errors of swapped nodes: which node fails, how, and at which line of its file."""

import inspect
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

from qwen35.errors import InputError
from qwen35.parallel.watch import RankLostError

LONGEST = 300  # characters of an exception's message that are shown
FIRST = 150  # those of them from its beginning


class NodeError(InputError):
    """A swapped node is broken. It raised an exception, which is the cause of this one, or its
    output does not fit that of the node that it replaces."""


class Watch:
    """A forward hook of a swapped node. It notes the output, and refuses outputs that are no
    tensors.

    name: the node's name in its model. where: file and line of its forward. returned: the last
    output in words.
    """

    def __init__(self, name: str, where: str) -> None:
        self.name, self.where, self.returned = name, where, "nothing yet"

    def __call__(self, module: nn.Module, _: object, output: object) -> None:
        self.returned = described(output)
        parts = output if isinstance(output, tuple) else (output,)
        if not parts or not all(isinstance(part, Tensor) for part in parts):
            raise self.refused(module, "a tensor, or a tuple of them")
        # Only a router returns integers, and weights with them.
        if isinstance(output, Tensor) and not output.is_floating_point():
            raise self.refused(module, "floats")

    def refused(self, module: nn.Module, expected: str) -> NodeError:
        """The error for an output that is not what was expected."""
        return NodeError(
            f"{self.name}: {self.where}: {type(module).__name__}.forward returned {self.returned}; "
            f"expected {expected}"
        )


def watch(name: str, module: nn.Module, replaced: nn.Module) -> None:
    """Add a `Watch` to a node that replaces `replaced`."""
    if module._forward_hooks is replaced._forward_hooks:  # after copy.copy, which shares them
        module._forward_hooks = OrderedDict(module._forward_hooks)
    module.register_forward_hook(Watch(name, definition(module.forward)))


def watched(module: nn.Module) -> Watch | None:
    """The watch of a swapped node, or None for other nodes."""
    return next((hook for hook in module._forward_hooks.values() if isinstance(hook, Watch)), None)


def check_alike(module: nn.Module, output: Any, expected: Any) -> None:
    """NodeError if a swapped node returned other shapes, or another kind of numbers (floats,
    integers), than the node that it replaces. The number of experts that a router chose is not
    compared, because a wrong number is a difference in the report, not an error."""
    found = watched(module)
    if found and _forms(output) != _forms(expected):
        found.returned = described(output)
        raise found.refused(module, described(expected, with_dtype=_kinds_differ(output, expected)))


def _parts(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def _kind(tensor: Tensor) -> str:
    return "floats" if tensor.is_floating_point() else str(tensor.dtype).rstrip("0123456789")


def _forms(output: Any) -> list[tuple[torch.Size, str]]:
    is_router = isinstance(output, tuple)  # experts [N, k] and weights [N, k]
    return [(p.shape[:-1] if is_router else p.shape, _kind(p)) for p in _parts(output)]


def _kinds_differ(output: Any, expected: Any) -> bool:
    return [_kind(part) for part in _parts(output)] != [_kind(part) for part in _parts(expected)]


def described(output: object, *, with_dtype: bool = True) -> str:
    """A short description of an output, such as `bfloat16 [1, 64, 256]`."""
    if isinstance(output, tuple):
        return f"({', '.join(described(part, with_dtype=with_dtype) for part in output)})"
    if not isinstance(output, Tensor):
        return "None" if output is None else f"a {type(output).__name__}"
    dtype = str(output.dtype).removeprefix("torch.")
    return f"{dtype} {list(output.shape)}" if with_dtype else str(list(output.shape))


@contextmanager
def blaming(model: nn.Module, stage: str = "") -> Iterator[None]:
    """Turn an exception of a block that calls `model` into NodeError, if the model has swapped
    nodes.

    The message names the node in whose forward the exception was raised. This is a swapped node, or
    a later one that fails with the output of a swapped node. Exceptions pass unchanged if the model
    has no swapped node, if they are an InputError that no swapped node raised, and if another rank is
    lost. stage: the name of `model` if it is a part of a model.
    """
    try:
        yield
    except (NodeError, RankLostError):
        raise
    except (Exception, SystemExit) as error:  # a node may call sys.exit
        message = _blame(error, model, stage)
        if message is None:
            raise
        raise NodeError(message) from error


def _blame(error: BaseException, model: nn.Module, stage: str) -> str | None:
    """The message of a NodeError, or None if no swapped node was involved."""
    prefix = f"{stage}." if stage else ""
    names = {id(module): f"{prefix}{name}" for name, module in model.named_modules()}
    names[id(model)] = stage or "the model"
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [f.f_locals.get("self") for f in frames if f.f_code.co_name == "_call_impl"]
    called = [m for m in modules if isinstance(m, nn.Module) and id(m) in names]
    for module in reversed(called):
        if found := watched(module):
            text = told(error, type(module).__module__, found.where)
            return f"{names[id(module)]}: {text}"
    if isinstance(error, InputError):
        return None
    for module in reversed(called):
        inside = [found for part in module.modules() if (found := watched(part))]
        if inside:
            returned = [f"{w.name} ({w.where}) had returned {w.returned}" for w in inside[:3]]
            more = [f"{len(inside) - 3} more were put in"] if len(inside) > 3 else []
            where = names[id(called[-1])]
            return f"{where}: {told(error)}; put in: {', '.join([*returned, *more])}"
    return None


def told(error: BaseException, module: str | None = None, otherwise: str = "") -> str:
    """An exception in one line: `my_kernels.py:23: ValueError: ...`.

    The place is the innermost line in the Python module of that name. If the module is not in the
    traceback, for example because the arguments do not fit, it is `otherwise`. module None: the innermost
    line outside of torch.
    """
    text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    # A compiler quotes a kernel between the place of an error and its reason.
    short = text if len(text) <= LONGEST else f"{text[:FIRST]} ... {text[FIRST - LONGEST :]}"
    where = _place(error, module) or otherwise
    return ": ".join(part for part in (where, type(error).__name__, short) if part)


def _place(error: BaseException, module: str | None) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_shown(error.filename)}:{error.lineno}"
    lines = [
        f"{_shown(frame.f_code.co_filename)}:{number}"
        for frame, number in traceback.walk_tb(error.__traceback__)
        if (frame.f_globals.get("__name__") == module if module else not _is_torch(frame))
    ]
    return lines[-1] if lines else ""


def _is_torch(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).split(".")[0] == "torch"


def definition(function: Callable[..., Any]) -> str:
    """The file and line of a function's definition, or "" if it has no code."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{_shown(code.co_filename)}:{code.co_firstlineno}" if isinstance(code, CodeType) else ""


def _shown(file: str) -> str:
    """A path, relative if it is below the current folder."""
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        return file
