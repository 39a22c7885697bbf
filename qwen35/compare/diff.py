"""Compares a model with the reference node by node, in units of bfloat16's own error.

Three sides compute the same ids: the *oracle* (the reference in float32 or float64), the
*yardstick* (the reference in bfloat16) and the *candidate*. `qwen35/compare/judge.py` says when a
node passes.

    local   every node gets the oracle's inputs and state, so an error shows only in its own node
    free    each side uses its own results, so errors accumulate as in real use. Only the experts
            are the candidate's on all sides, so that a choice that rounding flipped is counted at
            its router and does not affect later nodes

Only one stage (the embedding, a layer, ...) of each side exists at a time. It is read, used and
dropped.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen35.arguments import checked, shown
from qwen35.cache import Cache, State
from qwen35.compare.judge import MODES, Judge, Mode, Report
from qwen35.compare.trace import prompt_ids
from qwen35.errors import InputError
from qwen35.load import Loader, Swaps, locate
from qwen35.node_error import blaming, check_alike
from qwen35.parallel.nodes import Joined
from qwen35.parallel.ranks import ALONE, Ranks
from qwen35.parallel.states import Parts
from qwen35.swap import nodes, replaced
from reference.linear import DECODE_ROWS, GRID, linear
from reference.model import Model
from reference.moe import Router

Pass = tuple[str, int, int]  # phase, first token, end


@dataclass
class Call:
    """The arguments of a node (with states as they were before it ran), and its result."""

    given: tuple[Any, ...]
    result: Any = None


Calls = dict[str, Call]


@torch.inference_mode()
def diff(
    reference: str | Path | Model,
    ids: Sequence[int] | Tensor | str,
    *,
    candidate: str | Path | Model | dict[str, Tensor] | None = None,
    swaps: Swaps = (),
    dtype: torch.dtype | str | None = None,
    mode: Mode = "local",
    oracle_dtype: torch.dtype | str = torch.float32,
    decode: int = 6,
    stages: Callable[[str], bool] | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], object] | None = None,
    ranks: Ranks = ALONE,
) -> Report:
    """Compare a candidate with the reference of a checkpoint over `ids` or a text, teacher-forced.

    reference: a folder, a hub id, or "tiny". A model from `load` is taken as the candidate, and its
        folder as the reference.
    candidate (`--against`): a model from `load`, another checkpoint, or a trace (node -> output of one
        pass over `ids`), which is compared in the mode free. None is the reference's checkpoint, with
        `swaps` and in `dtype`.
    swaps, dtype: of a candidate that is loaded here, as in `load`.
    mode: "local" or "free", see the module.
    oracle_dtype: float32 or float64.
    decode: the number of ids, at the end, that are decoded.
    stages: a function that says by name which stages (embed_tokens, layers.0, ..., norm, lm_head, mtp)
        are compared. None: all. Stages before the last of them run too.
    device: where all sides run. None: the device of a model from `load`, or the CPU.
    progress: called with the number of stages that are done, and of all.
    ranks: the group over which a candidate that is a folder is cut. Every rank calls this function and
        gets the report. Inside a node whose results the ranks add up, only the router is compared.

    A report is true if it has passed. InputError for bad folders, other shapes than the reference's,
    and ids that the model cannot take. NodeError for a swapped node that fails, or that returns another
    shape or kind of numbers.
    """
    if mode not in MODES:
        raise InputError(f"mode = {shown(mode)}; expected {' or '.join(MODES)}")
    if checked("decode", decode, int) < 0:
        raise InputError(f"decode = {decode}; expected an integer >= 0")
    if stages is not None and not callable(stages):
        raise InputError(f"stages = {shown(stages)}; expected a function of a stage's name")
    if progress is not None and not callable(progress):
        raise InputError(f"progress = {shown(progress)}; expected a function of two numbers")
    if isinstance(reference, Model):
        if candidate is not None or reference.folder is None:
            raise InputError("reference is a built model; expected 'tiny', a folder or a hub id")
        reference, candidate = reference.folder, reference
    if isinstance(candidate, Model | dict) and (swaps or dtype is not None):
        raise InputError("swaps and dtype are of a candidate that is loaded; this one is built")
    if device is None:
        is_built = isinstance(candidate, Model)
        device = candidate.embed_tokens.weight.device if is_built else "cpu"
    folder = locate(reference)
    ids = prompt_ids(ids, folder)
    oracle = Loader(folder, dtype=oracle_dtype, device=device)
    oracle.config.check_prompt(ids, new_tokens=0)
    sources: list[Loader | Model | dict[str, Tensor]] = [oracle]
    sources.append(Loader(folder, dtype=torch.bfloat16, device=device))
    if isinstance(candidate, Model | dict):
        sources.append(candidate)
    else:
        other = locate(candidate, ranks) if candidate is not None else folder
        sources.append(Loader(other, dtype=dtype, device=device, swaps=swaps, ranks=ranks))
    plan = passes(len(ids), min(decode, len(ids) - 1))
    if isinstance(candidate, dict):
        mode, plan = "free", [("prefill", 0, len(ids))]
    sides = [Side(source, torch.tensor([ids], device=device), plan) for source in sources]
    oracle.config.check_same_shape(sides[2].whole or oracle.config)
    chosen = [name for name in oracle.stages if stages is None or stages(name)]
    if not chosen:
        raise InputError(f"no stage is chosen; there are {', '.join(oracle.stages)}")
    judge = Judge(mode, oracle.config.num_experts)
    last = oracle.stages.index(chosen[-1]) + 1
    for number, name in enumerate(oracle.stages[:last]):
        run_stage(name, sides, judge, compared=name in chosen)
        if progress is not None:
            progress(number + 1, last)
    report = judge.report()
    report.swapped = swapped_nodes(sources[2])
    if not report.rows:
        raise InputError(f"the candidate has none of the nodes of {', '.join(chosen)}")
    return report


def swapped_nodes(source: Loader | Model | dict[str, Tensor]) -> dict[str, str]:
    """The swapped nodes of a candidate: name -> `module:class`."""
    if isinstance(source, Loader):
        kinds = dict(source.swaps)
        return {
            node: f"{kind.__module__}:{getattr(kind, '__qualname__', '')}"
            for node, kind in kinds.items()
        }
    named = replaced(source) if isinstance(source, Model) else []
    return dict(text.split("=", 1) for text in named)


def passes(tokens: int, decode: int) -> list[Pass]:
    """The passes of a comparison. The prompt has two pieces on the 64-token grid, and its tail. The
    last `decode` tokens follow one by one. If there are more than four, the last four are one pass,
    as in the verification of drafts."""
    prompt = tokens - decode
    whole = prompt // GRID * GRID
    edges = sorted({0, whole // 2 // GRID * GRID, whole, prompt})
    together = DECODE_ROWS if decode > DECODE_ROWS else 1
    steps = [*range(prompt, tokens - together + 1), tokens] if decode else []
    prefill = [("prefill", first, end) for first, end in pairwise(edges)]
    return prefill + [("decode", first, end) for first, end in pairwise(steps)]


class Side:
    """One of the three sides, with its results so far, pass by pass. The source is a checkpoint
    (built stage by stage), a built model, or a trace."""

    def __init__(
        self, source: Loader | Model | dict[str, Tensor], tokens: Tensor, plan: list[Pass]
    ) -> None:
        self.source, self.tokens, self.plan = source, tokens, plan
        self.config = None if isinstance(source, dict) else source.config
        self.whole, self.parts = self.config, None
        if isinstance(source, Loader) and source.ranks.size > 1:
            self.whole, self.parts = source.whole, Parts(source.plan, source.ranks)
        self.outputs: dict[str, list[Tensor]] = {}  # of the stages that a later one needs

    def stage(self, name: str) -> tuple[nn.Module, list[Any]]:
        """A stage, and a list with its state, which is empty if it has none."""
        assert self.config is not None and not isinstance(self.source, dict)
        source = self.source
        module = source.get_submodule(name) if isinstance(source, Model) else source.stage(name)
        cache = Cache.empty(self.config, source.dtype, self.tokens.device)
        if name == "mtp":
            return module, [cache.mtp]
        is_layer = name.startswith("layers.")
        return module, [cache.layers[int(name.removeprefix("layers."))]] if is_layer else []

    def held(self, state: State, like: State) -> State:
        """A copy of this side's part of a whole state, in this side's dtypes."""
        own = state if self.parts is None else self.parts.cut(state)
        return own.copy(like=like)  # pyright: ignore (of the same kind)

    def shown(self, state: State) -> State:
        """The whole state, joined from the parts of the ranks."""
        return state if self.parts is None else self.parts.join(state)

    def inputs(self, stage: str) -> list[list[Tensor]]:
        """The arguments of a stage in each pass, without the state. The MTP head takes the next
        tokens, so its last pass is one row shorter, and is left out if no row remains."""
        if stage == "embed_tokens":
            return [[self.tokens[:, first:end]] for _, first, end in self.plan]
        if stage != "mtp":
            return [[hidden] for hidden in self.outputs["hidden"]]
        following = torch.cat(self.outputs["embed_tokens"], dim=1)[:, 1:]
        pairs = [
            [following[:, first:end], normed[:, : following.shape[1] - first]]
            for (_, first, end), normed in zip(self.plan, self.outputs["norm"], strict=True)
        ]
        return [pair for pair in pairs if pair[0].shape[1]]

    def advance(self, stage: str, outputs: list[Tensor]) -> None:
        if stage in ("embed_tokens", "norm"):
            self.outputs[stage] = outputs
        if stage not in ("lm_head", "mtp"):
            self.outputs["hidden"] = outputs

    def traced(self, stage: str, module: nn.Module) -> Calls:
        """The calls of a stage's nodes, from a trace."""
        assert isinstance(self.source, dict)
        calls: Calls = {}
        for node, m in _nodes_of(stage, module).items():
            if node in self.source:
                calls[node] = Call((), self.source[node].to(self.tokens.device))
            elif isinstance(m, Router) and f"{node}.1" in self.source:
                parts = [self.source[f"{node}.{i}"] for i in range(2)]
                chosen, weights = (part.to(self.tokens.device) for part in parts)
                if chosen.numel() and not 0 <= chosen.min() <= chosen.max() < len(m.weight):
                    span = f"{int(chosen.min())} to {int(chosen.max())}"
                    raise InputError(f"trace: {node} chose experts {span} of {len(m.weight)}")
                calls[node] = Call((), (chosen, weights))
        return calls


