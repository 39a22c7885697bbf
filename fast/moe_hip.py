"""The routed experts of 1 to 8 rows as one launch of a HIP kernel, kernels/moe.hip, on gfx950."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fast import configs
from fast.hip import HipLaunch
from fast.hip_compiler import ARCHITECTURE, Kernel
from fast.launch import Scratch
from fast.linear import Norm, Stream, read_normed, written
from fast.target import MAX_ROWS
from qwen35.errors import InputError

if TYPE_CHECKING:
    from fast.moe import Experts

SOURCE = Path(__file__).parent / "kernels" / "moe.hip"
UNITS = 256  # compute units of an MI355X
# The same constants are in the source.
STREAMERS, MAX_PAIRS, LINE, STEP, SUMMED, DEPTH = 8, 128, 16, 128, 32, 32


def check(packed: "Experts") -> None:
    """InputError unless the kernel takes these experts."""
    if packed.target != ARCHITECTURE:
        raise InputError(f"experts with kernel hip for {packed.target}; it is for {ARCHITECTURE}")
    if not packed.fp4:
        raise InputError("experts with kernel hip in bf16; it takes MXFP4")
    check_sizes(packed.D)


def check_sizes(D: int, shared_I: int = 0) -> None:
    """InputError for a hidden size, or an intermediate size of the shared expert, that the kernel does
    not take."""
    if D % STEP or (D > STREAMERS * STEP and D % (STREAMERS * STEP)):
        raise InputError(
            f"experts with kernel hip of hidden size {D}; expected a multiple of {STEP} up to "
            f"{STREAMERS * STEP}, or a multiple of that"
        )
    if shared_I % DEPTH:
        raise InputError(
            f"experts with kernel hip and a shared expert of intermediate size {shared_I}; "
            f"expected a multiple of {DEPTH}"
        )


def loads(D: int, I: int) -> int:
    """The number of loads, of 16 bytes a lane, that a wave issues for one task."""
    of_D, of_I = -(-D // STEP // STREAMERS), I // STEP
    if of_I > 4 and of_I % 2 == 0:
        of_I //= 2
    room = max(4, of_D, of_I)
    gate = min(16, 1 << (room // of_D).bit_length() - 1)
    down = math.gcd(min(16, 1 << (room // of_I).bit_length() - 1), D // STEP)
    return max(gate * of_D, down * of_I)


def launch(
    packed: "Experts",
    x: Tensor | Stream,
    experts: Tensor,
    weights: Tensor,
    scratch: Scratch,
    *,
    workgroups: int,
    shared: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    then: Norm | None = None,
    out: str = "moe",
) -> tuple[HipLaunch, Any]:
    """The launch, and the output [N, D] bf16, which it will write. Arguments as in `Experts.launches`.

    workgroups: their number, at most as many as the card runs at once, because they wait for each other.
    InputError for a shared expert of a size that the kernel does not take.
    """
    reads = read_normed(x)
    (N, k), D, I = experts.shape, packed.D, packed.I
    shape = configs.key(D=D, I=I)
    writes, result = written(out, N, D, D // SUMMED, packed.target, then, scratch)
    followed = then is not None
    # Counters of arrivals are never set back. A launch adds a number to each that depends on the sizes
    # and the grid, so launches that differ in these have counters of their own.
    lines = MAX_PAIRS + 2 * D // STEP + workgroups
    counters = scratch(f"experts {shape} on {workgroups}", lines, LINE, dtype=torch.int64)
    load = loads(D, I)
    routed, shared_down = shared or (None, None)
    shared_I = 0 if shared_down is None else shared_down.shape[1]
    check_sizes(D, shared_I)
    sizes = {"HIDDEN_SIZE": D, "INTERMEDIATE_SIZE": I, "EXPERTS": packed.E, "TOP_K": k}
    sizes |= {"SHARED_SIZE": shared_I}
    value = HipLaunch(
        f"experts {shape}",
        Kernel(SOURCE, "moe", tuple(sizes.items())),
        (workgroups, 1, 1),
        {
            "x": reads["x"], "squares": reads["squares"] if reads["PARTS"] else None,
            "experts": experts, "weights": weights,
            "gate_up": packed.gate_up, "gate_up_scale": packed.gate_up_scale,
            "down": packed.down, "down_scale": packed.down_scale, "residual": residual,
            "next_norm": writes["next_norm"] if followed else None,
            "hidden": scratch("expert hidden", N * k, MAX_ROWS, I),
            "partial": scratch("expert outputs", N * k, D, dtype=torch.float32),
            "counters": counters, "out": writes["out"],
            "scaled": writes["scaled"] if followed else None,
            "out_squares": writes["out_squares"] if followed else None,
            "routed": routed, "shared_down": shared_down,
            "rows": N, "parts": reads["PARTS"], "workgroups": workgroups,
            "splits": 0 if routed is None else routed.shape[0],
            "routed_width": 0 if routed is None else routed.shape[2], "eps": reads["eps"],
        },
        {"num_warps": STREAMERS + 1},
        (2 if load > 4 else 3) * STREAMERS * 64 * 16 * load,  # two or three tasks in each pass
        loading=STREAMERS,
        kinds=2,  # gate-up and down
        together=True,
    )  # fmt: skip
    return value, result


def workgroups_of(device: torch.device) -> int:
    """The number of workgroups that the kernel is launched with, one for each compute unit."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return UNITS
