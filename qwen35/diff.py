"""Which node of a model differs from the reference, and by how much, in units of bfloat16's own error.

Three sides compute the same ids: the *oracle* (the reference in float32 or float64), the *yardstick* (the
reference in bfloat16) and the *candidate*. A node passes when its largest error against the oracle is at
most twice the yardstick's, plus half a unit in the last place of its largest output.

    local   every node is given the oracle's inputs and state: an error stays where it is made
    free    each side goes on with what it computed itself: errors add up, as they do in use

One stage (the embedding, a layer, ...) of each side exists at a time: it is read, used and dropped.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qwen35.cache import Cache, KVCache
from qwen35.errors import InputError
from qwen35.judge import Judge, Report
from qwen35.load import Loader, Swaps
from qwen35.trace import nodes, recording
from reference.linear import DECODE_ROWS, GRID
from reference.model import Model
from reference.moe import Router

Mode = Literal["local", "free"]
# Fields of a config that size what a node is given or returns: both sides must agree on them.
SHAPE = (
    "num_hidden_layers", "hidden_size", "vocab_size", "layer_types", "num_experts",
    "num_attention_heads", "num_key_value_heads", "head_dim", "linear_num_key_heads",
    "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
    "linear_conv_kernel_dim", "intermediate_size", "moe_intermediate_size",
    "shared_expert_intermediate_size", "mtp_num_hidden_layers",
)  # fmt: skip
Calls = dict[str, tuple[Any, ...]]  # by node: what its forward was given
Pass = tuple[str, int, int]  # phase, first token, end


@torch.inference_mode()
def diff(
    reference: str | Path,
    ids: Sequence[int],
    *,
    candidate: str | Path | Model | dict[str, Tensor] | None = None,
    swaps: Swaps = (),
    dtype: torch.dtype | None = None,
    mode: Mode = "local",
    oracle_dtype: torch.dtype = torch.float32,
    decode: int = 6,
    stages: Callable[[str], bool] = lambda stage: True,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Report:
    """Compare a candidate with the reference of a checkpoint folder over `ids`, teacher-forced.

    candidate: a built model; another folder; a trace (node -> output of one pass over `ids`, compared
    free); None: the same folder in `dtype` with `swaps`. decode: how many of the last ids are decoded.
    stages: which are compared; those before the last of them are run, the rest is not.

    InputError for bad folders, other shapes than the reference's, and ids that the model cannot take.
    """
    oracle = Side(Loader(reference, dtype=oracle_dtype, device=device))
    yardstick = Side(Loader(reference, dtype=torch.bfloat16, device=device))
    sides = [oracle, yardstick]
    oracle.config.check_prompt(list(ids), new_tokens=0)
    plan = passes(len(ids), min(decode, len(ids) - 1))
    if isinstance(candidate, dict):
        mode, plan = "free", [("prefill", 0, len(ids))]
    elif isinstance(candidate, Model):
        sides.append(Side(candidate))
    else:
        folder = reference if candidate is None else candidate
        sides.append(Side(Loader(folder, dtype=dtype, device=device, swaps=swaps)))
    for name in SHAPE:
        ours, theirs = getattr(oracle.config, name), getattr(sides[-1].config, name)
        if ours != theirs:
            raise InputError(f"{name} is {ours} in the reference, {theirs} in the candidate")
    order = oracle.stages
    chosen = [name for name in order if stages(name)]
    if not chosen:
        raise InputError(f"no stage is chosen; there are {', '.join(order)}")
    run = order[: order.index(chosen[-1]) + 1]
    tokens = torch.tensor([list(ids)], device=device)
    streams = [Stream(side, tokens, plan) for side in sides]
    judge = Judge()
    for number, name in enumerate(run):
        if mode == "local":
            _local(streams, name, judge, compared=name in chosen)
        else:
            trace = candidate if isinstance(candidate, dict) else None
            _free(streams, name, judge, trace, compared=name in chosen)
        progress(number + 1, len(run))
    report = judge.report()
    if not report.rows:
        raise InputError(
            f"nothing to compare: the candidate has none of the nodes of {', '.join(chosen)}"
        )
    return report


def passes(tokens: int, decode: int) -> list[Pass]:
    """A prompt in two pieces on the 64-token grid and its tail; then the last `decode` tokens, one by
    one, and the very last four at once, as drafts are verified."""
    prompt = tokens - decode
    whole = prompt // GRID * GRID
    edges = sorted({0, whole // 2 // GRID * GRID, whole, prompt})
    together = DECODE_ROWS if decode > DECODE_ROWS else 1
    steps = [*range(prompt, tokens - together + 1), tokens] if decode else []
    prefill = [("prefill", first, end) for first, end in pairwise(edges)]
    return prefill + [("decode", first, end) for first, end in pairwise(steps)]


class Side:
    """One of the three: a checkpoint, of which a stage at a time is built, or a built model."""

    def __init__(self, source: Loader | Model) -> None:
        self.config = source.config
        self.source = source
        if isinstance(source, Model):
            if source.mtp is None:
                self.config = replace(self.config, mtp_num_hidden_layers=0)
            self.dtype = source.embed_tokens.weight.dtype
            self.stages: list[str] = []
        else:
            self.dtype, self.stages = source.dtype, source.stages

    def stage(self, name: str) -> nn.Module:
        is_model = isinstance(self.source, Model)
        return self.source.get_submodule(name) if is_model else self.source.stage(name)

    def states(self, stage: str, device: torch.device) -> list[Any]:
        """What a stage carries from pass to pass, in this side's dtypes: nothing, or one state."""
        cache = Cache.empty(self.config, self.dtype, device)
        if stage == "mtp":
            return [cache.mtp]
        return [cache.layers[int(stage.split(".")[1])]] if stage.startswith("layers.") else []


