"""The launches of decode rounds and of a prompt's tail: what each is handed, and what becomes of it, on a
model whose numbers are exact (`tests/support/coded_model.py`)."""

import gc
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fast import configs
from fast.graph import Pass, captured
from fast.launch import Launch, Work
from fast.step import Step, is_fast
from qwen35.cache import E4M3, Cache
from qwen35.errors import InputError
from tests.support.coded_model import (
    CONFIG,
    VOCABULARY,
    Coded,
    begin,
    coded_model,
    coded_ranks,
    hidden,
    read,
    rounds,
    weight_of_head,
)
from tests.support.plain_launches import in_turn
from tools.gfx950.target import emulate

TARGET = "gfx950"
PROMPT = [5, 9, 77, 3, 120, 8]
CHOICE = ["norm D=256", "head N=200 K=256", "pick N=200"]
DRAFT = ["mtp_input D=256", "mtp_fc N=256 K=512", "a layer", *CHOICE]
TRUNK = ["embed D=256", "a layer", *CHOICE]


def steps(
    drafts: int, size: int = 1, *, target: str = TARGET, capacity: int = 64, **settings: Any
) -> list[Step]:
    """A step on each rank."""
    head = weight_of_head()
    models = coded_ranks(target, head, size) if size > 1 else [coded_model(target, head)]
    return [Step(model, capacity, drafts, **settings) for model in models]


def one(drafts: int, **settings: Any) -> Step:
    return steps(drafts, **settings)[0]


def check(found: list[Step], number: int, vocab: int = VOCABULARY) -> None:
    """Compare rounds with the text and the drafts that there have to be, from `PROMPT` on."""
    truth, ids, drafts = Coded(weight_of_head(), vocab), list(PROMPT), found[0].drafts
    for step in found:
        begin(step, ids)
    lengths = set[int]()
    for _ in range(number):
        drafted = truth.drafts(ids, drafts)
        own = [truth.text([*ids, *drafted[:i]], 1)[0] for i in range(drafts + 1)]
        good = [a == b for a, b in zip(drafted, own, strict=False)]
        fresh = 1 + (good.index(False) if False in good else drafts)
        (report,) = rounds(found, 1)
        assert report == [fresh, *own]
        states = read([*ids, *drafted])[-drafts - 1 :]
        ids += own[:fresh]
        follow = [len(ids) - 1, len(ids) - 1 - fresh, *range(len(ids) - 1, len(ids) + 7)]
        for step in found:
            assert step.rows_ids.tolist() == [ids[-1], *drafted]
            assert step.picked.tolist() == own and step.fresh.tolist() == [fresh]
            assert step.state.starts.tolist() == follow[: drafts + 1]
            assert torch.equal(step.hidden, torch.stack([hidden(s) for s in states]))
            assert torch.equal(step.logits, weight_of_head()[:, states].T)
        lengths.add(fresh)
    assert ids[len(PROMPT) :] == truth.text(PROMPT, len(ids) - len(PROMPT))
    assert drafts == 0 or len(lengths) > 1, "all rounds accept as many drafts"


@pytest.mark.parametrize("target", ["gfx950", "sm_90"])
@pytest.mark.parametrize("drafts", [0, 1, 3, 7])
def test_a_round_gives_the_models_own_tokens_and_the_heads_drafts(drafts: int, target: str):
    check(steps(drafts, target=target), 6)


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_with_parts_of_the_embedding_and_the_head_give_the_same(size: int, drafts: int):
    check(steps(drafts, size), 6)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("vocab", [1, 60, 101, 199])
def test_ids_from_the_vocabulary_on_are_never_chosen(vocab: int, size: int):
    """Nor drafted, also where a rank has none of the ids that are left."""
    found = steps(2, size, vocab=vocab)
    for step in found:
        begin(step, PROMPT)
    truth = Coded(weight_of_head(), vocab)
    ids = list(PROMPT)
    for _ in range(3):
        drafted = truth.drafts(ids, 2)
        (report,) = rounds(found, 1)
        assert found[0].rows_ids.tolist()[1:] == drafted and max(report[1:]) < vocab
        ids += report[1 : 1 + report[0]]
    assert ids[len(PROMPT) :] == truth.text(PROMPT, len(ids) - len(PROMPT))


