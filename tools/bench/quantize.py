"""Time the MXFP4 quantiser beside those of torchao and compressed-tensors, in one process.

Before the timing, their bytes are compared with ours: on the bfloat16 tensor that is timed, and on
groups with edge cases of the format. `giga_elements_s` counts 10^9 elements per second, and
`bfloat16_gb_s` the bytes of the bfloat16 tensor. "ours, decoded" is the dequantisation, which writes
that tensor.
"""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

from qwen35.cli import Parser, at_least_one
from qwen35.errors import InputError
from tools.bench import report
from weights.mxfp4 import GROUP, dequantize, quantize

Quantizer = Callable[[Tensor], tuple[Tensor, Tensor]]  # -> [N, K/2] and [N, K/32], uint8

EDGES = {
    "zeros": [0.0] * GROUP,
    "negative zeros": [1.0, -0.0] * 16,
    "ties": [x * s for x in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 4.0) for s in (1, -1)] * 2,
    "a carry": [1.75, -1.0] * 16,
    "2^-126": [2.0**-126] * GROUP,
    "2^127": [2.0**127] * GROUP,
    "an infinity": [math.inf] + [1.0] * 31,
    "a NaN": [math.nan] + [1.0] * 31,
}


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--rows", type=at_least_one, default=4096, metavar="N",
        help="quantise a tensor of N rows (default: 4096)")  # fmt: skip
    add("--columns", type=at_least_one, default=4096, metavar="K",
        help="let it have K columns, a multiple of 32 (default: 4096)")  # fmt: skip
    add("--repeats", type=at_least_one, default=5, metavar="R",
        help="time each quantiser R times (default: 5)")  # fmt: skip


def _torchao() -> Quantizer:
    """torchao's MX cast, with the same rule for the scale, which it calls EVEN."""
    try:
        from torchao.prototype.mx_formats.config import (  # pyright: ignore[reportMissingImports]
            ScaleCalculationMode,
        )
        from torchao.prototype.mx_formats.mx_tensor import (  # pyright: ignore[reportMissingImports]
            to_mx,
        )
    except ImportError as error:
        raise InputError(f"torchao cannot be imported ({error}); pip install torchao") from None

    def run(weight: Tensor) -> tuple[Tensor, Tensor]:
        elements, even = torch.float4_e2m1fn_x2, ScaleCalculationMode.EVEN
        scale, packed = to_mx(weight, elements, GROUP, even)
        return packed.view(torch.uint8), scale.view(torch.uint8)

    return run


def _compressed_tensors() -> Quantizer:
    """The MXFP4A16 preset of compressed-tensors. Its scales come from the minimum and maximum of
    each group."""
    try:
        from compressed_tensors.compressors import (  # pyright: ignore[reportMissingImports]
            MXFP4PackedCompressor,
        )
        from compressed_tensors.quantization import (  # pyright: ignore[reportMissingImports]
            preset_name_to_scheme,
        )
        from compressed_tensors.quantization.utils import (  # pyright: ignore[reportMissingImports]
            calculate_qparams,
        )
    except ImportError as error:
        raise InputError(
            f"compressed-tensors cannot be imported ({error}); pip install compressed-tensors"
        ) from None
    scheme = preset_name_to_scheme("MXFP4A16", ["Linear"])

    def run(weight: Tensor) -> tuple[Tensor, Tensor]:
        least, most = weight.unflatten(-1, (-1, GROUP)).aminmax(dim=-1)
        scale, _ = calculate_qparams(least, most, scheme.weights)
        state = {"weight": weight, "weight_scale": scale}
        packed = MXFP4PackedCompressor.compress(state, scheme)
        return packed["weight_packed"], packed["weight_scale"]

    return run


def _compared(theirs: Quantizer, weight: Tensor) -> report.Row:
    """The fractions of codes and scales that are equal to ours, and the edge cases that differ."""
    (packed, scale), (our_packed, our_scale) = theirs(weight), quantize(weight)
    low, high = (packed ^ our_packed) & 15, (packed ^ our_packed) >> 4
    differs = []
    for name, group in EDGES.items():
        edge = torch.tensor([group], dtype=weight.dtype)
        pairs = zip(theirs(edge), quantize(edge), strict=True)
        if not all(torch.equal(found, ours) for found, ours in pairs):
            differs.append(name)
    return {
        "equal_codes": (low.eq(0).double().mean() + high.eq(0).double().mean()).item() / 2,
        "equal_scales": scale.eq(our_scale).double().mean().item(),
        "differs_on": ", ".join(differs) or "nothing",
    }


def main(args: argparse.Namespace) -> int:
    peers = {"torchao": _torchao(), "compressed-tensors": _compressed_tensors()}
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(args.rows, args.columns, generator=generator)
    weight = weight.bfloat16()
    packed, scale = quantize(weight)
    compared = {name: _compared(theirs, weight) for name, theirs in peers.items()}
    runs: dict[str, Callable[[], object]] = {"ours": lambda: quantize(weight)}
    runs |= {name: lambda theirs=theirs: theirs(weight) for name, theirs in peers.items()}
    runs["ours, decoded"] = lambda: dequantize(packed, scale)
    rows: list[report.Row] = []
    for name, seconds in report.alternate(runs, args.repeats).items():
        row: report.Row = {"name": name} | report.spread(seconds)
        per_second = 1e-9 / (row["median_ms"] / 1e3)
        row["giga_elements_s"] = weight.numel() * per_second
        row["bfloat16_gb_s"] = weight.nbytes * per_second
        if name in peers:
            row["times_ours"] = row["median_ms"] / rows[0]["median_ms"]
            row |= compared[name]
        rows.append(row)
    config = {"rows": args.rows, "columns": args.columns, "repeats": args.repeats}
    report.emit("quantize", config, rows, only_json=args.json)
    return 0
