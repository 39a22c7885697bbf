"""`python -m tools.count`: count what the launches of a block of experts do on gfx950, without a GPU.

The block is a rank's part of a model, for a few rows that choose different experts, with random weights:
the router, the shared expert, and the experts that are hit. Each launch of the HIP kernels, and of
Triton's for the same work, is executed by the emulator (docs/emulator.md) as a card would run it, a
persistent kernel on all 256 compute units. The columns of the table are:

weights: bytes of weights that the launch needs, each once.
read, written: bytes that it reads and writes, counters included. A byte that two lanes read counts twice,
and there are no caches. So a launch reads more than its weights: most of the rest are activations, which
many workgroups read, and scales, which several lanes of a wave read.
valu: vector instructions of all waves, without matrix products.
weights_per_valu: bytes of weights for each of them, all phases of the launch included. A kernel needs 13
to keep up with the memory of an MI355X (tools/compile.py).
"""

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fast import hip_compiler
from fast.catalogue import PUBLISHED, moe_block, sliced
from fast.launch import Launch, Scratch
from fast.target import KERNELS, MAX_ROWS
from qwen35.cli import Parser, at_least_one, print_json, run
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.paths import unfit_triton
from qwen35.progress import steps
from qwen35.terminal import say
from tools.compile import is_valu
from tools.gfx950.target import emulate
from tools.table import aligned

TARGET = "gfx950"
# Arguments of a launch that are weights: those of all experts, [E, ...], and those of the shared expert.
# One with the name `weight` is of the first kind if it has three axes.
STACKED = ("gate_up", "gate_up_scale", "down", "down_scale", "scale")
WHOLE = ("shared_down", "shared_weight")
ONE = 127  # the e8m0 code of 1
SUMS: tuple[str, ...] = ("weights", "read", "written", "valu")

Row = dict[str, Any]


def build_parser() -> Parser:
    parser = Parser(
        "python -m tools.count",
        "Count the bytes and the instructions of the launches of one block of experts on gfx950, in the "
        "emulator, without a GPU.",
    )
    add = parser.add_argument
    add("--config", default=PUBLISHED, metavar="NAME",
        help=f"count for the model of this published size (default: {PUBLISHED})")  # fmt: skip
    add("--ranks", type=at_least_one, default=8, metavar="N",
        help="share each expert among N ranks, and count one rank's part (default: 8)")  # fmt: skip
    add("--rows", type=int, default=4, metavar="N",
        help=f"count a pass of N rows (tokens), 1 to {MAX_ROWS} (default: 4)")  # fmt: skip
    add("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS),
        help="count Triton's launches, the HIP kernels' or both (default: both)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON document")
    return parser


def launches_of(config: Config, rows: int, kernel: str) -> list[Launch]:
    """The launches of a block, whose rows choose experts 0, 1, 2, ...; only these have values."""
    E, k = config.num_experts, config.num_experts_per_tok
    block = moe_block(config, E, TARGET, kernel, torch.device("cpu"))
    hit = torch.arange(rows * k, dtype=torch.int32).view(rows, k) % E
    for name, weight in block.named_parameters():
        some = weight[: rows * k] if name.startswith("experts.") else weight
        if weight.is_floating_point():
            some.normal_(0, config.hidden_size**-0.5)
        else:
            some.fill_(ONE) if name.endswith("scale") else some.random_()
    x, scratch = torch.randn(rows, config.hidden_size).bfloat16(), Scratch(torch.device("cpu"))
    route, choice = block.gate.launch(x, scratch)
    assert block.shared_down is not None
    experts, _ = block.experts.launches(
        x, hit, torch.full((rows, k), 1 / k), scratch, shared=(choice.parts, block.shared_down)
    )
    return [route, *experts]


def weights_of(launch: Launch, hit: int) -> int:
    """Bytes of weights that a launch needs if `hit` experts are chosen."""
    total = 0
    for name, value in launch.arguments.items():
        if not isinstance(value, Tensor):
            continue
        if value.dim() == 3 and (name in STACKED or name == "weight"):
            total += value[:hit].nbytes
        elif value.dim() == 2 and (name in WHOLE or name == "weight"):
            total += value.nbytes
    return total


def rows_of(launches: list[Launch], hit: int, kernel: str) -> Iterator[Row]:
    """A row of the table for each launch, and one for all of them."""
    total: dict[str, int] = dict.fromkeys(SUMS, 0)
    for launch in launches:
        done = emulate([launch], races=False)
        counts = (
            weights_of(launch, hit), done.bytes_read, done.bytes_written,
            sum(n for name, n in done.by_mnemonic.items() if is_valu(name)),
        )  # fmt: skip
        row: dict[str, int] = dict(zip(SUMS, counts, strict=True))
        total = {name: total[name] + n for name, n in row.items()}
        yield _row(kernel, launch.name, row)
    yield _row(kernel, "all", total)


def _row(kernel: str, name: str, counts: dict[str, int]) -> Row:
    per_valu = round(counts["weights"] / counts["valu"], 1)
    return {"kernel": kernel, "launch": name, **counts, "weights_per_valu": per_valu}


@torch.inference_mode()
def main(args: argparse.Namespace) -> int:
    if line := unfit_triton():  # InputError where Triton is missing
        say(line)
    config = sliced(Config.published(args.config), args.ranks)
    if not config.num_experts:
        raise InputError(f"{args.config} has no experts")
    if not 1 <= args.rows <= MAX_ROWS:
        raise InputError(f"--rows {args.rows}; expected 1 to {MAX_ROWS}")
    if "hip" in args.kernel:
        hip_compiler.find()  # or InputError, before the first kernel has run
    hit = min(config.num_experts, args.rows * config.num_experts_per_tok)
    torch.manual_seed(0)
    started, rows = time.perf_counter(), []
    for kernel in steps(dict.fromkeys(args.kernel), "kernels"):
        rows += rows_of(launches_of(config, args.rows, kernel), hit, kernel)
    if args.json:
        settings = {"config": args.config, "ranks": args.ranks, "block_rows": args.rows}
        print_json(settings | {"hit": hit, "rows": rows})
        return 0
    cells = ([f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()] for row in rows)
    print("\n".join(aligned([[*rows[0]], *cells], left=2)))
    seconds = time.perf_counter() - started
    print(f"{args.rows} rows, {hit} experts hit, in {seconds:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run(build_parser(), main)