def names(work: list[Work]) -> list[str]:
    return [one.name if isinstance(one, Launch) else "a layer" for one in work]


def test_the_launches_of_a_round():
    assert names(one(0).work) == [*TRUNK, "accept DRAFTS=0"]
    assert names(one(2).work) == [*DRAFT, *DRAFT, *TRUNK, "accept DRAFTS=2"]
    kinds = [name.split(" N=")[0] for name in names(steps(0, 2)[1].work)]
    assert kinds == [
        "embed_part D=256", "a layer", "a layer", "norm D=256", "head",
        "a layer",  # the gather of all logits
        "pick", "a layer", "pick RANKS=2", "accept DRAFTS=0",
    ]  # fmt: skip
    assert "pick N=100 of a part" in names(steps(0, 2)[1].work)


def test_the_drafts_look_only_at_ids_that_can_be_chosen():
    (draft, trunk) = [n for n in names(one(1, vocab=60).work) if n.startswith("head")]
    assert (draft, trunk) == ("head N=60 K=256", "head N=200 K=256")
    drafts = [next(n for n in names(s.work) if "head" in n) for s in steps(1, 4, vocab=60)]
    assert drafts == [f"head N={n} K=256" for n in (50, 10, 1, 1)]


def test_the_head_is_configured_by_its_rows_and_columns(monkeypatch: pytest.MonkeyPatch):
    usual = configs.USUAL[TARGET]["head"]
    entry = {"N=200 K=256": usual | {"BLOCK_N": 32}}
    monkeypatch.setitem(configs.table()[TARGET], "head", entry)
    step = one(0)
    head = next(work for work in step.work if isinstance(work, Launch) and "head" in work.name)
    assert head.grid == (7, 1, 1) and head.arguments["BLOCK_N"] == 32
    check([step], 6)


def test_small_launches_have_few_warps():
    """One where a single number is decided, and four where a program has a whole row."""
    work = [launch for launch in one(1).work if isinstance(launch, Launch)]
    warps = {launch.name.split()[0]: launch.options["num_warps"] for launch in work}
    assert warps["accept"] == 1
    assert {warps[name] for name in ("embed", "mtp_input", "norm", "pick")} == {4}


def test_a_choice_of_ones_own_takes_the_place_of_the_likeliest_tokens():
    step = one(1)
    begin(step, PROMPT)
    order: list[str] = []

    def choose() -> None:
        order.append("choose")
        step.picked.fill_(11)

    step.work = step.launches([choose], [lambda: order.append("after")])
    assert names(step.work)[-5:] == [*CHOICE[:2], "a layer", "accept DRAFTS=1", "a layer"]
    assert rounds([step], 1) == [[1, 11, 11]] and step.rows_ids[0] == 11
    assert order == ["choose", "after"]


def test_a_nan_in_a_logit_is_no_token():
    """Also in the logit of an id that is never chosen."""
    for vocab in (200, 100):
        model = coded_model(TARGET, weight_of_head())
        model.lm_head.weight[150] = torch.nan
        step = Step(model, 64, 0, vocab=vocab)
        begin(step, PROMPT)
        assert rounds([step], 1) == [[1, -1]]


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_the_launches_are_computed_as_their_kernels_do(drafts: int):
    """The same rounds in the emulator, so that what this file shows holds for the kernels."""
    by_torch, emulated = one(drafts), one(drafts)
    for step in (by_torch, emulated):
        begin(step, PROMPT)
    assert rounds([by_torch], 2) == rounds([emulated], 2, run=lambda launch: emulate([launch]))
    for name in ("hidden", "logits", "rows_ids", "picked"):
        assert torch.equal(getattr(by_torch, name), getattr(emulated, name)), name
    assert torch.equal(by_torch.state.starts, emulated.state.starts)


