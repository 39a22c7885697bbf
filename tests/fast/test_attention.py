"""Attention's four launches as gfx950 code in the emulator, beside the reference."""

import pytest
import torch

pytest.importorskip("triton")

from fast.attention import SHORT, piece_sizes, pieces
from fast.state import Keys
from qwen35.cache import FP8KVCache, KVCache
from tests.support.fast_cases import CPU
from tests.support.fast_nodes import (
    a_pass,
    buffers,
    fast,
    fast_node,
    node_findings,
    rounding_findings,
    row_findings,
)


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8])
def test_outputs_and_new_keys_and_values(rows: int, scale: float):
    assert not node_findings(a_pass("self_attn", rows, scale=scale))


@pytest.mark.parametrize("length", [0, 1, 31, 63, 126, 127, 128, 129, 255, 300])
def test_contexts_that_end_before_at_and_behind_a_pieces_edge(length: int):
    assert not node_findings(a_pass("self_attn", 4, length=length), capacity=length + 9)


@pytest.mark.parametrize("rows, length", [(1, 0), (4, 20), (5, 126), (8, 300)])
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_a_cache_in_e4m3(rows: int, length: int, scale: float):
    assert not node_findings(
        a_pass("self_attn", rows, length=length, scale=scale, fp8=True), capacity=320
    )


def test_rows_have_the_same_bits_over_a_cache_in_e4m3():
    assert not row_findings(a_pass("self_attn", 6, length=126, fp8=True), (1, 3, 2), capacity=200)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-6, 1.0, 3e4, 1e30])
def test_values_are_rounded_to_e4m3_as_by_the_reference(scale: float):
    assert not rounding_findings(a_pass("self_attn", 4, length=3, fp8=True, scale=scale))


@pytest.mark.parametrize("name", ["27B", "0.8B", "4B"])
def test_other_head_counts(name: str):
    """The 27B has six query heads for each key head, which is no power of two."""
    assert not node_findings(a_pass("self_attn", 4, name=name, length=140), capacity=256)


@pytest.mark.parametrize("sizes", [
    {"head_dim": 16}, {"head_dim": 256}, {"rotary": 1.0}, {"rms_norm_eps": 0.5},
])  # fmt: skip
def test_other_sizes(sizes: dict[str, object]):
    assert not node_findings(a_pass("self_attn", 2, **sizes))


@pytest.mark.parametrize("parts", [(1,) * 6, (2, 4), (4, 2), (5, 1)])
def test_rows_have_the_same_bits_in_one_pass_and_in_several(parts: tuple[int, ...]):
    """The rows lie on both sides of a piece's edge, and of the edge of a group of rows."""
    assert not row_findings(a_pass("self_attn", 6, length=126), parts, capacity=200)


def test_the_capacity_decides_no_bit():
    what = a_pass("self_attn", 4, length=130)
    small, large = fast(what, capacity=134), fast(what, capacity=900)
    assert torch.equal(small.out, large.out)


def test_nothing_else_in_the_cache_is_touched():
    what = a_pass("self_attn", 3, length=40)
    own = buffers(what, 64, 40, 8)
    assert isinstance(own, Keys) and isinstance(what.state, KVCache)
    fast(what, state=own)
    for held, before in ((own.keys, what.state.k), (own.values, what.state.v)):
        assert torch.equal(held[:, :40], before[0, :, :40])
        assert held[:, 43:].isnan().all() and not held[:, :43].isnan().any()


def test_a_nan_in_an_early_key_reaches_every_row_that_sees_it_and_is_not_hidden():
    what = a_pass("self_attn", 2, length=20)
    own = buffers(what, 64, 20, 8)
    assert isinstance(own, Keys)
    own.values[0, 3, 5] = torch.nan
    assert fast(what, state=own).out.isnan().any(1).all()


def test_pieces_cover_the_context_once():
    for near, far in map(piece_sizes, (4, 16)):
        assert [pieces(length, near, far) for length in (1, near, near + 1)] == [1, 1, 2]
        edge = SHORT * near
        assert [pieces(edge + more, near, far) for more in (0, 1, far, far + 1)] == [
            SHORT, SHORT + 1, SHORT + 1, SHORT + 2,
        ]  # fmt: skip


def test_pieces_are_longer_where_more_heads_share_their_keys():
    """As in the 27B (6 heads), the 4B and the 397B (16)."""
    assert piece_sizes(6) == piece_sizes(4) < piece_sizes(16)


def test_keys_come_back_from_their_buffers_bit_for_bit():
    what = a_pass("self_attn", 1, length=30)
    assert isinstance(what.state, KVCache)
    own = Keys.empty(what.model.config, 64, CPU)
    own.take(what.state, 30)
    back = KVCache(what.state.k[:, :, :0], what.state.v[:, :, :0])
    own.give(back, 30)
    assert torch.equal(back.tensors()["k"], what.state.k)
    assert torch.equal(back.tensors()["v"], what.state.v)


def test_keys_in_e4m3_come_back_from_larger_buffers_byte_for_byte():
    """A full step continues in one with more room, which copies the scales as well as the numbers."""
    what = a_pass("self_attn", 1, length=30, fp8=True)
    assert isinstance(what.state, FP8KVCache)
    small, large = (Keys.empty(what.model.config, room, CPU, "fp8") for room in (32, 64))
    small.take(what.state, 30)
    for scale in (large.key_scales, large.value_scales):
        scale.zero_()
    large.take_over(small)
    _, G, _, K = what.state.k.shape
    back = FP8KVCache.empty((1, G, K), torch.bfloat16, CPU)
    large.give(back, 30)
    for name, held in what.state.tensors().items():
        assert torch.equal(back.tensors()[name].view(torch.uint8), held.view(torch.uint8)), name


def test_several_sequences_go_through_the_reference_over_the_same_weights():
    what = a_pass("self_attn", 9, length=0)
    node, state = fast_node(what.node), what.state
    assert isinstance(state, KVCache)
    G, K = state.k.shape[1], state.k.shape[3]
    mine, theirs = (KVCache.empty((2, G, K), torch.bfloat16, CPU) for _ in range(2))
    x = what.x.repeat(2, 1, 1)
    assert torch.equal(node(x, mine), what.node(x, theirs))
