"""Replaces nodes of a built model by name, permanently or for a `with` block.

A replacement is a class with `from_reference(module)`, which takes over the weights of that node
(and may pack them). Its forward has the signature of the node that it replaces. This module knows
torch, not the model.
"""

import difflib
import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase, translate
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from qwen35.arguments import shown
from qwen35.errors import InputError
from qwen35.node_error import NodeError, definition, told, watch
from qwen35.user_file import load_file, name_of

A_CLASS = "MODULE:CLASS or FILE.py:CLASS"


class Replacement(Protocol):
    """A class whose instances can replace a node."""

    def from_reference(self, module: nn.Module) -> nn.Module: ...


# (pattern of node names, replacement), or `PATTERN=MODULE:CLASS`
Swaps = Sequence[tuple[str, Replacement | str] | str]


def matching(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The modules whose dotted name fits a glob (`*` also spans dots). InputError, with the nearest
    names, if there is none, and if `model` is no model."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model = {shown(model)}; expected a loaded model, as qwen35.load gives it"
        )
    if not isinstance(pattern, str):
        raise InputError(f"pattern = {shown(pattern)}; expected a text, as in 'layers.*.mlp'")
    named = {name: module for name, module in model.named_modules() if name}
    found = {name: module for name, module in named.items() if fnmatchcase(name, pattern)}
    if not found:
        near = difflib.get_close_matches(pattern, named, n=3, cutoff=0.3) or list(named)[:3]
        raise InputError(f"pattern {pattern!r} matches no node; the nearest are {', '.join(near)}")
    return found


