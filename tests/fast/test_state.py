"""The fast path's state, without a kernel: what it takes from the reference's cache, and gives back."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fast.state import RING, Delta, Keys, State, rope_table
from fast.target import MAX_ROWS
from qwen35.cache import KV_CACHE_DTYPES, Cache, DeltaState, KVCache
from qwen35.config import Config
from qwen35.errors import InputError
from reference import rope
from tests.support.family import FAMILY

CPU = torch.device("cpu")
CONFIG = Config.from_dict(FAMILY["397B-A17B"])
DELTA, ATTENTION = 0, 3  # layers of either kind


def filled(length: int, kv_cache_dtype: str = "auto", seed: int = 0) -> Cache:
    """A cache with other numbers everywhere, after `length` tokens. The MTP head has one row less."""
    torch.manual_seed(seed)
    cache = Cache.empty(CONFIG, torch.bfloat16, kv_cache_dtype=kv_cache_dtype)
    for state in (*cache.layers, cache.mtp):
        if isinstance(state, DeltaState):
            state.take(torch.randn(state.conv.shape).bfloat16(), torch.randn(state.recurrent.shape))
        elif isinstance(state, KVCache):
            B, G, _, K = state.k.shape
            state.append(*torch.randn(2, B, G, length - (state is cache.mtp), K).bfloat16())
    cache.length = length
    return cache


def held(cache: Cache) -> dict[str, Any]:
    """As bytes, since e4m3 has no comparison."""
    return {name: t.contiguous().view(torch.uint8) for name, t in cache.snapshot().items()}


def assert_alike(one: Cache, other: Cache) -> None:
    assert one.length == other.length
    ours, theirs = held(one), held(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
@pytest.mark.parametrize("length", [1, 2, 17, 40])
def test_a_cache_goes_in_and_comes_back(length: int, kv_cache_dtype: str) -> None:
    """Into another one that held more, and through a state with more room."""
    cache = filled(length, kv_cache_dtype)
    state = State.empty(CONFIG, 40, 3, CPU, kv_cache_dtype)
    state.take(cache)
    larger = State.empty(CONFIG, 48, 3, CPU, kv_cache_dtype)
    larger.take_over(state)
    for one in (state, larger):
        back = filled(41, kv_cache_dtype, seed=1)
        one.give(back)
        assert_alike(back, cache)


def test_the_mtp_heads_keys_stay_behind_if_nobody_drafts() -> None:
    cache, back = filled(5), filled(7, seed=1)
    state = State.empty(CONFIG, 8, 0, CPU)
    assert state.mtp is None
    state.take(cache)
    kept = back.mtp.copy()  # pyright: ignore
    larger = State.empty(CONFIG, 9, 0, CPU)
    larger.take_over(state)
    larger.give(back)
    assert back.length == 5 and back.mtp.length == kept.length == 6  # pyright: ignore
    assert torch.equal(back.layers[ATTENTION].k[:, :, :5], cache.layers[ATTENTION].k[:, :, :5])  # pyright: ignore


def test_a_cache_without_an_mtp_head_is_taken() -> None:
    cache = filled(5)
    cache.mtp = None
    state = State.empty(CONFIG, 8, 2, CPU)
    state.take(cache)
    state.give(cache)
    assert cache.length == 5


def test_a_cache_of_fewer_layers_is_noticed() -> None:
    state, fewer = State.empty(CONFIG, 8, 0, CPU), State.empty(CONFIG, 8, 0, CPU)
    state.take(filled(5))
    cache = filled(5)
    cache.layers.pop()
    fewer.layers.pop()
    for call, other in ((state.take, cache), (state.give, cache), (state.take_over, fewer)):
        with pytest.raises(ValueError, match="shorter"):
            call(other)  # pyright: ignore


@pytest.mark.parametrize("length", [1, 3, 16, 17, 30])
def test_rows_and_states_lie_where_the_kernels_look(length: int) -> None:
    """The row of a position at the position modulo 16; the memory after it modulo the slots."""
    cache, state = filled(length), State.empty(CONFIG, 32, 3, CPU)
    state.take(cache)
    own, given = state.layers[DELTA], cache.layers[DELTA]
    assert isinstance(own, Delta) and isinstance(given, DeltaState)
    taps, columns = given.conv.shape[1:]
    assert (taps, columns) == (3, CONFIG.conv_dim)
    for i in range(taps):
        row = own.projected[(length - taps + i) % RING]
        assert torch.equal(row[:columns], given.conv[0, i]) and not row[columns:].any()
    assert int(own.projected.any(1).sum()) == taps
    assert torch.equal(own.states[(length - 1) % MAX_ROWS], given.recurrent[0])
    assert int(own.states.flatten(1).any(1).sum()) == 1
    keys, kv = state.layers[ATTENTION], cache.layers[ATTENTION]
    assert isinstance(keys, Keys) and isinstance(kv, KVCache)
    assert torch.equal(keys.keys[:, :length], kv.k[0, :, :length])
    assert torch.equal(keys.values[:, :length], kv.v[0, :, :length])


def test_sizes_and_dtypes() -> None:
    state = State.empty(CONFIG, 24, 3, CPU)
    delta, keys = state.layers[DELTA], state.layers[ATTENTION]
    assert isinstance(delta, Delta) and isinstance(keys, Keys)
    # q, k and v; then z, and two numbers a head.
    columns = 2 * 2 * 16 + 8 * 24 + 8 * (24 + 2)
    assert (delta.projected.shape, delta.projected.dtype) == ((RING, columns), torch.bfloat16)
    assert (delta.states.shape, delta.states.dtype) == ((MAX_ROWS, 8, 16, 24), torch.float32)
    assert keys.keys.shape == keys.values.shape == (2, 24, 32)
    assert keys.keys.dtype == keys.values.dtype == torch.bfloat16
    assert [(t.shape, t.dtype) for t in (keys.key_scales, keys.value_scales)] == [
        ((0,), torch.uint8)
    ] * 2
    assert state.mtp is not None and state.mtp.keys.shape == (2, 24, 32)
    assert (state.starts.tolist(), state.starts.dtype) == ([0] * 4, torch.int32)
    assert state.capacity == 24 and len(state.layers) == CONFIG.num_hidden_layers
    meta = State.empty(CONFIG, 24, 3, torch.device("meta"), "fp8")
    fp8 = meta.layers[ATTENTION]
    assert isinstance(fp8, Keys) and isinstance(meta.mtp, Keys)
    for one in (fp8, meta.mtp):
        assert one.keys.dtype == one.values.dtype == torch.float8_e4m3fn
        assert one.key_scales.shape == one.value_scales.shape == (2, 24, 1)
        assert one.keys.is_meta and one.key_scales.is_meta
    assert meta.starts.is_meta and meta.cosine.is_meta and meta.sine.is_meta
    assert meta.layers[DELTA].projected.is_meta and meta.layers[DELTA].states.is_meta  # pyright: ignore
    none = State.empty(CONFIG, 24, 0, torch.device("meta")).layers[ATTENTION]
    assert isinstance(none, Keys) and none.key_scales.is_meta


@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_no_memory_is_held_that_is_not_used(kv_cache_dtype: str) -> None:
    keys = Keys.empty(CONFIG, 24, CPU, kv_cache_dtype)
    for one in (keys.keys, keys.values, keys.key_scales, keys.value_scales):
        assert one.untyped_storage().nbytes() == one.numel() * one.itemsize


def test_keys_of_another_dtype_are_noticed() -> None:
    """A state in e4m3 has scales."""
    bf16, fp8 = (State.empty(CONFIG, 24, 0, CPU, kind) for kind in ("auto", "fp8"))
    for one, other in ((bf16, fp8), (fp8, bf16)):
        with pytest.raises(ValueError, match=r"longer|shorter"):
            one.take_over(other)
        with pytest.raises(ValueError, match=r"longer|shorter"):
            one.take(filled(3, "fp8" if other is fp8 else "auto"))


def test_keys_over_a_cache_are_its_memory() -> None:
    cache = KVCache.empty((1, 2, 4), torch.bfloat16, CPU)
    cache.reserve(3)
    over = Keys.over(cache)
    over.keys.fill_(2)
    over.values.fill_(3)
    assert bool((cache.k == 2).all()) and bool((cache.v == 3).all())


@pytest.mark.parametrize(
    ("drafts", "starts"),
    [(0, [20]), (1, [20, 19]), (3, [20, 19, 20, 21]), (4, [20, 19, 20, 21, 22])],
)
def test_where_the_passes_of_a_round_begin(drafts: int, starts: list[int]) -> None:
    """The trunk's, the MTP head's first one a position earlier, and one after the other."""
    state = State.empty(CONFIG, 24, drafts, CPU)
    state.place(20)
    assert state.starts.tolist() == starts
    other = State.empty(CONFIG, 24, drafts, CPU)
    other.take_over(state)
    assert other.starts.tolist() == starts


def test_a_cache_that_just_fits_is_taken_and_a_longer_one_refused() -> None:
    state = State.empty(CONFIG, 6, 0, CPU)
    state.take(filled(6))
    with pytest.raises(InputError) as raised:
        state.take(filled(7))
    assert str(raised.value) == "7 tokens; the fast path's cache holds 6"


def test_a_convolution_that_leaves_no_room_in_the_ring_is_refused() -> None:
    most = RING - MAX_ROWS + 1
    State.empty(replace(CONFIG, linear_conv_kernel_dim=most), 4, 0, CPU)
    with pytest.raises(InputError) as raised:
        State.empty(replace(CONFIG, linear_conv_kernel_dim=most + 1), 4, 0, CPU)
    assert str(raised.value) == (
        f"{most + 1} taps; the fast path keeps 16 positions of a delta net's projections, 8 of them "
        "for a pass"
    )


def test_the_table_has_the_references_angles() -> None:
    cosine, sine = rope_table(8, 1e7, 30, CPU)
    positions = torch.arange(30)
    cos, sin = rope.rope_table(positions, 8, 1e7, torch.float32)
    assert torch.equal(cosine, cos) and torch.equal(sine, sin)
    assert cosine.dtype == sine.dtype == torch.float32
    on_meta = rope_table(8, 1e7, 30, torch.device("meta"))
    assert all(t.is_meta and t.shape == (30, 4) for t in on_meta)
    state = State.empty(CONFIG, 30, 0, CPU)
    theirs = rope_table(CONFIG.rotary_dim, CONFIG.rope_theta, 30, CPU)
    assert torch.equal(state.cosine, theirs[0]) and torch.equal(state.sine, theirs[1])


@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_a_cache_in_the_states_own_memory(kv_cache_dtype: str) -> None:
    """It is empty whatever it held before. What goes into it lies where the rounds look for it."""
    state = State.empty(CONFIG, 80, 3, CPU, kv_cache_dtype)
    state.take(filled(41, kv_cache_dtype, seed=1))
    for one in (one for one in state.layers if isinstance(one, Delta)):
        one.projected.fill_(3.0)
        one.states.fill_(4.0)
    cache = state.cache(CONFIG)
    assert_alike(cache, Cache.empty(CONFIG, torch.bfloat16, kv_cache_dtype=kv_cache_dtype))
    given = filled(64, kv_cache_dtype)
    cache.restore([given.snapshot()], 64)
    assert_alike(cache, given)
    kept = cache.snapshot()
    state.take(cache)
    plain = State.empty(CONFIG, 80, 3, CPU, kv_cache_dtype)
    plain.take(given)
    back, other = filled(1, kv_cache_dtype), filled(1, kv_cache_dtype)
    state.give(back)
    plain.give(other)
    assert_alike(back, given)
    assert_alike(other, given)
    assert state.starts.tolist() == plain.starts.tolist() == [64, 63, 64, 65]
    later = filled(64, kv_cache_dtype, seed=2)
    for mine, its in zip(cache.layers, later.layers, strict=True):
        if isinstance(mine, DeltaState):
            mine.take(*its.tensors().values())
    deltas = [name for name in kept if name.endswith(("conv", "recurrent"))]
    assert all(torch.equal(kept[name], given.snapshot()[name]) for name in deltas)
    assert all(torch.equal(cache.snapshot()[name], later.snapshot()[name]) for name in deltas)


def test_a_cache_in_the_memory_of_a_state_without_drafts_has_no_mtp_head() -> None:
    state = State.empty(CONFIG, 80, 0, CPU)
    cache, given = state.cache(CONFIG), filled(64)
    assert cache.mtp is None and cache.length == 0
    cache.restore([given.snapshot(mtp=False)], 64, mtp=False)
    state.take(cache)
    back = filled(1)
    state.give(back)
    assert back.length == 64 and torch.equal(back.layers[ATTENTION].k, given.layers[ATTENTION].k)  # pyright: ignore
