"""The state of a sequence: cached passes against one forward, pieces against whole, roll-back.

There are two kinds of claim. Cached and uncached passes sum in different orders: they have to agree
to rounding in float64, and by the two-times rule in float32. A row beside other rows, a prompt in
other pieces, and a roll-back promise the same bits, which torch.equal checks.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qwen35.cache import Cache, DeltaState, FP8KVCache, KVCache
from qwen35.generation import prefill
from reference.linear import DECODE_ROWS
from reference.model import Model
from tests.support.family import small_model
from tests.support.oracle import relative, token_ids, within_twice

MEMBERS = ("0.8B", "27B", "397B-A17B", "Qwen3-Next")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
LENGTHS = (1, 63, 64, 65, 127, 128, 129)

_models: dict[tuple[str, torch.dtype], Model] = {}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def model_of(name: str, dtype: torch.dtype = torch.float32) -> Model:
    """Kept from test to test; nobody alters it."""
    if (name, dtype) not in _models:
        _models[name, dtype] = small_model(name, seed=3, dtype=dtype)
    return _models[name, dtype]


def parts(cache: Cache) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a later pass reads, by name."""
    states = [(f"layer {i}", state) for i, state in enumerate(cache.layers)]
    for name, state in [*states, ("mtp", cache.mtp)]:
        if isinstance(state, KVCache):
            yield f"{name} keys", state.k[:, :, : state.length]
            yield f"{name} values", state.v[:, :, : state.length]
        elif isinstance(state, DeltaState):
            yield f"{name} conv", state.conv
            yield f"{name} recurrent", state.recurrent


def assert_same_bits(one: Cache, other: Cache) -> None:
    assert one.length == other.length
    for (name, a), (_, b) in zip(parts(one), parts(other), strict=True):
        assert torch.equal(a, b), name


def prefilled(
    model: Model, count: int, chunk: int = 4096, draft: bool = True
) -> tuple[Tensor, Cache]:
    """The last token's logits and the cache after a prompt."""
    cache = model.new_cache()
    ids = token_ids(count, model)[0].tolist()
    return model.lm_head(prefill(model, ids, cache, chunk=chunk, draft=draft)), cache


def decode(model: Model, ids: Tensor, cache: Cache) -> Tensor:
    """Logits of ids [1, T], one pass."""
    return model.lm_head(model(ids, cache))


# --- cached against uncached


