"""Number formats of the card's instructions, as numpy arrays of their codes and of float values.

bf16 and f16 codes stand in the low 16 bits. fp8 is e4m3fn (no infinities, NaN is 0x7f and 0xff), bf8 is
e5m2 (IEEE-like), fp4 is e2m1 (no infinities, no NaN), e8m0 is a power of two. No conversion flushes
denormals: Triton compiles for a mode that keeps them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.gfx950.nans import quiet

U32 = np.uint32
_POWERS = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan)  # of e8m0, by code


def bf16_to_f32(codes: NDArray) -> NDArray[np.float32]:
    """The values of bf16 codes in the low halves of numbers; the high halves are not read."""
    return (codes.astype(U32) << U32(16)).view(np.float32)


def f32_to_bf16(values: NDArray) -> NDArray[np.uint32]:
    """The bf16 codes of values, rounded to nearest, ties to even; a NaN stays one and becomes quiet."""
    bits = np.asarray(values, np.float32).view(U32)
    half = U32(0x7FFF) + ((bits >> U32(16)) & U32(1))  # a tie goes up only from an odd code
    return np.where(np.isnan(values), (bits >> U32(16)) | U32(0x40), (bits + half) >> U32(16))


def f16_to_f32(codes: NDArray) -> NDArray[np.float32]:
    """The values of f16 codes in the low halves of numbers; the high halves are not read."""
    return codes.astype(np.uint16).view(np.float16).astype(np.float32)


def f32_to_f16(values: NDArray) -> NDArray[np.uint32]:
    """The f16 codes of f32 or f64 values, rounded to nearest, ties to even; a NaN becomes quiet."""
    return quiet(values.astype(np.float16)).view(np.uint16).astype(U32)


def f32_exponent(bits: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The biased exponent of f32 bits, which some instructions take as an e8m0 code."""
    return (bits >> U32(23)) & U32(0xFF)


def e8m0(codes: NDArray) -> NDArray[np.float64]:
    """2 ** (code - 127); NaN for code 255."""
    return _POWERS[codes]


@dataclass(frozen=True)
class Minifloat:
    """A format of 4, 6 or 8 bits: sign, exponent, mantissa.

    values [2**bits]: float32, by code. limit: the code of the largest finite magnitude.
    """

    bits: int
    values: NDArray[np.float32]
    limit: int

    def decode(self, codes: NDArray) -> NDArray[np.float32]:
        """The values of codes, which are unsigned and below 2**bits."""
        return self.values[codes]

    def encode(self, values: NDArray) -> NDArray[np.uint32]:
        """The codes of values, rounded to nearest, ties to even, and limited to the largest magnitude.

        A NaN gives the code with all magnitude bits set. In fp4, which has no NaN, this is the largest
        value.
        """
        magnitudes = self.values[: self.limit + 1].astype(np.float64)  # grow with the code
        middles = (magnitudes[1:] + magnitudes[:-1]) / 2  # exact in float64
        size = np.abs(np.asarray(values, np.float64))
        below = np.searchsorted(middles, size, side="left")
        above = np.searchsorted(middles, size, side="right")  # differs from `below` only at a tie
        sign_bit = 1 << (self.bits - 1)
        code = np.where(below % 2 == 0, below, above)
        code = np.where(np.isnan(size), sign_bit - 1, code)
        return (code | np.where(np.signbit(values), sign_bit, 0)).astype(U32)


def _minifloat(exponent_bits: int, mantissa_bits: int, bias: int, special: str) -> Minifloat:
    """A format. special: the codes that are not finite: "none"; "fn", those of all ones, which are NaN;
    or "ieee", those whose exponent is all ones."""
    bits = 1 + exponent_bits + mantissa_bits
    sign_bit, top = 1 << (bits - 1), (1 << exponent_bits) - 1
    values = np.zeros(1 << bits, np.float32)
    for code in range(sign_bit):
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        fraction = mantissa / (1 << mantissa_bits)
        value = (
            (1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias)
        )
        if special == "ieee" and exponent == top:
            value = np.nan if mantissa else np.inf
        if special == "fn" and code == sign_bit - 1:
            value = np.nan
        values[code], values[code | sign_bit] = value, -value
    limit = int(np.flatnonzero(np.isfinite(values[:sign_bit]))[-1])
    return Minifloat(bits, values, limit)


MINIFLOATS = {
    "fp8": _minifloat(4, 3, 7, "fn"),
    "bf8": _minifloat(5, 2, 15, "ieee"),
    "fp6": _minifloat(2, 3, 1, "none"),
    "bf6": _minifloat(3, 2, 3, "none"),
    "fp4": _minifloat(2, 1, 1, "none"),
}