class Stream:
    """What one side has computed so far, pass by pass: the input of its next stage."""

    def __init__(self, side: Side, tokens: Tensor, plan: list[Pass]) -> None:
        self.side, self.tokens, self.plan = side, tokens, plan
        self.hidden: list[Tensor] = []
        self.embedded: list[Tensor] = []
        self.normed: list[Tensor] = []

    def inputs(self, stage: str) -> list[tuple[str, list[Tensor]]]:
        """Of each pass its phase and the arguments of a stage, but for the state. The MTP head takes the
        token that follows: its last pass is a row shorter, and is none without rows."""
        if stage == "embed_tokens":
            return [(phase, [self.tokens[:, first:end]]) for phase, first, end in self.plan]
        if stage != "mtp":
            return [(phase, [h]) for (phase, _, _), h in zip(self.plan, self.hidden, strict=True)]
        following = torch.cat(self.embedded, dim=1)[:, 1:]
        pairs = [
            (phase, [following[:, first:end], normed[:, : following.shape[1] - first]])
            for (phase, first, end), normed in zip(self.plan, self.normed, strict=True)
        ]
        return [(phase, pair) for phase, pair in pairs if pair[0].shape[1]]

    def advance(self, stage: str, outputs: list[Tensor]) -> None:
        if stage == "embed_tokens":
            self.embedded = outputs
        elif stage == "norm":
            self.normed = outputs
        if stage not in ("lm_head", "mtp"):
            self.hidden = outputs


def _local(streams: list[Stream], stage: str, judge: Judge, *, compared: bool) -> None:
    """Run the oracle's stage; then each of its nodes on all sides, with the oracle's inputs."""
    oracle, device = streams[0], streams[0].tokens.device
    sides = [stream.side for stream in (streams if compared else streams[:1])]
    modules = [side.stage(stage) for side in sides]
    states = [side.states(stage, device) for side in sides]
    outputs: list[Tensor] = []
    for phase, arguments in oracle.inputs(stage):
        before = [_copied(state) for state in states[0]]
        calls: list[Calls] = [{} for _ in sides]
        with _recorded_calls(stage, modules[0], calls[0]):
            outputs.append(modules[0](*arguments, *states[0]))
        for side, module, state, seen in list(zip(sides, modules, states, calls, strict=True))[1:]:
            # The stage as a whole, only to see with which dtypes each node is called on this side.
            own = [a.to(side.dtype) if a.is_floating_point() else a for a in arguments]
            with _recorded_calls(stage, module, seen):
                module(*own, *map(_like, before, state))
        for node in calls[0] if compared else ():
            if all(node in seen for seen in calls):
                given = [seen[node] for seen in calls]
                own_state = not any(_has_state(calls[0][n]) for n in calls[0] if _inside(n, node))
                _compare(modules, stage, node, phase, given, judge, with_state=own_state)
    oracle.advance(stage, outputs)


