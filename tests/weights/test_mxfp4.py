"""MXFP4 against the format and its rounding rule as plain Python states them, with exact fractions."""

import functools
import math
import struct
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen35.errors import InputError
from weights import mxfp4
from weights.mxfp4 import CHUNK, GROUP, dequantize, quantize

LEVELS = [Fraction(x) for x in ("0", "1/2", "1", "3/2", "2", "3", "4", "6")]
TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
LARGEST = (2 - 2**-23) * 2.0**127  # of float32
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


# ---- the format, stated once more ----


def decoded(byte: int, scale: int) -> tuple[float, float]:
    """The two numbers of a byte as Python floats, which hold all of them exactly."""

    def number(code: int) -> float:
        if scale == 255:
            return math.nan
        size = math.ldexp(float(LEVELS[code % 8]), scale - 127)
        return -size if code >= 8 else size

    return number(byte % 16), number(byte // 16)


def single(x: float) -> float:
    """x rounded to float32."""
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def beside(x: float, steps: int) -> float:
    """The positive float32 `steps` above x."""
    return struct.unpack(
        "<f", struct.pack("<i", struct.unpack("<i", struct.pack("<f", x))[0] + steps)
    )[0]


def to_even(code: int) -> int:
    return code % 2


@functools.cache
def nearest(size: Fraction, prefer: Callable[[int], int]) -> int:
    """The level that is nearest; of two that are as near, the one for which `prefer` is smaller."""
    return min(range(8), key=lambda code: (abs(LEVELS[code] - size), prefer(code)))


def encoded(
    group: list[float],
    carry: Fraction = Fraction(7, 4),
    prefer: Callable[[int], int] = to_even,
) -> tuple[list[int], int]:
    """32 numbers -> 32 codes and a scale byte.

    carry: the mantissa of amax from which it counts as the next power of two; prefer: see `nearest`.
    """
    group = [single(x) for x in group]
    if not all(map(math.isfinite, group)):
        return [0] * GROUP, 255
    mantissa, power = math.frexp(max(map(abs, group)))  # in [1/2, 1), or 0
    exponent = power - 1 + (2 * Fraction(mantissa) >= carry) - 2
    exponent = max(exponent, -127) if mantissa else -127
    sizes = [Fraction(math.ldexp(abs(x), -exponent)) for x in group]
    signs = [8 * (math.copysign(1, x) < 0) for x in group]
    codes = [nearest(size, prefer) + sign for size, sign in zip(sizes, signs, strict=True)]
    return codes, exponent + 127


# ---- the checks ----


def check_decoded(values: Tensor, packed: Tensor, scale: Tensor) -> None:
    """Equality with the statement, also in the sign of a zero; from 2^128 infinite, but for float64."""
    pairs = zip(
        packed.flatten().tolist(), scale.repeat_interleave(16, -1).flatten().tolist(), strict=True
    )
    numbers = [number for byte, s in pairs for number in decoded(byte, s)]
    if values.dtype != torch.float64:
        numbers = [math.copysign(math.inf, x) if abs(x) >= 2.0**128 else x for x in numbers]
    expected = torch.tensor(numbers, dtype=torch.float64)
    found = values.double().flatten()
    assert values.shape == (*packed.shape[:-1], packed.shape[-1] * 2)
    assert torch.equal(found.isnan(), expected.isnan())
    known = ~expected.isnan()
    assert torch.equal(found[known], expected[known])
    assert torch.equal(found.signbit()[known], expected.signbit()[known])


def as_bytes(groups: list[tuple[list[int], int]], rows: torch.Size) -> tuple[Tensor, Tensor]:
    """Codes and scales -> packed [*rows, K/2], scale [*rows, K/32]."""
    pairs = [
        low + 16 * high
        for codes, _ in groups
        for low, high in zip(codes[::2], codes[1::2], strict=True)
    ]
    packed = torch.tensor(pairs, dtype=torch.uint8).view(*rows, -1)
    return packed, torch.tensor([scale for _, scale in groups], dtype=torch.uint8).view(*rows, -1)


def stated(weight: Tensor, **rule: object) -> tuple[Tensor, Tensor]:
    """The weight that `encoded` makes of a weight [..., K]."""
    groups = weight.double().reshape(-1, GROUP).tolist()
    return as_bytes([encoded(group, **rule) for group in groups], weight.shape[:-1])  # type: ignore[arg-type]


def check_encoded(weight: Tensor, packed: Tensor, scale: Tensor) -> None:
    """Equality with the statement, bit for bit."""
    expected_packed, expected_scale = stated(weight)
    assert packed.dtype == scale.dtype == torch.uint8
    assert torch.equal(scale, expected_scale)
    assert torch.equal(packed, expected_packed)


# ---- what is checked ----


def every_byte_and_scale() -> tuple[Tensor, Tensor]:
    """packed [256, 256], scale [256, 16]: row s has all bytes with scale s."""
    codes = torch.arange(256, dtype=torch.uint8)
    return codes.expand(256, 256), codes[:, None].expand(256, 16)


def filled(numbers: list[float], rest: float = 0.0) -> list[float]:
    """A group that begins with `numbers`."""
    return numbers + [rest] * (GROUP - len(numbers))


def adversarial() -> Tensor:
    """[n, 32] float64: groups at the edges of the rule."""
    groups = []
    for k in (-140, -128, -127, -126, -125, -100, -14, -3, 0, 1, 9, 100, 124, 125):
        unit = 2.0**k
        for top in (4.0, 6.0):
            beyond = [beside(tie * unit, step) for tie in TIES for step in (-1, 0, 1)]
            groups.append(filled([top * unit, *beyond], 0.0))
            groups.append(filled([-top * unit, *(-x for x in beyond)], -0.0))
        for amax in (1.0, 1.25, 1.5, 1.75, 1.875):
            for step in (-1, 0, 1):
                groups.append([beside(amax * unit, step)] * GROUP)
                groups.append(
                    filled([0.3 * unit, -0.1 * unit, -beside(amax * unit, step)], unit / 8)
                )
        groups.append(filled([unit] * 31, -1000 * unit))
        groups.append(filled([-single(0.1) * unit], unit * 0.7))
    groups += [[0.0] * GROUP, [-0.0] * GROUP, [0.0, -0.0] * 16]
    groups += [
        filled([tiny]) for tiny in (2.0**-149, -(2.0**-149), 2.0**-128, 2.0**-127, 2.0**-126)
    ]
    groups += [[LARGEST] * GROUP, filled([-LARGEST, 1.0]), [x * 2.0**-149 for x in range(GROUP)]]
    for bad in (math.inf, -math.inf, math.nan):
        for place in (0, 7, 31):
            broken = [-1.5] * GROUP
            broken[place] = bad
            groups += [[3.0, -0.0] * 16, broken, [-2.5, 1.0] * 16]
    groups += [[math.inf, math.nan, -math.inf, -math.nan] * 8]
    # Rounded to float32 first: a tie, and an infinity.
    groups += [filled([4.0, 0.25 + 1e-12, 2.5 + 1e-12, 0.75 - 1e-12]), filled([1e300, 1.0])]
    return torch.tensor(groups, dtype=torch.float64)


def random_weight(seed: int, *shape: int) -> Tensor:
    """Gaussian, at the size of a trained weight."""
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_byte_with_every_scale(dtype: torch.dtype) -> None:
    """65,536 bytes, 131,072 numbers, all of them."""
    packed, scale = every_byte_and_scale()
    values = dequantize(packed, scale, dtype)
    assert values.dtype == dtype
    check_decoded(values, packed, scale)


def test_the_order_of_elements() -> None:
    """The example is made by hand: the low nibble comes first, and the second scale serves from
    element 32 on."""
    packed = torch.tensor([[0x21, 0x43, 0x65, 0x97, *[0] * 12, 0xF1, *[0] * 14, 0x80]]).byte()
    scale = torch.tensor([[127, 129]]).byte()
    values = dequantize(packed, scale)
    assert values.dtype == torch.bfloat16
    assert values[0, :8].tolist() == [0.5, 1, 1.5, 2, 3, 4, 6, -0.5]
    assert values[0, 32:34].tolist() == [2.0, -24.0]
    assert values[0, 63].signbit()
    assert not values[0, 62].signbit()
    again = quantize(values)
    assert torch.equal(again[0], packed)
    assert torch.equal(again[1], scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_edges_of_the_rule(dtype: torch.dtype) -> None:
    """Ties and their neighbours, carries of amax, subnormals, zeros, infinities and NaNs."""
    weight = adversarial().to(dtype)
    check_encoded(weight, *quantize(weight))


def test_a_group_that_is_not_finite_stays_alone() -> None:
    """Scale 255, codes 0; the neighbours are what they are without it."""
    good = random_weight(1, 3, GROUP)
    for bad in (math.inf, -math.inf, math.nan):
        weight = good.clone()
        weight[1, 5] = bad
        packed, scale = quantize(weight)
        assert scale[1].item() == 255
        assert not packed[1].any()
        assert dequantize(packed, scale)[1].isnan().all()
        for found, expected in zip((packed, scale), quantize(good), strict=True):
            assert torch.equal(found[::2], expected[::2])


floats = st.floats(width=32)
# Multiples of 2^-4 are ties often; a common power of two brings them to every exponent.
grid = st.tuples(
    st.lists(st.integers(-112, 112), min_size=GROUP, max_size=GROUP), st.integers(-149, 121)
).map(lambda drawn: [math.ldexp(x, drawn[1]) for x in drawn[0]])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.one_of(
        grid,
        st.lists(floats, min_size=GROUP, max_size=GROUP),
        st.lists(st.floats(-7, 7, width=32), min_size=GROUP, max_size=GROUP),
    ),
    st.sampled_from(DTYPES),
)
@example([0.0] * GROUP, torch.float32)
def test_any_group(group: list[float], dtype: torch.dtype) -> None:
    """Whatever 32 numbers are drawn."""
    weight = torch.tensor(group, dtype=torch.float64).to(dtype)
    check_encoded(weight, *quantize(weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussian_weights(dtype: torch.dtype) -> None:
    """Bit for bit, and as near as four bits come: an error of about 11% (root mean square)."""
    weight = random_weight(2, 20, 256).to(dtype)
    packed, scale = quantize(weight)
    check_encoded(weight, packed, scale)
    error = dequantize(packed, scale, torch.float64) - weight.double()
    assert 0.10 < float(error.norm() / weight.double().norm()) < 0.13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_second_time_changes_nothing(dtype: torch.dtype) -> None:
    """quantize(dequantize(q)) = q for what quantize made, up to where float32 ends."""
    edges = adversarial()
    edges = edges[edges.abs().amax(-1).nan_to_num(0.0) < 1.75 * 2.0**127]
    weight = torch.cat([edges, random_weight(3, 64, GROUP).double()])
    first = quantize(weight)
    again = quantize(dequantize(*first, dtype))
    assert torch.equal(again[0], first[0])
    assert torch.equal(again[1], first[1])


def test_where_float32_ends() -> None:
    """From 1.75 x 2^127 the nearest number is 2^128: a byte has it, float64 too, float32 does not."""
    packed, scale = quantize(torch.full((GROUP,), LARGEST))
    assert dequantize(packed, scale, torch.float64).eq(2.0**128).all()
    assert dequantize(packed, scale, torch.float32).isposinf().all()


def test_leading_axes_and_strides() -> None:
    """Any number of axes before K, in any order in memory; empty ones too."""
    weight = random_weight(4, 3, 5, 2 * GROUP)
    packed, scale = quantize(weight)
    assert packed.shape == (3, 5, GROUP)
    assert scale.shape == (3, 5, 2)
    check_encoded(weight, packed, scale)
    values = dequantize(packed, scale)
    for view in (
        weight.transpose(0, 1).contiguous().transpose(0, 1),
        weight.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        torch.stack([weight, -weight], dim=-1)[..., 0],
    ):
        assert not view.is_contiguous()
        for found, expected in zip(quantize(view), (packed, scale), strict=True):
            assert torch.equal(found, expected)
    strided = packed.mT.contiguous().mT, scale.mT.contiguous().mT
    assert torch.equal(dequantize(*strided), values)
    one = quantize(weight[0, 0])
    assert torch.equal(dequantize(*one), values[0, 0])
    for empty in ((0, GROUP), (3, 0), (0,)):
        assert dequantize(*quantize(torch.zeros(empty))).shape == empty


@pytest.mark.parametrize("groups", range(1, 8))
def test_chunks_do_not_show(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups at a time or all at once, with one that is not finite in each place."""
    weight = random_weight(5, groups, GROUP)
    for place in range(groups):
        weight[place, 3] = math.inf
        monkeypatch.setattr(mxfp4, "CHUNK", CHUNK)
        expected = quantize(weight)
        monkeypatch.setattr(mxfp4, "CHUNK", 2 * GROUP)
        for found, whole in zip(quantize(weight), expected, strict=True):
            assert torch.equal(found, whole)
        weight[place, 3] = 0.01


@pytest.mark.parametrize("more", [-GROUP, 0, GROUP])
def test_around_a_chunk(more: int) -> None:
    """There are as many elements as in a chunk, a group fewer, or a group more. The parts give the
    whole."""
    weight = random_weight(6, CHUNK + more)
    middle = CHUNK // 2 + GROUP
    parts = zip(quantize(weight[:middle]), quantize(weight[middle:]), strict=True)
    for found, part in zip(quantize(weight), parts, strict=True):
        assert torch.equal(found, torch.cat(part))


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_left_as_they_were(dtype: torch.dtype) -> None:
    """Both directions leave them so, also with a group that is not finite."""
    weight = random_weight(7, 4, GROUP).to(dtype)
    weight[2, 2] = math.nan
    before = weight.clone()
    packed, scale = quantize(weight)
    copies = packed.clone(), scale.clone()
    dequantize(packed, scale).zero_()
    assert torch.equal(weight.nan_to_num(9.0), before.nan_to_num(9.0))
    assert torch.equal(packed, copies[0])
    assert torch.equal(scale, copies[1])


# ---- errors ----


def message(attempt: Callable[[], object]) -> str:
    """The one line of the InputError that `attempt` raises."""
    with pytest.raises(InputError) as caught:
        attempt()
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("weight", [torch.zeros(2, 33), torch.zeros(2, 32, dtype=torch.int32)])
def test_what_cannot_be_quantised(weight: Tensor) -> None:
    """The shape, the dtype, and what they should have been."""
    text = message(lambda: quantize(weight))
    assert str(list(weight.shape)) in text
    assert str(weight.dtype) in text
    assert "multiple of 32" in text


@pytest.mark.parametrize(
    ("packed", "scale"),
    [
        ((2, 32), (2, 1)),
        ((2, 32), (2, 3)),
        ((2, 32), (1, 2)),
        ((2, 32), (2,)),
        ((2, 32), (2, 2, 1)),
        ((2, 24), (2, 1)),
        ((32,), ()),
    ],
)
def test_shapes_that_do_not_belong_together(
    packed: tuple[int, ...], scale: tuple[int, ...]
) -> None:
    """Both shapes are named."""
    text = message(lambda: dequantize(torch.zeros(packed).byte(), torch.zeros(scale).byte()))
    assert str(list(packed)) in text
    assert str(list(scale)) in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_a_dtype_that_is_not_exact(dtype: torch.dtype) -> None:
    """The error names the dtype that was asked for, and the one that there is."""
    packed, scale = quantize(torch.zeros(GROUP))
    text = message(lambda: dequantize(packed, scale, dtype))
    assert str(dtype) in text
    assert "torch.bfloat16" in text


@pytest.mark.parametrize(
    ("packed", "scale"),
    [
        (torch.int8, torch.uint8),
        (torch.float8_e4m3fn, torch.uint8),
        (torch.uint8, torch.float32),
        (torch.uint8, torch.float8_e4m3fn),
    ],
)
def test_bytes_that_are_no_bytes(packed: torch.dtype, scale: torch.dtype) -> None:
    """FP8 weights look like this; read as MXFP4 they would be nonsense."""
    wrong = torch.zeros(2, 16).to(packed), torch.zeros(2, 1).to(scale)
    text = message(lambda: dequantize(*wrong))
    assert str(packed) in text
    assert str(scale) in text


# ---- planted faults ----


def swapped(packed: Tensor) -> Tensor:
    """The nibbles of each byte exchanged."""
    return packed >> 4 | packed << 4


DECODER_FAULTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "high nibble first": lambda p, s: dequantize(swapped(p), s),
    "scale one too large": lambda p, s: dequantize(p, s + 1),
    "scales one group late": lambda p, s: dequantize(p, s.roll(1)),
    "sign dropped": lambda p, s: dequantize(p & 0x77, s),
    "sign of zero dropped": lambda p, s: dequantize(p, s) + 0.0,
    "subnormals flushed": lambda p, s: flushed(dequantize(p, s)),
    "255 is a power like the others": lambda p, s: dequantize(p, s).nan_to_num(math.inf),
    "0 is zero": lambda p, s: dequantize(p, s).where(s.repeat_interleave(32, -1) > 0, 0.0),
    "6 is 5": lambda p, s: dequantize(p, s) * (1 - (nibbles(p) % 8 == 7) / 6),
}


def flushed(values: Tensor) -> Tensor:
    """Subnormal numbers become zeros of their sign."""
    return values.where(~(values.abs() < 2.0**-126), values * 0)


def nibbles(packed: Tensor) -> Tensor:
    """packed [..., K/2] -> codes [..., K]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


@pytest.mark.parametrize("fault", DECODER_FAULTS)
def test_a_fault_of_a_decoder_is_seen(fault: str) -> None:
    """The check that the healthy decoder passes sees it."""
    packed, scale = every_byte_and_scale()
    with pytest.raises(AssertionError):
        check_decoded(DECODER_FAULTS[fault](packed, scale), packed, scale)


ENCODER_FAULTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "high nibble first": lambda w: changed(w, swapped),
    "halves of a group in the two nibbles": lambda w: changed(w, halves),
    "sign dropped": lambda w: changed(w, lambda p: p & 0x77),
    "sign of zero dropped": lambda w: changed(w, positive_zeros),
    "scale one too large": lambda w: (quantize(w)[0], quantize(w)[1] + 1),
    "scales one group late": lambda w: (quantize(w)[0], quantize(w)[1].roll(1)),
    "zeros with scale 1": lambda w: (quantize(w)[0], quantize(w)[1].masked_fill(zeros(w), 127)),
    "scale 255 for a finite group": lambda w: (
        quantize(w)[0],
        quantize(w)[1].masked_fill(zeros(w), 255),
    ),
    "infinities saturate": lambda w: quantize(w.nan_to_num(LARGEST, LARGEST, -LARGEST)),
    "exponent rounded down": lambda w: stated(w, carry=Fraction(2)),
    "exponent carries at 1.5": lambda w: stated(w, carry=Fraction(3, 2)),
    "exponent carries above 1.75": lambda w: stated(w, carry=Fraction(7, 4) + Fraction(1, 2**30)),
    "ties away from zero": lambda w: stated(w, prefer=lambda code: -code),
    "ties towards zero": lambda w: stated(w, prefer=lambda code: code),
    "ties to odd": lambda w: stated(w, prefer=lambda code: -(code % 2)),
}


def changed(weight: Tensor, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    packed, scale = quantize(weight)
    return change(packed), scale


def halves(packed: Tensor) -> Tensor:
    codes = nibbles(packed)
    return codes[..., :16] | codes[..., 16:] << 4


def positive_zeros(packed: Tensor) -> Tensor:
    codes = nibbles(packed)
    codes = codes.masked_fill(codes == 8, 0)
    return codes[..., ::2] | codes[..., 1::2] << 4


def zeros(weight: Tensor) -> Tensor:
    """[n, 1]: which groups are all zeros."""
    return weight.eq(0).all(-1, keepdim=True)


@pytest.mark.parametrize("fault", ENCODER_FAULTS)
def test_a_fault_of_an_encoder_is_seen(fault: str) -> None:
    """The check that the healthy encoder passes sees it."""
    weight = adversarial()
    with pytest.raises(AssertionError):
        check_encoded(weight, *ENCODER_FAULTS[fault](weight))


def test_another_dtype_names_those_that_there_are() -> None:
    packed, scale = quantize(torch.ones(2, 32))
    with pytest.raises(InputError) as raised:
        dequantize(packed, scale, torch.float16)
    assert str(raised.value) == (
        "MXFP4 is decoded to torch.bfloat16, torch.float32, torch.float64; torch.float16 was asked for"
    )


def test_numbers_are_decoded_where_the_bytes_are() -> None:
    packed = torch.empty(3, 16, dtype=torch.uint8, device="meta")
    scale = torch.empty(3, 1, dtype=torch.uint8, device="meta")
    assert dequantize(packed, scale).is_meta
    assert all(part.is_meta for part in quantize(torch.empty(0, 32, device="meta")))
