"""The table of angles: dtypes, devices, and positions to the end of the longest context."""

import math

import pytest
import torch

from reference.rope import apply_rope, rope_table


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_both_parts_are_cast(dtype: torch.dtype) -> None:
    """They are cast from float32, in which the angles are computed whatever the dtype is."""
    positions = torch.arange(300)
    cos, sin = rope_table(positions, 64, 1e7, dtype)
    wide_cos, wide_sin = rope_table(positions, 64, 1e7, torch.float32)
    assert cos.dtype == sin.dtype == dtype
    assert torch.equal(cos, wide_cos.to(dtype)) and torch.equal(sin, wide_sin.to(dtype))


def test_the_table_is_where_the_positions_are() -> None:
    cos, sin = rope_table(torch.arange(4, device="meta"), 8, 1e4, torch.float32)
    assert cos.is_meta and sin.is_meta


def test_an_angle_is_its_formula_at_any_position() -> None:
    """It is as exact as float32 can hold an angle, which grows to 262,143."""
    positions = [0, 1, 255, 256, 65_537, 262_143]
    for rotary_dim, theta in ((64, 1e7), (16, 1e4)):
        table = rope_table(torch.tensor(positions), rotary_dim, theta, torch.float64)
        for row, position in enumerate(positions):
            for i in range(rotary_dim // 2):
                angle = position * theta ** (-2 * i / rotary_dim)
                allowed = angle * 2**-21 + 2**-23
                for part, exact in zip(table, (math.cos(angle), math.sin(angle)), strict=True):
                    assert abs(float(part[row, i]) - exact) <= allowed


def test_what_is_rotated_keeps_its_dtype_and_the_rest_its_bits() -> None:
    """Channels j and j + 2 of four are a pair; the last two are not touched."""
    x = torch.randn(1, 1, 3, 6).bfloat16()
    cos, sin = rope_table(torch.arange(3), 4, 1e4, torch.bfloat16)
    rotated = apply_rope(x, cos, sin)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated[..., 4:], x[..., 4:])
    assert torch.equal(rotated[:, :, 0], x[:, :, 0])  # at position 0
    turned = torch.complex(x[0, 0, :, :2].float(), x[0, 0, :, 2:4].float()) * torch.complex(
        cos.float(), sin.float()
    )
    got = torch.complex(rotated[0, 0, :, :2].float(), rotated[0, 0, :, 2:4].float())
    assert torch.allclose(torch.view_as_real(got), torch.view_as_real(turned), atol=0.05)
