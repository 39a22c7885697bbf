"""Time a whole decode round on a GPU, with random weights.

A round is drafts, verification and acceptance in one captured graph. --config chooses the shape:
397b, 122b, 35b, or tiny (the embedded model). With --tp it is one rank's slice, without the
all-reduces between ranks. `torchrun --nproc-per-node N -m tools.bench step --tp N` runs N ranks
with them; all have the same weights, and rank 0 prints its figures. Routed experts are MXFP4,
everything else is bf16. The router's weights are random, so the rows choose different experts; the
distinct experts are counted. `--layers N` builds only N layers of the trunk, for GPUs without the
memory for all. The time of a layer is then the difference that the last N / 2 layers make, divided
by N / 2, and is added for each missing layer.

`floor_us` is the time to read the weights, states and context once at `read_gb_s`. This is the
bandwidth of a sum over 8 GiB in the same run. The row `round` is a replay of the graph. Each other
row is a graph with the launches of one kind alone, in all layers. `tokens_per_s` is a projection:
published numbers of tokens per round, divided by the time of a round.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fast.catalogue import sliced
from fast.launch import Launch
from fast.layer import DecoderLayer
from fast.moe import Experts
from fast.mtp import MTP
from fast.step import Step, Work
from fast.target import KERNELS, target_of
from qwen35.cache import KV_CACHE_DTYPES
from qwen35.cli import Parser, at_least_one, at_least_zero, output_file
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.load import TINY, lay_out
from qwen35.parallel.nodes import Summed
from qwen35.parallel.ranks import ALONE, Ranks, group, started_by_torchrun
from qwen35.progress import steps
from reference.model import Model
from tools.bench import gpu, report
from weights.storage import write_whole

# Mean tokens per round with 0 to 3 drafts, as published for Qwen3.5-397B-A17B in NVFP4, with
# thinking, on SPEED-Bench's coding prompts (SemiAnalysisAI/InferenceX,
# golden_al_distribution/qwen3.5_mtp.yaml).
TOKENS_A_ROUND = (1.0, 1.93, 2.73, 3.39)
SIZES = {"397b": "397B-A17B", "35b": "35B-A3B", "122b": "122B-A10B"}
FP4_BYTES = 17 / 32  # per weight, with its share of a scale


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--config", choices=[*SIZES, "tiny"], default="397b",
        help="time a model of this size, with random weights (default: 397b)")  # fmt: skip
    add("--tp", type=at_least_one, default=8, metavar="N",
        help="share the model among N ranks, and time one of them (default: 8)")  # fmt: skip
    add("--layers", type=at_least_one, metavar="N",
        help="build only N layers of the trunk, a multiple of 8 (default: all)")  # fmt: skip
    add("--drafts", type=int, default=3, choices=range(len(TOKENS_A_ROUND)),
        help="draft so many tokens per round (default: 3)")  # fmt: skip
    add("--context", type=at_least_zero, default=10_000, metavar="T",
        help="begin the round after T tokens (default: 10,000)")  # fmt: skip
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto",
        help="store keys and values in the model's dtype (auto) or in e4m3 (fp8) (default: "
        "auto)")  # fmt: skip
    add("--moe-kernel", choices=KERNELS, default="triton",
        help="compute experts and routers with Triton's kernels, or on an MI355X with HIP kernels "
        "(default: triton)")  # fmt: skip
    add("--repeats", type=at_least_one, default=30, metavar="R",
        help="time R replays of each graph, in each pass (default: 30)")  # fmt: skip
    add("--no-nodes", action="store_true", help="time only the whole round")
    add("--plot", type=output_file, metavar="FILE",
        help="also draw into FILE, as SVG, where the time goes")  # fmt: skip


def share_of(name: str, ranks: int) -> Config:
    """The config of one rank's slice of the model that --config names. InputError if it cannot be
    sliced."""
    tiny = TINY / "config.json"
    whole = Config.from_file(tiny) if name == "tiny" else Config.published(SIZES[name])
    return sliced(whole, ranks)


def random_model(
    config: Config, device: torch.device, ranks: Ranks = ALONE, moe_kernel: str = "triton"
) -> Model:
    """A model of fast layers with random weights. It is built on the device, layer by layer.

    ranks: the group of which this is one rank; its layers then exchange their results. moe_kernel: as in
    `qwen35.load.load`.
    """
    return _Builder(config, device, ranks, moe_kernel).model()


def begun(step: Step, context: int) -> Step:
    """Give a step a random state after `context` tokens. Returns the step."""
    generator = torch.Generator(step.table.device).manual_seed(1)
    for state in (*step.state.layers, step.state.mtp):
        for tensor in vars(state).values() if state is not None else ():
            if tensor.dtype == torch.uint8:  # scales of keys and values
                tensor.fill_(127)
            else:
                random = torch.randn(tensor.shape, generator=generator, device=tensor.device)
                tensor.copy_(random)
    step.hidden.normal_(generator=generator)
    for ids in (step.rows_ids, step.picked):
        ids.random_(0, step.vocab, generator=generator)
    begin_at(step.state.starts, step.fresh, context)
    return step


class _Builder:
    """Builds the fast modules of a config with random weights, one by one on the device."""

    def __init__(self, config: Config, device: torch.device, ranks: Ranks, moe_kernel: str) -> None:
        self.config, self.device, self.ranks, self.kernel = config, device, ranks, moe_kernel
        self.generator = torch.Generator(device).manual_seed(0)

    def model(self) -> Model:
        model = lay_out(self.config)
        for name in ("embed_tokens", "norm", "lm_head"):
            self._fill(model.get_submodule(name))
        for i, layer in enumerate(steps(model.layers, "layers built")):
            model.layers[i] = DecoderLayer.from_reference(self._layer(layer), kernel=self.kernel)
        if model.mtp is not None:
            model.mtp.layers[0] = self._layer(model.mtp.layers[0])
            self._fill(model.mtp)
            model.mtp = MTP.from_reference(  # pyright: ignore (a fast one replaces it)
                model.mtp, kernel=self.kernel
            )
        return model.eval()

    def _layer(self, layer: Any) -> Any:
        config = self.config
        if config.num_experts:
            I = config.moe_intermediate_size
            target = target_of(self.device)
            sizes = config.num_experts, config.hidden_size, I
            experts = Experts(*sizes, target, self.device, kernel=self.kernel)
            for codes in (experts.gate_up, experts.down):
                codes.random_(0, 256, generator=self.generator)
            for scale, K in ((experts.gate_up_scale, config.hidden_size), (experts.down_scale, I)):
                exponent = 125 - (K.bit_length() - 1) // 2  # weights of about K^-1/2
                scale.random_(exponent - 1, exponent + 2, generator=self.generator)
            layer.mlp.experts = experts
        self._fill(layer)
        mixer = "linear_attn" if layer.is_linear else "self_attn"
        for name in (mixer, "mlp") if self.ranks.size > 1 else ():
            setattr(layer, name, Summed(getattr(layer, name), self.ranks))
        return layer

    def _fill(self, module: nn.Module) -> None:
        """Replace the meta parameters of a module by random ones."""
        for part in list(module.modules()):
            for name, parameter in list(part.named_parameters(recurse=False)):
                if parameter.device.type != "meta":
                    continue
                wide = name in ("A_log", "dt_bias")
                size = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
                value = torch.empty(parameter.shape, device=self.device)
                value.normal_(generator=self.generator).mul_(size)
                value = value if wide else value.bfloat16()
                setattr(part, name, nn.Parameter(value, requires_grad=False))


def moved(launch: Launch, hit: int, context: int) -> float:
    """The minimum of bytes that a launch moves: weights, states, keys and values. hit: the number
    of distinct experts in this layer."""
    a, kind = launch.arguments, launch.name.split()[0]
    weight = FP4_BYTES if a.get("FP4") else 2.0
    if kind == "gate_up":
        return hit * 2 * a["I"] * a["D"] * weight
    if kind == "down":
        return hit * a["D"] * a["I"] * weight + 2 * a["D"] * a["SHARED_I"]
    if kind == "experts":  # in HIP
        names = "gate_up", "gate_up_scale", "down", "down_scale"
        shared = a["shared_down"]
        return hit * sum(a[n][0].nbytes for n in names) + (0 if shared is None else shared.nbytes)
    if kind == "delta":
        return 2 * 4 * a["HV"] * a["K"] * a["V"]  # the state, read and written
    if kind == "attend":
        return 2 * a["keys"].element_size() * a["G"] * a["K"] * context
    if "weight" in a and kind not in ("norm", "mtp_input"):
        return 2.0 * a["weight"].numel()
    return 0.0


def experts_hit(work: Sequence[Work]) -> dict[int, int]:
    """Run the work once. Returns the number of distinct experts of each launch, by its index in the
    work."""
    found: dict[int, int] = {}
    for place, one in enumerate(work):
        one()
        if isinstance(one, Launch) and "experts" in one.arguments:
            found[place] = len(one.arguments["experts"].unique())
    return found


def passes(step: Step, work: Sequence[Work], repeats: int, context: int) -> tuple[list[float], ...]:
    """The microseconds of the work in a graph, in two passes that begin at the same position."""
    graph = gpu.Graph([lambda: [one() for one in work]])
    both = []
    for _ in range(2):
        begin_at(step.state.starts, step.fresh, context)
        both.append(graph.microseconds(repeats))
    return both[0], both[1]


def begin_at(starts: Tensor, fresh: Tensor, context: int) -> None:
    """Make the next round begin at position `context`, behind one new token. starts, fresh: a state's and
    its step's."""
    begin = [context, context - 1, *range(context, context + len(starts))]
    starts.copy_(torch.tensor(begin[: len(starts)], dtype=torch.int32))
    fresh.fill_(1)


