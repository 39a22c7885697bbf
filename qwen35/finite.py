"""Finds NaN and infinity in a pass: the token with such logits, and the node where they begin."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from qwen35.errors import InputError


class NotFiniteError(InputError):
    """The logits for the token at `position` are NaN or infinite.

    ids: the tokens of the pass up to there, or none after a prefill. origin: where such numbers
    begin, if that is known.
    """

    def __init__(self, position: int, ids: Sequence[int], origin: str = "") -> None:
        what = f"position {position}: the logits are NaN or infinite"
        super().__init__(f"{what}; {origin}" if origin else what)
        self.position, self.ids = position, list(ids)


def check_finite(logits: Tensor, position: int, ids: Sequence[int]) -> None:
    """Raise NotFiniteError if the largest of the logits [V] for the token at `position` is not
    finite."""
    if not logits.max().isfinite():  # the maximum is NaN if any number is NaN
        raise NotFiniteError(position, ids)


@contextmanager
def not_finite(model: nn.Module) -> Iterator[list[str]]:
    """Yield a list that gets the names of nodes that return NaN or infinity while the block runs.

    A node comes after the nodes inside it, so such numbers begin in the first one.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: list[str] = []

    def look(module: nn.Module, _: object, output: object) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        floats = (o for o in outputs if isinstance(o, Tensor) and o.is_floating_point())
        if id(module) in names and not all(bool(o.isfinite().all()) for o in floats):
            found.append(names[id(module)])

    handle = register_module_forward_hook(look)
    try:
        yield found
    finally:
        handle.remove()
