"""What the launches of a prompt's pass are handed: which there are, their programs, blocks and names; and
what comes before and after them."""

import copy
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fast.launch import Launch, Scratch, Work
from fast.linear import Norm
from fast.prefill import attention, deltanet, layer, moe, tiles
from fast.prefill.linear import GROUP, normed, product
from fast.prefill.span import Span, number_of_rows
from fast.router import Router
from fast.state import Keys
from qwen35.cache import DeltaState, KVCache
from qwen35.errors import InputError
from tests.support.fast_cases import CPU, TARGET, exact_rows
from tests.support.fast_nodes import a_pass, fast_node
from tests.support.plain_launches import in_turn
from tests.support.prefill_nodes import Poisoned, prefill_findings, state_of
from tools.gfx950.target import emulate

META = torch.device("meta")


def launches(work: list[Work]) -> list[Launch]:
    return [one for one in work if isinstance(one, Launch)]


def filling(out: Tensor, value: Callable[[], Tensor]) -> Work:
    """Work that computes a value into a buffer when it runs."""

    def work() -> None:
        out.copy_(value())

    return work


def table(work: list[Work]) -> list[tuple[str, tuple[int, ...], int]]:
    """Name, grid and warps of each launch."""
    return [(one.name, one.grid, one.options["num_warps"]) for one in launches(work)]


def of_a_layer(rows: int, **settings: Any) -> list[Work]:
    what = a_pass("layer", rows, **settings)
    node, state = fast_node(what.node), state_of(what, torch.bfloat16)
    with META:  # all buffers lie where the rows do
        work, out = layer.on_state(layer.on_layer, node, what.x, state, Scratch(CPU))
    assert out.shape == what.x.shape and out.device == CPU
    given = [value for launch in launches(work) for value in launch.arguments.values()]
    assert {value.device for value in given if isinstance(value, Tensor)} == {CPU}
    filled = [one.arguments["filled"] for one in launches(work) if "filled" in one.arguments]
    assert len(filled) > 4 and all(number.tolist() == [rows] for number in filled)
    return work


# ---- the launches of a layer


FEED_FORWARD = [
    ("prefill norm D=64", (70, 1, 1), 4),
    ("prefill router N=105 K=64", (1, 1, 1), 4),
    ("prefill choose E=24", (18, 1, 1), 4),
    ("prefill activate I=40", (70, 1, 1), 4),
    ("prefill count E=24", (2, 1, 1), 4),
    ("prefill place E=24", (2, 1, 1), 4),
    ("prefill gate_up D=64 I=32 bf16", (1, 29, 1), 4),
    ("prefill down D=64 I=32 bf16", (1, 29, 1), 4),
    ("prefill shared_down N=64 K=40", (1, 1, 1), 4),
    ("prefill combine D=64", (70, 1, 1), 4),
]


def test_the_launches_of_a_layer_with_a_delta_net():
    shape = "H=2 HV=8 K=16 V=32"
    assert table(of_a_layer(70)) == [
        ("prefill norm D=64", (70, 1, 1), 4),
        ("prefill delta_in N=592 K=64", (5, 1, 1), 4),
        (f"prefill mix {shape}", (8, 12, 1), 4),
        ("prefill carry C=320", (3, 1, 1), 4),
        (f"prefill solve {shape}", (2, 8, 1), 8),
        (f"prefill scan {shape}", (8, 1, 1), 4),
        (f"prefill read {shape}", (2, 8, 1), 4),
        ("prefill delta_out N=64 K=256", (1, 1, 1), 4),
        *FEED_FORWARD,
    ]


@pytest.mark.parametrize("fp8", [False, True])
def test_the_launches_of_a_layer_with_attention(fp8: bool):
    """Over a cache in e4m3 all of its 134 positions are decoded."""
    shape = "H=8 G=2 K=32"
    assert table(of_a_layer(70, linear=False, length=64, fp8=fp8)) == [
        ("prefill norm D=64", (70, 1, 1), 4),
        ("prefill attention_in N=640 K=64", (5, 1, 1), 4),
        (f"prefill turn {shape}{' FP8' * fp8}", (5, 12, 1), 4),
        *([("prefill decode G=2 K=32", (9, 2, 1), 4)] if fp8 else []),
        (f"prefill attend {shape}", (8, 2, 1), 4),
        ("prefill attention_out N=64 K=256", (1, 1, 1), 4),
        *FEED_FORWARD,
    ]


