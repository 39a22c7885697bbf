"""`python -m tools.project`: estimate the time of a decode round on an MI355X, without a GPU.

A round is drafts, verification and acceptance, as in `tools.bench step`, of one rank's share of a model,
without the all-reduces between ranks. Each launch is compiled for gfx950, the emulator executes some of
its workgroups, and `tools.gfx950.timeline` estimates its time from their instructions. Weights are zeros,
which changes no time; the rows choose different experts.

The columns of the table are microseconds of one launch. `latency` is the time of a workgroup's loads,
waits and instructions, one after the other, times the rounds of workgroups that the grid needs. `issue`
is the time of all instructions on all SIMDs, `loads` that of all loaded bytes through the compute units,
and `memory` that of the bytes that must be moved, at the memory's bandwidth. `us` is the longest of these
four, plus what an empty launch costs; `limit` says which one it is. `all_us` is `us` times the number of
launches of this kind.

--measured FILE checks the model with a result of `python -m tools.bench step --json` on an H200. It adds
the time that the same kind of launch took there, and what the model says for an H200's clock, latency and
bandwidth. The H200 runs its own machine code, in configurations of its own, so the two differ where its
code waits less often. The measured time of a kind that runs once a round includes the cost of replaying a
graph.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fast import catalogue
from fast.catalogue import PUBLISHED
from fast.launch import Launch
from fast.step import Step
from qwen35.arguments import shown
from qwen35.cache import KV_CACHE_DTYPES
from qwen35.cli import Parser, at_least_one, at_least_zero, print_json, run
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.load import lay_out
from qwen35.paths import unfit_triton
from qwen35.progress import steps
from qwen35.reading import expected_object, read_json
from qwen35.terminal import say
from tools.bench.step import SIZES, TOKENS_A_ROUND, begin_at, moved
from tools.gfx950.timeline import H200, MI355X, Card, Executed, execute, launch_time
from tools.table import aligned

ROOM = 256  # positions behind the context
Row = dict[str, Any]


def build_parser() -> Parser:
    parser = Parser("python -m tools.project", __doc__ or "")
    add = parser.add_argument
    add("--config", default=PUBLISHED, metavar="NAME",
        help=f"estimate for the model of this published size (default: {PUBLISHED})")  # fmt: skip
    add("--tp", type=at_least_one, default=8, metavar="N",
        help="share the model among N ranks, and estimate one of them (default: 8)")  # fmt: skip
    add("--drafts", type=int, default=3, choices=range(len(TOKENS_A_ROUND)),
        help="draft so many tokens per round (default: 3)")  # fmt: skip
    add("--context", type=at_least_zero, default=10_000, metavar="T",
        help="begin the round after T tokens (default: 10,000)")  # fmt: skip
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto",
        help="store keys and values in the model's dtype (auto) or in e4m3 (fp8) (default: "
        "auto)")  # fmt: skip
    add("--load-ns", type=at_least_one, default=int(MI355X.load_ns), metavar="NS",
        help=f"let a load from memory take NS nanoseconds (default: {MI355X.load_ns:.0f})")  # fmt: skip
    add("--measured", type=Path, metavar="FILE",
        help="check the model with the times of an H200 in FILE, which `python -m tools.bench step "
        "--json` has printed")  # fmt: skip
    add("--json", action="store_true", help="print one JSON document")
    return parser


def step_of(config: Config, context: int, drafts: int, kv_cache_dtype: str) -> Step:
    """A step for gfx950 whose tensors have no memory. InputError for a config that no kernel takes."""
    meta = torch.device("meta")
    model = lay_out(replace(config, num_experts=1, num_experts_per_tok=1)).bfloat16()
    catalogue.fast(model, config, "gfx950", meta)
    model.kv_cache_dtype = kv_cache_dtype
    return Step(model, context + ROOM, drafts)


class Filled:
    """Gives tensors without memory some: zeros, which take none until something is written."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, Any]] = {}

    def __call__(self, value: Any) -> Any:
        """A tensor's twin on the CPU, which shares its memory with the twins of its views. A tuple's
        twins; anything else as it is."""
        if isinstance(value, tuple):
            return tuple(self(one) for one in value)
        if not isinstance(value, Tensor) or value.device.type != "meta":
            return value
        storage = value.untyped_storage()
        if storage._cdata not in self._held:
            zeros = torch.zeros(storage.nbytes(), dtype=torch.uint8)
            self._held[storage._cdata] = zeros, storage  # which keeps the number its own
        whole = self._held[storage._cdata][0].untyped_storage()
        empty = torch.empty(0, dtype=value.dtype)
        return empty.set_(whole, value.storage_offset(), value.shape, value.stride())

    def launch(self, launch: Launch) -> Launch:
        arguments = {name: self(value) for name, value in launch.arguments.items()}
        return replace(launch, arguments=arguments, reaches=self(launch.reaches))


def kinds_of(step: Step, context: int, experts: int) -> Iterator[tuple[Launch, int]]:
    """Each launch of a round that differs from the others, with memory, and how often it runs."""
    names = [one.name for one in step.work if isinstance(one, Launch)]
    fill = Filled()
    begin_at(fill(step.state.starts), fill(step.fresh), context)
    for launch in {one.name: one for one in step.work if isinstance(one, Launch)}.values():
        filled = fill.launch(launch)
        if (chosen := filled.arguments.get("experts")) is not None:
            chosen.copy_(torch.arange(chosen.numel()).view(chosen.shape) % experts)
        yield filled, names.count(launch.name)