@pytest.mark.parametrize("prompt", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("name", MEMBERS)
def test_cached_decode_is_the_full_forward(name: str, prompt: int) -> None:
    wide, model = model_of(name, torch.float64), model_of(name)

    def full(m: Model, ids: Tensor) -> Tensor:
        return decode(m, ids, m.new_cache())[:, prompt - 1 :]

    def cached(m: Model, ids: Tensor) -> Tensor:
        cache = m.new_cache()
        passes = [decode(m, part, cache) for part in ids.split([prompt, *[1] * 16], dim=1)]
        return torch.cat([passes[0][:, -1:], *passes[1:]], dim=1)

    sequences = [token_ids(prompt + 16, model, seed) for seed in range(2 if prompt == 1 else 1)]
    truth = torch.cat([full(wide, ids) for ids in sequences])
    assert relative(torch.cat([cached(wide, ids) for ids in sequences]), truth) < 1e-12
    error, most = within_twice(
        torch.cat([cached(model, ids) for ids in sequences]),
        torch.cat([full(model, ids) for ids in sequences]),
        truth,
    )
    assert error <= most


# --- pieces against whole


@pytest.mark.parametrize("count", LENGTHS)
@pytest.mark.parametrize("name", MEMBERS)
def test_prefill_in_pieces(name: str, count: int) -> None:
    model = model_of(name)
    logits, cache = prefilled(model, count)
    for chunk in (64, 128):
        other_logits, other = prefilled(model, count, chunk)
        assert torch.equal(logits, other_logits), f"chunk {chunk}"
        assert_same_bits(cache, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_in_pieces_long(dtype: torch.dtype) -> None:
    """700 tokens: several growths of the KV buffer and a tail off the grid."""
    model = model_of("397B-A17B", dtype)
    logits, cache = prefilled(model, 700)
    for chunk in (64, 128):
        other_logits, other = prefilled(model, 700, chunk)
        assert torch.equal(logits, other_logits), f"chunk {chunk}"
        assert_same_bits(cache, other)


def test_a_prefilled_prompt_is_the_plain_forward() -> None:
    """`prefill` adds nothing: its last state is that of one pass over the prompt, to rounding."""
    model = model_of("27B", torch.float64)
    logits, cache = prefilled(model, 129, chunk=64)
    assert relative(logits, decode(model, token_ids(129, model), model.new_cache())[:, -1:]) < 1e-12
    assert cache.length == 129
    assert cache.mtp is not None
    assert cache.mtp.length == 128  # the last row waits for its next token


# --- a row beside others


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MEMBERS)
def test_rows_of_a_decode_pass_are_independent(name: str, dtype: torch.dtype) -> None:
    """1, 2, 3 or 4 rows at once give the bits of one at a time, in states and MTP too."""
    model = model_of(name, dtype)
    for prompt in (1, 65):
        ids = token_ids(DECODE_ROWS, model, seed=1)
        _, alone = prefilled(model, prompt)
        single = [model(ids[:, t : t + 1], alone) for t in range(DECODE_ROWS)]
        drafts = [model.draft(ids[:, t : t + 1], single[t], alone) for t in range(DECODE_ROWS)]
        hidden, drafted = torch.cat(single, 1), torch.cat(drafts, 1)
        for rows in range(1, DECODE_ROWS + 1):
            _, together = prefilled(model, prompt)
            for part in ids.split(rows, dim=1):
                first = together.length - prompt
                got = model(part, together)
                expected = hidden[:, first : first + part.shape[1]]
                assert torch.equal(got, expected), f"{rows} rows"
                assert torch.equal(model.lm_head(got), torch.cat(
                    [model.lm_head(expected[:, t : t + 1]) for t in range(part.shape[1])], 1
                ))  # fmt: skip
                mtp = model.draft(part, got, together)
                assert torch.equal(mtp, drafted[:, first : first + part.shape[1]]), f"{rows} rows"
            assert_same_bits(together, alone)


# --- roll-back


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("back", [0, 1, 2, 3])
@pytest.mark.parametrize("name", MEMBERS)
def test_rollback(name: str, back: int, dtype: torch.dtype) -> None:
    """Four rows less the last `back` are the rows that were kept, and what comes after them too."""
    model = model_of(name, dtype)
    ids, after = token_ids(4, model, seed=1), token_ids(2, model, seed=2)
    for prompt in (1, 66):
        _, cache = prefilled(model, prompt)
        model(ids, cache)
        cache.rollback(back)
        _, kept = prefilled(model, prompt)
        model(ids[:, : 4 - back], kept)
        assert cache.length == prompt + 4 - back
        assert_same_bits(cache, kept)
        assert torch.equal(model(after, cache), model(after, kept))
        assert_same_bits(cache, kept)


def test_rollback_in_steps() -> None:
    """Two roll-backs of one pass add up."""
    model = model_of("27B")
    ids = token_ids(4, model, seed=1)
    _, cache = prefilled(model, 10)
    _, kept = prefilled(model, 10)
    model(ids, cache)
    cache.rollback(1)
    cache.rollback(2)
    model(ids[:, :1], kept)
    assert_same_bits(cache, kept)


# --- the KV buffer


def test_kv_buffer_grows() -> None:
    """Doubling: what was held stays, what is returned is everything, few copies are made."""
    cache = KVCache(*(torch.empty(1, 2, 0, 4) for _ in range(2)))
    k, v = torch.randn(1, 2, 300, 4), torch.randn(1, 2, 300, 4)
    buffers = set()
    for first in range(0, 300, 3):
        keys, values = cache.append(k[:, :, first : first + 3], v[:, :, first : first + 3])
        assert torch.equal(keys, k[:, :, : first + 3])
        assert torch.equal(values, v[:, :, : first + 3])
        buffers.add(cache.k.shape[2])
    assert cache.length == 300
    assert len(buffers) < 12
    assert cache.k.shape[2] < 2 * 300 + 3


@pytest.mark.parametrize("noise", ["std 100", "nan"])
@pytest.mark.parametrize("name", ["27B", "397B-A17B"])
def test_the_tail_of_the_kv_buffer_is_not_read(name: str, noise: str) -> None:
    """Garbage beyond the length, before decode passes and before a prefill pass, changes no bit."""
    model = model_of(name)

    def run(dirty: bool) -> tuple[list[Tensor], Cache]:
        cache = model.new_cache()
        outputs, soiled = [], 0
        for count in (64, 64, 64, 2, 4, 1):
            for state in [*cache.layers, cache.mtp]:
                if dirty and isinstance(state, KVCache):
                    for held in (state.k, state.v):
                        tail = held[:, :, state.length :]
                        soiled += tail.numel()
                        tail.normal_(0, 100) if noise == "std 100" else tail.fill_(torch.nan)
            ids = token_ids(count, model, seed=count)
            outputs.append(model(ids, cache))
            outputs.append(model.draft(ids, outputs[-1], cache))
        assert soiled or not dirty, "there was no tail"
        return outputs, cache

    clean, clean_cache = run(dirty=False)
    noisy, noisy_cache = run(dirty=True)
    assert all(torch.equal(a, b) for a, b in zip(clean, noisy, strict=True))
    assert_same_bits(clean_cache, noisy_cache)


def test_a_delta_state_that_goes_on_from_copies_cannot_go_back_behind_them():
    """A step's state replaces what an earlier decode pass had left to go back to."""
    zeros = torch.zeros(1, 3, 4), torch.zeros(1, 2, 2, 2)
    state = DeltaState(*zeros)
    state.advance(torch.ones(1, 5, 4), [torch.ones(1, 2, 2, 2), torch.full((1, 2, 2, 2), 2.0)])
    state.take(*zeros)
    with pytest.raises(AssertionError, match="only a decode pass goes back"):
        state.rollback(1)
    assert not state.recurrent.any()


@pytest.mark.parametrize("kind", [KVCache, FP8KVCache])
def test_several_parts_are_taken_in_their_order(kind: type[KVCache]) -> None:
    """Behind what is there, into buffers with more room, in one copy a tensor."""
    torch.manual_seed(0)
    whole = kind.empty((1, 2, 16), torch.float32, "cpu")
    whole.append(torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16))
    taken = kind.empty((1, 2, 16), torch.float32, "cpu")
    taken.reserve(20)
    edges = (0, 1), (1, 4), (4, 5), (5, 9)
    pieces = [
        [tensor[:, :, first:last] for tensor in whole.tensors().values()] for first, last in edges
    ]
    taken.take_all(pieces[:1])
    taken.take_all(pieces[1:])
    assert taken.length == 9 and taken.capacity == 20
    for name, tensor in whole.tensors().items():
        assert torch.equal(taken.tensors()[name].view(torch.uint8), tensor.view(torch.uint8)), name