def test_the_launches_of_a_dense_layer():
    assert table(of_a_layer(70, name="27B", linear=False, length=64))[5:] == [
        ("prefill norm D=64", (70, 1, 1), 4),
        ("prefill mlp_gate_up N=192 K=64", (2, 1, 1), 4),
        ("prefill mlp_down N=64 K=96", (1, 1, 1), 4),
    ]


@pytest.mark.parametrize("name, linear, first, second", [
    ("397B-A17B", True, "delta_out", "combine"), ("397B-A17B", False, "attention_out", "combine"),
    ("27B", False, "attention_out", "mlp_down"),
])  # fmt: skip
def test_each_half_of_a_layer_adds_what_came_before_it(
    name: str, linear: bool, first: str, second: str
):
    """The input of the norm before it."""
    found = launches(of_a_layer(70, name=name, linear=linear))
    before = [one.arguments["x"] for one in found if "norm" in one.name]
    given = {one.name.split()[1]: one.arguments for one in found}
    for last, x in zip((first, second), before, strict=True):
        assert given[last]["HAS_RESIDUAL"] and given[last]["residual"] is x
    assert before[1] is given[first]["out"] and before[0] is not before[1]


@pytest.mark.parametrize(("heads", "place"), [(38, 1), (78, 1), (80, 0), (160, 0)])
def test_memory_is_scanned_by_the_widest_blocks_of_which_there_are_80(heads: int, place: int):
    """On Hopper, in heads of 32 columns. place: of the blocks in their list, the narrowest last."""
    what = a_pass("linear_attn", 9, linear_num_value_heads=heads)
    node = copy.copy(fast_node(what.node))
    node.target = "sm_90"
    known = tiles.SCANS["sm_90"][place]
    width = min(known["BLOCK_V"], 32)
    work, _ = layer.on_state(
        deltanet.work, node, what.x, state_of(what, torch.bfloat16), Scratch(CPU)
    )
    (scan,) = (one for one in launches(work) if "scan" in one.name.split())
    assert scan.grid == (heads, 32 // width, 1)
    assert scan.arguments["BLOCK_V"] == width
    assert scan.options == {name: known[name] for name in ("num_warps", "num_stages")}
    (read,) = (one for one in launches(work) if "read" in one.name.split())
    assert read.options == {"num_warps": 4, "num_stages": 1, "maxnreg": 168}


@pytest.mark.parametrize(("room", "names"), [
    (1 << 28, ["attend split 0 of 3", "join last 3"]),
    (2, ["attend split 0 of 2", "join 2", "attend split 2 of 1", "join last 1"]),
    (0, ["attend split 0 of 1", "join 1", "attend split 1 of 1", "join 1", "attend split 2 of 1",
         "join last 1"]),
])  # fmt: skip
def test_pieces_take_turns_where_their_results_need_too_much_room(
    room: int, names: list[str], monkeypatch: pytest.MonkeyPatch
):
    """room: that of so many pieces' results."""
    what = a_pass("self_attn", 70, length=64)
    config = what.model.config
    H, K = config.num_attention_heads, config.head_dim
    monkeypatch.setattr(attention, "PIECE", 64)
    monkeypatch.setattr(attention, "ROOM", room * 70 * H * K * 4 if room < 9 else room)
    work, _ = layer.on_state(
        attention.work, fast_node(what.node), what.x, state_of(what, torch.bfloat16), Scratch(CPU)
    )
    found = launches(work)[2:-1]
    said = []
    for one in found:
        kind, shape = one.name.removeprefix("prefill ").split(f" H={H} G=2 K={K}")
        if kind == "attend":
            count = one.grid[2]
            said.append(f"attend{shape} {one.arguments['first']} of {count}")
            assert one.grid[:2] == (H, 2) and one.arguments["SPLIT"]
        else:
            said.append(f"join{shape} {one.arguments['pieces']}")
            assert one.grid == (5, H, 1) and one.options == {"num_warps": 4}
    assert said == names
    shared = [
        {id(one.arguments[name]) for one in found} for name in ("by_piece", "peaks", "totals")
    ]
    assert [len(ids) for ids in shared] == [1, 1, 1]


def test_keys_in_two_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "PIECE", 64)
    what = a_pass("self_attn", 20, length=60)
    assert not prefill_findings(what)
    state = state_of(what, torch.bfloat16)
    work, _ = layer.on_state(attention.work, fast_node(what.node), what.x, state, Scratch(CPU))
    names = [one.name.partition(" H=8 G=2 K=32")[::2] for one in launches(work)[2:-1]]
    assert names == [("prefill attend", " split"), ("prefill join", " last")]


