"""Vector instructions that are a function of each lane's own sources, one definition each.

Semantics follow AMD's published pseudocode (CDNA ISA documents). Known deviations: fma goes through
float64, so one result in about 2**29 is rounded twice; exp, log, rcp, rsq, sqrt, sin and cos are
correctly rounded, where the card is allowed an error of about 1 ulp.
"""

import operator
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tools.gfx950.formats import (
    f32_exponent,
)
from tools.gfx950.nans import is_signaling, no_value, quiet
from tools.gfx950.vector import define

U16, U32, U64 = np.uint16, np.uint32, np.uint64
I32, I64 = np.int32, np.int64
F32, F64 = np.float32, np.float64


# ---- moves and bits


def perm(a: NDArray, b: NDArray, selector: NDArray) -> NDArray:
    """Each byte of the selector picks a byte of {a, b} (0 is b's lowest), a sign (8 to 11), 0 or 0xff."""
    data = (a.astype(U64) << U64(32)) | b.astype(U64)
    result = U32(0)
    for i in range(4):
        choice = (selector >> U32(8 * i)) & U32(0xFF)
        byte = (data >> ((choice & U32(7)).astype(U64) * U64(8))) & U64(0xFF)
        if (choice >= 8).any():
            sign = (data >> ((choice & U32(3)).astype(U64) * U64(16) + U64(15))) & U64(1)
            byte = np.where(choice >= 8, sign * U64(0xFF), byte)
            byte = np.where(choice == 12, U64(0), np.where(choice > 12, U64(0xFF), byte))
        result = result | (byte.astype(U32) << U32(8 * i))
    return np.asarray(result)


def field(x: NDArray, start: NDArray, width: NDArray) -> NDArray:
    """bfe: width & 31 bits from bit start & 31 on; zero bits are 0."""
    return (x >> (start & 31)) & ((U32(1) << (width & 31)) - U32(1))


def signed_field(x: NDArray, start: NDArray, width: NDArray) -> NDArray:
    """bfe of a signed number: the field's highest bit is its sign."""
    width = width & U32(31)
    bits = (x >> (start & 31).view(I32)).view(U32) & ((U32(1) << width) - U32(1))
    sign = np.where(width > 0, U32(1) << ((width - U32(1)) & U32(31)), U32(0))
    return ((bits ^ sign) - sign).view(I32)


def reverse_bits(x: NDArray) -> NDArray:
    for width, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F)):
        x = ((x >> U32(width)) & U32(mask)) | ((x & U32(mask)) << U32(width))
    return x.astype(U32).byteswap()


def joined_shift(a: NDArray, b: NDArray, amount: NDArray) -> NDArray:
    """The low 32 bits of the 64 bits {a, b}, shifted right."""
    return (((a.astype(U64) << U64(32)) | b.astype(U64)) >> amount.astype(U64)).astype(U32)


def leading_zeros(x: NDArray) -> NDArray:
    """ffbh: zeros above the highest one; -1 if there is no one."""
    return np.where(x == 0, -1, 32 - np.frexp(x.astype(F64))[1]).astype(I32)


def trailing_zeros(x: NDArray) -> NDArray:
    """ffbl: zeros below the lowest one; -1 if there is no one."""
    lowest = x & (U32(0) - x)
    return np.where(x == 0, -1, np.frexp(lowest.astype(F64))[1] - 1).astype(I32)


def leading_signs(x: NDArray) -> NDArray:
    """ffbh of a signed number: how many of the highest bits equal the sign bit; -1 if all do."""
    return leading_zeros(np.where(x < 0, ~x, x).astype(I32).view(U32))


