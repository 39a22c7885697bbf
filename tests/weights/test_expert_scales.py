"""Scales of all experts of a layer in one tensor, against scales that are repeated for every number."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35.errors import InputError
from weights.expert_scales import block_of, expert_scales, is_unscaled
from weights.storage import Stored

E, U8, E8M0 = 3, torch.uint8, torch.float8_e8m0fnu


def stored(scale: Tensor) -> Stored:
    return Stored("x_scale", Path("file"), scale.dtype, tuple(scale.shape), lambda: scale)


def numbered(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    count = int(torch.tensor(shape).prod())
    return (torch.arange(count) % 250).reshape(shape).to(dtype)


def spread(scales: Tensor, block: tuple[int, int], rows: int, columns: int) -> Tensor:
    """Scales of blocks, for each number of a matrix."""
    wide = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[:rows, :columns]


@pytest.mark.parametrize("shape", [(E,), (E, 1), (E, 1, 1)])
def test_one_scale_an_expert(shape: tuple[int, ...]) -> None:
    scale = numbered(*shape)
    for expert in range(E):
        view, block = expert_scales(
            stored(scale), expert, E, (256, 64), range(128, 256), (128, 128)
        )
        assert view(scale).flatten().tolist() == [expert] and block == (128, 128)


@pytest.mark.parametrize("shape", [(E, 10), (E, 10, 1)])
def test_one_scale_a_row(shape: tuple[int, ...]) -> None:
    scale = numbered(*shape)
    for rows in (range(5), range(5, 10), range(10)):
        view, block = expert_scales(stored(scale), 1, E, (10, 64), rows, (128, 128))
        assert view(scale).flatten().tolist() == [10 + row for row in rows] and block == (128, 128)


@pytest.mark.parametrize("matrix", [(512, 200), (512, 128), (512, 257)])
def test_blocks_of_gate_and_up_are_counted_through_both(matrix: tuple[int, int]) -> None:
    """Or from the start of each, which is the same where blocks divide them."""
    N, K = matrix
    scale = numbered(E, N // 128, -(-K // 128))
    for rows in (range(N // 2), range(N // 2, N), range(N)):
        view, block = expert_scales(stored(scale), 2, E, matrix, rows, (128, 128))
        whole = spread(scale[2], (128, 128), N, K)
        assert torch.equal(spread(view(scale), block, len(rows), K), whole[rows.start : rows.stop])


@pytest.mark.parametrize("N", [100, 128, 300])
def test_blocks_of_a_matrix_alone(N: int) -> None:
    """Of down, there is nothing that a last, shorter block could reach into."""
    scale = numbered(E, -(-N // 128), 2)
    view, block = expert_scales(stored(scale), 2, E, (N, 200), range(N), (128, 128))
    assert torch.equal(view(scale), scale[2]) and block == (128, 128)


@pytest.mark.parametrize("half", [96, 192, 64])
def test_a_block_reaches_from_gate_to_up(half: int) -> None:
    """The rows of up begin in the middle of a block."""
    N = 2 * half
    scale = numbered(E, -(-N // 128), 2)
    if 2 * -(-half // 128) == -(-N // 128):
        said = (
            f"x_scale has shape {list(scale.shape)}: it cannot be told whether a block of 128 rows "
            f"reaches from gate to up, which have {half} each"
        )
        for rows in (range(half), range(half, N)):
            with pytest.raises(InputError) as raised:
                expert_scales(stored(scale), 0, E, (N, 200), rows, (128, 128))
            assert str(raised.value) == said
        return
    for rows in (range(half), range(half, N)):
        view, block = expert_scales(stored(scale), 1, E, (N, 200), rows, (128, 128))
        whole = spread(scale[1], (128, 128), N, 200)
        found = spread(view(scale), block, half, 200)
        assert torch.equal(found, whole[rows.start : rows.stop])


@pytest.mark.parametrize("half", [64, 192])
def test_blocks_of_each_from_its_own_start(half: int) -> None:
    N, of_half = 2 * half, -(-half // 128)
    scale = numbered(E, 2 * of_half, 1)
    if 2 * of_half == -(-N // 128):
        pytest.skip("the same as through both")
    for part, rows in enumerate((range(half), range(half, N))):
        view, block = expert_scales(stored(scale), 1, E, (N, 100), rows, (128, 128))
        own = scale[1, part * of_half : (part + 1) * of_half]
        assert torch.equal(view(scale), own) and block == (128, 128)


@pytest.mark.parametrize("dtype", [U8, E8M0])
def test_mxfp8_has_blocks_of_32_in_a_row(dtype: torch.dtype) -> None:
    scale = numbered(E, 6, 3, dtype=U8).view(dtype)
    view, block = expert_scales(stored(scale), 1, E, (6, 96), range(3, 6), (128, 128))
    assert block == (1, 32)
    assert torch.equal(view(scale).view(U8), scale[1, 3:].view(U8))


@pytest.mark.parametrize(
    ("dtype", "shape", "matrix", "block"),
    [
        (U8, (6, 3), (6, 96), (1, 32)),
        (U8, (6, 3), (6, 70), (1, 32)),
        (E8M0, (6, 3), (6, 96), (1, 32)),
        (torch.float32, (6, 3), (6, 96), (128, 128)),
        (U8, (6, 2), (6, 96), (128, 128)),
        (U8, (1, 1), (1, 20), (128, 128)),
    ],
)
def test_which_block_a_matrix_has(
    dtype: torch.dtype, shape: tuple[int, ...], matrix: tuple[int, int], block: tuple[int, int]
) -> None:
    """32 in a row only for powers of two, whose shape is not that of the other blocks too."""
    scale = stored(
        numbered(*shape, dtype=U8).view(dtype) if dtype == E8M0 else numbered(*shape, dtype=dtype)
    )
    assert block_of(scale, shape, matrix, (128, 128)) == block


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((2, 1, 1), 256), ((E, 3, 1), 256), ((E, 2, 2), 256), ((E, 2), 256), ((E, 255), 256), ((), 256),
     ((E, 1, 1, 2), 256), ((E, 2, 1), 0)],
)  # fmt: skip
def test_scales_that_do_not_fit(shape: tuple[int, ...], rows: int) -> None:
    scale: Any = numbered(*shape) if shape else torch.tensor(1.0)
    with pytest.raises(InputError) as raised:
        expert_scales(stored(scale), 0, E, (256, 100), range(rows), (128, 128))
    assert str(raised.value) == (
        f"x_scale has shape {list(shape)}; experts of shape [256, 100] need [3, 2, 1] "
        "(a block of 128 x 128), [3, 256, 1] (a row) or [3, 1, 1] (an expert)"
    )


def test_weights_whose_scales_were_forgotten() -> None:
    """The first 4,096 numbers are e4m3, and not all of them 0."""
    codes = torch.randn(64, 100).to(torch.float8_e4m3fn).bfloat16()
    assert is_unscaled(codes) and not is_unscaled(codes * 1.1) and not is_unscaled(codes * 0)
    late = codes.clone().flatten()
    late[4096] = 1.1
    assert is_unscaled(late)
    late[4095] = 1.1
    assert not is_unscaled(late)
