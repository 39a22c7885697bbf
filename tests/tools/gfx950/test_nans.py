"""Which NaN an operation gives, to the bit."""

import numpy as np
import pytest

from tools.gfx950.nans import is_signaling, no_value, passing_on, quiet

KINDS = {  # by dtype: an integer of its size, a negative signaling NaN, the same made quiet, 0/0
    np.float16: (np.uint16, 0xFC03, 0xFE03, 0xFE00),
    np.float32: (np.uint32, 0xFF800003, 0xFFC00003, 0xFFC00000),
    np.float64: (np.uint64, 0xFFF0000000000003, 0xFFF8000000000003, 0xFFF8000000000000),
}


@pytest.mark.parametrize("dtype", KINDS, ids=lambda dtype: dtype.__name__)
def test_a_nan_that_is_passed_on(dtype: type) -> None:
    """The first source that is one, made quiet; 0/0 if none is. Numbers and other results stay."""
    kind, signaling, quieted, of_nothing = KINDS[dtype]
    bad, other = np.array([signaling], kind).view(dtype), np.array([quieted + 1], kind).view(dtype)
    one, inf = np.ones(1, dtype), np.full(1, np.inf, dtype)

    def bits(found: object) -> list[int]:
        return np.asarray(found).view(kind).reshape(-1).tolist()

    assert bits(quiet(np.concatenate([bad, one]))) == [quieted, *bits(one)]
    assert is_signaling(np.concatenate([bad, quiet(bad), one, inf])).tolist() == [
        True,
        False,
        False,
        False,
    ]
    assert bits(no_value(np.dtype(dtype))) == [of_nothing]
    with np.errstate(all="ignore"):
        add = passing_on(np.add)
        assert bits(add(bad, other)) == [quieted] and bits(add(other, bad)) == [quieted + 1]
        assert bits(add(one, bad)) == [quieted] and bits(add(one, one)) == bits(one + one)
        assert bits(add(inf, -inf)) == [of_nothing]
        value, flag = passing_on(lambda a, b: (a + b, a > b))(one, bad)
        assert bits(value) == [quieted] and flag.tolist() == [False]


def test_what_is_left_as_it_is() -> None:
    """A result that is no float, and a conversion's NaN."""
    nan = np.array([0x7F800003], np.uint32).view(np.float32)
    assert passing_on(np.isnan)(nan).tolist() == [True]
    half = passing_on(lambda x: np.array([0x7E01], np.uint16).view(np.float16))(nan)
    assert np.asarray(half).view(np.uint16).tolist() == [0x7E01]
    whole = passing_on(lambda x: np.array([0x7FC00001], np.uint32).view(np.float32))(np.arange(1))
    assert np.asarray(whole).view(np.uint32).tolist() == [0xFFC00000]