define("v_mov_b32 v_accvgpr_read_b32 v_accvgpr_write_b32 v_accvgpr_mov_b32", "u32 = u32", np.array)
define("v_mov_b64", "u64 = u64", np.array)
define("v_not_b32", "u32 = u32", np.invert)
define("v_and_b32", "u32 = u32 u32", operator.and_)
define("v_or_b32", "u32 = u32 u32", operator.or_)
define("v_xor_b32", "u32 = u32 u32", operator.xor)
define("v_xnor_b32", "u32 = u32 u32", lambda a, b: ~(a ^ b))
define("v_and_or_b32", "u32 = u32 u32 u32", lambda a, b, c: (a & b) | c)
define("v_or3_b32", "u32 = u32 u32 u32", lambda a, b, c: a | b | c)
define("v_bfi_b32", "u32 = u32 u32 u32", lambda a, b, c: (a & b) | (~a & c))
define("v_bfm_b32", "u32 = u32 u32", lambda a, b: ((U32(1) << (a & 31)) - U32(1)) << (b & 31))
define("v_bfe_u32", "u32 = u32 u32 u32", field)
define("v_bfe_i32", "i32 = i32 u32 u32", signed_field)
define("v_bfrev_b32", "u32 = u32", reverse_bits)
define("v_bcnt_u32_b32", "u32 = u32 u32", lambda a, b: np.bitwise_count(a).astype(U32) + b)
define("v_ffbh_u32", "i32 = u32", leading_zeros)
define("v_ffbl_b32", "i32 = u32", trailing_zeros)
define("v_ffbh_i32", "i32 = i32", leading_signs)
define("v_perm_b32", "u32 = u32 u32 u32", perm)
define("v_alignbit_b32", "u32 = u32 u32 u32", lambda a, b, c: joined_shift(a, b, c & 31))
define("v_alignbyte_b32", "u32 = u32 u32 u32", lambda a, b, c: joined_shift(a, b, (c & 3) * U32(8)))
define("v_cndmask_b32", "b32 = b32 b32 mask", lambda no, yes, mask: np.where(mask, yes, no))

# ---- shifts: a "rev" has the amount first

define("v_lshlrev_b32", "u32 = u32 u32", lambda amount, x: x << (amount & 31))
define("v_lshrrev_b32", "u32 = u32 u32", lambda amount, x: x >> (amount & 31))
define("v_ashrrev_i32", "i32 = i32 i32", lambda amount, x: x >> (amount & 31))
define("v_lshlrev_b16", "u16 = u16 u16", lambda amount, x: x << (amount & 15))
define("v_lshrrev_b16", "u16 = u16 u16", lambda amount, x: x >> (amount & 15))
define("v_ashrrev_i16", "i16 = i16 i16", lambda amount, x: x >> (amount & 15))
define("v_lshlrev_b64", "u64 = u32 u64", lambda amount, x: x << (amount & 63).astype(U64))
define("v_lshrrev_b64", "u64 = u32 u64", lambda amount, x: x >> (amount & 63).astype(U64))
define("v_ashrrev_i64", "i64 = u32 i64", lambda amount, x: x >> (amount & 63).astype(I64))
define("v_lshl_or_b32", "u32 = u32 u32 u32", lambda a, b, c: (a << (b & 31)) | c)
define("v_lshl_add_u32", "u32 = u32 u32 u32", lambda a, b, c: (a << (b & 31)) + c)
define("v_add_lshl_u32", "u32 = u32 u32 u32", lambda a, b, c: (a + b) << (c & 31))
define("v_lshl_add_u64", "u64 = u64 u32 u64", lambda a, b, c: (a << (b & 7).astype(U64)) + c)

# ---- integers


def multiply_high(a: NDArray, b: NDArray) -> NDArray:
    """The high 32 bits of a product, signed or unsigned as the sources are."""
    wide = I64 if a.dtype == I32 else U64
    return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)


def low24(x: NDArray) -> NDArray:
    """The low 24 bits, as a signed or unsigned number like the source."""
    if x.dtype == I32:
        return (x << 8) >> 8
    return x & U32(0xFFFFFF)


def add_carry(a: NDArray, b: NDArray, carry: NDArray | int = 0) -> tuple[NDArray, NDArray]:
    total = a.astype(U64) + b.astype(U64) + np.asarray(carry, U64)
    return total.astype(U32), total > U64(0xFFFFFFFF)


def subtract_borrow(a: NDArray, b: NDArray, borrow: NDArray | int = 0) -> tuple[NDArray, NDArray]:
    total = a.astype(I64) - b.astype(I64) - np.asarray(borrow, I64)
    return total.astype(U32), total < 0


