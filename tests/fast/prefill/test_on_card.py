"""The nodes of a prompt's rows on a card, beside the reference there: sm_90 code has no emulator.

Every pair of head sizes runs, since it was such a pair that Triton compiled wrongly.
"""

import copy
import warnings
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")

from fast.attention import GatedAttention
from fast.deltanet import GatedDeltaNet
from fast.launch import Scratch
from fast.layer import DecoderLayer
from fast.moe import Experts
from fast.prefill import attention, moe, tiles
from fast.prefill.linear import product
from fast.prefill.span import number_of_rows
from tests.support.fast_cases import Case, case, expected, judged, routing, slow_experts, too_far
from tests.support.fast_nodes import Pass, a_pass
from tests.support.prefill_nodes import slow, state_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no card")
KINDS = {"linear_attn": GatedDeltaNet, "self_attn": GatedAttention, "layer": DecoderLayer}
SIZES = (16, 32, 64, 128)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def findings(what: Pass) -> list[str]:
    node = KINDS[what.kind].from_reference(copy.deepcopy(what.node).cuda())
    state = state_of(what, torch.bfloat16)
    for name, tensor in list(vars(state).items()):
        if isinstance(tensor, torch.Tensor):
            setattr(state, name, tensor.cuda())
    out = node(what.x[None].cuda(), state)[0].cpu()
    return judged("out", out, slow(what, torch.bfloat16).out, slow(what, torch.float64).out)


@pytest.mark.parametrize("K", SIZES)
@pytest.mark.parametrize("V", SIZES)
def test_a_delta_net_of_any_head_sizes(K: int, V: int):
    sizes = {"linear_key_head_dim": K, "linear_value_head_dim": V}
    assert not findings(a_pass("linear_attn", 130, **sizes))


@pytest.mark.parametrize("K", SIZES)
@pytest.mark.parametrize("one", tiles.SCANS["sm_90"], ids=lambda one: str(one["BLOCK_V"]))
def test_a_delta_net_with_each_of_the_blocks_that_scan_has(
    one: tiles.Tiles, K: int, monkeypatch: pytest.MonkeyPatch
):
    """This model's few heads would take the narrowest blocks alone."""
    monkeypatch.setitem(tiles.SCANS, "sm_90", [one])
    sizes = {"linear_key_head_dim": K, "linear_value_head_dim": 128}
    assert not findings(a_pass("linear_attn", 300, **sizes))


@pytest.mark.parametrize("K", [32, 64, 128, 256])
def test_attention_of_any_head_size(K: int):
    assert not findings(a_pass("self_attn", 130, length=64, head_dim=K))


def test_attention_in_pieces_has_the_same_bits_at_once_and_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
):
    """Also with other rows in the pass."""
    monkeypatch.setattr(attention, "PIECE", 64)
    what = a_pass("self_attn", 300, length=192)
    assert not findings(what)
    once = on_this_card(what, (300,))
    assert torch.equal(on_this_card(what, (64, 256, 300)), once)
    monkeypatch.setattr(attention, "ROOM", 0)
    assert not findings(what)
    assert torch.equal(on_this_card(what, (300,)), once)
    assert torch.equal(on_this_card(what, (128, 300)), once)


def on_this_card(what: Pass, ends: tuple[int, ...]) -> torch.Tensor:
    """The output of a node, in passes that end at these rows."""
    node = KINDS[what.kind].from_reference(copy.deepcopy(what.node).cuda())
    state = state_of(what, torch.bfloat16)
    for name, tensor in state.buffers().items():
        setattr(state, name, tensor.cuda())
    x = what.x[None].cuda()
    return torch.cat([node(x[:, a:b], state) for a, b in pairwise((0, *ends))], dim=1)[0].cpu()


@pytest.mark.parametrize("K, N", [(256, 96), (4096, 769), (1024, 2560)])
def test_a_product_has_the_same_bits_with_all_block_sizes(
    K: int, N: int, monkeypatch: pytest.MonkeyPatch
):
    x, weight = (torch.randn(rows, K).bfloat16().cuda() for rows in (300, N))
    monkeypatch.setattr(tiles, "BUSY", 0)
    known = tiles.PRODUCTS["sm_90"]
    outputs: list[torch.Tensor] = []
    for one in known:
        monkeypatch.setitem(tiles.PRODUCTS, "sm_90", [one])
        launch, out = product(x, weight, "sm_90", Scratch(x.device), number_of_rows(x), name="any")
        launch()
        outputs.append(out.clone())
    assert len(outputs) == len(known) > 1
    assert all(torch.equal(out, outputs[0]) for out in outputs)


@pytest.mark.parametrize("linear", [True, False])
def test_a_layer(linear: bool):
    sizes = {"num_experts": 1, "num_experts_per_tok": 1}
    assert not findings(a_pass("layer", 130, linear=linear, length=64, **sizes))


def on_card(node: Experts, chosen: Case) -> torch.Tensor:
    x, ids, weights = (t.cuda() for t in (chosen.x, chosen.experts.int(), chosen.weights))
    scratch = Scratch(x.device)
    work, out = moe.experts(node, x, ids, weights, number_of_rows(x), scratch)
    for name in ("arranged", "pairs hidden", "pairs down", "feed-forward"):
        for key, held in scratch._held.items():  # pyright: ignore[reportPrivateUsage]
            if key[0] == name:
                held.fill_(float("nan"))
    for one in work:
        one()
    return out.cpu()


@pytest.mark.parametrize("D, I", [(128, 128), (256, 96), (384, 256), (1024, 384)])
def test_experts_in_mxfp4(D: int, I: int):
    """Alone, with few others and with more rows than a tile has, a row has the same bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no configurations for these sizes
        node = Experts.from_reference(slow_experts(24, D, I), "sm_90").cuda()
    for kind, rows in (("random", 40), ("same", 150), ("ends", 300)):
        chosen = case(routing(kind, rows, 4, 24), D=D, I=I)
        out = on_card(node, chosen)
        assert not too_far(out, *expected(chosen)), kind
        for _ in range(20):
            assert torch.equal(on_card(node, chosen), out), kind
        some = list(range(rows - 9, rows))
        assert torch.equal(on_card(node, chosen.rows(some)), out[some]), kind
        assert torch.equal(on_card(node, chosen.rows([3])), out[[3]]), kind
