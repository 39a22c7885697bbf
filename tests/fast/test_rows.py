"""Which kernels take the rows of a node that is called as a module, and with what: up to 8 rows, more, or
several sequences. And what the ranks' parts of a layer are asked for."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

import fast.layer
from fast import configs
from fast.allreduce import Gathered
from fast.launch import Scratch, Work
from fast.layer import DecoderLayer
from fast.linear import Norm, Stream
from fast.moe import MLP, Experts, SparseMoeBlock
from fast.router import Router
from qwen35.parallel.nodes import Summed
from tests.support.coded_model import Turns
from tests.support.fast_cases import CPU, TARGET
from tests.support.fast_nodes import a_pass, fast_node, slow_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is not in configs.json")

FEW, MANY = "launches", "a prompt's"
NODES = {"attention": "self_attn", "deltanet": "linear_attn", "layer": "layer"}  # by module


@pytest.mark.parametrize("kind", NODES)
@pytest.mark.parametrize("rows", [1, 8, 9, 64])
def test_more_than_eight_rows_of_a_sequence_take_a_prompts_kernels(
    kind: str, rows: int, monkeypatch: pytest.MonkeyPatch
):
    what = a_pass(NODES[kind], rows)
    node = fast_node(what.node)
    module = getattr(fast, kind)
    asked: list[tuple[Any, ...]] = []

    def prefilled(*given: Any) -> Tensor:
        asked.append((MANY, *given))
        return given[2] + 1

    monkeypatch.setattr(module, "prefilled", prefilled)

    def run(work: list[Any], device: torch.device) -> None:
        asked.append((FEW, len(work), device))
        given = [value for launch in work for value in launch.arguments.values()]
        assert {value.device for value in given if isinstance(value, Tensor)} == {CPU}

    monkeypatch.setattr(module, "run", run)
    x, state = what.x[None], what.state.copy()
    with torch.device("meta"):  # all buffers lie where the rows do
        out = node(x, state)
    assert out.shape == x.shape
    launches = {"attention": 4, "deltanet": 3, "layer": 1 + 3 + 3}[kind]
    if rows <= 8:
        assert asked == [(FEW, launches, CPU)]
        return
    work = module.on_layer if kind == "layer" else module.prefill.work
    assert torch.equal(out, x + 1)
    assert len(asked) == 1 and asked[0][0] == MANY
    assert all(a is b for a, b in zip(asked[0][1:], (work, node, x, state), strict=True))


@pytest.mark.parametrize("kind", NODES)
def test_several_sequences_take_the_references_node(kind: str, monkeypatch: pytest.MonkeyPatch):
    what = a_pass(NODES[kind], 3)
    node = fast_node(what.node)
    asked: list[tuple[Any, ...]] = []

    def forward(*given: Any) -> Tensor:
        asked.append(given)
        return given[0] + 1

    monkeypatch.setattr(node.many, "forward", forward)
    x, state = what.x.repeat(2, 1, 1), what.state
    assert torch.equal(node(x, state), x + 1)
    assert len(asked) == 1 and asked[0][0] is x and asked[0][1] is state


@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize("kind", ["router", "block", "mlp"])
def test_a_feed_forward_and_a_router_count_the_rows_of_all_sequences(
    kind: str, rows: int, monkeypatch: pytest.MonkeyPatch
):
    dense = kind == "mlp"
    mlp: Any = slow_model("27B" if dense else "397B-A17B").layers[0].mlp
    mlp = copy.deepcopy(mlp)  # its weights become parts of the node's
    node: Any
    if kind == "router":
        node = Router.from_reference(mlp.gate, TARGET)
    else:
        node = (MLP if dense else SparseMoeBlock).from_reference(mlp, TARGET)
    asked: list[tuple[Any, ...]] = []

    def of_a_prompt(*given: Any) -> Any:
        asked.append(given)
        result = SimpleNamespace(experts=torch.zeros(1), weights=torch.ones(2))
        return [], result if kind == "router" else given[1] + 1

    names = {"router": "route", "block": "block", "mlp": "mlp"}
    monkeypatch.setattr(f"fast.prefill.moe.{names[kind]}", of_a_prompt)
    where = fast.router if kind == "router" else fast.moe
    ran: list[tuple[int, torch.device]] = []
    monkeypatch.setattr(where, "run", lambda work, device: ran.append((len(work), device)))
    D = node.weight.shape[1] if kind == "router" else mlp_width(mlp)
    x = torch.randn(rows, D).bfloat16() if kind == "router" else torch.randn(rows, 1, D).bfloat16()
    out = node(x)
    if rows <= 8:
        assert not asked and ran == [({"router": 1, "block": 3, "mlp": 2}[kind], CPU)]
        return
    assert ran == [(0, CPU)]
    ((asked_node, given, filled, scratch),) = asked
    assert asked_node is node and torch.equal(given, x.view(rows, D))
    assert filled.tolist() == [rows] and isinstance(scratch, Scratch)
    if kind == "router":
        assert out[0].dtype == torch.int64 and torch.equal(out[1], torch.ones(2))
    else:
        assert torch.equal(out, x + 1)


def mlp_width(mlp: Any) -> int:
    return (mlp.gate_proj if hasattr(mlp, "gate_proj") else mlp.gate).weight.shape[1]


# ---- configurations


@pytest.mark.parametrize(
    ("kernel", "shape", "entry", "expected"),
    [
        ("route", "N=25 K=64", {"BLOCK_N": 16, "BLOCK_K": 32, "SPLITS": 2}, (2, 2, 1)),
        ("route", "N=25 K=64", {"BLOCK_N": 32, "BLOCK_K": 64, "SPLITS": 1}, (1, 1, 1)),
        ("delta", "HV=8 K=16 V=32", {"BLOCK_V": 8}, (8, 4, 1)),
        ("attend", "H=8 G=2 K=32", {"GROUP": 1, "TILE": 32}, (1, 2, 3)),
        ("combine", "H=8 G=2 K=32", {"MANY": 16, "WIDTH": 16}, (3, 8, 2)),
    ],
)
def test_the_entry_of_a_kernels_own_shape_is_taken(
    kernel: str, shape: str, entry: dict[str, int], expected: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """Of the router's, also the bytes of weights that a program reads in a pass of its loop."""
    monkeypatch.setitem(configs.table()[TARGET], kernel, {shape: entry | {"num_warps": 8}})
    scratch, three = Scratch(CPU), torch.zeros(3, 64).bfloat16()
    if kernel == "route":
        made = Router(torch.zeros(25, 64).bfloat16(), 24, 5, True, TARGET)
        work: list[Any] = [made.launch(three, scratch)[0]]
        assert work[0].weight_bytes == entry["BLOCK_N"] * entry["BLOCK_K"] * 2
    else:
        what = a_pass("linear_attn" if kernel == "delta" else "self_attn", 3, length=120)
        node = fast_node(what.node)
        own, start, rope = node.begin(what.x[None], what.state.copy())
        given = [own, start, *([rope] if rope else []), scratch]
        work = node.launches(what.x, *given)[0]
    (launch,) = (one for one in work if one.name.split()[0] == kernel)
    assert launch.grid == expected and launch.options["num_warps"] == 8
    assert entry.items() <= launch.arguments.items()