def add_saturating(a: NDArray, b: NDArray) -> NDArray:
    total, carry = add_carry(a, b)
    return np.where(carry, U32(0xFFFFFFFF), total)


def subtract_saturating(a: NDArray, b: NDArray) -> NDArray:
    difference, borrow = subtract_borrow(a, b)
    return np.where(borrow, U32(0), difference)


def multiply_add_64(a: NDArray, b: NDArray, c: NDArray) -> tuple[NDArray, NDArray]:
    """32 x 32 + 64 bits, and bit 64 of the exact sum: the carry, or the sign that did not fit."""
    product = a.astype(c.dtype) * b.astype(c.dtype)
    total = product + c
    if c.dtype == U64:
        return total, total < c
    overflow = ((product ^ total) & (c ^ total)) < 0
    return total, (total < 0) ^ overflow


def middle(a: NDArray, b: NDArray, c: NDArray) -> NDArray:
    return np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))


define("v_add_u32", "u32 = u32 u32", operator.add, clamped=add_saturating)
define("v_sub_u32", "u32 = u32 u32", operator.sub, clamped=subtract_saturating)
define("v_subrev_u32", "u32 = u32 u32", lambda a, b: b - a)
define("v_add_i32", "i32 = i32 i32", operator.add)
define("v_sub_i32", "i32 = i32 i32", operator.sub)
define("v_add3_u32", "u32 = u32 u32 u32", lambda a, b, c: a + b + c)
define("v_xad_u32", "u32 = u32 u32 u32", lambda a, b, c: (a ^ b) + c)
define("v_sad_u32", "u32 = u32 u32 u32", lambda a, b, c: np.maximum(a, b) - np.minimum(a, b) + c)
define("v_add_co_u32", "u32 mask = u32 u32", add_carry)
define("v_sub_co_u32", "u32 mask = u32 u32", subtract_borrow)
define("v_subrev_co_u32", "u32 mask = u32 u32", lambda a, b: subtract_borrow(b, a))
define("v_addc_co_u32", "u32 mask = u32 u32 mask", add_carry)
define("v_subb_co_u32", "u32 mask = u32 u32 mask", subtract_borrow)
define("v_subbrev_co_u32", "u32 mask = u32 u32 mask", lambda a, b, c: subtract_borrow(b, a, c))
define("v_mul_lo_u32", "u32 = u32 u32", operator.mul)
define("v_mul_hi_u32", "u32 = u32 u32", multiply_high)
define("v_mul_hi_i32", "i32 = i32 i32", multiply_high)
define("v_mul_u32_u24", "u32 = u32 u32", lambda a, b: low24(a) * low24(b))
define("v_mul_i32_i24", "i32 = i32 i32", lambda a, b: low24(a) * low24(b))
define("v_mul_hi_u32_u24", "u32 = u32 u32", lambda a, b: multiply_high(low24(a), low24(b)))
define("v_mul_hi_i32_i24", "i32 = i32 i32", lambda a, b: multiply_high(low24(a), low24(b)))
define("v_mad_u32_u24", "u32 = u32 u32 u32", lambda a, b, c: low24(a) * low24(b) + c)
define("v_mad_i32_i24", "i32 = i32 i32 i32", lambda a, b, c: low24(a) * low24(b) + c)
define("v_mad_u64_u32", "u64 mask = u32 u32 u64", multiply_add_64)
define("v_mad_i64_i32", "i64 mask = i32 i32 i64", multiply_add_64)
for kind in ("u32", "i32", "u16", "i16"):
    define(f"v_min_{kind}", f"{kind} = {kind} {kind}", np.minimum)
    define(f"v_max_{kind}", f"{kind} = {kind} {kind}", np.maximum)
    three = f"{kind} = {kind} {kind} {kind}"
    define(f"v_min3_{kind}", three, lambda a, b, c: np.minimum(np.minimum(a, b), c))
    define(f"v_max3_{kind}", three, lambda a, b, c: np.maximum(np.maximum(a, b), c))
    define(f"v_med3_{kind}", three, middle)