@pytest.mark.parametrize(("rows", "few"), [(256, True), (257, False)])
def test_passes_of_few_rows_have_smaller_blocks_of_attention(rows: int, few: bool):
    """On Hopper."""
    what = a_pass("self_attn", rows, length=0)
    node = copy.copy(fast_node(what.node))
    node.target = "sm_90"
    own, start, rope = node.begin(what.x[None], state_of(what, torch.bfloat16))
    known = tiles.TILES["sm_90"]["attend few" if few else "attend"]
    span = Span.of(start, what.x, rows)
    work, _ = attention.work(node, what.x, own, span, rope, Scratch(CPU))
    (attend,) = (one for one in launches(work) if "attend" in one.name.split())
    assert attend.grid == (8, math.ceil(rows / known["BLOCK_M"]), 1)
    assert attend.options == {name: known[name] for name in ("num_warps", "num_stages")}


# ---- experts


def experts(target: str, N: int, *, fp4: bool, D: int = 256, I: int = 128) -> list[Launch]:
    node = SimpleNamespace(
        E=24, D=D, I=I, target=target, fp4=fp4, tile_n=64, tile_k=128,
        gate_up=torch.zeros(24, 2 * I, D), gate_up_scale=torch.zeros(1), down=torch.zeros(24, D, I),
        down_scale=torch.zeros(1),
    )  # fmt: skip
    x = torch.zeros(N, D).bfloat16()
    chosen = torch.zeros(N, 4, dtype=torch.int32)
    work, _ = moe.experts(node, x, chosen, chosen.float(), number_of_rows(x), Scratch(CPU))
    return launches(work)


