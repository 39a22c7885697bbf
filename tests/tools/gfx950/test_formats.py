"""The number formats against torch's and against what the OCP documents list."""

import math
import runpy

import numpy as np
import pytest
import torch

from tools.gfx950 import formats
from tools.gfx950.formats import (
    Minifloat,
    bf16_to_f32,
    e8m0,
    f16_to_f32,
    f32_exponent,
    f32_to_bf16,
    f32_to_f16,
)

RANDOM = np.random.default_rng(1).integers(0, 1 << 32, 20000, np.uint32)
# Around the ties of bf16 and f16, and numbers of ordinary size.
NEAR = RANDOM & np.uint32(0xFFFFE001) | np.uint32(0x1000) * (RANDOM >> np.uint32(4) & np.uint32(1))
BITS = np.concatenate([RANDOM, NEAR, RANDOM & 0x87FFFFFF | 0x38000000]).astype(np.uint32)


@pytest.fixture
def tables() -> dict[str, Minifloat]:
    """Built anew, as an import does it."""
    return runpy.run_path(formats.__file__, run_name=formats.__name__)["MINIFLOATS"]


def same(got: np.ndarray, expected: torch.Tensor) -> None:
    np.testing.assert_array_equal(got, expected.double().numpy())  # NaN equals NaN


@pytest.mark.parametrize(
    ("to_code", "from_code", "dtype", "bit"),
    [(f32_to_bf16, bf16_to_f32, torch.bfloat16, 1 << 6), (f32_to_f16, f16_to_f32, torch.float16, 1 << 9)],
)  # fmt: skip
def test_half_precision_is_torchs(to_code, from_code, dtype: torch.dtype, bit: int) -> None:
    values = BITS.view(np.float32)
    expected = torch.from_numpy(values).to(dtype)
    codes = to_code(values)
    assert codes.dtype == np.uint32 and (codes < 1 << 16).all()
    is_nan = np.isnan(values)
    signed = expected.view(torch.int16).numpy().astype(np.uint16)
    np.testing.assert_array_equal(codes[~is_nan], signed[~is_nan])
    assert (codes[is_nan] & bit).all() and np.isnan(from_code(codes[is_nan])).all()
    np.testing.assert_array_equal(codes[is_nan] >> 15, BITS[is_nan] >> 31)
    every = np.arange(1 << 16, dtype=np.uint32)
    numbers = from_code(every | np.uint32(0 if dtype == torch.bfloat16 else 0xABC << 16))
    assert numbers.dtype == np.float32
    same(numbers, torch.from_numpy(every.astype(np.uint16).view(np.int16)).view(dtype))


def test_exponents() -> None:
    values = np.array([1.0, -1.0, 0.0, 2.0**-127, 1.5, 4.0, np.inf], np.float32)
    assert f32_exponent(values.view(np.uint32)).tolist() == [127, 127, 0, 0, 127, 129, 255]
    powers = e8m0(np.array([0, 1, 126, 127, 128, 254]))
    assert powers.tolist() == [2.0**-127, 2.0**-126, 0.5, 1.0, 2.0, 2.0**127]
    assert np.isnan(e8m0(np.array([255, 0]))).tolist() == [True, False]


SMALL = {  # the magnitudes by code
    "fp4": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "fp6": [k / 8 for k in range(16)] + [2 + k / 4 for k in range(8)] + [4 + k / 2 for k in range(8)],
    "bf6": [0, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.625, 0.75, 0.875, 1, 1.25,
            1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28],
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_small_formats_have_the_listed_numbers(tables: dict[str, Minifloat], name: str) -> None:
    magnitudes, bits = SMALL[name], {"fp4": 4}.get(name, 6)
    table = tables[name]
    assert (table.bits, table.limit) == (bits, len(magnitudes) - 1)
    values = table.decode(np.arange(1 << bits))
    assert values.tolist() == [*magnitudes, *(-x for x in magnitudes)]
    assert np.signbit(values).tolist() == [False] * len(magnitudes) + [True] * len(magnitudes)
    assert values.dtype == np.float32
    assert table.encode(np.array([math.nan, 1e9, -1e9])).tolist() == [
        len(magnitudes) - 1, len(magnitudes) - 1, 2 * len(magnitudes) - 1,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype", "limit"),
    [("fp8", torch.float8_e4m3fn, 0x7E), ("bf8", torch.float8_e5m2, 0x7B)],
)
def test_eight_bits_are_torchs(
    tables: dict[str, Minifloat], name: str, dtype: torch.dtype, limit: int
) -> None:
    table = tables[name]
    assert (table.bits, table.limit) == (8, limit)
    codes = torch.arange(256, dtype=torch.uint8)
    same(table.decode(codes.numpy()), codes.view(dtype))
    assert np.signbit(table.decode(np.arange(256))).tolist()[:0x7C] == [False] * 0x7C
    assert np.signbit(table.decode(np.arange(128, 128 + 0x7C))).all()


@pytest.mark.parametrize("name", ["fp8", "bf8", *SMALL])
def test_encoding_rounds_to_nearest_even_and_saturates(
    tables: dict[str, Minifloat], name: str
) -> None:
    """Every number, every middle of two, and the float64 numbers beside these."""
    table = tables[name]
    magnitudes = table.values[: table.limit + 1].astype(np.float64)
    sign_bit = 1 << (table.bits - 1)
    codes = np.arange(len(magnitudes))
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    cases = [
        (magnitudes, codes),
        (middles, codes[:-1] + codes[:-1] % 2),
        (np.nextafter(middles, 0), codes[:-1]),
        (np.nextafter(middles, np.inf), codes[1:]),
        (np.array([magnitudes[-1] * 1.4, np.inf]), np.full(2, table.limit)),
        (np.array([np.nan]), np.array([sign_bit - 1])),
    ]
    for values, expected in cases:
        got = table.encode(values)
        assert got.dtype == np.uint32
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(table.encode(np.copysign(values, -1.0)), expected | sign_bit)