@pytest.mark.parametrize("fp8", [False, True])
def test_attention_is_named_by_its_cache(fp8: bool):
    what = a_pass("self_attn", 3, fp8=fp8)
    node = fast_node(what.node)
    own, start, rope = node.begin(what.x[None], what.state.copy())
    names = [launch.name for launch in node.launches(what.x, own, start, rope, Scratch(CPU))[0]]
    assert names[1] == "attend H=8 G=2 K=32" + " FP8" * fp8


# ---- the parts of a layer


class Part(nn.Module):
    """In place of a mixer or a feed-forward of a rank: gives its input times a number."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor, self.asked = factor, list[dict[str, Any]]()

    def launches(self, x: Stream, *given: Any, **settings: Any) -> tuple[list[Work], Tensor]:
        self.asked.append(settings)
        out = given[-1](settings["out"] + str(self.factor), *x.x.shape)

        def work() -> None:
            out.copy_(x.x * self.factor)

        return [work], out


def test_the_ranks_add_up_a_mixers_results_and_a_feed_forwards():
    """Each sum has the residual and prepares the norm that follows."""
    what = a_pass("layer", 3, linear=False)
    D = what.x.shape[1]
    everyone: list[dict[int, Tensor]] = [{}, {}]
    layers, works, outs = [], [], []
    then = Norm(torch.full((D,), 0.5).bfloat16(), 0.125)
    for rank in range(2):
        layer = copy.deepcopy(fast_node(what.node))
        layer.ranks = Turns(rank, 2, everyone)
        layer.many.self_attn, layer.many.mlp = Part(1 + rank), Part(3 + rank)
        scratch = Scratch(CPU)
        x = torch.arange(3 * D).view(3, D).remainder(5).bfloat16()
        stream = Stream(x, x, torch.zeros(1, 16), 0.5)
        state = SimpleNamespace()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fast.layer, "Keys", SimpleNamespace)
            work, out = layer.launches(stream, state, x, (x, x), scratch, then)  # pyright: ignore
        layers.append(layer)
        works.append(work)
        outs.append(out)
    for at_once in zip(*works, strict=True):
        for one in at_once:
            one()
    after = x * (1 + 1 + 2)
    for layer, out in zip(layers, outs, strict=True):
        assert [part.asked for part in (layer.mixer, layer.feed_forward)] == [[{"out": "part"}]] * 2
        assert isinstance(out, Stream) and out.eps == 0.125
        assert torch.equal(out.x, after * (1 + 3 + 4))
        assert torch.equal(out.scaled, (out.x.float() * 1.5).bfloat16())


class Group:
    """A group of ranks whose cards share no memory."""

    rank, size = 1, 2

    def exchange(self, value: Any) -> list[Any]:
        return [value, False]


@pytest.mark.parametrize("linear", [True, False])
def test_a_part_of_a_layer_has_the_exchange_of_its_group(linear: bool):
    """Its nodes stay in the wrappers of a rank's model."""
    node: Any = copy.deepcopy(a_pass("layer", 1, linear=linear).node)
    group: Any = Group()
    mixer = "linear_attn" if linear else "self_attn"
    for name in (mixer, "mlp"):
        node.set_submodule(name, Summed(node.get_submodule(name), group))
    layer = DecoderLayer.from_reference(node, TARGET)
    assert isinstance(layer.ranks, Gathered) and layer.ranks.ranks is group
    assert (layer.ranks.rank, layer.ranks.size) == (1, 2)
    for name, part in ((mixer, layer.mixer), ("mlp", layer.feed_forward)):
        wrapper = layer.many.get_submodule(name)
        assert isinstance(wrapper, Summed) and wrapper.part is part


