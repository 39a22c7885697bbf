"""FP8 weights against e4m3 as plain Python states it, and against explicit loops over the elements."""

import math
import struct
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen35.errors import InputError
from weights.fp8 import E4M3, dequantize, granularity, quantize_blocks, quantize_channels

TINY = 2.0**-126
KINDS = ["tensor", "channel", "block"]


def e4m3(byte: int) -> float:
    """Sign, four bits of exponent with bias 7, three of mantissa; all ones is NaN, none is infinite."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    size = math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)
    return -size if byte & 128 else size


SIZES = [e4m3(byte) for byte in range(127)]


def single(x: float) -> float:
    """x rounded to float32."""
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def rounded(x: float, dtype: torch.dtype) -> float:
    """x, a float32 number, rounded to dtype: to eight bits, ties to even, or left as it is."""
    if dtype == torch.float32:
        return x
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    bits += 0x7FFF + (bits >> 16 & 1)
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]


def as_e4m3(x: float) -> int:
    """The byte nearest to x, ties to the even one, magnitudes above 448 to 448."""
    size = min(abs(x), 448.0)
    nearest = min(range(127), key=lambda byte: (abs(SIZES[byte] - size), byte & 1))
    return nearest | 128 * (math.copysign(1, x) < 0)


def stated(numbers: list[float], scale_dtype: torch.dtype) -> tuple[list[int], float]:
    """Finite numbers that share a scale -> their bytes and the scale, division by division in float32."""
    numbers = [single(x) for x in numbers]
    amax = max(map(abs, numbers))
    scale = rounded(max(single(amax / 448), TINY), scale_dtype) if amax else 1.0
    return [as_e4m3(single(x / scale)) for x in numbers], scale


def bytes_of(weight: Tensor) -> list[list[int]]:
    return weight.view(torch.uint8).tolist()


def random_bytes(N: int, K: int) -> Tensor:
    """[N, K] e4m3, any byte, NaNs too."""
    generator = torch.Generator().manual_seed(N + K)
    return torch.randint(0, 256, (N, K), generator=generator, dtype=torch.uint8).view(E4M3)


def random_scale(kind: str, N: int, K: int, dtype: torch.dtype) -> Tensor:
    """Scales of many sizes."""
    shape = {"tensor": (), "channel": (N, 1), "block": (-(-N // 128), -(-K // 128))}[kind]
    generator = torch.Generator().manual_seed(3 * N + K)
    return (torch.randn(shape, generator=generator) * 3 - 5).exp().to(dtype)


def random_weight(N: int, K: int) -> Tensor:
    """Gaussian rows of different sizes."""
    generator = torch.Generator().manual_seed(5 * N + K)
    sizes = torch.randn(N, 1, generator=generator).exp()
    return 0.02 * torch.randn(N, K, generator=generator) * sizes


def check_decoded(values: Tensor, weight: Tensor, scale: Tensor, kind: str) -> None:
    """Element after element; NaN where the byte is."""
    N, K = weight.shape
    scales, numbers = scale.double().reshape(-1).tolist(), bytes_of(weight)
    across = -(-K // 128)
    expected = torch.empty(N, K, dtype=torch.float64)
    for n in range(N):
        for k in range(K):
            place = {"tensor": 0, "channel": n, "block": n // 128 * across + k // 128}[kind]
            expected[n, k] = e4m3(numbers[n][k]) * scales[place]  # exact: at most 28 bits
    if values.dtype != torch.float64:
        expected = expected.float().to(values.dtype).double()
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_byte(dtype: torch.dtype) -> None:
    """All 256, also the sign of zero."""
    weight = torch.arange(256, dtype=torch.uint8).view(E4M3)[None]
    values = dequantize(weight, torch.tensor(1.0), dtype)
    assert values.dtype == dtype
    expected = torch.tensor([[e4m3(byte) for byte in range(256)]], dtype=torch.float64)
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=0, equal_nan=True)
    known = ~expected.isnan()
    assert torch.equal(values.signbit()[known], expected.signbit()[known])
    assert known.sum() == 254


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (130, 129), (128, 300), (3, 257)])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_granularities(
    kind: str, shape: tuple[int, int], scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """Shapes that 128 does not divide, in each dtype of scale and result."""
    weight, scale = random_bytes(*shape), random_scale(kind, *shape, scale_dtype)
    values = dequantize(weight, scale, dtype)
    assert values.dtype == dtype
    check_decoded(values, weight, scale, kind)


@pytest.mark.parametrize(("kind", "flat"), [("tensor", (1,)), ("channel", (130,))])
def test_scales_without_their_last_axis(kind: str, flat: tuple[int, ...]) -> None:
    """[1] is [], and [N] is [N, 1]."""
    weight, scale = random_bytes(130, 20), random_scale(kind, 130, 20, torch.float32)
    assert granularity((130, 20), flat) == kind
    assert granularity((130, 20), tuple(scale.shape)) == kind
    check_decoded(dequantize(weight, scale.view(flat), torch.float32), weight, scale, kind)


def test_another_block_and_strides() -> None:
    """Blocks of 2 x 3, a transposed weight; the inputs stay as they were."""
    weight = random_bytes(7, 5).view(torch.uint8).T.contiguous().T.view(E4M3)
    scale = torch.arange(1.0, 9.0).view(4, 2)
    values = dequantize(weight, scale, torch.float64, block=(2, 3))
    for n in range(7):
        for k in range(5):
            expected = e4m3(bytes_of(weight)[n][k]) * float(scale[n // 2, k // 3])
            assert values[n, k].item() == expected or math.isnan(expected)
    assert torch.equal(scale, torch.arange(1.0, 9.0).view(4, 2))
    assert bytes_of(weight) == bytes_of(random_bytes(7, 5))


def test_blocks_of_one_row() -> None:
    """Blocks of 1 x 3: each number has the scale of its row's piece."""
    weight, scale = random_bytes(4, 5), torch.arange(1.0, 9.0).view(4, 2)
    expected = dequantize(weight, torch.tensor(1.0), torch.float32)
    expected *= scale.repeat_interleave(3, 1)[:, :5]
    values = dequantize(weight, scale, torch.float32, block=(1, 3))
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