def _compare(
    modules: list[nn.Module],
    stage: str,
    node: str,
    phase: str,
    given: list[tuple[Any, ...]],
    judge: Judge,
    *,
    with_state: bool,
) -> None:
    """One node on all sides. The oracle's inputs are rounded to the yardstick's dtypes first, so that all
    sides are given the same values, each in its own dtypes."""
    inner = [m.get_submodule(node.removeprefix(stage).removeprefix(".")) for m in modules]
    rounded = [_like(value, kind) for value, kind in zip(given[0], given[1], strict=True)]
    results: list[Any] = []
    held: list[list[Any]] = []
    routed: list[list[tuple[Router, Tensor]]] = []
    for module, kinds in zip(inner, given, strict=True):
        arguments = [_copied(_like(v, kind)) for v, kind in zip(rounded, kinds, strict=True)]
        with _router_inputs(module) as seen:
            results.append(module(*arguments))
        held.append([argument for argument in arguments if is_dataclass(argument)])
        routed.append(seen)
    if not routed[0]:
        judge.add(node, "output", phase, results)
    else:
        router = routed[0][0][0]
        exact, rough = (probabilities(*seen[0]) for seen in routed[:2])  # [N, E]
        gap, unsure = _gaps(exact, rough, router.top_k)
        if inner[0] is router:
            judge.add_choice(node, phase, results, exact.shape[1], gap, unsure)
        else:
            judge.add(node, "output", phase, results, unsure)
    if with_state:
        for states in zip(*held, strict=True):
            for name, tensors in _state_tensors(states):
                judge.add(node, name, phase, tensors)


def _free(
    streams: list[Stream],
    stage: str,
    judge: Judge,
    trace: dict[str, Tensor] | None,
    *,
    compared: bool,
) -> None:
    """Run the stage on each side with what that side computed before; compare its nodes' outputs."""
    phases = [phase for phase, _ in streams[0].inputs(stage)]
    recorded: list[list[dict[str, Tensor]]] = []
    ended: list[list[Any]] = []
    for stream in streams:
        module = stream.side.stage(stage)
        states = stream.side.states(stage, stream.tokens.device)
        of_passes: list[dict[str, Tensor]] = []
        outputs: list[Tensor] = []
        for _, arguments in stream.inputs(stage):
            of_passes.append({})
            with recording(_nodes_of(stage, module), of_passes[-1]):
                outputs.append(module(*arguments, *states))
        stream.advance(stage, outputs)
        recorded.append(of_passes)
        ended.append(states)
    if not compared:
        return
    if trace is not None:
        recorded.append([trace])
    for phase, *of_sides in zip(phases, *recorded, strict=False):
        _compare_outputs(of_sides, phase, streams[0].side.config.num_experts, judge)
    if trace is None:
        for states in zip(*ended, strict=True):
            for name, tensors in _state_tensors(states):
                judge.add(stage, name, "after all", tensors)


def _compare_outputs(
    of_sides: list[dict[str, Tensor]], phase: str, experts: int, judge: Judge
) -> None:
    """All nodes of one pass, by name; a router gives two outputs, experts and weights."""
    for name in of_sides[0]:
        if not all(name in outputs for outputs in of_sides):
            continue
        results = [outputs[name] for outputs in of_sides]
        if results[2].numel() == results[0].numel():  # another library may not fold the same axes
            results[2] = results[2].reshape(results[0].shape)
        node, _, part = name.rpartition(".")
        if results[0].is_floating_point():
            if part == "1" and f"{node}.0" in of_sides[0]:
                continue
            judge.add(name, "output", phase, results)
        else:
            pairs = [(outputs[name], outputs[f"{node}.1"]) for outputs in of_sides]
            judge.add_choice(node, phase, pairs, experts)
        if name == "lm_head":
            judge.add_tokens(results[0], results[2])


