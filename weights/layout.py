"""The orders in memory in which kernels read a matrix, with lossless conversion in both directions.

Each order is defined twice. The axis names in `Layout` convert a whole tensor: rows and columns are
split into axes, which are written in another order. `Layout.offset` is the closed formula that a
kernel evaluates for one element. The tests compare the two.

| name            | what it holds              | neighbours in memory                                    |
|-----------------|----------------------------|---------------------------------------------------------|
| `flat`          | anything, any dtype        | a row (the checkpoint's own order)                      |
| `interleaved`   | gate rows, then up rows    | gate row 0, up row 0, gate row 1, ...                   |
| `interleaved16` | gate rows, then up rows    | gate rows 0 to 15, up rows 0 to 15, gate rows 16 to 31  |
| `aiter_weight`  | MXFP4 codes, two in a byte | tiles of 16 rows x 16 bytes, which are the block of one scale in each row |
| `aiter_scale`   | e8m0 scales, one in a byte | rows r and r + 16 of columns c and c + 4: one 32-bit word |

A chain of layouts is written with "+", applied from the left: `interleaved+aiter_weight`.
The AITER orders are those of `shuffle_weight(layout=(16, 16))` and `shuffle_scale` in ROCm/aiter,
aiter/ops/shuffle.py; its `is_guinterleave` is `interleaved16`.
"""  # noqa: E501

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor

from qwen35.errors import InputError

Size = tuple[int, int]
Index = TypeVar("Index", int, Tensor)


@dataclass(frozen=True)
class Layout:
    """One order of a matrix [R, C]. Sizes count elements, which are bytes where `only_bytes`.

    rows, columns: names of the axes that R and C split into, the slowest first.
    order: all of these names, as the axes lie in memory.
    offset: the closed formula, (row, column, R, C) -> position.
    row_axes, column_axes: lengths of the axes by name, except `n` and `c`, whose lengths follow from
        R and C.
    pads: whether a matrix with sizes that these lengths do not divide is padded with zeros;
        otherwise it is refused.
    filled_to: the numbers to whose multiples it is padded, if they are larger than these lengths.
    only_bytes: whether only uint8 is allowed.
    """

    rows: str
    columns: str
    order: str
    offset: Callable[..., Any]
    row_axes: Mapping[str, int] = field(default_factory=dict)
    column_axes: Mapping[str, int] = field(default_factory=dict)
    pads: bool = False
    filled_to: Size | None = None
    only_bytes: bool = False

    @property
    def multiple(self) -> Size:
        """The numbers of which R and C have to be multiples."""
        own = math.prod(self.row_axes.values()), math.prod(self.column_axes.values())
        return self.filled_to or own

    def lengths(self, R: int, C: int) -> dict[str, int]:
        """The length of every axis of a matrix [R, C]."""
        n = R // math.prod(self.row_axes.values())
        c = C // math.prod(self.column_axes.values())
        return {"n": n, "c": c, **self.row_axes, **self.column_axes}


# The formulas take int or int64 tensors for row and column; R and C are sizes after padding.


def _flat(r: Index, c: Index, R: int, C: int) -> Index:
    return r * C + c


