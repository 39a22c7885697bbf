"""The kernels, and nothing else. `launches` lists each in every configuration that the project ships."""

from collections.abc import Iterator

import torch

from fast.launch import Launch
from qwen35.errors import InputError

try:
    import triton
except ModuleNotFoundError:
    raise InputError(
        "the fast path needs Triton 3.6 or later, which is not installed (pip install triton)"
    ) from None

PUBLISHED = ((512, 10), (256, 8))  # experts and top-k of the family's mixtures
D = 4096
INTERMEDIATE = (1024, 512, 256, 128)  # of an expert's, on 1, 2, 4 or 8 ranks


def launches(target: str, rows: int = 4) -> Iterator[Launch]:
    """Every kernel at the 397B model's sizes, on tensors without memory: to be compiled, not run."""
    from fast.moe import Experts, SparseMoeBlock
    from fast.router import Router

    meta = torch.device("meta")
    x = torch.empty(rows, D, dtype=torch.bfloat16, device=meta)
    (E, top_k), *_ = PUBLISHED
    for I in INTERMEDIATE:
        weight = torch.empty(E + 1 + 2 * I, D, dtype=torch.bfloat16, device=meta)
        shared_down = torch.empty(D, I, dtype=torch.bfloat16, device=meta)
        block = SparseMoeBlock(
            Router(weight, E, top_k, True, target), Experts(E, D, I, target, meta), shared_down
        )
        yield from block.launches(x)[0]
    E, top_k = PUBLISHED[1]
    router = Router(torch.empty(E, D, dtype=torch.bfloat16, device=meta), E, top_k, True, target)
    yield from router.launches(x)[0]


__all__ = ["launches", "triton"]