def run_stage(stage: str, sides: list[Side], judge: Judge, *, compared: bool) -> None:
    """Run one stage, pass by pass, on the sides that need it, and compare its nodes."""
    free = judge.mode == "free"
    running = [s for s in (sides if free or compared else sides[:1]) if s.config is not None]
    modules, states = zip(*(side.stage(stage) for side in running), strict=True)
    arguments = [side.inputs(stage) for side in (running if free else sides[:1])]
    outputs: list[list[Tensor]] = [[] for _ in running]
    named = [_nodes_of(stage, module) for module in modules]
    # Local: the oracle is first, because its results show the form that a node has to return. Free: the
    # candidate is first, because the others take its experts.
    order = list(range(len(running)))[:: -1 if free else 1]
    for number, (phase, first, _) in enumerate(sides[0].plan[: len(arguments[0])]):
        span = first, first + arguments[0][number][0].shape[1]
        before = [state.copy() for state in states[0]]
        calls: list[Calls] = [{} for _ in running]
        if free and running != sides:
            calls.append(sides[2].traced(stage, modules[0]))
        with blaming(modules[-1], stage):
            for i in order:
                given, own = arguments[i if free else 0][number], states[i]
                if not free and i:  # only to see with which dtypes this side calls each node
                    given = [_like(a, running[i].source) for a in given]
                    own = [running[i].held(*pair) for pair in zip(before, own, strict=True)]
                held = calls[2] if free and i < 2 else {}
                with observed(named[i], calls[i], held, like=calls[0] if i == 2 else {}):
                    outputs[i].append(modules[i](*given, *own))
            if free and running == sides:
                check_returns(named[2], calls[2], calls[0])
            if compared:
                compare(running, named, calls, phase, span, judge)
    for side, own in zip(running if free else sides[:1], outputs, strict=False):
        side.advance(stage, own)
    if compared and free and running == sides:
        whole = 0, sides[0].plan[-1][2]
        for ended in zip(*states, strict=True):
            shown = [side.shown(state) for side, state in zip(sides, ended, strict=True)]
            judge.add_states(stage, "after all", shown, whole)


