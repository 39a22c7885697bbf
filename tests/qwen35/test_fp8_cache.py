"""Keys and values in e4m3: the numbers, and that chunks, hits and drafts still change no bit."""

import copy
import json
from pathlib import Path

import pytest
import torch

import qwen35
from qwen35.cache import Cache, FP8KVCache, KVCache, from_e4m3, to_e4m3
from qwen35.errors import InputError
from qwen35.generate import build_parser, main
from qwen35.generation import Generation
from qwen35.load import TINY, load
from qwen35.prefix.cache import PrefixCache
from qwen35.prefix.folder import Folder
from qwen35.prefix.keys import identity
from qwen35.sampling import Sampling
from reference.model import Model
from tests.support.family import small_model
from tests.support.oracle import token_ids
from tools.exact import cells, differing, prompt_of


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def in_fp8(name: str = "397B-A17B") -> Model:
    model = copy.copy(small_model(name, seed=3, dtype=torch.bfloat16))
    model.kv_cache_dtype = "fp8"
    return model


# --- the numbers


def test_every_e4m3_number_comes_back() -> None:
    """254 finite bytes times each power of two that may occur; bfloat16 holds them all."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    assert len(every) == 254
    for power in (-60, -3, 0, 5, 60):
        x = (every * 2.0**power).bfloat16()
        numbers, scale = to_e4m3(x)
        assert int(scale) == 127 + power  # 448 is among them, which decides the scale
        assert torch.equal(from_e4m3(numbers, scale, torch.bfloat16), x)


@pytest.mark.parametrize("largest, power", [
    (448.0, 0), (450.0, 1), (896.0, 1), (1.75, -8), (1.7578125, -7), (1.0, -8), (2.0**100, 92),
])  # fmt: skip
def test_the_smallest_power_of_two_under_which_nothing_is_too_large(
    largest: float, power: int
) -> None:
    x = torch.tensor([[0.5 * largest, -largest, 0.0]]).bfloat16()
    numbers, scale = to_e4m3(x)
    assert int(scale) == 127 + power
    assert numbers.float().isfinite().all()


def test_rounding_is_to_the_nearest_with_ties_to_even() -> None:
    """The expected values are worked out by hand at scale 1: steps are 32 up to 448, and 1 between
    8 and 16."""
    x = torch.tensor([448.0, 400.0, 432.0, 417.0, 8.5, 9.5, 8.75]).bfloat16()
    numbers, scale = to_e4m3(x)
    assert int(scale) == 127
    assert numbers.float().tolist() == [448, 384, 448, 416, 8, 10, 9]


@pytest.mark.parametrize("x", [0.0, 2.0**-126, 2.0**-133, 3e38])
def test_zeros_and_the_ends_of_the_range(x: float) -> None:
    back = from_e4m3(*to_e4m3(torch.full((1, 4), x).bfloat16()), torch.float32)
    assert back.isfinite().all()
    assert abs(float(back[0, 0]) - x) <= max(x / 16, 2.0**-126)


@pytest.mark.parametrize("x", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(x: float) -> None:
    row = torch.tensor([[1.0, x, 2.0]]).bfloat16()
    back = from_e4m3(*to_e4m3(row), torch.float32)
    assert not back[0, 1].isfinite()


def test_each_position_and_head_has_its_own_scale() -> None:
    cache = FP8KVCache.empty((1, 2, 16), torch.bfloat16, "cpu")
    x = torch.rand(1, 2, 5, 16) * torch.tensor([1e-4, 1, 30, 1e4, 0])[:, None]
    keys, values = cache.append(x.bfloat16(), 3 * x.bfloat16())
    for held, given in ((keys, x), (values, 3 * x)):
        largest = given.abs().amax(-1, keepdim=True)
        assert ((held - given).abs() <= largest / 14).all()
    scales = cache.tensors()["k_scale"][0, :, :, 0].int()  # [G, T]
    assert (scales[:, :4].diff(dim=1) >= 4).all() and (scales[:, 4] == 1).all()


# --- the buffer


def test_the_buffer_grows_and_goes_back() -> None:
    cache = FP8KVCache.empty((1, 2, 16), torch.bfloat16, "cpu")
    x = torch.randn(1, 2, 300, 16).bfloat16()
    for first in range(0, 300, 3):
        keys, _ = cache.append(x[:, :, first : first + 3], x[:, :, first : first + 3])
    assert torch.equal(keys, from_e4m3(*to_e4m3(x), torch.bfloat16))
    cache.rollback(100)
    assert cache.tensors()["v_scale"].shape == (1, 2, 200, 1)
    again, _ = cache.append(x[:, :, 200:], x[:, :, 200:])
    assert torch.equal(again, keys)


def test_a_copy_and_a_snapshot_have_the_same_bytes() -> None:
    model = in_fp8()
    cache = model.new_cache()
    model(token_ids(64, model), cache)
    kv = next(state for state in cache.layers if isinstance(state, KVCache))
    for name, tensor in kv.copy().tensors().items():
        assert torch.equal(tensor.view(torch.uint8), kv.tensors()[name].view(torch.uint8))
    other = model.new_cache()
    other.restore([cache.snapshot()], 64)
    after = token_ids(3, model, seed=2)
    assert torch.equal(model(after, cache), model(after, other))


def test_it_takes_half_the_memory() -> None:
    def held(kind: str) -> int:
        cache = Cache.empty(small_model("397B-A17B").config, torch.bfloat16, kv_cache_dtype=kind)
        cache.reserve(1000)
        kv = [state for state in cache.layers if isinstance(state, KVCache)]
        return sum(b.nbytes for state in kv for b in state.buffers().values())

    K = small_model("397B-A17B").config.head_dim
    assert held("fp8") == held("auto") * (K + 1) / (2 * K)


# --- the same bits in every way to compute them


@pytest.mark.parametrize("length", [1, 65, pytest.param(200, marks=pytest.mark.slow)])
def test_chunks_hits_and_drafts_change_no_bit(length: int) -> None:
    model = load(TINY, kv_cache_dtype="fp8")
    prompt = prompt_of(length, model.config.vocab_size)
    found = [
        cell for name in ("greedy", "sampled") for depth in (0, 3) for chunk in (64, 4096)
        for cell in cells(model, prompt, name, depth, chunk, 8)
    ]  # fmt: skip
    assert not differing(found)
    plain = list(cells(load(TINY), prompt, "greedy", 0, 64, 8))
    assert plain[0].digest != found[0].digest  # it is another computation than in bfloat16


def test_a_folder_of_the_prefix_cache_is_never_shared_with_bfloat16(tmp_path: Path) -> None:
    prompt, tokens = prompt_of(130, 1000), {}
    for kind in ("auto", "fp8", "auto", "fp8"):
        model = load(TINY, kv_cache_dtype=kind)
        store = Folder(tmp_path, identity(model, "one"))
        kept = PrefixCache(model, budget=1 << 30, store=store, checkpoint="one")
        generation = Generation(model, prompt, 4, Sampling(), frozenset(), 3, prefix_cache=kept)
        found = [token for token, _ in generation]
        assert generation.cached_tokens == (128 if kind in tokens else 0)
        assert tokens.setdefault(kind, found) == found


# --- where it is chosen


def test_load_and_the_command_line_name_it_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["In the beginning", "--kv-cache-dtype", "fp8", "--json", "--max-new-tokens", "12"]
    assert main(build_parser().parse_args(args)) == 0
    document = json.loads(capsys.readouterr().out)
    model = load(TINY, kv_cache_dtype="fp8")
    assert document["text"] == str(qwen35.generate(model, "In the beginning", max_new_tokens=12))
    assert document["kv_cache_dtype"] == "fp8"


def test_an_unknown_one_is_refused() -> None:
    with pytest.raises(InputError, match="kv_cache_dtype 'int4'; expected auto or fp8"):
        load(TINY, kv_cache_dtype="int4")