# --- copies, snapshots


def filled(kind: type[KVCache], T: int, seed: int) -> KVCache:
    """A cache of T random positions."""
    generator = torch.Generator().manual_seed(seed)
    cache = kind.empty((1, 2, 16), torch.float32, "cpu")
    cache.append(*torch.randn(2, 1, 2, T, 16, generator=generator))
    return cache


@pytest.mark.parametrize("kind", [KVCache, FP8KVCache])
def test_a_copy_of_keys_and_values_has_its_own_memory(kind: type[KVCache]) -> None:
    cache = filled(kind, 5, seed=1)
    held = {name: tensor.clone() for name, tensor in cache.tensors().items()}
    copied = cache.copy()
    for name, tensor in cache.tensors().items():
        tensor.zero_()
        assert copied.tensors()[name].dtype == tensor.dtype
        assert torch.equal(copied.tensors()[name].view(torch.uint8), held[name].view(torch.uint8))
    assert (type(copied), copied.length) == (kind, 5)


def test_a_copy_has_the_dtypes_of_another_state() -> None:
    wide = KVCache.empty((1, 2, 16), torch.float64, "cpu")
    keys = filled(KVCache, 5, seed=1)
    assert torch.equal(keys.copy(wide).tensors()["k"], keys.tensors()["k"].double())
    state = DeltaState(torch.randn(1, 3, 4).bfloat16(), torch.randn(1, 2, 2, 2))
    state.advance(torch.ones(1, 4, 4).bfloat16(), [torch.ones(1, 2, 2, 2)])
    like = DeltaState(torch.zeros(1, 3, 4), torch.zeros(1, 2, 2, 2).double())
    for other, conv, recurrent in (
        (None, torch.bfloat16, torch.float32),
        (like, torch.float32, torch.float64),
    ):
        copied = state.copy(other)
        assert (copied.conv.dtype, copied.recurrent.dtype) == (conv, recurrent)
        assert torch.equal(copied.conv, state.conv.to(conv))
        assert torch.equal(copied.recurrent, state.recurrent.to(recurrent))
        assert copied.conv.data_ptr() != state.conv.data_ptr()
        assert copied.recurrent.data_ptr() != state.recurrent.data_ptr()
        assert copied.rows is None and copied.trail == []