# ---- a step's state


def test_a_step_keeps_what_its_model_and_its_depth_ask_for():
    step = one(3, capacity=40)
    assert step.state.capacity == 40 and step.vocab == VOCABULARY and step.length == 0
    assert [list(x.shape) for x in (step.rows_ids, step.picked, step.fresh, step.report)] == [
        [4], [4], [1], [5],
    ]  # fmt: skip
    assert {x.dtype for x in (step.rows_ids, step.picked, step.fresh, step.report)} == {torch.int32}
    assert step.hidden.shape == (4, 256) and step.logits.shape == (4, 200)
    assert {step.hidden.dtype, step.logits.dtype} == {torch.bfloat16}
    assert one(0).state.mtp is None and one(0).tail.mtp is None
    model = coded_model(TARGET, weight_of_head())
    model.kv_cache_dtype = "fp8"
    assert Step(model, 64, 0).state.layers[0].keys.dtype == E4M3  # pyright: ignore
    assert [(s.first, s.vocab, list(s.logits.shape)) for s in steps(0, 4)] == [
        (first, 200, [1, 200]) for first in (0, 50, 100, 150)
    ]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2])
def test_all_memory_lies_where_the_embedding_does(size: int):
    """Whatever torch's default is."""
    head = weight_of_head()
    model = coded_ranks(TARGET, head, 2)[0] if size > 1 else coded_model(TARGET, head)
    with torch.device("meta"):
        step = Step(model, 64, 2)
    state, tail, keys = step.state, step.tail, step.state.layers[0]
    assert state.mtp is not None and tail.mtp is not None
    held = [
        step.rows_ids, step.picked, step.fresh, step.report, step.hidden, step.logits, state.starts,
        state.cosine, state.sine, keys.keys, state.mtp.values, tail.ids, tail.start, tail.hidden,  # pyright: ignore
    ]  # fmt: skip
    for work in (*step.work, *tail.trunk.work, *tail.mtp.work):
        if isinstance(work, Launch):
            held += [x for x in work.arguments.values() if isinstance(x, torch.Tensor)]
    assert {x.device for x in held} == {torch.device("cpu")}


def test_a_step_takes_a_prompts_cache():
    small, large = one(2), one(2, capacity=96)
    begin(small, PROMPT)
    cache = Cache.empty(CONFIG, torch.bfloat16, torch.device("cpu"))
    small.state.give(cache)
    large.take(cache)
    assert large.length == len(PROMPT) - 1
    large.begin(PROMPT[-1], hidden(read(PROMPT)[-2]))
    assert rounds([large], 4) == rounds([small], 4)


def test_a_step_with_more_room_takes_over():
    small, large = one(3, capacity=32), one(3, capacity=64)
    begin(small, PROMPT)
    rounds([small], 2)
    large.take_over(small)
    assert rounds([large], 2) == rounds([small], 2)


def test_what_is_not_fast_and_what_is_too_deep_is_refused():
    model = coded_model(TARGET, weight_of_head())
    slow = SimpleNamespace(layers=[*model.layers, torch.nn.Identity()], mtp=model.mtp)
    no_head = SimpleNamespace(layers=model.layers, mtp=torch.nn.Identity())
    assert is_fast(model, 3) and is_fast(no_head, 0)
    assert not is_fast(slow, 0) and not is_fast(no_head, 1)
    for wrong, drafts in ((slow, 0), (no_head, 1)):
        with pytest.raises(InputError) as caught:
            Step(wrong, 64, drafts)
        assert str(caught.value) == "a step needs a model whose layers and MTP head are all fast"
    for drafts in (-1, 8):
        with pytest.raises(InputError) as caught:
            Step(model, 64, drafts)
        assert str(caught.value) == f"{drafts} drafts a round; the fast path verifies 0 to 7"


