"""The numbers of AMD's published pseudocode: typed values, their bits, and exact arithmetic."""

import math
import struct
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

FORMATS = {16: "<e", 32: "<f", 64: "<d"}
MANTISSA = {16: 10, 32: 23, 64: 52}
SILENT: list[int] = []  # widths of NaN results whose bits the text does not define


class UnsupportedError(Exception):
    """The pseudocode uses something that this evaluator does not know."""


@dataclass(frozen=True)
class Value:
    """A typed number. kind: u, i, b (bits), f or bf. The value of a float is a Python float,
    rounded to its width."""

    kind: str
    width: int
    value: int | float

    @property
    def is_float(self) -> bool:
        return self.kind in ("f", "bf")


class NaN(float):
    """A NaN with known bits: those of an operand that is passed on, or of a constant.

    Arithmetic turns it into a plain NaN. bits: those of a float64 with the sign and payload of the
    NaN.
    """

    bits: int

    def __new__(cls, bits: int) -> "NaN":
        made = super().__new__(cls, math.nan)
        made.bits = bits
        return made

    @classmethod
    def of(cls, bits: int, width: int) -> "NaN":
        sign, payload = bits >> (width - 1), bits & ((1 << MANTISSA[width]) - 1)
        return cls(sign << 63 | 0x7FF << 52 | payload << (52 - MANTISSA[width]))

    def to(self, width: int) -> int:
        kept = (self.bits & ((1 << 52) - 1)) >> (52 - MANTISSA[width])
        exponent = ((1 << (width - 1 - MANTISSA[width])) - 1) << MANTISSA[width]
        return (self.bits >> 63) << (width - 1) | exponent | kept

    @property
    def is_quiet(self) -> bool:
        return bool(self.bits >> 51 & 1)

    def quieted(self) -> "NaN":
        return NaN(self.bits | 1 << 51)

    def __neg__(self) -> "NaN":
        return NaN(self.bits ^ 1 << 63)

    def __abs__(self) -> "NaN":
        return NaN(self.bits & ~(1 << 63))


def to_bits(v: Value) -> int:
    if v.kind == "bf":
        return round_to_bf16(v.value)
    if v.kind == "f":
        if isinstance(v.value, NaN):
            return v.value.to(v.width)
        if math.isnan(v.value):
            SILENT.append(v.width)
            return {16: 0x7E00, 32: 0x7FC00000, 64: 0x7FF8 << 48}[v.width]
        try:
            return int.from_bytes(struct.pack(FORMATS[v.width], v.value), "little")
        except OverflowError:
            return to_bits(Value("f", v.width, math.copysign(math.inf, v.value)))
    return int(v.value) & ((1 << v.width) - 1)