def kinds(work: Sequence[Work]) -> dict[str, list[int]]:
    """The indices of the launches of each kind."""
    found: dict[str, list[int]] = defaultdict(list)
    for place, one in enumerate(work):
        if isinstance(one, Launch):
            found[one.name.split()[0]].append(place)
    return found


def main(args: argparse.Namespace) -> int:
    if args.plot:
        _check_plot(args)
    size = started_by_torchrun()
    if size == 1:
        return _run(args, ALONE)
    args.device = torch.device("cuda")
    with group("python -m tools.bench step", size, args) as ranks:
        return _run(args, ranks)


def _run(args: argparse.Namespace, ranks: Ranks) -> int:
    device, target = gpu.find(args.moe_kernel)
    whole = share_of(args.config, args.tp)
    count = args.layers or whole.num_hidden_layers
    if count != whole.num_hidden_layers and (count % 8 or not 0 < count < whole.num_hidden_layers):
        raise InputError(
            f"--layers {count}; expected a multiple of 8 below {whole.num_hidden_layers}"
        )
    config = replace(whole, num_hidden_layers=count, layer_types=whole.layer_types[:count])
    read = gpu.read_gb_s(device)
    with torch.inference_mode():
        return _measured(args, config, whole.num_hidden_layers, device, target, read, ranks)