def test_a_stack_is_decoded_matrix_by_matrix() -> None:
    weight, scale = random_bytes(6, 5).view(2, 3, 5), torch.arange(1.0, 9.0).view(2, 2, 2)
    stacked = dequantize(weight, scale, torch.bfloat16, block=(2, 3))
    assert (stacked.dtype, stacked.shape) == (torch.bfloat16, (2, 3, 5))
    for one, matrix, factors in zip(stacked, weight, scale, strict=True):
        expected = dequantize(matrix, factors, torch.bfloat16, block=(2, 3))
        torch.testing.assert_close(one, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 2), (3, 2, 2)])
def test_a_stack_needs_as_many_scales_as_matrices(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as caught:
        dequantize(random_bytes(6, 5).view(2, 3, 5), torch.ones(shape), torch.float32)
    assert str(caught.value) == (
        f"FP8 matrices of shape [2, 3, 5] have scales of shape {list(shape)}; "
        "expected scales for each of 2"
    )


def test_other_numbers_are_not_decoded() -> None:
    with pytest.raises(InputError) as caught:
        dequantize(torch.ones(2, 3), torch.tensor(1.0), torch.float32)
    assert str(caught.value) == "FP8 numbers have torch.float32; expected torch.float8_e4m3fn"


@pytest.mark.parametrize(
    "weight",
    [torch.ones(3), torch.ones(2, 3, 4), torch.ones(0, 3), torch.ones(2, 3, dtype=torch.int32)],
    ids=["a row", "a stack", "nothing", "integers"],
)
@pytest.mark.parametrize("encode", [quantize_blocks, quantize_channels])
def test_what_is_no_matrix_of_numbers_is_not_encoded(
    encode: Callable[[Tensor], tuple[Tensor, Tensor]], weight: Tensor
) -> None:
    with pytest.raises(InputError) as caught:
        encode(weight)
    assert str(caught.value) == (
        f"a weight of shape {list(weight.shape)} and {weight.dtype} cannot be FP8: "
        "two axes of floating-point numbers were expected"
    )


def test_a_nan_scale() -> None:
    """Makes its block NaN, and no other."""
    scale = torch.tensor([[1.0, math.nan], [1.0, 1.0]])
    values = dequantize(torch.ones(129, 129).to(E4M3), scale, torch.bfloat16)
    assert values.isnan().nonzero().tolist() == [[n, 128] for n in range(128)]


def check_blocks(weight: Tensor, values: Tensor, scale: Tensor, block: tuple[int, int]) -> None:
    """Each block against `stated`."""
    for i, rows in enumerate(weight.double().split(block[0])):
        for j, tile in enumerate(rows.split(block[1], dim=1)):
            expected, factor = stated(tile.flatten().tolist(), scale.dtype)
            part = values[i * block[0] :, j * block[1] :][: tile.shape[0], : tile.shape[1]]
            assert float(scale[i, j]) == factor
            assert part.contiguous().view(torch.uint8).flatten().tolist() == expected


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_encoding_blocks(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    """Blocks of 128 with smaller ones at both edges, and back within half a step of eight."""
    weight = random_weight(130, 131).to(dtype)
    before = weight.clone()
    values, scale = quantize_blocks(weight, scale_dtype=scale_dtype)
    assert (values.dtype, scale.dtype) == (E4M3, scale_dtype)
    assert (values.shape, scale.shape) == (weight.shape, (2, 2))
    check_blocks(weight, values, scale, (128, 128))
    assert torch.equal(weight, before)
    error = dequantize(values, scale, torch.float64) - weight.double()
    largest = scale.double().repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)[:, :131]
    # Half a step: 2^-4 of the number, or of the smallest normal one; a rounded scale may also saturate.
    assert (error.abs() <= weight.double().abs() / 16 + largest * 2**-10).all()


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_encoding_channels(scale_dtype: torch.dtype) -> None:
    """A scale a row."""
    weight = random_weight(9, 70)
    values, scale = quantize_channels(weight, scale_dtype)
    assert (values.dtype, scale.dtype) == (E4M3, scale_dtype)
    assert (values.shape, scale.shape) == ((9, 70), (9, 1))
    check_blocks(weight, values, scale, (1, 70))


def test_ties_go_to_the_even_byte() -> None:
    """Every middle between two neighbours and the float32 numbers beside it, with a scale of 1."""
    middles = torch.tensor([(e4m3(byte) + e4m3(byte + 1)) / 2 for byte in range(126)])
    around = [middles, middles.nextafter(torch.tensor(0.0)), middles.nextafter(torch.tensor(500.0))]
    row = torch.cat([torch.tensor([448.0, -0.0]), *around, *(-part for part in around)])
    values, scale = quantize_channels(row[None])
    assert scale.item() == 1.0
    assert bytes_of(values)[0] == [as_e4m3(x) for x in row.tolist()]
    middle = bytes_of(values)[0][2:128]
    assert middle == [byte + byte % 2 for byte in range(126)]


def test_a_scale_that_was_rounded_down_saturates() -> None:
    """448 is the end also where amax / scale is more: bfloat16 has no scale for it."""
    amax = 448 * (1 + 2**-8)  # halfway to the next bfloat16: the scale becomes 1
    values, scale = quantize_channels(torch.tensor([[amax, -amax, 1.0]]), torch.bfloat16)
    assert scale.item() == 1.0
    assert values.float().tolist() == [[448.0, -448.0, 1.0]]


def test_a_small_scale_of_float16_saturates() -> None:
    """Where float16 is coarse, amax / scale is far above 448."""
    amax = 448 * 1.4 * 2.0**-24
    values, scale = quantize_channels(torch.tensor([[amax, -amax]]), torch.float16)
    assert scale.item() == 2.0**-24
    assert values.float().tolist() == [[448.0, -448.0]]


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("amax", [2.0**-149, 2.0**-130, 2.0**-126, 2.0**-118, 3.4e38])
def test_very_small_and_very_large(amax: float, scale_dtype: torch.dtype) -> None:
    """A scale is at least 2^-126: smaller ones would not be normal numbers."""
    row = torch.tensor([[amax, -amax, amax / 3, 0.0]])
    values, scale = quantize_channels(row, scale_dtype)
    check_blocks(row, values, scale, (1, 4))
    assert scale.item() >= TINY


def test_zeros_and_what_is_not_finite() -> None:
    """Zeros have scale 1 and keep their signs; an infinity or a NaN makes its own block NaN."""
    weight = torch.ones(4, 6)
    weight[:2, :2] = torch.tensor([[0.0, -0.0], [-0.0, 0.0]])
    weight[1, 3], weight[3, 0], weight[2, 4] = math.inf, math.nan, -math.inf
    values, scale = quantize_blocks(weight, block=(2, 2))
    bad = torch.tensor([[False, True, False], [True, False, True]])
    assert torch.equal(scale.isnan(), bad)
    assert torch.equal(values.float().isnan(), bad.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert scale[0, 0] == 1
    assert values[:2, :2].contiguous().view(torch.uint8).tolist() == [[0, 128], [128, 0]]
    assert quantize_channels(torch.tensor([[1.0, 1e300]], dtype=torch.float64))[1].isnan().all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=12),
    st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_any_row(numbers: list[float], scale_dtype: torch.dtype) -> None:
    """Whatever finite numbers are drawn."""
    row = torch.tensor([numbers])
    values, scale = quantize_channels(row, scale_dtype)
    check_blocks(row, values, scale, (1, len(numbers)))


@pytest.mark.parametrize("shape", [(2,), (2, 1), (129,), (1, 130), (3, 2), (2, 2, 1), (130, 2)])
def test_scales_that_do_not_belong(shape: tuple[int, ...]) -> None:
    """Both shapes and what was expected, in a line."""
    weight = random_bytes(130, 300)
    with pytest.raises(InputError) as caught:
        dequantize(weight, torch.ones(shape), torch.float32)
    assert str(caught.value) == (
        f"an FP8 weight of shape [130, 300] has scales of shape {list(shape)}; expected [] (one), "
        "[130, 1] (a row) or [2, 3] (a block of 128 x 128)"
    )
    with pytest.raises(InputError, match=r"or \[65, 100\] \(a block of 2 x 3\)$"):
        granularity((130, 300), shape, (2, 3))


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((), "tensor"), ((1,), "tensor"), ((1, 1), "tensor"), ((130,), "channel"),
     ((130, 1), "channel"), ((2, 3), "block")],
)  # fmt: skip
def test_what_shares_a_scale(shape: tuple[int, ...], kind: str) -> None:
    assert granularity((130, 300), shape) == kind


FAULTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "divided by the scale": lambda w, s: dequantize(w, 1 / s, torch.float64),
    "blocks transposed": lambda w, s: dequantize(w, s.T.contiguous(), torch.float64),
    "blocks one row late": lambda w, s: dequantize(w, s.roll(1, 0), torch.float64),
    "blocks one column late": lambda w, s: dequantize(w, s.roll(1, 1), torch.float64),
    "blocks of equal parts": lambda w, s: w.double() * stretched(s, 75),
    "another exponent bias": lambda w, s: dequantize(w, s / 2, torch.float64),
    "NaN is 480": lambda w, s: dequantize(w, s, torch.float64).nan_to_num(480.0),
    "product in bfloat16": lambda w, s: dequantize(w, s, torch.bfloat16).double(),
}


def stretched(scale: Tensor, width: int) -> Tensor:
    """[2, 2] scales over 150 x 150, each over width x width."""
    return scale.double().repeat_interleave(width, 0).repeat_interleave(width, 1)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: str) -> None:
    """The check that the healthy decoder passes sees it."""
    weight, scale = random_bytes(150, 150), random_scale("block", 150, 150, torch.float32)
    with pytest.raises(AssertionError):
        check_decoded(FAULTS[fault](weight, scale), weight, scale, "block")


ENCODER_FAULTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "numbers cut off": lambda w: (cut(w / quantize_channels(w)[1]), quantize_channels(w)[1]),
    "scale inverted": lambda w: (quantize_channels(w)[0], 1 / quantize_channels(w)[1]),
    "a scale for the whole matrix": lambda w: whole(w),
    "the largest is 240": lambda w: (
        (w / quantize_channels(w)[1] * 240 / 448).to(E4M3),
        quantize_channels(w)[1] * 448 / 240,
    ),
    "sign dropped": lambda w: quantize_channels(w.abs()),
}


def cut(wide: Tensor) -> Tensor:
    """Rounded towards zero: the byte below where the nearest is above."""
    values = wide.to(E4M3)
    return (values.view(torch.uint8) - (values.float().abs() > wide.abs()).byte()).view(E4M3)


def whole(weight: Tensor) -> tuple[Tensor, Tensor]:
    values, scale = quantize_blocks(weight, block=tuple(weight.shape), scale_dtype=torch.float32)
    return values, scale.expand(len(weight), 1)


@pytest.mark.parametrize("fault", ENCODER_FAULTS)
def test_a_fault_of_an_encoder_is_seen(fault: str) -> None:
    """The check that the healthy encoder passes sees it."""
    weight = random_weight(5, 60)
    check_blocks(weight, *quantize_channels(weight), (1, 60))
    with pytest.raises(AssertionError):
        check_blocks(weight, *ENCODER_FAULTS[fault](weight), (1, 60))