# ---- the end of a prompt


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fast.graph.run", lambda work, device: in_turn(work))


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("cuts", [(1,), (7,), (8,), (9,), (16,), (17,), (3, 8, 10), (8, 9, 25)])
@pytest.mark.parametrize("drafts", [0, 2])
def test_a_tail_in_parts_leaves_what_a_text_leaves(cuts: tuple[int, ...], drafts: int):
    """The trunk's states and the head's pairs of every token, and the hidden state of the last one."""
    ids = [(37 * i + 11) % VOCABULARY for i in range(cuts[-1])]
    step, before = one(drafts), None
    for first, last in zip((0, *cuts), cuts, strict=False):
        before = step.extend(ids[first:last], before)
        assert torch.equal(before, hidden(read(ids[:last])[-1]))
        assert step.length == last and step.state.starts[0] == last
    assert step.state.layers[0].keys[0, : len(ids), 0].tolist() == ids  # pyright: ignore
    token = Coded(weight_of_head(), VOCABULARY).text(ids, 1)[0]
    assert before is not None
    step.begin(token, before)
    if step.state.mtp is not None:
        pairs = [[i, s] for i, s in zip(ids[1:], read(ids)[:-1], strict=True)]
        assert step.state.mtp.keys[0, : len(ids) - 1, :2].tolist() == pairs
    report = rounds([step], 1)[0]
    text = report[1 : 1 + report[0]]
    assert text == Coded(weight_of_head(), VOCABULARY).text([*ids, token], len(text))


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(("count", "trunk", "head"), [(1, 1, 0), (8, 1, 1), (9, 2, 1), (17, 3, 2)])
def test_a_tail_takes_as_few_passes_as_it_can(count: int, trunk: int, head: int):
    """Eight rows each; the head has no row for the first token."""
    step, asked = one(1), list[str]()
    assert step.tail.mtp is not None
    for name, part in (("trunk", step.tail.trunk), ("head", step.tail.mtp)):
        part.work = [*part.work, partial(asked.append, name)]
    step.extend(list(range(count)), None)
    assert asked == ["trunk"] * trunk + ["head"] * head


@pytest.mark.usefixtures("on_the_cpu")
def test_a_tail_behind_a_prompts_blocks_goes_on_from_their_state():
    """The token before the tail gives the head its first pair."""
    ids = [(37 * i + 11) % VOCABULARY for i in range(21)]
    step = one(1)
    begin(step, ids[:12])
    step.length = 11
    found = step.extend(ids[11:], hidden(read(ids)[10]))
    assert torch.equal(found, hidden(read(ids)[-1]))
    assert step.state.mtp is not None
    pairs = [[i, s] for i, s in zip(ids[1:], read(ids)[:-1], strict=True)]
    assert step.state.mtp.keys[0, : len(ids) - 1, :2].tolist() == pairs


# ---- graphs


class Graph:
    """In place of a CUDA graph: holds what ran while it was captured."""

    def __init__(self) -> None:
        self.captured: list[Callable[[], None]] = []
        self.replayed = 0

    def replay(self) -> None:
        self.replayed += 1