def _interleaved(r: Index, c: Index, R: int, C: int) -> Index:
    half = R // 2
    return (r % half * 2 + r // half) * C + c


def _interleaved16(r: Index, c: Index, R: int, C: int) -> Index:
    half = R // 2
    return ((r % half // 16 * 2 + r // half) * 16 + r % 16) * C + c


def _aiter_weight(n: Index, kb: Index, N: int, Kb: int) -> Index:
    """Tiles of 16 rows x 32 bytes. The axes of a tile are [half of the bytes (2)][row (16)][byte (16)].

    The halves of a tile follow one another as tiles do, so the position is also
    (n >> 4) * 16 * Kb + (kb >> 4) * 256 + (n & 15) * 16 + (kb & 15).
    """
    tile = (n >> 4) * (Kb >> 5) + (kb >> 5)
    return tile * 512 + ((kb >> 4) & 1) * 256 + (n & 15) * 16 + (kb & 15)


def _aiter_scale(r: Index, c: Index, R: int, C: int) -> Index:
    """Tiles of 32 rows x 8 scales. A tile has the words [c & 3][r & 15], and a word the bytes
    [c >> 2 & 1][r >> 4 & 1]."""
    tile = (r >> 5) * (C >> 3) + (c >> 3)
    word = (tile * 4 + (c & 3)) * 16 + (r & 15)
    return word * 4 + ((c >> 2) & 1) * 2 + ((r >> 4) & 1)


LAYOUTS = {
    "flat": Layout("n", "c", "n c", _flat),
    "interleaved": Layout("half n", "c", "n half c", _interleaved, {"half": 2}),
    "interleaved16": Layout(
        "half n row", "c", "n half row c", _interleaved16, {"half": 2, "row": 16}
    ),
    "aiter_weight": Layout(
        "n row", "c half byte", "n c half row byte", _aiter_weight,
        {"row": 16}, {"half": 2, "byte": 16}, only_bytes=True,
    ),
    "aiter_scale": Layout(
        "n high row", "c right column", "n c column row right high", _aiter_scale,
        {"high": 2, "row": 16}, {"right": 2, "column": 4}, pads=True, filled_to=(256, 8),
        only_bytes=True,
    ),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor together with its order in memory.

    data: [..., R', C'], contiguous, in the dtype of the original. R', C' are R, C, or larger where the
        layout pads. These axes only give the size; `offset` says which element lies where.
    layout: a name of `LAYOUTS`, or a chain of names.
    shape: [..., R, C], that of the row-major tensor.
    """

    data: Tensor
    layout: str
    shape: tuple[int, ...]


def pack(x: Tensor, layout: str) -> Packed:
    """A copy of a row-major tensor [..., R, C] in another order. Leading axes (experts) stay.

    x: any strides; uint8 for the AITER layouts, any dtype for the others.

    `aiter_scale` pads each matrix to multiples of 256 rows and 8 columns. AITER leaves the padding
    undefined (torch.empty); here it is 0, the e8m0 code of 2**-127, which is finite (255 is NaN) and
    the same in every run. AITER takes experts as one matrix [E * R, C], which is the same order if 256
    divides R.

    InputError for an unknown layout, for fewer than two axes, and for a dtype or size that the layout
    cannot hold.
    """
    data = x
    for step, (rows, columns), (R, C) in _steps(layout, tuple(x.shape), x.dtype):
        if step.pads:
            data = torch.nn.functional.pad(data, (0, C - columns, 0, R - rows))
        walked = rearrange(data, f"... ({step.rows}) ({step.columns}) -> ... ({step.order})",
                           **step.lengths(R, C))  # fmt: skip
        data = walked.clone(memory_format=torch.contiguous_format).view(*x.shape[:-2], R, C)
    return Packed(data, layout, tuple(x.shape))


def unpack(packed: Packed) -> Tensor:
    """A copy of the row-major tensor that was packed, with the same bits and shape.

    InputError as in `pack`, and if the data has another shape than layout and shape imply.
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
        matrix = rearrange(data.flatten(-2), f"... ({step.order}) -> ... ({step.rows}) ({step.columns})",
                           **step.lengths(R, C))  # fmt: skip
        data = matrix[..., :rows, :columns]
    return data.clone(memory_format=torch.contiguous_format)


def offset(layout: str, row: Index, column: Index, shape: tuple[int, ...]) -> Index:
    """Where element (row, column) of a matrix lies in its packed data, in elements from its start.

    row, column: two int, or two integer tensors that broadcast; the result is an int or an int64
    tensor. shape: [..., R, C], that of the row-major tensor. With leading axes the matrices follow one
    another.

    InputError as in `pack`, and for a row or a column outside of the shape.
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


def _inside(what: str, index: int | Tensor, size: int) -> Any:
    """Check an index and return it. A tensor is returned as int64, because narrower types would wrap
    around."""
    wide = torch.as_tensor(index).long()
    outside = wide[(wide < 0) | (wide >= size)].tolist()
    if outside:
        raise InputError(f"{what} {outside[0]} of a matrix with {size} {what}s")
    return index if isinstance(index, int) else wide