def nodes(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The modules whose name matches a glob and that run as such. Modules inside a routed expert are
    left out unless the pattern names it (`layers.3.mlp.experts.7.*`). InputError when there is none."""
    if not isinstance(pattern, str):
        matching(model, pattern)  # says so
    fits = re.compile(translate(pattern)).match
    inside = ".experts." in pattern  # the thousands of nodes in experts are walked only if wanted
    found: dict[str, nn.Module] = {}
    rest = [("", model)]
    while rest:
        prefix, module = rest.pop()
        children = [(f"{prefix}{name}", child) for name, child in module.named_children()]
        for name, child in children:
            is_list = isinstance(child, nn.ModuleList) and not name.endswith("experts")
            if not is_list and fits(name):
                found[name] = child
        rest += [(f"{name}.", c) for name, c in children if inside or not name.endswith("experts")]
    if not found:
        matching(model, pattern)  # says which names are near
        raise InputError(f"pattern {pattern!r} matches no node that runs by itself")
    return found


def outermost(found: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The nodes that are not inside another of them. The others are replaced together with
    these."""

    def parents(name: str) -> Iterator[str]:
        return accumulate(name.split(".")[:-1], "{}.{}".format)

    return {n: module for n, module in found.items() if not any(p in found for p in parents(n))}


def swap(model: nn.Module, pattern: str, replacement: Replacement | str) -> list[str]:
    """Replace every node that fits `pattern` by `replacement.from_reference(node)`; return their names.

    Nodes are replaced one by one, and each old node is released before the next one is packed.
    InputError if no node fits, if `from_reference` refuses a node (those before it stay replaced), or if
    the new node's forward has other parameters than the old one's. NodeError if `from_reference` raises
    another exception.
    """
    names = list(outermost(matching(model, pattern)))
    made = as_replacement(replacement)
    for name in names:
        model.set_submodule(name, instead(name, model.get_submodule(name), made))
    return names


def replaced(model: nn.Module) -> list[str]:
    """The swapped nodes, as `name=module:class`, without nodes inside of them."""
    found = {
        name: module
        for name, module in model.named_modules()
        if name and not type(module).__module__.startswith(("reference.", "torch."))
    }
    kinds = {name: type(module) for name, module in outermost(found).items()}
    return [f"{name}={kind.__module__}:{kind.__qualname__}" for name, kind in kinds.items()]


@contextmanager
def swapped(model: nn.Module, pattern: str, replacement: Replacement | str) -> Iterator[list[str]]:
    """`swap` until the end of the block, to compare two variants. The old nodes stay in memory."""
    before = outermost(matching(model, pattern))
    try:
        yield swap(model, pattern, replacement)
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def instead(name: str, module: nn.Module, replacement: Replacement) -> nn.Module:
    """The replacement of one node. name: its name in the model. Raises as `swap` does."""
    make = replacement.from_reference
    try:
        fresh = make(module)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except (Exception, SystemExit) as error:
        text = told(error, replacement.__module__, definition(make))
        raise NodeError(f"{name}: {text}") from error
    if not isinstance(fresh, nn.Module):
        kind = "None" if fresh is None else f"a {type(fresh).__name__}"
        raise NodeError(f"{name}: from_reference returned {kind}; expected a torch module")
    old, new = (list(inspect.signature(m.forward).parameters) for m in (module, fresh))
    if old != new:
        raise InputError(
            f"{name}: {type(fresh).__name__}.forward takes ({', '.join(new)}), "
            f"{type(module).__name__}.forward ({', '.join(old)})"
        )
    watch(name, fresh, module)
    return fresh


def parse_swap(text: str, what: str = "--swap") -> tuple[str, Replacement]:
    """Parse `PATTERN=package.module:Class` or `PATTERN=file.py:Class` into the pattern and the class.
    what: the argument's name, for errors. InputError if there is no such class."""
    pattern, _, path = text.partition("=")
    if not pattern or not path:
        raise InputError(f"{what} {text!r}; expected PATTERN={A_CLASS}")
    return pattern, class_at(path, f"{what} {text!r}", f"PATTERN={A_CLASS}")


def class_at(path: str, what: str, expected: str = A_CLASS) -> Replacement:
    """The class at `package.module:Class` or `file.py:Class`. what: begins an error."""
    module, _, name = path.rpartition(":")
    if not (module and name):
        raise InputError(f"{what}; expected {expected}")
    is_file = module.endswith(".py")
    if is_file and not Path(module).is_file():
        raise InputError(f"{what}: {module}: no such file")
    try:
        imported = load_file(module) if is_file else importlib.import_module(module)
    except (Exception, SystemExit) as error:  # importing the module runs the user's code
        own = name_of(module) if is_file else module
        raise InputError(f"{what}: {told(error, own)}") from error
    found = getattr(imported, name, None)
    if found is None:
        raise InputError(f"{what}: {module} has no {name}")
    return _checked(found, f"{what}: {name}")


def as_replacement(given: Replacement | str) -> Replacement:
    """A class, or the class that a text names as the command line does."""
    if isinstance(given, str):
        return class_at(given, f"replacement {given!r}")
    return _checked(given, f"replacement {shown(given)}")


def as_swaps(swaps: Swaps | str) -> list[tuple[str, Replacement]]:
    """Pairs (pattern, class) from such pairs, or from the command line's `PATTERN=MODULE:CLASS`."""
    found: list[tuple[str, Replacement]] = []
    if not isinstance(swaps, Sequence):
        raise InputError(f"swaps = {shown(swaps)}; expected a list of pairs (PATTERN, class)")
    for given in [swaps] if isinstance(swaps, str) else swaps:
        if isinstance(given, str):
            found.append(parse_swap(given, "swaps"))
        elif isinstance(given, Sequence) and len(given) == 2 and isinstance(given[0], str):
            found.append((given[0], as_replacement(given[1])))
        else:
            raise InputError(
                f"swaps: {shown(given)}; expected pairs (PATTERN, class) or PATTERN={A_CLASS}"
            )
    return found


def _checked(found: Any, what: str) -> Replacement:
    if not hasattr(found, "from_reference"):
        raise InputError(f"{what} has no from_reference")
    return found
