"""The routed experts: the loop that specifies them and the grouped form that runs, bit for bit."""

from dataclasses import replace

import pytest
import torch

from qwen35.config import Config
from reference.moe import Experts, GroupedExperts, Router, SparseMoeBlock
from tests.support.family import FAMILY, randomise
from tests.support.fast_cases import quantised

CONFIG = Config.from_dict(FAMILY["397B-A17B"])


def both(dtype: torch.dtype) -> tuple[Experts, GroupedExperts]:
    """The same weights in the two forms."""
    loop, grouped = Experts(CONFIG), GroupedExperts(CONFIG)
    randomise(loop, 3)
    grouped.load_state_dict(loop.state_dict())
    return loop.to(dtype), grouped.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("N", [1, 2, 4, 5, 63, 64, 65, 130])
def test_the_loop_and_the_grouped_form_agree(N: int, dtype: torch.dtype) -> None:
    """Choices are random, or of few experts, or have one expert in every row."""
    loop, grouped = both(dtype)
    E, k = CONFIG.num_experts, CONFIG.num_experts_per_tok
    generator = torch.Generator().manual_seed(N)
    x = torch.randn(N, CONFIG.hidden_size, generator=generator).to(dtype)
    for first, last in ((0, E), (0, k), (E - k, E)):
        ids = torch.stack(
            [torch.randperm(last - first, generator=generator)[:k] + first for _ in range(N)]
        )
        weights = torch.rand(N, k, generator=generator)
        found, wanted = grouped(x, ids, weights), loop(x, ids, weights)
        assert found.dtype == wanted.dtype == dtype
        assert torch.equal(found, wanted)
        assert torch.equal(found.signbit(), wanted.signbit())


def test_quantised_experts_too() -> None:
    """Experts whose weights are decoded when they are hit."""
    sizes = FAMILY["397B-A17B"] | {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8}
    config = Config.from_dict(sizes | {"num_experts_per_tok": 3})
    loop, grouped = Experts(config), GroupedExperts(config)
    for form in (loop, grouped):
        quantised(form, seed=1)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids = torch.stack([torch.arange(8).roll(row)[:3] for row in range(7)])
    weights = torch.full((7, 3), 0.3)
    assert torch.equal(loop(x, ids, weights), grouped(x, ids, weights))


def test_the_model_runs_the_grouped_form() -> None:
    assert type(SparseMoeBlock(CONFIG).experts) is GroupedExperts


def test_without_a_shared_expert_the_routed_sum_is_all() -> None:
    config = Config.from_dict(FAMILY["397B-A17B"] | {"shared_expert_intermediate_size": 0})
    block = SparseMoeBlock(config)
    randomise(block, 5)
    x = torch.randn(2, 3, config.hidden_size, generator=torch.Generator().manual_seed(1))
    rows = x.flatten(0, 1)
    assert torch.equal(block(x), block.experts(rows, *block.gate(rows)).view(2, 3, -1))


@pytest.mark.parametrize("norm", [True, False])
def test_the_router_takes_the_likeliest_and_of_equals_the_first(norm: bool) -> None:
    """Half of the experts have the weights of the other half, so that each probability is there twice."""
    config = replace(CONFIG, norm_topk_prob=norm)
    E, k = config.num_experts, config.num_experts_per_tok
    router = Router(config).double()
    randomise(router, 7)
    router.weight[E // 2 :] = router.weight[: E // 2]
    x = torch.randn(5, config.hidden_size, generator=torch.Generator().manual_seed(8)).double()
    experts, weights = router(x)
    probabilities = (x @ router.weight.T).softmax(-1)
    assert experts.shape == weights.shape == (5, k)
    for row, likely in enumerate(probabilities.tolist()):
        best = sorted(range(E), key=lambda e: (-round(likely[e], 12), e))[:k]
        assert experts[row].tolist() == best
        total = sum(likely[e] for e in best) if norm else 1.0
        assert weights[row].tolist() == pytest.approx([likely[e] / total for e in best], rel=1e-9)


@pytest.mark.parametrize(("N", "tile"), [(1, 4), (4, 4), (5, 64), (65, 64)])
def test_products_of_experts_have_the_row_counts_of_the_pass(
    N: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few rows an expert has, in both forms: a row's bits would depend on the others."""
    seen: set[int] = set()
    original = torch.nn.functional.linear

    def spied(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.add(x.shape[:-1].numel())
        return original(x, weight)

    forms = both(torch.float32)
    x = torch.randn(N, CONFIG.hidden_size, generator=torch.Generator().manual_seed(N))
    ids = torch.arange(N * 2).view(N, 2) % CONFIG.num_experts
    monkeypatch.setattr(torch.nn.functional, "linear", spied)
    for form in forms:
        form(x, ids, torch.full((N, 2), 0.5))
        assert seen == {tile}
        seen.clear()
