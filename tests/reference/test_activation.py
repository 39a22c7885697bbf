"""The activations against torch's own, in each dtype, and where softplus becomes x."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reference.activation import sigmoid, silu, softplus, wide
from tests.support.oracle import within_twice

POINTS = torch.tensor([-80, -20, -3, -0.5, 0, 0.5, 3, 19.5, 20, 20.25, 20.75, 21, 30, 90]).double()
PAIRS = [(sigmoid, torch.sigmoid), (silu, F.silu), (softplus, F.softplus)]


@pytest.mark.parametrize(("ours", "torchs"), PAIRS, ids=["sigmoid", "silu", "softplus"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_is_torchs(
    ours: Callable[[Tensor], Tensor], torchs: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    x = POINTS.to(dtype)
    got = ours(x)
    assert (got.dtype, got.shape) == (dtype, x.shape)
    truth = torchs(x.double())
    if dtype == torch.float64:
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=0)
    error, limit = within_twice(got[:, None], torchs(x)[:, None], truth[:, None])
    assert error <= limit


def test_softplus_is_x_only_above_20() -> None:
    """torch's is the same: at 20 itself it takes the logarithm, which float64 tells from 20."""
    below, above = torch.tensor([20.0]).double(), torch.tensor([20.25]).double()
    assert softplus(below).item() > 20
    assert softplus(above).item() == 20.25
    assert softplus(torch.tensor([1e4])).item() == 1e4


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32), (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32), (torch.float64, torch.float64),
    ],
)  # fmt: skip
def test_numbers_add_up_in_float32_or_more(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert wide(torch.ones(2, dtype=dtype)).dtype == expected
