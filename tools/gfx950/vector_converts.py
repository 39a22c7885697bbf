"""Vector instructions for conversions, for dot products of pairs, and for packed values.

They are defined as in `vector_ops`, whose notes on rounding hold here too.
"""

import operator
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tools.gfx950.formats import (
    MINIFLOATS,
    bf16_to_f32,
    f16_to_f32,
    f32_to_bf16,
    f32_to_f16,
)
from tools.gfx950.nans import quiet
from tools.gfx950.vector import define, define_packed
from tools.gfx950.vector_ops import fma, maximum, minimum

U16, U32, U64 = np.uint16, np.uint32, np.uint64
I32, I64 = np.int32, np.int64
F32, F64 = np.float32, np.float64

# ---- conversions


def to_integer(kind: type[np.integer]) -> Callable[[NDArray], NDArray]:
    """A conversion to integers that rounds toward zero and saturates; NaN gives 0."""
    limits = np.iinfo(kind)

    def convert(x: NDArray) -> NDArray:
        whole = np.trunc(np.where(np.isnan(x), 0, x).astype(F64))
        return np.clip(whole, limits.min, limits.max).astype(I64).astype(kind)

    return convert


def byte_to_f32(place: int) -> Callable[[NDArray], NDArray]:
    def convert(x: NDArray) -> NDArray:
        return ((x >> U32(8 * place)) & U32(0xFF)).astype(F32)

    return convert


def packed(convert: Callable[[NDArray], NDArray]) -> Callable[[NDArray, NDArray], NDArray]:
    """A conversion of two values to 16 bits each, of which the first goes into the low half."""

    def pack(a: NDArray, b: NDArray) -> NDArray:
        return convert(a) | (convert(b) << U32(16))

    return pack


def f32_to_f16_toward_zero(x: NDArray) -> NDArray:
    nearest = x.astype(np.float16)
    too_large = np.abs(nearest.astype(F32)) > np.abs(x)
    return np.where(too_large, nearest.view(U16) - U16(1), nearest.view(U16)).astype(U32)


def exact(x: NDArray) -> NDArray:
    """The value itself: the result's type does the conversion."""
    return x


for kind in ("i32", "u32", "f16"):
    define(f"v_cvt_f32_{kind}", f"f32 = {kind}", exact)
define("v_cvt_f32_f64", "f32 = f64", exact)
define("v_cvt_f16_f32", "f16 = f32", exact)
define("v_cvt_f16_u16", "f16 = u16", exact)
define("v_cvt_f16_i16", "f16 = i16", exact)
define("v_cvt_f64_f32", "f64 = f32", exact)
define("v_cvt_f64_i32", "f64 = i32", exact)
define("v_cvt_f64_u32", "f64 = u32", exact)
define("v_cvt_i32_f32", "i32 = f32", to_integer(np.int32))
define("v_cvt_u32_f32", "u32 = f32", to_integer(np.uint32))
define("v_cvt_i32_f64", "i32 = f64", to_integer(np.int32))
define("v_cvt_u32_f64", "u32 = f64", to_integer(np.uint32))
define("v_cvt_i16_f16", "i16 = f16", to_integer(np.int16))
define("v_cvt_u16_f16", "u16 = f16", to_integer(np.uint16))
define("v_cvt_rpi_i32_f32", "i32 = f32", lambda x: to_integer(np.int32)(np.floor(x + F32(0.5))))
define("v_cvt_flr_i32_f32", "i32 = f32", lambda x: to_integer(np.int32)(np.floor(x)))
for place in range(4):
    define(f"v_cvt_f32_ubyte{place}", "f32 = u32", byte_to_f32(place))
define("v_cvt_f32_bf16", "f32 = u16", lambda x: quiet(bf16_to_f32(x)), own_nans=True)
define("v_cvt_pk_bf16_f32", "u32 = f32 f32", packed(f32_to_bf16))
define("v_cvt_pk_f16_f32", "u32 = f32 f32", packed(f32_to_f16))
define("v_cvt_pkrtz_f16_f32", "u32 = f32 f32", packed(f32_to_f16_toward_zero))
define("v_pack_b32_f16", "u32 = f16 f16", packed(lambda x: x.view(U16).astype(U32)))