def check_returns(nodes_: dict[str, nn.Module], calls: Calls, expected: Calls) -> None:
    """NodeError for the first swapped node whose output has another form than the oracle's."""
    for node, call in calls.items():
        if node in expected:
            check_alike(nodes_[node], call.result, expected[node].result)


def compare(
    sides: list[Side],
    modules: list[dict[str, nn.Module]],
    calls: list[Calls],
    phase: str,
    span: tuple[int, int],
    judge: Judge,
) -> None:
    """Compare all nodes of a stage that every side has called in one pass. modules: those of each side,
    by node name. span: the first token of the pass, and the token after the last one."""
    router = next((node for node, module in modules[0].items() if isinstance(module, Router)), "")
    given = [of_side[router].given[0] for of_side in calls[:2]] if router else []
    choice = _gaps(given, [own[router] for own in modules[:2]]) if router else None
    mixer = [
        node for node, call in calls[0].items() if any(isinstance(v, State) for v in call.given)
    ][-1:]
    for node in calls[0]:
        if not all(node in of_side for of_side in calls):
            judge.unmatched.add(node)
            continue
        results, states = [of_side[node].result for of_side in calls], []
        if judge.mode == "local":
            own = [own[node] for own in modules]
            results, states = _local(sides, own, [c[node].given for c in calls])
        if choice and node == router:
            judge.add_choice(node, phase, results, *choice, span)
            continue
        # In local mode a node that holds the router chooses anew; in free mode all sides agree.
        chooses = judge.mode == "local" and router.startswith(f"{node}.")
        judge.add(node, "output", phase, results, choice[1] if choice and chooses else None, span)
        if states and node in mixer:
            judge.add_states(node, phase, states, span)
        if node == "lm_head" and judge.mode == "free":
            judge.add_tokens(results[0], results[2])


