"""The error of a conversion: its sums, the worst group and where it is, in slices, tensors and ranks."""

import math

import pytest
import torch
from torch import Tensor

from weights import rounding
from weights.rounding import Rounding


def numbers(N: int, K: int, seed: int) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def off(x: Tensor, seed: int) -> Tensor:
    """x with an error of about a tenth."""
    return x * (1 + 0.1 * numbers(*x.shape, seed=seed))


def measured(name: str, x: Tensor, y: Tensor) -> Rounding:
    found = Rounding()
    found.add(name, x, lambda rows: y[rows])
    return found


def worst_of(x: Tensor, y: Tensor, group: int) -> tuple[float, int, int]:
    """The largest relative RMS of a group, its row and its first column."""
    errors, sizes = (z.double().unflatten(1, (-1, group)).norm(dim=-1) for z in (y - x, x))
    worst, at = (errors / sizes).flatten().max(0)
    row, part = divmod(int(at), x.shape[1] // group)
    return worst.item(), row, part * group


@pytest.mark.parametrize(("K", "group"), [(96, 32), (40, 40)])
@pytest.mark.parametrize("most", [1, 200, 1 << 20])
def test_sums_and_the_worst_group(
    K: int, group: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the slices' size; a row is the group where 32 does not divide it."""
    monkeypatch.setattr(rounding, "MEASURED", most)
    x = numbers(7, K, seed=1)
    y = off(x, seed=2)
    found = measured("w", x, y)
    worst, row, column = worst_of(x, y, group)
    assert (found.tensors, found.elements) == (1, 7 * K)
    assert found.squares == pytest.approx(x.double().square().sum().item(), rel=1e-9)
    assert found.error_squares == pytest.approx((y - x).double().square().sum().item(), rel=1e-5)
    assert found.worst == pytest.approx(worst, rel=1e-5)
    assert found.worst_at == f"w[{row}, {column}:{column + group}]"


def test_tensors_and_ranks_add_up() -> None:
    """One after the other or merged, with the worst group of all in whichever it is."""
    small, large = numbers(3, 64, seed=1), numbers(2, 32, seed=2)
    bad, good = off(small, seed=3) * 1.5, off(large, seed=4)
    expected_error = math.sqrt(
        ((bad - small).double().square().sum() + (good - large).double().square().sum()).item()
        / (small.double().square().sum() + large.double().square().sum()).item()
    )
    one = Rounding()
    for name, x, y in (("bad", small, bad), ("good", large, good)):
        one.add(name, x, lambda rows, y=y: y[rows])
    merged, other = measured("good", large, good), measured("bad", small, bad)
    merged.merge(other)
    reverse = measured("bad", small, bad)
    reverse.merge(measured("good", large, good))
    worst, row, column = worst_of(small, bad, 32)
    for found in (one, merged, reverse):
        summary = found.summary()
        assert summary == {
            "tensors": 2,
            "elements": 256,
            "relative_rms": pytest.approx(expected_error, rel=1e-5),
            "worst_group": pytest.approx(worst, rel=1e-5),
            "worst_at": f"bad[{row}, {column}:{column + 32}]",
        }


def test_nothing_and_zeros_have_no_error() -> None:
    nothing = {"tensors": 0, "elements": 0, "relative_rms": 0.0, "worst_group": 0.0, "worst_at": ""}
    assert Rounding().summary() == nothing
    found = measured("zeros", torch.zeros(2, 32), torch.zeros(2, 32))
    assert found.summary() == nothing | {"tensors": 1, "elements": 64}