define("v_add_u16", "u16 = u16 u16", operator.add)
define("v_sub_u16", "u16 = u16 u16", operator.sub)
define("v_subrev_u16", "u16 = u16 u16", lambda a, b: b - a)
define("v_mul_lo_u16", "u16 = u16 u16", operator.mul)
define("v_mad_u16 v_mad_legacy_u16", "u16 = u16 u16 u16", lambda a, b, c: a * b + c)
define("v_mad_u32_u16", "u32 = u16 u16 u32", lambda a, b, c: a.astype(U32) * b.astype(U32) + c)

# ---- floats


def picking(
    prefers: Callable[[NDArray, NDArray], NDArray], of_zeros: Callable[[NDArray], NDArray]
) -> Callable[[NDArray, NDArray], NDArray]:
    """Make a minimum or maximum, whose result has the bits of one of its two sources.

    If one is a quiet NaN, the result is the other; a signaling NaN is itself the result, made quiet.
    prefers: whether the first source is taken. of_zeros: the same for two zeros, from the first one's
    sign bit.
    """

    def pick(a: NDArray, b: NDArray) -> NDArray:
        equal = np.where(a == 0, of_zeros(np.signbit(a)), prefers(a, b))
        rest = np.where(np.where(a == b, equal, prefers(a, b)), a, b)
        chosen = np.where(np.isnan(a), b, np.where(np.isnan(b), a, rest))
        return np.where(is_signaling(a), quiet(a), np.where(is_signaling(b), quiet(b), chosen))

    return pick


minimum = picking(operator.lt, lambda negative: negative)
maximum = picking(operator.ge, lambda negative: ~negative)


def median(a: NDArray, b: NDArray, c: NDArray) -> NDArray:
    """The middle one of three numbers; the smallest one if one is a NaN."""
    least, most = minimum(minimum(a, b), c), maximum(maximum(a, b), c)
    rest = np.where(most == a, maximum(b, c), np.where(most == b, maximum(a, c), maximum(a, b)))
    return np.where(np.isnan(a) | np.isnan(b) | np.isnan(c), least, rest)


def fma(a: NDArray, b: NDArray, c: NDArray) -> NDArray:
    """a * b + c, computed in float64, which holds the product of two float32 exactly, then rounded."""
    return (a.astype(F64) * b.astype(F64) + c.astype(F64)).astype(a.dtype)


def in_f64(function: Callable[[NDArray], NDArray]) -> Callable[[NDArray], NDArray]:
    """The function computed in float64 and rounded to the source's type."""

    def rounded(x: NDArray) -> NDArray:
        return function(x.astype(F64)).astype(x.dtype)

    return rounded


def scale_by_power(x: NDArray, exponent: NDArray) -> NDArray:
    """ldexp. Exponents beyond 400 have the same effect: any value becomes infinite, or 0."""
    return np.ldexp(x.astype(F64), np.clip(exponent.astype(I32), -400, 400)).astype(x.dtype)


def fraction(x: NDArray) -> NDArray:
    return x - np.floor(x)


FLOATS = ("f32", "f16", "f64")
for kind in FLOATS:
    one, two, three = (f"{kind} = " + " ".join([kind] * n) for n in (1, 2, 3))
    define(f"v_add_{kind}", two, operator.add)
    define(f"v_sub_{kind}", two, operator.sub)
    define(f"v_subrev_{kind}", two, lambda a, b: b - a)
    define(f"v_mul_{kind}", two, operator.mul)
    define(f"v_min_{kind}", two, minimum, own_nans=True)
    define(f"v_max_{kind}", two, maximum, own_nans=True)
    define(f"v_min3_{kind}", three, lambda a, b, c: minimum(minimum(a, b), c), own_nans=True)
    define(f"v_max3_{kind}", three, lambda a, b, c: maximum(maximum(a, b), c), own_nans=True)
    define(f"v_med3_{kind}", three, median, own_nans=True)
    define(f"v_minimum3_{kind}", three, lambda a, b, c: np.minimum(np.minimum(a, b), c))
    define(f"v_maximum3_{kind}", three, lambda a, b, c: np.maximum(np.maximum(a, b), c))
    define(f"v_rndne_{kind}", one, np.rint)
    define(f"v_floor_{kind}", one, np.floor)
    define(f"v_ceil_{kind}", one, np.ceil)
    define(f"v_trunc_{kind}", one, np.trunc)
    define(f"v_fract_{kind}", one, fraction)
    define(f"v_sqrt_{kind}", one, np.sqrt)
    define(f"v_rcp_{kind}", one, in_f64(lambda x: 1 / x))
    define(f"v_rsq_{kind}", one, in_f64(lambda x: 1 / np.sqrt(x)))
    if kind != "f64":  # numpy has no fma in float64
        define(f"v_fma_{kind}", three, fma)
        define(f"v_fmac_{kind}", f"{kind} = {kind} {kind} +{kind}", fma)
