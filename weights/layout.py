"""The orders in memory in which kernels walk a matrix, and the way there and back, bit for bit.

Each order stands here twice. `Layout.axes` and `Layout.order` are the form that moves a whole tensor:
split the row-major matrix into axes, permute them, write them out. `Layout.offset` is the closed formula
that a kernel evaluates for one element. The tests hold the two against each other.

| name            | what it holds             | what lies side by side                                  |
|-----------------|---------------------------|---------------------------------------------------------|
| `flat`          | anything, any dtype       | a row (the checkpoint's own order)                      |
| `interleaved`   | gate rows, then up rows   | gate row 0, up row 0, gate row 1, ...                   |
| `interleaved16` | the same                  | gate rows 0 to 15, up rows 0 to 15, gate rows 16 to 31  |
| `aiter_weight`  | MXFP4 weights, two a byte | 16 rows x 16 bytes: of each row the block of one scale  |
| `aiter_scale`   | e8m0 scales, one a byte   | rows r, r + 16 of columns c, c + 4: one 32-bit word     |

A chain of layouts is written with "+", applied from the left: `interleaved+aiter_weight`.
The AITER orders are those of `shuffle_weight(layout=(16, 16))` and `shuffle_scale` in ROCm/aiter,
aiter/ops/shuffle.py; its `is_guinterleave` is `interleaved16`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from qwen35.errors import InputError

Size = tuple[int, int]
Index = TypeVar("Index", int, Tensor)


@dataclass(frozen=True)
class Layout:
    """One order of a matrix [R, C]. Sizes count elements, which are bytes where `only_bytes`."""

    axes: Callable[[int, int], tuple[int, ...]]  # R, C -> the axes that row-major order splits into
    order: tuple[int, ...]  # these axes as they lie in memory, the slowest first
    offset: Callable[..., Any]  # row, column, R, C -> position in the matrix's memory
    multiple: Size = (1, 1)  # of R and of C
    pads: bool = False  # whether other sizes are filled up with zeros (else they are refused)
    only_bytes: bool = False  # whether the dtype has to be uint8


# The formulas take int or int64 tensors for row and column; R and C are sizes after the filling.


def _flat(r: Index, c: Index, R: int, C: int) -> Index:
    return r * C + c


def _interleaved(r: Index, c: Index, R: int, C: int) -> Index:
    half = R // 2
    return (r % half * 2 + r // half) * C + c


def _interleaved16(r: Index, c: Index, R: int, C: int) -> Index:
    half = R // 2
    return ((r % half // 16 * 2 + r // half) * 16 + r % 16) * C + c


def _aiter_weight(n: Index, kb: Index, N: int, Kb: int) -> Index:
    """Tiles of 16 rows x 32 bytes, in each [half of the bytes (2)][row (16)][byte (16)]. A tile's halves
    follow each other as tiles do: (n >> 4) * 16 * Kb + (kb >> 4) * 256 + (n & 15) * 16 + (kb & 15)."""
    tile = (n >> 4) * (Kb >> 5) + (kb >> 5)
    return tile * 512 + ((kb >> 4) & 1) * 256 + (n & 15) * 16 + (kb & 15)


def _aiter_scale(r: Index, c: Index, R: int, C: int) -> Index:
    """Tiles of 32 rows x 8 scales, in each [c & 3][r & 15] words of bytes [c >> 2 & 1][r >> 4 & 1]."""
    tile = (r >> 5) * (C >> 3) + (c >> 3)
    word = (tile * 4 + (c & 3)) * 16 + (r & 15)
    return word * 4 + ((c >> 2) & 1) * 2 + ((r >> 4) & 1)


LAYOUTS = {
    "flat": Layout(axes=lambda R, C: (R, C), order=(0, 1), offset=_flat),
    "interleaved": Layout(
        axes=lambda R, C: (2, R // 2, C),
        order=(1, 0, 2),
        offset=_interleaved,
        multiple=(2, 1),
    ),
    "interleaved16": Layout(
        axes=lambda R, C: (2, R // 32, 16, C),
        order=(1, 0, 2, 3),
        offset=_interleaved16,
        multiple=(32, 1),
    ),
    "aiter_weight": Layout(
        axes=lambda N, Kb: (N // 16, 16, Kb // 32, 2, 16),
        order=(0, 2, 3, 1, 4),
        offset=_aiter_weight,
        multiple=(16, 32),
        only_bytes=True,
    ),
    "aiter_scale": Layout(
        axes=lambda R, C: (R // 32, 2, 16, C // 8, 2, 4),
        order=(0, 3, 5, 2, 4, 1),
        offset=_aiter_scale,
        multiple=(256, 8),
        pads=True,
        only_bytes=True,
    ),
}


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor together with the order that it lies in.

    data [..., R', C']: contiguous, in the dtype of the original; R', C' are R, C, filled up where the
    layout pads. Its axes only count: which element lies where is `offset`'s to say.
    layout: a name of `LAYOUTS`, or a chain of names. shape [..., R, C]: the row-major tensor's.
    """

    data: Tensor
    layout: str
    shape: tuple[int, ...]