# ---- fp8 without a scale; converts.py has those that take a scale or write a half of the destination


def pair_from(name: str) -> Callable[[NDArray], NDArray]:
    decode = MINIFLOATS[name].decode

    def convert(codes: NDArray) -> NDArray:
        low, high = decode(codes & U16(0xFF)), decode(codes >> U16(8))
        return low.view(U32).astype(U64) | (high.view(U32).astype(U64) << U64(32))

    return convert


define("v_cvt_pk_f32_fp8", "u64 = u16", pair_from("fp8"))
define("v_cvt_pk_f32_bf8", "u64 = u16", pair_from("bf8"))
define("v_cvt_f32_fp8", "f32 = u32", lambda x: MINIFLOATS["fp8"].decode(x & U32(0xFF)))
define("v_cvt_f32_bf8", "f32 = u32", lambda x: MINIFLOATS["bf8"].decode(x & U32(0xFF)))

# ---- dot products of pairs, summed in float64 and rounded once


def dot2(decode: Callable[[NDArray], NDArray]) -> Callable[[NDArray, NDArray, NDArray], NDArray]:
    def dot(a: NDArray, b: NDArray, c: NDArray) -> NDArray:
        total = c.astype(F64)
        for shift in (U32(0), U32(16)):
            half_a, half_b = decode((a >> shift) & U32(0xFFFF)), decode((b >> shift) & U32(0xFFFF))
            total = total + half_a.astype(F64) * half_b.astype(F64)
        return total.astype(F32)

    return dot


define("v_dot2c_f32_bf16", "f32 = u32 u32 +f32", dot2(bf16_to_f32))
define("v_dot2c_f32_f16", "f32 = u32 u32 +f32", dot2(f16_to_f32))

# ---- packed

for kind in ("f16", "f32"):
    define_packed(f"v_pk_add_{kind}", f"{kind} = {kind} {kind}", operator.add)
    define_packed(f"v_pk_mul_{kind}", f"{kind} = {kind} {kind}", operator.mul)
    define_packed(f"v_pk_fma_{kind}", f"{kind} = {kind} {kind} {kind}", fma)
define_packed("v_pk_min_f16", "f16 = f16 f16", minimum, own_nans=True)
define_packed("v_pk_max_f16", "f16 = f16 f16", maximum, own_nans=True)
three = "f16 = f16 f16 f16"
define_packed("v_pk_minimum3_f16", three, lambda a, b, c: np.minimum(np.minimum(a, b), c))
define_packed("v_pk_maximum3_f16", three, lambda a, b, c: np.maximum(np.maximum(a, b), c))
for kind in ("u16", "i16"):
    define_packed(f"v_pk_add_{kind}", f"{kind} = {kind} {kind}", operator.add)
    define_packed(f"v_pk_sub_{kind}", f"{kind} = {kind} {kind}", operator.sub)
    define_packed(f"v_pk_min_{kind}", f"{kind} = {kind} {kind}", np.minimum)
    define_packed(f"v_pk_max_{kind}", f"{kind} = {kind} {kind}", np.maximum)
    define_packed(f"v_pk_mad_{kind}", f"{kind} = {kind} {kind} {kind}", lambda a, b, c: a * b + c)
define_packed("v_pk_mul_lo_u16", "u16 = u16 u16", operator.mul)
define_packed("v_pk_lshlrev_b16", "u16 = u16 u16", lambda amount, x: x << (amount & 15))
define_packed("v_pk_lshrrev_b16", "u16 = u16 u16", lambda amount, x: x >> (amount & 15))
define_packed("v_pk_ashrrev_i16", "i16 = i16 i16", lambda amount, x: x >> (amount & 15))
