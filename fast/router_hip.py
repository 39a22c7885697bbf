"""The router of 1 to 8 rows as one launch of a HIP kernel, kernels/router.hip, on gfx950."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fast import configs
from fast.hip import HipLaunch
from fast.hip_compiler import ARCHITECTURE, Kernel
from fast.launch import Scratch
from qwen35.errors import InputError

if TYPE_CHECKING:
    from fast.router import Router

SOURCE = Path(__file__).parent / "kernels" / "router.hip"
# As in the source.
STREAMERS, TILE, DEPTH, MOST, LINE = 8, 16, 32, 4, 16


def check(router: "Router") -> None:
    """InputError unless the kernel takes this router."""
    if router.target != ARCHITECTURE:
        raise InputError(f"a router with kernel hip for {router.target}; it is for {ARCHITECTURE}")
    if (D := router.weight.shape[1]) % DEPTH:
        raise InputError(
            f"a router with kernel hip of hidden size {D}; expected a multiple of {DEPTH}"
        )


def splits(D: int) -> int:
    """The number of parts of the D columns. Each part has workgroups of its own."""
    return -(-D // DEPTH // (MOST * STREAMERS))


def launch(router: "Router", reads: dict[str, Any], choice: Any, scratch: Scratch) -> HipLaunch:
    """The launch that writes a `fast.router.Choice`. reads: as `fast.linear.read_normed` has them."""
    M, D = router.weight.shape
    shape = configs.key(N=M, K=D, E=router.E)
    grid = -(-M // TILE), splits(D), 1
    sizes = {"HIDDEN_SIZE": D, "COLUMNS": M, "EXPERTS": router.E, "TOP_K": router.top_k}
    sizes |= {"NORMALISED": int(router.norm)}
    return HipLaunch(
        f"router {shape}",
        Kernel(SOURCE, "router", tuple(sizes.items())),
        grid,
        {
            "x": reads["x"], "squares": reads["squares"] if reads["PARTS"] else None,
            "weight": router.weight, "sums": choice.parts,
            # It is never set back: each launch adds its number of workgroups.
            "counter": scratch(f"router {shape}", LINE, dtype=torch.int64),
            "experts": choice.experts, "weights": choice.weights,
            "rows": len(reads["x"]), "parts": reads["PARTS"], "eps": reads["eps"],
        },
        {"num_warps": STREAMERS + 1},
        loading=STREAMERS,
        kinds=0,  # all weights at once
    )  # fmt: skip
