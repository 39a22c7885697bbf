"""The matrix product: which row counts the library sees, and one row's bits among others."""

import pytest
import torch
from torch import Tensor

from reference.linear import DECODE_ROWS, GRID, Linear, linear, row_tile


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_two_row_counts() -> None:
    assert [row_tile(rows) for rows in (1, 4, 5, 64, 65)] == [4, 4, 64, 64, 64]
    assert (DECODE_ROWS, GRID) == (4, 64)


@pytest.mark.parametrize(
    "shape", [(1,), (4,), (2, 2), (5,), (2, 3), (64,), (65,), (2, 65), (1, 130)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_is_the_product(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = numbers(*shape, 24, seed=1).to(dtype), numbers(7, 24, seed=2).to(dtype)
    got = linear(x, weight)
    assert (got.dtype, got.shape) == (dtype, (*shape, 7))
    expected = x.double() @ weight.double().T
    bound = torch.finfo(dtype).eps * (x.double().abs() @ weight.double().abs().T)
    assert ((got.double() - expected).abs() <= bound).all()


def test_the_library_sees_two_row_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = torch.nn.functional.linear

    def spied(x: Tensor, weight: Tensor) -> Tensor:
        seen.append(len(x.reshape(-1, x.shape[-1])))
        return original(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", spied)
    counts = {}
    for rows in (1, 3, 4, 5, 63, 64, 65, 128, 130):
        seen.clear()
        linear(torch.ones(1, rows, 8), torch.ones(2, 8))
        counts[rows] = [*seen]
    assert counts == {
        1: [4], 3: [4], 4: [4], 5: [64], 63: [64], 64: [64], 65: [64] * 2, 128: [64] * 2,
        130: [64] * 3,
    }  # fmt: skip


def test_a_weight_of_another_dtype_is_cast() -> None:
    weight = numbers(7, 24, seed=2).bfloat16()
    x = numbers(3, 24, seed=1).float()
    got = linear(x, weight)
    assert got.dtype == torch.float32
    assert torch.equal(got, linear(x, weight.float()))


def test_the_module() -> None:
    module = Linear(24, 7).double()
    assert module.weight.shape == (7, 24)
    module.weight.copy_(numbers(7, 24, seed=2))
    x = numbers(3, 24, seed=1)
    assert torch.equal(module(x), linear(x, module.weight))
    assert repr(module) == "Linear(24 -> 7)"