define("v_rcp_iflag_f32", "f32 = f32", in_f64(lambda x: 1 / x))
define("v_exp_f32", "f32 = f32", in_f64(np.exp2))
define("v_exp_f16", "f16 = f16", in_f64(np.exp2))
define("v_log_f32", "f32 = f32", in_f64(np.log2))
define("v_log_f16", "f16 = f16", in_f64(np.log2))
define("v_sin_f32", "f32 = f32", in_f64(lambda x: np.sin(2 * np.pi * x)))
define("v_cos_f32", "f32 = f32", in_f64(lambda x: np.cos(2 * np.pi * x)))
define("v_ldexp_f32", "f32 = f32 i32", scale_by_power)
define("v_ldexp_f16", "f16 = f16 i16", scale_by_power)
define("v_fmamk_f32", "f32 = f32 f32 f32", lambda a, constant, b: fma(a, constant, b))
define("v_fmaak_f32", "f32 = f32 f32 f32", fma)


def frexp_exponent(x: NDArray) -> NDArray:
    return np.where(np.isfinite(x), np.frexp(x.astype(F64))[1], 0)


def frexp_mantissa(x: NDArray) -> NDArray:
    return np.where(np.isfinite(x), np.frexp(x)[0], x)


define("v_frexp_exp_i32_f32", "i32 = f32", frexp_exponent)
define("v_frexp_mant_f32", "f32 = f32", frexp_mantissa, own_nans=True)

# ---- division: div_scale, rcp, Newton steps with fma, div_fmas, div_fixup


def f32_exponents(x: NDArray) -> NDArray:
    return f32_exponent(x.view(U32)).astype(I32)


def is_denormal(x: NDArray) -> NDArray:
    return (x != 0) & (np.abs(x) < np.finfo(x.dtype).tiny)


def div_scale(x: NDArray, denominator: NDArray, numerator: NDArray) -> tuple[NDArray, NDArray]:
    """Numerator or denominator (x is one of them), scaled so that no step of the division leaves the
    range of f32; and whether div_fmas has to scale back."""
    inverse = 1 / denominator.astype(F64)
    quotient = numerator / denominator
    numerator_exponents = f32_exponents(numerator)
    zero = (numerator == 0) | (denominator == 0)
    far = numerator_exponents - f32_exponents(denominator) >= 96
    small = is_denormal(denominator)
    inverse_small, quotient_small = is_denormal(inverse), is_denormal(quotient)
    low = numerator_exponents <= 23
    special = zero | far | small | inverse_small | quotient_small | low
    if not special.any():
        return x, special
    up, down = scale_by_power(x, np.asarray(64)), scale_by_power(x, np.asarray(-64))
    if_denominator = np.where(x == denominator, up, x)
    cases = [  # the first case that holds counts
        (zero, F32(np.nan)),
        (far, if_denominator),
        (small, up),
        (inverse_small & quotient_small, if_denominator),
        (inverse_small, down),
        (quotient_small, np.where(x == numerator, up, x)),
        (low, up),
    ]
    scaled = np.select([case for case, _ in cases], [value for _, value in cases], x)
    back = ~zero & (far | (~small & quotient_small))
    return scaled, back


def div_fmas(a: NDArray, b: NDArray, c: NDArray, scale: NDArray) -> NDArray:
    """div_scale scaled by 2^64 one way or the other; this undoes it. (The published text has 2^32, which
    would undo nothing; AMD's text for other chips has these two.)"""
    exact = a.astype(F64) * b.astype(F64) + c.astype(F64)
    back = np.where(f32_exponents(c) > 127, 2.0**64, 2.0**-64)
    return np.where(scale, exact * back, exact).astype(F32)


