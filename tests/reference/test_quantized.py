"""Linear layers with a quantised weight: they are those of the decoded weight."""

import pytest
import torch
from torch import Tensor, nn

from qwen35.errors import InputError
from reference.linear import linear
from reference.quantized import FP8Linear, MXFP4Linear
from weights import fp8, mxfp4

N, K = 6, 64
BLOCK = (4, 32)  # not the usual one


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(kind: str) -> tuple[nn.Module, Tensor]:
    """A layer, and its weight [N, K] in float32."""
    if kind == "mxfp4":
        packed, powers = mxfp4.quantize(numbers(N, K, seed=1))
        return MXFP4Linear(packed, powers, "a.weight"), mxfp4.dequantize(
            packed, powers, torch.float32
        )
    weight, scale = numbers(N, K, seed=1).to(fp8.E4M3), numbers(2, 2, seed=2).abs()
    truth = fp8.dequantize(weight, scale, torch.float32, BLOCK)
    return FP8Linear(weight, scale, "a.weight", BLOCK), truth


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_it_is_the_linear_layer_of_the_decoded_weight(kind: str) -> None:
    """The result has the dtype of the input, and no gradient."""
    layer, weight = made(kind)
    assert not any(p.requires_grad for p in layer.parameters())
    for dtype in (torch.float32, torch.bfloat16):
        x = numbers(2, 3, K, seed=3).to(dtype)
        assert torch.equal(layer(x), linear(x, weight.to(dtype)))


@pytest.mark.parametrize(
    ("kind", "line"), [("mxfp4", "64 -> 6"), ("fp8", "64 -> 6, a scale per block")]
)
def test_what_it_says_of_itself(kind: str, line: str) -> None:
    layer, _ = made(kind)
    assert layer.extra_repr() == line


@pytest.mark.parametrize(
    ("kind", "nan", "line"),
    [("mxfp4", mxfp4.NAN_SCALE, "a.weight: a scale is 255"),
     ("fp8", torch.nan, "a.weight: a scale is not a finite")],
)  # fmt: skip
def test_a_nan_scale_is_named_at_use(kind: str, nan: float, line: str) -> None:
    layer, _ = made(kind)
    layer.get_parameter("weight_scale")[1, 1] = nan
    with pytest.raises(InputError, match=line):
        layer(numbers(1, K, seed=3))
