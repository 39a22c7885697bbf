"""The two norms against torch's own in float64, and what they say of themselves."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reference.norm import RMSNorm, RMSNormGated
from tests.support.oracle import within_twice

EPS = 0.25  # large enough that its place in the formula shows


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(got: Tensor, same: Tensor, truth: Tensor) -> None:
    """got against torch in got's dtype and in float64."""
    assert got.dtype == same.dtype
    if got.dtype == torch.float64:
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)
    error, limit = within_twice(got, same, truth)
    assert error <= limit


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_models_norm_multiplies_by_one_more_than_its_weight(dtype: torch.dtype) -> None:
    norm = RMSNorm(6, EPS).to(dtype)
    assert torch.equal(norm.weight, torch.zeros(6, dtype=dtype))
    norm.weight.copy_(numbers(6, seed=1))
    x = numbers(2, 3, 6, seed=2).to(dtype)
    check(norm(x), *(F.rms_norm(y, (6,), 1 + norm.weight.to(y), EPS) for y in (x, x.double())))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate_type", ["swish", "silu", "sigmoid"])
def test_the_delta_nets_norm_comes_before_its_gate(dtype: torch.dtype, gate_type: str) -> None:
    norm = RMSNormGated(6, EPS, gate_type).to(dtype)
    assert torch.equal(norm.weight, torch.ones(6, dtype=dtype))
    norm.weight.copy_(numbers(6, seed=3))
    x, gate = numbers(2, 3, 6, seed=4).to(dtype), numbers(2, 3, 6, seed=5).to(dtype)
    act = torch.sigmoid if gate_type == "sigmoid" else F.silu
    check(
        norm(x, gate),
        *(F.rms_norm(y, (6,), norm.weight.to(y), EPS) * act(gate.to(y)) for y in (x, x.double())),
    )


def test_print_shows_their_sizes() -> None:
    assert repr(RMSNorm(6, 1e-6)) == "RMSNorm(6, eps=1e-06)"
    assert repr(RMSNormGated(8, 1e-5, "silu")) == "RMSNormGated(8, eps=1e-05, gate=silu)"