def div_fixup(quotient: NDArray, denominator: NDArray, numerator: NDArray) -> NDArray:
    """The quotient with its sign, and the special cases that the steps before cannot get right."""
    negative = np.signbit(denominator) != np.signbit(numerator)
    infinite = (denominator == 0) | np.isinf(numerator)
    zero = np.isinf(denominator) | (numerator == 0)
    tiny = f32_exponents(numerator) - f32_exponents(denominator) < -150
    nan = np.isnan(denominator) | np.isnan(numerator)
    if not (infinite | zero | tiny | nan).any():
        return np.where(negative, -np.abs(quotient), np.abs(quotient))
    size = np.select([infinite, zero | tiny], [F32(np.inf), F32(0)], np.abs(quotient))
    result = np.where(negative, -size, size)
    result = np.where(infinite & zero, no_value(result.dtype), result)  # 0/0 and inf/inf
    result = np.where(np.isnan(denominator), quiet(denominator), result)
    return np.where(np.isnan(numerator), quiet(numerator), result)


define("v_div_scale_f32", "f32 mask = f32 f32 f32", div_scale, own_nans=True)
define("v_div_fixup_f32", "f32 = f32 f32 f32", div_fixup, own_nans=True)
# v_div_fmas_f32 reads VCC without naming it: see lanes.py.

# ---- comparisons


def ordered(a: NDArray, b: NDArray) -> NDArray:
    return ~(np.isnan(a) | np.isnan(b))


def all_true(a: NDArray, b: NDArray) -> NDArray:
    return np.ones(np.broadcast_shapes(a.shape, b.shape), bool)


def all_false(a: NDArray, b: NDArray) -> NDArray:
    return ~all_true(a, b)


INTEGER_COMPARISONS = {
    "f": all_false,
    "lt": operator.lt,
    "eq": operator.eq,
    "le": operator.le,
    "gt": operator.gt,
    "ne": operator.ne,
    "ge": operator.ge,
    "t": all_true,
}
FLOAT_COMPARISONS = {
    "f": all_false,
    "lt": operator.lt,
    "eq": operator.eq,
    "le": operator.le,
    "gt": operator.gt,
    "lg": lambda a, b: (a != b) & ordered(a, b),
    "ge": operator.ge,
    "o": ordered,
    "u": lambda a, b: ~ordered(a, b),
    "nge": lambda a, b: ~(a >= b),
    "nlg": lambda a, b: (a == b) | ~ordered(a, b),
    "ngt": lambda a, b: ~(a > b),
    "nle": lambda a, b: ~(a <= b),
    "neq": operator.ne,
    "nlt": lambda a, b: ~(a < b),
    "tru": all_true,
}


def float_class(x: NDArray, wanted: NDArray) -> NDArray:
    """Whether x belongs to one of the classes whose bit is set in `wanted`."""
    bits, negative = x.view(U32), np.signbit(x)
    exponent, mantissa = f32_exponent(bits), bits & U32(0x7FFFFF)
    sides = [(2, 9), (3, 8), (4, 7), (5, 6)]  # -inf, +inf; normal; denormal; zero
    side = np.select([exponent == 255, exponent > 0, mantissa > 0], [0, 1, 2], 3)
    number = np.array(sides)[side, np.where(negative, 0, 1)]
    number = np.where(np.isnan(x), np.where(mantissa >> U32(22), 1, 0), number)
    return (wanted >> number.astype(U32)) & U32(1) != 0


for kind in ("u32", "i32", "u64", "i64", "u16", "i16"):
    for name, compare in INTEGER_COMPARISONS.items():
        for prefix in ("v_cmp", "v_cmpx"):
            define(f"{prefix}_{name}_{kind}", f"mask = {kind} {kind}", compare)
for kind in FLOATS:
    for name, compare in FLOAT_COMPARISONS.items():
        for prefix in ("v_cmp", "v_cmpx"):
            define(f"{prefix}_{name}_{kind}", f"mask = {kind} {kind}", compare)
define("v_cmp_class_f32", "mask = f32 u32", float_class)
