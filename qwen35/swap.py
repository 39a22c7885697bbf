"""Replaces nodes of a built model by name, permanently or for a `with` block.

A replacement is a class with `from_reference(module)`, which takes over the weights of that node
(and may pack them). Its forward has the signature of the node that it replaces. This module knows
torch, not the model.
"""

import difflib
import importlib
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase, translate
from itertools import accumulate
from typing import Protocol

from torch import nn

from qwen35.errors import InputError
from qwen35.node_error import NodeError, definition, told, watch


class Replacement(Protocol):
    """A class whose instances can replace a node."""

    def from_reference(self, module: nn.Module) -> nn.Module: ...


def matching(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The modules whose dotted name fits a glob (`*` also spans dots). InputError, with the nearest
    names, when there is none."""
    named = {name: module for name, module in model.named_modules() if name}
    found = {name: module for name, module in named.items() if fnmatchcase(name, pattern)}
    if not found:
        near = difflib.get_close_matches(pattern, named, n=3, cutoff=0.3) or list(named)[:3]
        raise InputError(f"pattern {pattern!r} matches no node; the nearest are {', '.join(near)}")
    return found


def nodes(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The modules whose name matches a glob and that run as such. Modules inside a routed expert are
    left out unless the pattern names it (`layers.3.mlp.experts.7.*`). InputError when there is none."""
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


def swap(model: nn.Module, pattern: str, replacement: Replacement) -> list[str]:
    """Replace every node that fits `pattern` by `replacement.from_reference(node)`; return their names.

    Nodes are replaced one by one; each old one is released before the next is packed. InputError when no
    node fits, when `from_reference` refuses one (those before it stay replaced), or when the new node's
    forward has other parameters than the old one's; NodeError when `from_reference` breaks.
    """
    names = list(outermost(matching(model, pattern)))
    for name in names:
        model.set_submodule(name, instead(name, model.get_submodule(name), replacement))
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
def swapped(model: nn.Module, pattern: str, replacement: Replacement) -> Iterator[list[str]]:
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
    except Exception as error:
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


def parse_swap(text: str) -> tuple[str, Replacement]:
    """Parse `PATTERN=package.module:Class` into the pattern and the class. InputError where it fails."""
    pattern, _, path = text.partition("=")
    module, _, name = path.partition(":")
    if not (pattern and module and name):
        raise InputError(f"--swap {text!r}; expected PATTERN=MODULE:CLASS")
    try:
        imported = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # importing the module runs the user's code
        raise InputError(f"--swap {text!r}: {told(error, module)}") from error
    found = getattr(imported, name, None)
    if found is None:
        raise InputError(f"--swap {text!r}: {module} has no {name}")
    if not hasattr(found, "from_reference"):
        raise InputError(f"--swap {text!r}: {name} has no from_reference")
    return pattern, found
