"""A model over ranks against the whole model: numbers, bits, names, and what each rank reads.

The ranks are threads of one process here; test_group.py has processes over gloo.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qwen35.errors import InputError
from qwen35.generation import Generation
from qwen35.load import TINY, Loader, load
from qwen35.parallel.nodes import Summed, VocabularyEmbedding, VocabularyHead, ranks_of
from qwen35.parallel.ranks import ALONE, Ranks
from qwen35.parallel.reduce import ordered_sum
from qwen35.prefix.keys import identity
from qwen35.sampling import Sampling
from qwen35.swap import matching
from reference.model import Model
from tests.support.checkpoints import QUANTIZED_SIZES, QWEN3_5_FP8, QWEN3_6, write
from tests.support.dialects import quiet_load
from tests.support.family import FAMILY
from tests.support.oracle import relative, within_twice
from tests.support.ranks import on_threads
from weights.convert import convert
from weights.output import Options

EXACT = 1e-12
IDS = torch.randint(2000, (1, 200), generator=torch.Generator().manual_seed(4))
SAMPLINGS = [Sampling(vocab=2000), Sampling(temperature=0.8, top_k=20, seed=5, vocab=2000)]


def passes(model: Model, ids: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """A prefill, then decode passes of 1, 2 and 4 rows: all logits, and those of the MTP head."""
    cache = model.new_cache()
    hidden, start = [], 0
    for rows in (prompt, 1, 2, 4):
        hidden.append(model(ids[:, start : start + rows], cache))
        start += rows
    logits = model.lm_head(torch.cat(hidden, dim=1))
    if model.mtp is None:
        return logits, logits
    drafted = model.draft(ids[:, 1 : prompt + 1], hidden[0], cache)
    return logits, model.lm_head(drafted)


def loaded(folder: Path, dtype: torch.dtype | None, ranks: Ranks) -> Model:
    return load(folder, dtype=dtype, ranks=ranks)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_in_float64_it_is_the_whole_model(size: int) -> None:
    """The embedded model; with four ranks, two hold the same key heads of either kind of attention."""
    with torch.inference_mode():
        truth = passes(load(TINY, dtype=torch.float64), IDS, 100)
    everyone = on_threads(size, lambda r: passes(loaded(TINY, torch.float64, r), IDS, 100))
    for found in everyone:
        assert max(map(relative, found, truth)) < EXACT
        assert all(map(torch.equal, found, everyone[0]))


@pytest.mark.parametrize(
    ("member", "size"), [("0.8B", 2), ("35B-A3B", 2), ("35B-A3B", 4), ("Qwen3-Next", 2)]
)
def test_members_of_the_family(tmp_path: Path, member: str, size: int) -> None:
    """Dense with a tied head, experts, grouped projections."""
    write(tmp_path, member, QWEN3_6)
    ids = IDS[:, :80] % FAMILY[member]["vocab_size"]
    with torch.inference_mode():
        truth = passes(quiet_load(tmp_path, torch.float64), ids, 65)
    found = on_threads(size, lambda r: passes(loaded(tmp_path, torch.float64, r), ids, 65))
    assert (
        max(relative(a, b) for logits in found for a, b in zip(logits, truth, strict=True)) < EXACT
    )


PROMPT = IDS[0, :70].tolist()


def continued(ranks: Ranks, depth: int, dtype: torch.dtype) -> list[tuple[list[int], Tensor]]:
    """Greedy and sampled: the tokens, and the logits [tokens, V] behind them."""
    model = loaded(TINY, dtype, ranks)
    found = []
    for sampling in SAMPLINGS:
        text = Generation(model, PROMPT, 12, sampling, frozenset(), depth)
        logits = torch.stack([logits for _, logits in text])
        found.append((text.token_ids, logits))
    return found


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_tokens_are_the_references_but_for_near_ties(size: int) -> None:
    """If a text leaves the reference's, its logits up to there err at most twice as much, so that
    the two tokens nearly tie. All ranks have the same bits."""
    everyone = on_threads(size, partial(continued, depth=3, dtype=torch.bfloat16))
    with torch.inference_mode():
        exact = load(TINY, dtype=torch.float64)
    theirs_by_sampling = continued(ALONE, 0, torch.bfloat16)
    for own, (theirs, yardstick) in zip(
        zip(*everyone, strict=True), theirs_by_sampling, strict=True
    ):
        ours, logits = own[0]
        assert all(tokens == ours and torch.equal(bits, logits) for tokens, bits in own)
        same = next((i for i in range(len(ours)) if ours[i] != theirs[i]), len(ours) - 1) + 1
        with torch.inference_mode():
            text = torch.tensor([PROMPT + ours[: same - 1]])
            truth = exact.lm_head(exact(text, exact.new_cache()))[0, len(PROMPT) - 1 :]
        error, most = within_twice(logits[:same], yardstick[:same], truth)
        assert error <= most


def test_in_float64_tokens_are_the_references() -> None:
    theirs = continued(ALONE, 0, torch.float64)
    for ours in on_threads(2, partial(continued, depth=2, dtype=torch.float64)):
        assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]


# --- the sum


def test_the_sum_goes_in_the_order_of_ranks_in_float32() -> None:
    """Rounded once: in bfloat16 steps, or in another order, the small terms would be lost."""
    parts = torch.tensor([[1.0, 256.0], [2**-9, 1.0], [2**-9, 1.0], [2**-8, 0.0]]).bfloat16()
    assert ordered_sum(parts).tolist() == [1 + 2**-7, 258.0]
    big = torch.tensor([[1e8], [-1e8], [1.0]])
    assert ordered_sum(big).item() == 1.0 and ordered_sum(big[[2, 0, 1]]).item() == 0.0
    wide = torch.tensor([[1.0], [2**-40]], dtype=torch.float64)
    assert ordered_sum(wide).item() == 1 + 2**-40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_has_the_same_bits_at_every_row_count(dtype: torch.dtype) -> None:
    parts = torch.randn(4, 64, 97, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = ordered_sum(parts)
    for rows in (1, 2, 3, 4, 63):
        assert torch.equal(ordered_sum(parts[:, :rows]), whole[:rows])


# --- names


def test_names_stay_those_of_the_checkpoint() -> None:
    """Patterns, traces and swaps need no other names, and the repr shows what runs."""
    whole = load(TINY)
    for model in on_threads(2, lambda r: loaded(TINY, None, r)):
        own, theirs = (dict(m.named_parameters()) for m in (model, whole))
        assert own.keys() == theirs.keys()
        assert [n for n, _ in model.named_modules()] == [n for n, _ in whole.named_modules()]
        joined = {n for n, m in model.named_modules() if isinstance(m, Summed)}
        layers = [f"layers.{i}" for i in range(8)] + ["mtp.layers.0"]
        assert joined == {
            f"{layer}.{part}" for layer in layers for part in ("linear_attn", "self_attn", "mlp")
            if f"{layer}.{part}" in dict(whole.named_modules())
        }  # fmt: skip
        assert isinstance(model.embed_tokens, VocabularyEmbedding)
        assert isinstance(model.lm_head, VocabularyHead)
        rank = ranks_of(model).rank
        assert re.search(rf"\(mlp\): Summed\(\n +SparseMoeBlock, rank {rank} of 2\n", repr(model))
        assert identity(model, "x")["part"] == f"rank {rank} of 2"
    assert "part" not in identity(whole, "x") and "Summed" not in repr(whole)


class Doubled(torch.nn.Module):
    """Stands for the experts, and gives twice their output."""

    def __init__(self, experts: torch.nn.Module) -> None:
        super().__init__()
        self.inner = experts

    @classmethod
    def from_reference(cls, experts: torch.nn.Module) -> "Doubled":
        return cls(experts)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        return 2 * self.inner(x, experts, weights)


def test_a_swap_inside_of_a_part_is_summed_too() -> None:
    """The swap is made at load, or later in the loaded model."""
    swaps = [("layers.1.mlp.experts", Doubled)]
    with torch.inference_mode():
        truth = passes(load(TINY, dtype=torch.float64, swaps=swaps), IDS, 64)

    def at_load(ranks: Ranks) -> tuple[Tensor, Tensor]:
        return passes(load(TINY, dtype=torch.float64, swaps=swaps, ranks=ranks), IDS, 64)

    def later(ranks: Ranks) -> tuple[Tensor, Tensor]:
        model = loaded(TINY, torch.float64, ranks)
        (name,) = matching(model, "layers.1.mlp.experts")
        model.set_submodule(name, Doubled(model.get_submodule(name)))
        return passes(model, IDS, 64)

    for way in (at_load, later):
        assert all(relative(found[0], truth[0]) < EXACT for found in on_threads(2, way))


def test_a_swap_around_a_sum_is_refused() -> None:
    swaps = [("layers.1", Doubled)]
    with pytest.raises(
        InputError, match=r"layers\.1 holds layers\.1\.linear_attn, whose results the"
    ):
        on_threads(2, lambda r: load(TINY, swaps=swaps, ranks=r))


# --- what each rank reads


def test_a_rank_holds_its_share_and_maps_its_experts() -> None:
    """Experts and the plain rows of the embedding are views of the file: nothing of them is read."""
    whole = sum(p.nbytes for p in load(TINY).parameters())
    for model in on_threads(2, lambda r: loaded(TINY, None, r)):
        held = sum(p.nbytes for p in model.parameters())
        assert 0.5 * whole < held < 0.53 * whole  # norms and routers are whole on each
        for name in (
            "embed_tokens",
            "layers.2.mlp.experts.3.up_proj",
            "layers.2.mlp.experts.3.down_proj",
        ):
            weight = model.get_parameter(f"{name}.weight")
            assert weight.untyped_storage().nbytes() > 20e6, name  # the file's own mapping


def test_a_rank_casts_its_share_alone() -> None:
    """To another dtype; what it does not hold is not read."""
    largest = load(TINY).embed_tokens.weight.numel()

    class Casts(TorchFunctionMode):
        most = 0

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            found = func(*args, **kwargs or {})
            if func is Tensor.to and found.dtype != args[0].dtype:
                self.most = max(self.most, args[0].numel())
            return found

    def most(ranks: Ranks) -> int:
        with Casts() as casts:
            loaded(TINY, torch.float32, ranks)
        return casts.most

    assert on_threads(2, most) == [largest // 2] * 2


SIZES = QUANTIZED_SIZES | {
    "linear_num_key_heads": 4, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256,
    "intermediate_size": 256,
}  # fmt: skip


@pytest.mark.parametrize("to", ["bf16", "mxfp4", "fp8"])
def test_parts_that_were_converted_are_what_ranks_read_of_the_whole(
    tmp_path: Path, to: Any
) -> None:
    """Bit for bit, in each format, and near the whole model."""
    write(tmp_path / "in", "35B-A3B", QWEN3_5_FP8 if to == "bf16" else QWEN3_6, **SIZES)
    options = Options(to, "experts")
    convert(tmp_path / "in", tmp_path / "whole", options)
    convert(tmp_path / "in", tmp_path / "parts", replace(options, tp=2))
    ids = IDS[:, :80] % 160

    def logits(folder: str, ranks: Ranks) -> Tensor:
        return passes(loaded(tmp_path / folder, torch.float64, ranks), ids, 65)[0]

    of_whole = on_threads(2, partial(logits, "whole"))
    of_parts = on_threads(2, partial(logits, "parts"))
    assert all(torch.equal(found, of_whole[0]) for found in of_whole + of_parts)
    with torch.inference_mode():
        assert relative(of_whole[0], logits("whole", ALONE)) < EXACT


def test_parts_of_another_number_of_ranks_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "in", "35B-A3B", QWEN3_6, **SIZES)
    convert(tmp_path / "in", tmp_path / "parts", Options("bf16", tp=2))
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: on_threads(4, lambda r: load(tmp_path / "parts", ranks=r)),
         r"parts: holds the folders of 2 ranks, and --tp is 4"),
        (lambda: load(tmp_path / "parts"), r"holds the folders of 2 ranks, which are joined by"),
        (lambda: load(tmp_path / "parts/rank-1-of-2"), "rank 1 of 2, but a whole checkpoint is needed"),
        (lambda: on_threads(2, lambda r: load(tmp_path / "parts/rank-1-of-2", ranks=r)),
         r"rank-1-of-2: holds rank 1 of 2, and rank 0 of 2 is read here"),
    ]  # fmt: skip
    for call, message in refused:
        with pytest.raises(InputError, match=message):
            call()


def test_groups_that_ranks_would_share_are_refused(tmp_path: Path) -> None:
    """MXFP4 has a scale for 32 numbers, FP8 one for 128 rows."""
    for to, message in (("mxfp4", "of axis 1 is not a multiple of 32"),
                        ("fp8", "of axis 0 is not a multiple of 128")):  # fmt: skip
        write(tmp_path / to / "in", "35B-A3B", QWEN3_6, **SIZES | {"moe_intermediate_size": 32})
        convert(tmp_path / to / "in", tmp_path / to / "out", Options(to, "experts"))
        with pytest.raises(
            InputError, match=rf"experts\.0\.\w+_proj.*: the range \d+\.\.\d+ {message}"
        ):
            on_threads(2, partial(loaded, tmp_path / to / "out", None))


@pytest.mark.parametrize(
    ("size", "message"),
    [(8, "num_attention_heads = 4 is not divisible by tensor-parallel size 8")],
)
def test_sizes_that_do_not_divide(size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        on_threads(size, lambda r: Loader(TINY, ranks=r))


def test_a_rank_with_another_checkpoint_is_refused(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        write(tmp_path / name, "35B-A3B", QWEN3_6, seed=seed, **SIZES)
        convert(tmp_path / name, tmp_path / f"{name}-parts", Options("bf16", tp=2))
    for kind in ("", "-parts"):
        with pytest.raises(InputError, match=r"checkpoint is .* on rank 0 and .* on rank 1"):
            on_threads(2, lambda r, kind=kind: load(tmp_path / f"{'ab'[r.rank]}{kind}", ranks=r))