def row_of(launch: Launch, often: int, done: Executed, size: float, card: Card) -> Row:
    """A row of the table. size: bytes that the launch must move."""
    found = launch_time(done, size, card)
    us = found.us + card.launch_us
    return {
        "name": launch.name, "launches": often, "workgroups": done.count, "of_a_unit": done.of_a_unit,
        **vars(found), "us": us, "limit": found.limit, "all_us": us * often,
    }  # fmt: skip


def measured(path: Path, args: argparse.Namespace) -> dict[str, float]:
    """Microseconds of a launch of each kind in a result of tools.bench step. InputError unless the file
    is one of an H200 of the same round."""
    told = read_json(path)
    try:
        ran, found = _read_result(told)
    except InputError as error:
        raise InputError(f"{path}: no result of tools.bench step --json: {error}") from None
    if "H200" not in str(told.get("device")):
        raise InputError(f"{path}: measured on {told.get('device')!r}; the model knows an H200")
    for name in ("config", "tp", "drafts", "context", "kv_cache_dtype"):
        there, here = ran.get(name), getattr(args, name)
        if there != here:
            raise InputError(f"{path}: {name} = {shown(there)}; this is a round of {shown(here)}")
    return found


def _read_result(told: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """The configuration, and the microseconds of a launch of each kind. InputError, with the key and its
    value, for a document of another shape."""
    told = expected_object(told)
    ran, rows = told.get("config"), told.get("rows")
    if not isinstance(ran, dict):
        raise InputError(f"config = {shown(ran)}; expected an object")
    if not isinstance(rows, list):
        raise InputError(f"rows = {shown(rows)}; expected a list")
    found: dict[str, float] = {}
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise InputError(f"rows[{i}] = {shown(row)}; expected an object with a name")
        if " " in row["name"]:
            continue  # a round by proportion
        for name in ("us", "launches"):
            value: Any = row.get(name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value < math.inf:
                raise InputError(f"rows[{i}]: {name} = {shown(value)}; expected a number above 0")
        found[row["name"]] = row["us"] / row["launches"]
    name = ran.get("config")
    return ran | {"config": SIZES.get(name, name) if isinstance(name, str) else name}, found


@torch.inference_mode()
def main(args: argparse.Namespace) -> int:
    if line := unfit_triton():  # InputError where Triton is missing
        say(line)
    there = {} if args.measured is None else measured(args.measured, args)
    config = catalogue.sliced(Config.published(args.config), args.tp)
    step = step_of(config, args.context, args.drafts, args.kv_cache_dtype)
    card = replace(MI355X, load_ns=args.load_ns)
    hit = min(config.num_experts, (1 + args.drafts) * config.num_experts_per_tok)
    rows: list[Row] = []
    for launch, often in steps(list(kinds_of(step, args.context, config.num_experts)), "launches"):
        done, size = execute(launch), moved(launch, hit, args.context)
        row = row_of(launch, often, done, size, card)
        if (us := there.get(launch.name.split()[0])) is not None:
            here = launch_time(done, size, H200).us + H200.launch_us
            row |= {"h200_us": us, "model_h200_us": here, "model_to_measured": here / us}
        rows.append(row)
    round_us = sum(row["all_us"] for row in rows)
    floor_us = sum(row["memory"] * row["launches"] for row in rows)
    whole = {
        "launches": sum(row["launches"] for row in rows), "us": round_us, "floor_us": floor_us,
        "share_of_read": floor_us / round_us,
        "tokens_per_s": TOKENS_A_ROUND[args.drafts] / round_us * 1e6,
    }  # fmt: skip
    if args.json:
        names = ("config", "tp", "drafts", "context", "kv_cache_dtype", "load_ns")
        print_json({name: getattr(args, name) for name in names} | {"round": whole, "rows": rows})
        return 0
    _show(sorted(rows, key=lambda row: -row["all_us"]))
    print(
        f"a round: {round_us:.0f} us in {whole['launches']} launches, "
        f"{whole['share_of_read']:.0%} of the bandwidth; a projection, not measured: "
        f"{whole['tokens_per_s']:.0f} tokens/s"
    )
    if checked := [row for row in rows if "h200_us" in row]:
        ratios = [row["model_to_measured"] for row in checked]
        error = math.exp(sum(abs(math.log(ratio)) for ratio in ratios) / len(ratios))
        model, there_us = (
            sum(row[name] * row["launches"] for row in checked)
            for name in ("model_h200_us", "h200_us")
        )
        print(
            f"the model of an H200: {min(ratios):.2f} to {max(ratios):.2f} of the measured times, a "
            f"factor of {error:.2f} on average; all launches {model:.0f} us, measured {there_us:.0f}"
        )
    return 0


def _show(rows: list[Row]) -> None:
    """Print the rows as a table."""
    columns = list({name: None for row in rows for name in row})
    cells = [[_cell(row.get(name, "")) for name in columns] for row in rows]
    print("\n".join(aligned([columns, *cells], left=1)))


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run(build_parser(), main)