def pack(x: Tensor, layout: str) -> Packed:
    """A row-major tensor [..., R, C] in another order, as a copy; leading axes (experts) stay.

    x: any strides; uint8 for the AITER layouts, any dtype for the others.

    `aiter_scale` fills each matrix up to multiples of 256 rows and 8 columns. AITER leaves the filling
    undefined (torch.empty); here it is 0, the e8m0 code of 2**-127, which is finite (255 is NaN) and
    the same in every run. AITER takes experts as one matrix [E * R, C]: the same where 256 divides R.

    Raises InputError for an unknown layout, fewer than two axes, and a dtype or size it cannot hold.
    """
    data = x
    for step, (rows, columns), (R, C) in _steps(layout, tuple(x.shape), x.dtype):
        if step.pads:
            data = torch.nn.functional.pad(data, (0, C - columns, 0, R - rows))
        data = _permuted(data, step.axes(R, C), step.order).view(*x.shape[:-2], R, C)
    return Packed(data, layout, tuple(x.shape))


def unpack(packed: Packed) -> Tensor:
    """The row-major tensor that was packed, bit for bit and in its shape, as a copy.

    Raises InputError as `pack` does, and for data of another shape than layout and shape imply.
    """
    data, shape = packed.data, packed.shape
    steps = _steps(packed.layout, shape, data.dtype)
    implied = (*shape[:-2], *steps[-1][2])
    if data.shape != implied:
        raise InputError(
            f"{packed.layout}: the data has shape {list(data.shape)}, "
            f"{list(shape)} in this layout has {list(implied)}"
        )
    for step, (rows, columns), (R, C) in reversed(steps):
        axes = step.axes(R, C)
        walked = tuple(axes[i] for i in step.order)
        back = tuple(step.order.index(i) for i in range(len(axes)))
        data = _permuted(data, walked, back).view(*shape[:-2], R, C)[..., :rows, :columns]
    return data.contiguous()


def offset(layout: str, row: Index, column: Index, shape: tuple[int, ...]) -> Index:
    """Where element (row, column) of a matrix lies in its packed data, in elements from its start.

    row, column: two int, or two integer tensors that broadcast; the result is an int, or int64.
    shape [..., R, C]: the row-major tensor's. With leading axes the matrices follow one another.

    Raises InputError as `pack` does, and for a row or a column outside of the shape.
    """
    steps = _steps(layout, shape)
    place: Any = _inside("row", row, shape[-2]) * shape[-1] + _inside("column", column, shape[-1])
    for step, (_, columns), (R, C) in steps:
        place = step.offset(place // columns, place % columns, R, C)
    return place


def _steps(
    layout: str, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8
) -> list[tuple[Layout, Size, Size]]:
    """The layouts of a chain, each with the matrix's size before it and after it."""
    steps: list[tuple[Layout, Size, Size]] = []
    if len(shape) < 2:
        raise InputError(f"{layout}: shape {list(shape)}, expected two axes or more")
    before = (shape[-2], shape[-1])
    for name in layout.split("+"):
        if name not in LAYOUTS:
            raise InputError(f"layout {layout!r}: {name!r} is none of {', '.join(LAYOUTS)}")
        step = LAYOUTS[name]
        if step.only_bytes and dtype != torch.uint8:
            raise InputError(f"{name}: dtype {dtype}, expected torch.uint8")
        (R, C), (rows, columns) = before, step.multiple
        after = (-(-R // rows) * rows, -(-C // columns) * columns)
        if after != before and not step.pads:
            raise InputError(
                f"{name}: a matrix [{R}, {C}], expected multiples of [{rows}, {columns}]"
            )
        steps.append((step, before, after))
        before = after
    return steps


def _permuted(x: Tensor, axes: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """The last two axes of x split into `axes` and written out in `order`, always as a copy."""
    leading = x.dim() - 2
    split = x.view(*x.shape[:-2], *axes)  # an axis splits under any strides
    walked = split.permute(*range(leading), *(leading + i for i in order))
    return walked.clone(memory_format=torch.contiguous_format)


def _inside(what: str, index: int | Tensor, size: int) -> Any:
    """The index, once it is known to be one; tensors in int64, as narrow types would wrap around."""
    wide = torch.as_tensor(index).long()
    outside = wide[(wide < 0) | (wide >= size)].tolist()
    if outside:
        raise InputError(f"{what} {outside[0]} of a matrix with {size} {what}s")
    return index if isinstance(index, int) else wide