def from_bits(bits: int, kind: str, width: int) -> Value:
    bits &= (1 << width) - 1
    if kind == "bf":
        wide = from_bits(bits << 16, "f", 32)
        return Value("bf", 16, wide.value)
    if kind == "f":
        exponent = bits >> MANTISSA[width] & ((1 << (width - 1 - MANTISSA[width])) - 1)
        payload = bits & ((1 << MANTISSA[width]) - 1)
        if payload and exponent == (1 << (width - 1 - MANTISSA[width])) - 1:
            return Value("f", width, NaN.of(bits, width))
        return Value(
            "f", width, struct.unpack(FORMATS[width], bits.to_bytes(width // 8, "little"))[0]
        )
    if kind == "i" and bits >> (width - 1):
        bits -= 1 << width
    return Value(kind, width, bits)


def round_to_bf16(x: float) -> int:
    """The bits of the nearest bf16, with ties to even."""
    if isinstance(x, NaN):
        return x.quieted().to(32) >> 16
    if math.isnan(x):
        SILENT.append(16)
        return 0x7FC0
    sign = 0x8000 if math.copysign(1, x) < 0 else 0
    x = abs(x)
    if math.isinf(x) or x >= 2.0**128 * (1 - 2.0**-9):
        return sign | 0x7F80
    low, high = 0, 0x7F7F
    while low < high:  # the largest code whose value is not above x
        mid = (low + high + 1) // 2
        low, high = (mid, high) if from_bits(mid, "bf", 16).value <= x else (low, mid - 1)
    below = Fraction(from_bits(low, "bf", 16).value)
    above = Fraction(from_bits(low + 1, "bf", 16).value) if low < 0x7F7F else Fraction(2) ** 128
    d = (Fraction(x) - below) - (above - Fraction(x))
    return sign | (low + (d > 0 or (d == 0 and low % 2 == 1)))


def rounded(x: float | Fraction, width: int) -> float:
    """Round to a float of a width. An exact argument is rounded only once, except for ties in bit
    53."""
    if isinstance(x, float) and math.isnan(x):
        return x
    try:
        value = float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf
    return from_bits(to_bits(Value("f", width, value)), "f", width).value if width < 64 else value


def small_float(code: int, name: str) -> float:
    exponent_bits, mantissa_bits, bias = {"fp8": (4, 3, 7), "bf8": (5, 2, 15), "fp4": (2, 1, 1)}[
        name
    ]
    mantissa = code & ((1 << mantissa_bits) - 1)
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) & 1 else 1.0
    is_nan = (name == "fp8" and code & 0x7F == 0x7F) or (
        name == "bf8" and exponent == 31 and mantissa
    )
    if is_nan:
        return NaN((sign < 0) << 63 | 0x7FF8 << 48)
    if name == "bf8" and exponent == 31:
        return sign * math.inf
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


@cache
def magnitudes(name: str) -> list[Fraction]:
    """The finite non-negative values, by code."""
    codes = range(1 << (3 if name == "fp4" else 7))
    return [Fraction(v) for code in codes if math.isfinite(v := small_float(code, name))]


def to_small(x: float, name: str) -> int:
    """The code of the nearest value, with ties to even and saturation. It tries every code."""
    bits = 4 if name == "fp4" else 8
    if math.isnan(x):
        sign = x.bits >> 63 if isinstance(x, NaN) else 0
        return sign << (bits - 1) | (1 << (bits - 1)) - 1
    values = magnitudes(name)
    size = min(Fraction(abs(x)), values[-1]) if math.isfinite(x) else values[-1]
    best = min(range(len(values)), key=lambda code: (abs(values[code] - size), code % 2))
    return best | (1 << (bits - 1) if math.copysign(1, x) < 0 else 0)


def convert(v: Value, kind: str, width: int) -> Value:
    """The conversion x_to_y. It rounds to nearest (floats), or toward zero with saturation
    (integers)."""
    if kind == "f":
        if isinstance(v.value, NaN):  # undefined in the text; IEEE 754 conversions make it quiet
            return Value("f", width, v.value.quieted())
        value = v.value if isinstance(v.value, float) and not math.isfinite(v.value) else None
        return Value("f", width, rounded(v.value, width) if value is None else value)
    if v.is_float:
        low, high = (
            (0, 2**width - 1) if kind == "u" else (-(2 ** (width - 1)), 2 ** (width - 1) - 1)
        )
        if math.isnan(v.value):
            return Value(kind, width, 0)
        return Value(kind, width, int(min(max(v.value, low), high)))
    return from_bits(int(v.value), kind, width)


def exact_float(operator: str, x: float, y: float, width: int) -> float:
    if operator == "**":
        return math.nan if math.isnan(y) else 2.0 ** max(min(y, 1023), -2000)
    if not (math.isfinite(x) and math.isfinite(y)):
        if operator == "/" and math.isfinite(x):
            return math.copysign(0.0, x) * math.copysign(1, y) if math.isinf(y) else math.nan
        if operator == "/":
            raise UnsupportedError("division of infinity")
        return {"+": x + y, "-": x - y, "*": x * y}[operator]
    if operator == "/":
        if y == 0:
            return math.nan if x == 0 else math.copysign(math.inf, x) * math.copysign(1, y)
        return rounded(Fraction(x) / Fraction(y), width) or math.copysign(0.0, x) * math.copysign(
            1, y
        )
    native = {"+": x + y, "-": x - y, "*": x * y}[operator]
    exact = {
        "+": Fraction(x) + Fraction(y),
        "-": Fraction(x) - Fraction(y),
        "*": Fraction(x) * Fraction(y),
    }
    return rounded(exact[operator], width) if exact[operator] else native


def exact_fma(a: float, b: float, c: float, width: int) -> float:
    if not all(math.isfinite(v) for v in (a, b, c)):
        return a * b + c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    return rounded(exact, width) if exact else a * b + c


def special_float(name: str, x: float, width: int) -> float:
    if math.isnan(x):
        return math.nan
    if name == "sqrt":
        return rounded(math.sqrt(x), width) if x >= 0 else math.nan
    if name == "log2":
        return -math.inf if x == 0 else math.nan if x < 0 else math.log2(x) if x < math.inf else x
    if not math.isfinite(x) or x == 0:
        return x
    return math.copysign(float({"floor": math.floor, "trunc": math.trunc}[name](x)), x)