def probabilities(router: Router, x: Tensor) -> Tensor:
    """Of all experts, [N, E] float64, as a router computes them from x [N, D]."""
    full = copy.copy(router)
    full.top_k = router.weight.shape[0]
    experts, weights = full.forward(x)
    return torch.zeros_like(weights, dtype=torch.float64).scatter_(1, experts, weights.double())


def _gaps(exact: Tensor, rough: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of each token [N]: how far the last chosen expert is from the next, and whether four times the
    yardstick's error could close that gap (a candidate may have twice that error, on both sides)."""
    ranked = exact.sort(dim=-1, descending=True).values
    chosen, following = ranked[:, k - 1], ranked[:, k : k + 1]
    gap = chosen - following[:, 0] if following.shape[1] else torch.full_like(chosen, torch.inf)
    return gap, gap <= 4 * (rough - exact).abs().amax(-1)


def _nodes_of(stage: str, module: nn.Module) -> dict[str, nn.Module]:
    """A stage and the nodes inside it, by their names in the model."""
    inner = nodes(module, "*") if next(module.children(), None) is not None else {}
    return {stage: module} | {f"{stage}.{name}": node for name, node in inner.items()}


@contextmanager
def _recorded_calls(stage: str, module: nn.Module, calls: Calls) -> Iterator[None]:
    """Keep what each node of a stage is given, states as they were before it ran."""

    def keep(name: str, arguments: tuple[Any, ...]) -> None:
        calls[name] = tuple(_copied(argument) for argument in arguments)

    handles = [
        m.register_forward_pre_hook(lambda _m, given, name=name: keep(name, given))  # pyright: ignore
        for name, m in _nodes_of(stage, module).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _router_inputs(module: nn.Module) -> Iterator[list[tuple[Router, Tensor]]]:
    """What the routers inside a node are given while the block runs."""
    seen: list[tuple[Router, Tensor]] = []
    routers = [m for m in module.modules() if isinstance(m, Router)]
    handles = [
        m.register_forward_pre_hook(lambda _m, given, m=m: seen.append((m, given[0])))  # pyright: ignore
        for m in routers
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _copied(value: Any) -> Any:
    """A state with buffers of its own; tensors are not written into, and stay."""
    return _like(value, value) if is_dataclass(value) else value


def _like(value: Any, kind: Any) -> Any:
    """A tensor in the dtype of another one; a state with its tensors in the dtypes of another one's.
    What a state keeps to take its last pass back is left out."""
    if isinstance(value, Tensor):
        return value.to(kind.dtype)
    if not is_dataclass(value):
        return value
    changed: dict[str, Any] = {}
    for name in (f.name for f in fields(value)):
        here, there = getattr(value, name), getattr(kind, name)
        if isinstance(here, Tensor):
            changed[name] = here.to(there.dtype, copy=True) if isinstance(there, Tensor) else None
        elif isinstance(here, list):
            changed[name] = []
    return replace(value, **changed)  # pyright: ignore[reportArgumentType] (an instance, not a class)


def _has_state(arguments: tuple[Any, ...]) -> bool:
    return any(is_dataclass(argument) for argument in arguments)


def _inside(node: str, outer: str) -> bool:
    return node.startswith(f"{outer}.")


def _state_tensors(states: tuple[Any, ...]) -> Iterator[tuple[str, list[Tensor]]]:
    """The tensors of one state on each side, by field: keys and values as far as they are filled."""
    if isinstance(states[0], KVCache):
        yield "k", [state.k[:, :, : state.length] for state in states]
        yield "v", [state.v[:, :, : state.length] for state in states]
    else:
        yield "conv", [state.conv for state in states]
        yield "recurrent", [state.recurrent for state in states]
