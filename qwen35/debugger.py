"""Stops in the debugger inside a node's forward, without editing a file."""

import bdb
import pdb
import sys
from typing import Any

from torch import Tensor, nn

from qwen35.cache import Cache
from qwen35.errors import InputError
from qwen35.swap import nodes
from reference.model import Model


class LeftError(KeyboardInterrupt):
    """The user left the debugger with `q` or the end of the input. A command then ends as after
    Ctrl-C."""


class Debugger(pdb.Pdb):
    """A pdb that ends the program when the user leaves it. pdb's own `runcall` would return None as the
    node's output, and the next node would fail."""

    def runcall(self, function: Any, /, *arguments: Any, **named: Any) -> Any:
        self.reset()
        sys.settrace(self.trace_dispatch)
        try:
            result = function(*arguments, **named)
        except bdb.BdbQuit:
            raise LeftError from None
        finally:
            sys.settrace(None)
        if self.quitting:  # it was left where the function returns
            raise LeftError
        return result


def break_in(model: Model, pattern: str, position: int = 0) -> list[str]:
    """Make pdb stop at the first line of the forward of each node that fits a pattern.

    pdb stops once in each node, in the pass that computes the token at `position` of the sequence (0 is
    the first token of the prompt). In a node of the MTP head it stops when the node first runs after the
    trunk has computed that token. Results stay the same.

    Returns a list with the names of the nodes. A name is removed from it when pdb has stopped there. The
    model then raises LeftError if the user leaves the debugger. InputError if no node fits, or for a
    negative position.
    """
    if position < 0:
        raise InputError(f"break at token {position}; expected a position >= 0")
    found = nodes(model, pattern)
    waiting = list(found)
    passes: list[range] = [range(0)]  # positions of the trunk's latest pass

    def note_pass(_: nn.Module, arguments: tuple[Tensor, Cache]) -> None:
        ids, cache = arguments
        passes[0] = range(cache.length, cache.length + ids.shape[1])

    model.register_forward_pre_hook(note_pass)
    for name, node in found.items():
        _stop_once(name, node, passes, position, waiting)
    return waiting


def _stop_once(
    name: str, node: nn.Module, passes: list[range], position: int, waiting: list[str]
) -> None:
    """Replace a node's forward until pdb has stopped in it once. Then the original is restored."""
    forward = node.forward

    def stopping(*arguments: Any) -> Any:
        reached = passes[0].stop > position
        if not (reached if name.startswith("mtp") else position in passes[0]):
            return forward(*arguments)
        del node.forward
        waiting.remove(name)
        if passes[0].start:  # the text so far stands on the line
            print()
        print(f"in {name}, {type(node).__name__}.forward, positions {passes[0].start} to "
              f"{passes[0].stop - 1}; c goes on, q ends the program")  # fmt: skip
        return Debugger().runcall(forward, *arguments)

    node.forward = stopping