def _measured(
    args: argparse.Namespace,
    config: Config,
    layers: int,
    device: torch.device,
    target: str,
    read: float,
    ranks: Ranks,
) -> int:
    model = random_model(config, device, ranks, args.moe_kernel)
    model.kv_cache_dtype = args.kv_cache_dtype
    room = args.context + 8 * (args.repeats + 20) * (1 + args.drafts)
    step = begun(Step(model, room, args.drafts), args.context)
    hit = experts_hit(step.work)

    def bytes_of(places: Sequence[int]) -> float:
        return sum(
            moved(one, hit.get(p, 0), args.context)
            for p in places
            if isinstance(one := step.work[p], Launch)
        )

    every = list(range(len(step.work)))
    first, second = passes(step, step.work, args.repeats, args.context)
    total = bytes_of(every)
    rows: list[report.Row] = [
        {"name": "round", "layers": config.num_hidden_layers, "launches": len(step.work)}
        | gpu.figures(first, second, total, read)
    ]
    if config.num_hidden_layers < layers:
        rows.append(_whole(step, args, config.num_hidden_layers, layers, rows[0], bytes_of, read))
    us = rows[-1]["us"]
    rows[-1]["tokens_per_s"] = TOKENS_A_ROUND[args.drafts] / us * 1e6
    rows[-1]["experts_hit"] = statistics.mean(hit.values()) if hit else 0.0
    if not args.no_nodes:
        for kind, places in kinds(step.work).items():
            first, second = passes(step, [step.work[p] for p in places], args.repeats, args.context)
            rows.append(
                {"name": kind, "layers": config.num_hidden_layers, "launches": len(places)}
                | gpu.figures(first, second, bytes_of(places), read)
            )
    names = ("config", "tp", "drafts", "context", "kv_cache_dtype", "moe_kernel", "repeats")
    report.emit(
        "step", {"target": target, "ranks": ranks.size} | {n: getattr(args, n) for n in names}, rows,
        only_json=args.json, device=torch.cuda.get_device_name(device), read_gb_s=read,
    )  # fmt: skip
    if args.plot and ranks.rank == 0:
        _draw(args.plot, rows)
    return 0


