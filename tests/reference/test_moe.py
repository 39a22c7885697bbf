"""The routed experts: the loop that specifies them and the grouped form that runs, bit for bit."""

import pytest
import torch

from qwen35.config import Config
from reference.moe import Experts, GroupedExperts, SparseMoeBlock
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