def test_a_part_of_a_layer_says_which():
    what = a_pass("layer", 1)
    layer = copy.deepcopy(fast_node(what.node))
    assert layer.extra_repr() == "" and layer.ranks is None
    layer.ranks = Turns(1, 4, [{} for _ in range(4)])
    assert layer.extra_repr() == "rank 1 of 4, turns all-reduce"


@pytest.mark.parametrize(("fp4", "kind"), [(True, "MXFP4"), (False, "bf16")])
@pytest.mark.parametrize("target", ["gfx950", "sm_90"])
def test_experts_overlap_on_hopper_alone_and_say_what_they_hold(target: str, fp4: bool, kind: str):
    """On Hopper down begins before gate-up has ended, and waits in the kernel for its results."""
    experts = Experts(2, 256, 128, target, CPU, fp4=fp4)
    assert experts.extra_repr() == f"2 of 256 -> 128 -> 256, {kind}, {target}"
    x, ids = torch.zeros(1, 256).bfloat16(), torch.zeros(1, 1, dtype=torch.int32)
    work, _ = experts.launches(x, ids, torch.ones(1, 1), Scratch(CPU))
    on_hopper = target == "sm_90"
    assert [launch.arguments["OVERLAP"] for launch in work] == [on_hopper, on_hopper]
    assert [launch.options.get("launch_pdl", False) for launch in work] == [False, on_hopper]