def _check_plot(args: argparse.Namespace) -> None:
    """InputError if there will be nothing to draw, or no place for it."""
    if args.no_nodes:
        raise InputError(
            f"--plot {args.plot} draws the times of nodes, which --no-nodes leaves out"
        )


def _whole(
    step: Step, args: argparse.Namespace, built: int, layers: int, row: report.Row,
    bytes_of: Callable[[Sequence[int]], float], read: float,
) -> report.Row:  # fmt: skip
    """The projected row of a round of all layers. Each missing layer costs as much as the mean of
    the second half of the built ones."""
    begins = [
        p for p, one in enumerate(step.work)
        if isinstance(one, Launch) and one.name.split()[0] in ("delta_in", "attention_in")
    ]  # fmt: skip
    own = begins[len(begins) - built :]
    half = range(own[built // 2], _end(step.work, own[-1]))
    without = [one for p, one in enumerate(step.work) if p not in half]
    shorter = statistics.median(passes(step, without, args.repeats, args.context)[0])
    each = (row["us"] - shorter) / (built // 2)
    each_bytes = bytes_of(list(half)) / (built // 2)
    us = row["us"] + each * (layers - built)
    total = bytes_of(list(range(len(step.work)))) + each_bytes * (layers - built)
    floor = total / read * 1e-3
    return {
        "name": "round of all layers, by proportion", "layers": layers, "us": us, "floor_us": floor,
        "gb_s": total / us * 1e-3, "share_of_read": floor / us,
    }  # fmt: skip


def _end(work: Sequence[Work], begin: int) -> int:
    """The index after the last launch of the layer that begins at `begin`."""
    is_summed = any(isinstance(one, Launch) and one.name.startswith("allreduce") for one in work)
    for place in range(begin, len(work)):
        one = work[place]
        if isinstance(one, Launch) and one.name.split()[0] in ("down", "mlp_down"):
            return place + 1 + is_summed
    raise AssertionError("a layer ends with its feed-forward")


def _draw(path: Path, rows: Sequence[report.Row]) -> None:
    """Draw a bar chart of the microseconds per round by kind. The dark part of a bar is its
    floor_us."""
    bars = sorted((r for r in rows if not r["name"].startswith("round")), key=lambda r: -r["us"])
    longest = max(row["us"] for row in bars)
    lines = []
    for i, row in enumerate(bars):
        y, scale = 30 + 22 * i, 480 / longest
        lines += [
            f'<text x="150" y="{y + 13}" text-anchor="end">{row["name"]}</text>',
            f'<rect x="160" y="{y}" width="{row["us"] * scale:.1f}" height="16" fill="#9bbcd9"/>',
            f'<rect x="160" y="{y}" width="{row["floor_us"] * scale:.1f}" height="16" fill="#1f5f99"/>',
            f'<text x="{168 + row["us"] * scale:.0f}" y="{y + 13}">{row["us"]:.0f} us</text>',
        ]
    title = (
        '<text x="160" y="18">microseconds a round by node; dark: the time to read its bytes</text>'
    )
    write_whole(
        path,
        f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{40 + 22 * len(bars)}" '
        f'font-family="sans-serif" font-size="12">{title}{"".join(lines)}</svg>\n',
    )