def test_a_delta_state_takes_copies() -> None:
    given = torch.ones(1, 3, 4), torch.ones(1, 2, 2, 2)
    state = DeltaState(torch.zeros(1, 3, 4), torch.zeros(1, 2, 2, 2))
    state.take(*given)
    for tensor in given:
        tensor.zero_()
    assert state.conv.all() and state.recurrent.all()


def test_a_decode_pass_goes_back_no_further_than_its_own_parts() -> None:
    state = DeltaState(torch.zeros(1, 3, 4), torch.zeros(1, 2, 2, 2))
    state.advance(torch.ones(1, 5, 4), [torch.ones(1, 2, 2, 2)] * 2)
    with pytest.raises(AssertionError, match="only a decode pass goes back"):
        state.rollback(3)
    state.rollback(2)
    assert not state.recurrent.any()


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_an_empty_cache_has_parts_without_memory_on_its_device(kv_cache_dtype: str) -> None:
    cache = Cache.empty(
        model_of("397B-A17B").config, torch.bfloat16, "meta", 3, kv_cache_dtype=kv_cache_dtype
    )
    for state in [*cache.layers, cache.mtp]:
        assert state is not None
        assert all(t.is_meta and len(t) == 3 for t in state.tensors().values())
        if isinstance(state, KVCache):
            assert (state.capacity, state.length) == (0, 0)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("mtp", [True, False])
def test_snapshots_are_restored_one_behind_the_other(kv_cache_dtype: str, mtp: bool) -> None:
    """The snapshots are of three positions and then of five. The MTP head's rows are one behind."""
    config = model_of("397B-A17B").config

    def passes(cache: Cache, T: int, mtp_rows: int, seed: int) -> None:
        for i, state in enumerate([*cache.layers, cache.mtp]):
            generator = torch.Generator().manual_seed(seed + i)
            if isinstance(state, KVCache):
                B, G, _, K = state.k.shape
                rows = mtp_rows if state is cache.mtp else T
                state.append(*torch.randn(2, B, G, rows, K, generator=generator))
            elif state is not None:
                state.take(
                    *(torch.randn(t.shape, generator=generator) for t in state.tensors().values())
                )
        cache.advance(T)

    cache = Cache.empty(config, torch.float32, kv_cache_dtype=kv_cache_dtype)
    passes(cache, 3, 2, seed=1)
    first = cache.snapshot(mtp=mtp)
    passes(cache, 5, 5, seed=100)
    second = cache.snapshot(3, mtp=mtp)
    assert first.keys() == second.keys() == cache.snapshot(mtp=mtp).keys()
    assert any(name.startswith("mtp.") for name in first) == mtp
    lengths = {name: (first[name].shape[2], second[name].shape[2]) for name in first}
    assert lengths["layers.3.k"] == (3, 5) and lengths.get("mtp.k", (2, 5)) == (2, 5)
    assert cache.length == 8
    restored = Cache.empty(config, torch.float32, kv_cache_dtype=kv_cache_dtype)
    restored.restore([first, second], 8, mtp=mtp)
    assert restored.length == 8
    assert restored.mtp is not None and cache.mtp is not None
    assert restored.mtp.length == (7 if mtp else 0)
    for mine, theirs in zip(restored.layers, cache.layers, strict=True):
        same(mine, theirs)
    if mtp:
        same(restored.mtp, cache.mtp)


def same(mine: KVCache | DeltaState, theirs: KVCache | DeltaState) -> None:
    assert mine.tensors().keys() == theirs.tensors().keys()
    for name, tensor in theirs.tensors().items():
        assert torch.equal(mine.tensors()[name].view(torch.uint8), tensor.view(torch.uint8)), name