class Capture:
    """In place of `torch.cuda.graph`."""

    collects: list[bool]

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def __enter__(self) -> None:
        Capture.current, Capture.collects = self.graph, [gc.isenabled()]

    def __exit__(self, *_: object) -> None:
        Capture.current = None

    current: Graph | None = None


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A card that captures; the names of what ran outside of a capture."""
    ran: list[str] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)

    def launched(launch: Launch) -> None:
        assert Capture.current is not None, "a launch outside of a capture"
        Capture.current.captured.append(launch)

    def run(work: list[Work], device: torch.device) -> None:
        ran.extend(names(work))

    monkeypatch.setattr(Launch, "__call__", launched)
    for module in ("step", "graph"):
        monkeypatch.setattr(f"fast.{module}.run", run)
    yield ran
    gc.enable()


def on_a_card(drafts: int) -> Step:
    """A step whose layers launch nothing and whose table lies on a card."""
    step = one(drafts)
    step.table = SimpleNamespace(device=torch.device("cuda"))  # pyright: ignore
    for part in (step, step.tail.trunk, *filter(None, [step.tail.mtp])):
        part.work = [one for one in part.work if isinstance(one, Launch)]
    step.prompt = None  # its passes need whole layers
    return step


@pytest.mark.parametrize("drafts", [0, 1])
def test_a_round_and_the_passes_of_a_tail_are_run_and_then_captured(drafts: int, card: list[str]):
    step = on_a_card(drafts)
    passes = [step.tail.trunk, *([step.tail.mtp] if step.tail.mtp else [])]
    assert len(passes) == 1 + drafts
    step.prepare()
    assert card == [n for part in (step, *passes) for n in names(part.work)]
    for part in (step, *passes):
        assert isinstance(part.graph, Graph) and part.graph.captured == part.work
    ran = len(card)
    step.prepare()
    assert len(card) == ran, "it is prepared once"
    step.report[0] = 1
    assert step.round() == step.report.tolist() and len(card) == ran
    step.tail.extend([3], None, 0)
    assert [part.graph.replayed for part in (step, *passes)] == [1, 1, 0][: 1 + len(passes)]  # pyright: ignore
    step.tail.extend([3], hidden(1), 4)
    assert passes[-1].graph.replayed == (1 if drafts else 2)  # pyright: ignore


@pytest.mark.usefixtures("card")
def test_the_passes_of_a_prompt_are_prepared_with_a_step():
    step, prepared = on_a_card(1), list[str]()
    step.prompt = SimpleNamespace(prepare=lambda: prepared.append("prompt"))  # pyright: ignore
    step.prepare()
    step.prepare()
    assert prepared == ["prompt"]


@pytest.mark.usefixtures("on_the_cpu")
def test_a_longer_tail_is_one_pass_of_the_prompts_where_there_are_such_passes():
    """Where there are none, as in a rank's part of a model, it is passes of eight rows."""
    step, asked = one(0), list[tuple[int, Any, int]]()
    assert step.prompt is not None and coded_ranks_have_no_prompt()

    def extend(ids: list[int], before: Any, first: int) -> Any:
        asked.append((len(ids), before, first))
        return hidden(5)

    step.prompt = SimpleNamespace(extend=extend)  # pyright: ignore
    ids = [(37 * i + 11) % VOCABULARY for i in range(49)]
    before = step.extend(ids[:24], None)
    assert not asked and step.length == 24
    assert torch.equal(step.extend(ids[24:], before), hidden(5))
    assert asked == [(25, before, 24)] and step.length == 49 and step.state.starts[0] == 49
    step = one(0)
    step.prompt = None
    assert torch.equal(step.extend(ids, None), hidden(read(ids)[-1]))


def coded_ranks_have_no_prompt() -> bool:
    parts = coded_ranks(TARGET, weight_of_head(), 2)
    return all(Step(part, 64, 0).prompt is None for part in parts)


def test_without_a_card_nothing_is_prepared_and_a_round_runs_its_work(card: list[str]):
    step = one(1)
    step.prepare()
    assert (card, step.graph, step.tail.trunk.graph) == ([], None, None)
    assert step.round() == step.report.tolist()
    assert card == names(step.work)


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.usefixtures("card")
def test_no_garbage_is_collected_while_a_graph_is_captured(collects: bool):
    """Nor is the collector left off by a capture that fails, or on where it was off."""
    seen: list[bool] = []
    (gc.enable if collects else gc.disable)()
    graph: Any = captured([lambda: seen.append(gc.isenabled())])
    assert isinstance(graph, Graph) and seen == [False] and gc.isenabled() is collects

    def fails() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        captured([fails])
    assert gc.isenabled() is collects


def test_a_pass_runs_on_its_device_until_it_is_a_graph(monkeypatch: pytest.MonkeyPatch):
    where: list[tuple[int, str]] = []

    def run(work: list[Work], device: torch.device) -> None:
        where.append((len(work), device.type))

    monkeypatch.setattr("fast.graph.run", run)
    Pass([lambda: None], torch.device("meta")).run()
    assert where == [(1, "meta")]