@pytest.mark.parametrize("target", ["gfx950", "sm_90"])
@pytest.mark.parametrize("fp4", [True, False])
@pytest.mark.parametrize("N", [9, 72, 144, 1536])
def test_experts_have_tiles_of_their_weights_and_of_their_pairs(target: str, fp4: bool, N: int):
    """1.5, 12, 24 and 256 pairs for each expert. Tiles of MXFP4 depend on them."""
    found = {one.name.split()[1]: one for one in experts(target, N, fp4=fp4)}
    known = tiles.TILES[target]["grouped" if fp4 else "grouped bf16"]
    block = known["BLOCK_M"]
    if fp4:
        block = {9: 16, 72: 32, 144: 64, 1536: 128}[N] if target == "sm_90" else 64
    pairs = 4 * N
    count = min(pairs, pairs // block + 24)
    kind = "" if fp4 else " bf16"
    for name, columns, steps in (("gate_up", 256, 256), ("down", 256, 128)):
        one = found[name]
        wide = math.gcd(known["BLOCK_N"], columns)
        assert one.name == f"prefill {name} D=256 I=128{kind}"
        assert one.grid == (columns // wide, count, 1)
        given = one.arguments
        assert (given["BLOCK_M"], given["BLOCK_N"], given["BLOCK_K"]) == (
            block, wide, math.gcd(known["BLOCK_K"], steps),
        )  # fmt: skip
        assert one.options == {key: known[key] for key in ("num_warps", "num_stages")}
        assert (given["pairs"], given["E"], given["FP4"]) == (pairs, 24, fp4)
        assert len(given["tile_expert"]) == len(given["tile_first"]) == count
    assert found["count"].arguments["TILE"] == block
    arranged = fp4 and target == "sm_90"
    assert ("arrange" in found) is arranged
    if arranged:
        assert found["arrange"].grid == (N, 1, 1)
        assert found["gate_up"].arguments["x"] is found["arrange"].arguments["out"]


def test_the_choice_of_experts_has_the_products_in_float32():
    """Ties are those of the reference, whose logits are bf16: of 256 + 19, 20 and 21, for instance."""
    x, weight = (torch.zeros(rows, 64).bfloat16() for rows in (9, 25))
    x[:, :2] = 1
    weight[:, 0], weight[:, 1] = 256, torch.arange(25)
    router = Router(weight, 24, 5, True, TARGET)
    work, choice = moe.route(router, x, number_of_rows(x), Poisoned(CPU))
    emulate(work)
    assert choice.parts.dtype == choice.weights.dtype == torch.float32
    assert torch.equal(choice.parts, (256.0 + torch.arange(25)).repeat(1, 9, 1))
    assert choice.experts.tolist() == [[23, 22, 19, 20, 21]] * 9
    share = torch.tensor([280.0, 278, 276, 276, 276]).softmax(-1)
    assert torch.allclose(choice.weights, share.expand(9, 5), rtol=1e-5)


def test_more_experts_than_there_are_cannot_be_chosen():
    x = torch.zeros(9, 64).bfloat16()
    router = Router(torch.zeros(25, 64).bfloat16(), 24, 25, True, TARGET)
    with pytest.raises(InputError, match="the router's top 25 of 24 experts; expected 1 to 16"):
        moe.route(router, x, number_of_rows(x), Scratch(CPU))


@pytest.mark.parametrize("D", [1024, 2048, 2560])
def test_wide_rows_are_several_blocks(D: int):
    """1,024 columns each."""
    found = {one.name.split()[1]: one for one in experts("sm_90", 9, fp4=True, D=D)}
    for name in ("arrange", "combine"):
        assert found[name].name == f"prefill {name} D={D}"
        assert found[name].grid == (9, math.ceil(D / 1024), 1)
        assert found[name].arguments["BLOCK"] == 1024


# ---- products and norms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["plain", "residual", "activated"])
def test_a_product_of_the_rows_that_there_are(kind: str, dtype: torch.dtype):
    """The buffer has more."""
    x, weight = exact_rows(1, 12, 64), exact_rows(2, 96, 64)
    residual = exact_rows(3, 12, 96) if kind == "residual" else None
    filled, scratch = torch.tensor([9], dtype=torch.int32), Poisoned(CPU)
    launch, out = product(
        x, weight, TARGET, scratch, filled, name="one", residual=residual,
        activated=kind == "activated", dtype=dtype,
    )  # fmt: skip
    assert launch.name == "prefill one N=96 K=64" and launch.arguments["GROUP"] == GROUP
    in_turn([launch])
    exact = x.double() @ weight.double().T
    if kind == "activated":
        gate, up = exact[:, ::2], exact[:, 1::2]
        exact = gate * gate.sigmoid() * up
    if residual is not None:
        exact += residual.double()
    assert out.dtype == dtype and out.shape == exact.shape
    assert torch.allclose(out[:9].double(), exact[:9], rtol=2**-8, atol=1e-3)
    assert out[9:].isnan().all()


def test_a_product_is_activated_or_has_a_residual():
    x = exact_rows(1, 9, 64)
    with pytest.raises(AssertionError):
        product(
            x, x, TARGET, Scratch(CPU), number_of_rows(x), name="one", residual=x, activated=True
        )


@pytest.mark.parametrize(("rows", "columns", "blocks"), [(64, 2576, 41 * 2), (1024, 2576, 8 * 21)])
def test_a_product_has_a_program_for_each_block(rows: int, columns: int, blocks: int):
    """On Hopper of 64 x 32 and 128 x 128."""
    x, weight = (torch.zeros(n, 64).bfloat16() for n in (rows, columns))
    launch, _ = product(x, weight, "sm_90", Scratch(CPU), number_of_rows(x), name="one")
    known = tiles.product_tiles("sm_90", rows, columns)
    size = known["BLOCK_M"], known["BLOCK_N"]
    assert launch.grid == (
        math.ceil(rows / size[0]) * math.ceil(columns / size[1]), 1, 1,
    )  # fmt: skip
    assert launch.options == {name: known[name] for name in ("num_warps", "num_stages")}
    assert (launch.arguments["BLOCK_M"], launch.arguments["BLOCK_N"]) == size


def test_a_norm_of_every_row():
    x = exact_rows(1, 9, 96)
    norm = Norm(exact_rows(2, 1, 96)[0], 0.25)
    launch, out = normed(x, norm, Poisoned(CPU), name="one")
    assert launch.name == "prefill norm D=96" and launch.arguments["BLOCK"] == 128
    in_turn([launch])
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 0.25).rsqrt()
    exact = exact * (1 + norm.weight.double())
    assert torch.allclose(out.double(), exact, rtol=2**-7, atol=1e-6)


def test_rows_that_do_not_fit_are_named():
    x, weight = exact_rows(1, 9, 64), exact_rows(2, 96, 64)
    scratch, filled = Scratch(CPU), number_of_rows(x)
    expected = "expected [rows, 64], torch.bfloat16"
    for wrong in (x[:, :32], x.float()):
        said = f"x of shape {[*wrong.shape]} and {wrong.dtype}; {expected}"
        for name, make in (
            ("one", partial(product, wrong, weight, TARGET, scratch, filled)),
            ("two", partial(normed, wrong, Norm(x[0], 0.5), scratch)),
        ):
            with pytest.raises(InputError) as caught:
                make(name=name)
            assert str(caught.value) == f"{name}: {said}"
    with pytest.raises(InputError) as caught:
        node = SimpleNamespace(E=2, D=64, I=32, target=TARGET)
        ids = torch.zeros(9, 1, dtype=torch.int32)
        moe.experts(node, x[:, :32], ids, ids.float(), filled, scratch)
    assert str(caught.value) == f"experts: x of shape [9, 32] and torch.bfloat16; {expected}"


# ---- block sizes


@pytest.mark.parametrize(("rows", "columns", "blocks"), [
    (1280, 2048, (128, 256)), (1152, 2048, (128, 128)), (1280, 1024, (128, 128)),
    (1279, 2047, (128, 256)), (640, 1024, (64, 128)), (320, 1024, (64, 64)), (64, 32, (64, 32)),
])  # fmt: skip
def test_eighty_programs_keep_a_gpu_busy(rows: int, columns: int, blocks: tuple[int, int]):
    found = tiles.product_tiles("sm_90", rows, columns)
    assert (found["BLOCK_M"], found["BLOCK_N"]) == blocks
    assert tiles.product_tiles("gfx950", rows, columns) == tiles.PRODUCTS["gfx950"][0]


@pytest.mark.parametrize("target", ["gfx950", "sm_90"])
def test_blocks_divide_the_sizes_that_are_asked_for(target: str):
    known = tiles.TILES[target]["grouped"]
    found = tiles.tiles(target, "grouped", BLOCK_N=96, BLOCK_K=4096)
    assert found == known | {"BLOCK_N": 32}
    assert tiles.tiles(target, "grouped") == known


@pytest.mark.parametrize(("pairs", "rows"), [
    (0, 16), (11.99, 16), (12, 32), (23.99, 32), (24, 64), (255, 64), (256, 128), (10**6, 128),
])  # fmt: skip
def test_an_experts_tile_has_few_rows_where_it_has_few_pairs(pairs: float, rows: int):
    assert tiles.expert_rows("sm_90", pairs) == rows
    assert tiles.expert_rows("gfx950", pairs) == 64


# ---- a span, and what comes around a pass


def test_all_rows_of_a_pass_are_a_span():
    x, start = torch.zeros(7, 3), torch.tensor([5], dtype=torch.int32)
    span = Span.of(start, x, 12)
    assert span.start is start and span.end == 12
    for count in (span.filled, number_of_rows(x)):
        assert count.tolist() == [7] and count.dtype == torch.int32 and count.device == CPU
    assert number_of_rows(torch.zeros(2, 3, device=META)).device == META


class Mixer:
    """In place of a mixer: places its first row at position 5."""

    def __init__(self) -> None:
        self.ended: list[tuple[Any, ...]] = []
        self.own = SimpleNamespace(give=lambda *given: self.ended.append(("give", *given)))
        self.start, self.rope = torch.tensor([5], dtype=torch.int32), object()

    def begin(self, x: Tensor, state: Any) -> tuple[Any, Tensor, Any]:
        self.begun = x, state
        return self.own, self.start, self.rope

    def end(self, *given: Any) -> None:
        self.ended.append(("end", *given))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("attends", [False, True])
def test_a_pass_begins_and_advances_the_references_state(
    attends: bool, whole: bool, monkeypatch: pytest.MonkeyPatch
):
    """The last of its work does. whole: the mixer of a layer."""
    mixer = Mixer()
    node = SimpleNamespace(mixer=mixer) if whole else mixer
    state: Any = DeltaState(torch.zeros(1, 3, 8), torch.zeros(1, 2, 4, 4))
    if attends:
        state = KVCache.empty((1, 2, 16), torch.bfloat16, CPU)
        state.append(*torch.zeros(2, 1, 2, 5, 16).bfloat16())
    x, asked = exact_rows(1, 9, 64), list[tuple[Any, ...]]()
    out = torch.empty_like(x)

    def work(*given: Any) -> tuple[list[Work], Tensor]:
        asked.append(given)
        return [filling(out, lambda: x + 1)], out

    ran: list[torch.device] = []

    def run(todo: list[Work], device: torch.device) -> None:
        ran.append(device)
        for one in todo:
            assert not mixer.ended, "advanced before the end"
            one()

    monkeypatch.setattr(layer, "run", run)
    with META:
        found = layer.prefilled(work, node, x[None], state)
    assert torch.equal(found, x[None] + 1) and ran == [CPU]
    ((asked_node, rows, own, span, rope, scratch),) = asked
    assert asked_node is node and torch.equal(rows, x) and rows.dim() == 2
    assert (own, rope, scratch.device) == (mixer.own, mixer.rope, CPU)
    assert span.start is mixer.start and span.filled.tolist() == [9]
    assert mixer.begun[0].shape == (1, 9, 64) and mixer.begun[1] is state
    if attends:
        assert span.end == 5 + 9 and state.k.shape[2] >= 14 and state.length == 5
        assert mixer.ended == [("end", own, state, 9)]
    else:
        assert span.end == 9 and mixer.ended == [("give", state, 3 + 9)]


class Ranks:
    """An exchange of two ranks, the other of which gives twice as much."""

    def total(self, part: Tensor, residual: Tensor, scratch: Scratch) -> tuple[Work, Tensor]:
        out = scratch("total", *part.shape)
        return filling(out, lambda: 3 * part + residual), out


@pytest.mark.parametrize("ranks", [None, Ranks()])
def test_the_parts_of_a_layer_are_added_over_the_ranks(ranks: Any):
    """Without ranks the node adds the residual itself."""
    x, residual, scratch = exact_rows(1, 9, 64), exact_rows(2, 9, 64), Scratch(CPU)

    def work(residual: Tensor | None = None) -> tuple[list[Work], Tensor]:
        out = scratch("part", 9, 64)
        return [filling(out, lambda: x if residual is None else x + residual)], out

    todo, out = layer.added_over_ranks(SimpleNamespace(ranks=ranks), work, residual, scratch)
    in_turn(todo)
    assert len(todo) == (2 if ranks else 1)
    assert torch.equal(out, (3 if ranks else 1) * x + residual)


def test_a_layer_gives_its_mixer_the_state_and_the_feed_forward_the_rows():
    """On ranks each adds its part to what came before it."""
    what = a_pass("layer", 9, linear=False)
    node = fast_node(what.node)
    given: list[tuple[Tensor, Tensor]] = []

    class Noted(Ranks):
        def total(self, part: Tensor, residual: Tensor, scratch: Scratch) -> tuple[Work, Tensor]:
            given.append((part, residual))
            return super().total(part, residual, scratch)

    of_rank = SimpleNamespace(
        ranks=Noted(), is_linear=False, mixer=node.mixer, feed_forward=node.feed_forward,
        input_layernorm=node.input_layernorm, post_attention_layernorm=node.post_attention_layernorm,
    )  # fmt: skip
    own, start, rope = node.mixer.begin(what.x[None], what.state.copy())
    assert isinstance(own, Keys)
    span = Span.of(start, what.x, 17)
    work, _ = layer.on_layer(of_rank, what.x, own, span, rope, Poisoned(CPU))
    (mixed, x), (fed, after) = given
    assert x is what.x and mixed.shape == fed.shape == after.shape == (9, 64)
    found = {one.name.split()[1]: one.arguments for one in launches(work)}
    norms = [one.arguments for one in launches(work) if "norm" in one.name]
    assert [(one["x"] is x, one["x"] is after) for one in norms] == [(True, False), (False, True)]
    assert [one["weight"] is norm.weight for one, norm in zip(
        norms, (node.input_layernorm, node.post_attention_layernorm), strict=True
    )] == [True, True]  # fmt: skip
    assert found["turn"]["keys"] is own.keys and found["turn"]["cosine"] is rope[0]
    assert not found["attention_out"]["HAS_RESIDUAL"] and not found["combine"]["HAS_RESIDUAL"]