def _local(
    sides: list[Side], modules: list[Any], given: list[tuple[Any, ...]]
) -> tuple[list[Any], list[State]]:
    """Run one node on all sides. Returns the results, and the states after them. The oracle's inputs are
    rounded to the yardstick's dtypes first, so that all sides have the same values, each in its own
    dtypes."""
    rounded = [_like(value, kind) for value, kind in zip(given[0], given[1], strict=True)]
    results: list[Any] = []
    states: list[State] = []
    for side, module, kinds in zip(sides, modules, given, strict=True):
        own = [
            side.held(value, kind) if isinstance(value, State) else _like(value, kind)
            for value, kind in zip(rounded, kinds, strict=True)
        ]
        results.append(module(*own))
        states += [side.shown(value) for value in own if isinstance(value, State)]
    return results, states


def _like(value: Any, kind: Any) -> Any:
    """A tensor, or a copy of a state, in the dtypes of `kind`; integers stay."""
    if not isinstance(value, Tensor):
        return value.copy(like=kind)
    return value.to(kind.dtype) if value.is_floating_point() else value


def _gaps(given: list[Tensor], routers: list[Any]) -> tuple[Tensor, Tensor]:
    """The gap of each token, [N], and whether rounding may close it, [N].

    The gap is that between the probabilities of the oracle's last chosen expert and of the next one.
    Rounding may close a gap of at most four times the yardstick's error, because a candidate may have
    twice that error in each of the two probabilities. given, routers: the inputs and the routers of the
    oracle and of the yardstick.
    """
    exact, rough = (
        linear(x, router.weight).double().softmax(-1)
        for x, router in zip(given, routers, strict=True)
    )  # [N, E]
    k = routers[0].top_k
    ranked = exact.sort(dim=-1, descending=True).values
    chosen, following = ranked[:, k - 1], ranked[:, k : k + 1]
    gap = chosen - following[:, 0] if following.shape[1] else torch.full_like(chosen, torch.inf)
    return gap, gap <= 4 * (rough - exact).abs().amax(-1)


def _nodes_of(stage: str, module: nn.Module) -> dict[str, nn.Module]:
    """A stage and the nodes inside it, by their names in the model. Of the nodes inside a `Joined` node
    only the router is there, because the others compute only one rank's part."""
    inner = nodes(module, "*") if next(module.children(), None) is not None else {}
    joined = tuple(f"{name}." for name, node in inner.items() if isinstance(node, Joined))
    return {stage: module} | {
        f"{stage}.{name}": node
        for name, node in inner.items()
        if not name.startswith(joined) or isinstance(node, Router)
    }


@contextmanager
def observed(
    nodes_: dict[str, nn.Module], calls: Calls, held: Calls, like: Calls
) -> Iterator[None]:
    """Put the calls of a stage's nodes into `calls` while the block runs.

    held: calls of routers whose experts replace those that a router has chosen. `calls` has the experts
    that it chose itself. like: calls with the expected shapes. NodeError if a swapped node returns
    another form.
    """

    def before(node: str, given: tuple[Any, ...]) -> None:
        calls[node] = Call(tuple(v.copy() if isinstance(v, State) else v for v in given))

    def after(node: str, result: Any) -> Any:
        calls[node].result = result
        if node in like:
            check_alike(nodes_[node], result, like[node].result)
        if node not in held or not isinstance(result, tuple):
            return None
        chosen, weights = held[node].result
        return (chosen, _like(weights, result[1])) if len(chosen) == len(result[0]) else None

    handles = []
    for node, m in nodes_.items():
        handles.append(
            m.register_forward_pre_hook(lambda _m, given, node=node: before(node, given))  # pyright: ignore
        )
        handles.append(m.register_forward_hook(lambda _m, _g, out, node=node: after(node, out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
