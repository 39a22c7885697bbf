"""The gated delta net for the rows of a prompt."""

import math
from typing import Any

import torch
from torch import Tensor

from fast.launch import Launch, Scratch, Work, constants, options
from fast.prefill.linear import product
from fast.prefill.span import Span
from fast.prefill.tiles import scan_tiles, tiles
from fast.state import RING, Delta
from fast.target import GRID

TOKENS = 16  # tokens that one program convolves
COLUMNS = 1024  # columns of a row that one program writes to the ring


def work(
    node: Any, x: Tensor, state: Delta, span: Span, rope: None, scratch: Scratch, *,
    residual: Tensor | None = None,
) -> tuple[list[Work], Tensor]:  # fmt: skip
    """The work of a `fast.deltanet.GatedDeltaNet` for x [N, D] bf16, and its output [N, D] bf16.

    The output is filled when the work runs. The work also advances `state` past the rows. residual
    [N, D] bf16 is added to the output.
    """
    from fast.kernels.prefill import deltanet as kernels  # Triton is needed from here on

    N, target = len(x), node.target
    H, HV, K, V = node.H, node.HV, node.K, node.V
    taps, chunks = node.taps.shape[1], math.ceil(N / GRID)
    first, projected = product(x, node.in_proj, target, scratch, span.filled, name="delta_in")
    half = torch.float16
    qk = scratch("delta qk", chunks * GRID, 2, H, K, dtype=half)
    v = scratch("delta v", chunks * GRID, HV, V, dtype=half)
    decays = scratch("delta decays", HV, chunks * GRID, dtype=torch.float32)
    wanted = scratch("delta wanted", HV, chunks * GRID, V, dtype=half)
    erased = scratch("delta erased", HV, chunks * GRID, K, dtype=half)
    memories = scratch("delta memories", HV, chunks, K, V, dtype=half)
    read = scratch("delta read", N, HV * V)
    sizes = {"H": H, "HV": HV, "K": K, "V": V}
    shape = " ".join(f"{name}={size}" for name, size in sizes.items())

    scanning = scan_tiles(target, HV, V)

    def launch(name: str, grid: tuple[int, int], arguments: dict[str, Any]) -> Launch:
        config = scanning if name == "scan" else tiles(target, name)
        return Launch(
            f"prefill {name} {shape}",
            getattr(kernels, name),
            (*grid, 1),
            arguments | sizes | constants(config),
            options(config),
        )

    common = {"projected": projected, "filled": span.filled, "M": projected.shape[1]}
    ring = {
        "ring": state.projected, "start": span.start, "WIDE": state.projected.shape[1], "TAPS": taps,
        "RING": RING,
    }  # fmt: skip
    mix = Launch(
        f"prefill mix {shape}",
        kernels.mix,
        (chunks * GRID // TOKENS, 2 * H + HV, 1),
        {**common, **ring, "taps": node.taps, "qk": qk, "v": v, **sizes, "TOKENS": TOKENS},
        {"num_warps": 4},
    )
    C = 2 * H * K + HV * V
    carry = Launch(
        f"prefill carry C={C}",
        kernels.carry,
        (taps - 1, math.ceil(C / COLUMNS), 1),
        {**common, **ring, "C": C, "BLOCK": COLUMNS},
        {"num_warps": 4},
    )
    solve = launch(
        "solve", (chunks, HV),
        {
            **common, "qk": qk, "v": v, "decay_log": node.decay_log, "decay_bias": node.decay_bias,
            "decays": decays, "wanted": wanted, "erased": erased,
        },
    )  # fmt: skip
    scan = launch(
        "scan", (HV, V // scanning["BLOCK_V"]),
        {
            "qk": qk, "decays": decays, "wanted": wanted, "erased": erased, "states": state.states,
            "memories": memories, "start": span.start, "filled": span.filled, "chunks": chunks,
            "slots": len(state.states),
        },
    )  # fmt: skip
    reading = launch(
        "read", (chunks, HV),
        {
            **common, "qk": qk, "decays": decays, "corrections": wanted, "memories": memories,
            "norm": node.norm, "out": read, "eps": node.eps, "SIGMOID": node.sigmoid,
        },
    )  # fmt: skip
    last, out = product(
        read, node.out_proj, target, scratch, span.filled, name="delta_out", residual=residual
    )
    return [first, mix, carry, solve, scan, reading, last], out
