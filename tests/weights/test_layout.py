"""Memory orders: offsets worked out by hand, walks written as loops, and the way there and back."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen35.errors import InputError
from weights.layout import LAYOUTS, Packed, offset, pack, unpack

Place = tuple[int, int]

CHAINS = [
    *LAYOUTS,
    "interleaved+aiter_weight",
    "interleaved+aiter_scale",
    "interleaved16+aiter_weight",
    "aiter_weight+interleaved",
    "aiter_scale+interleaved",
    "interleaved+flat+interleaved",
    "aiter_scale+aiter_weight",
    "aiter_weight+aiter_scale",
]

# Of each layout: the shape, and where chosen elements lie. Worked out on paper, for nobody to recompute.
BY_HAND: dict[str, tuple[Place, dict[Place, int]]] = {
    "flat": ((3, 5), {(0, 0): 0, (0, 4): 4, (1, 0): 5, (2, 3): 13}),
    "interleaved": (
        (6, 3),  # gate rows 0, 1, 2; up rows 3, 4, 5
        {
            (0, 0): 0,
            (0, 2): 2,
            (3, 0): 3,
            (1, 0): 6,
            (4, 1): 10,
            (2, 0): 12,
            (5, 0): 15,
            (5, 2): 17,
        },
    ),
    "interleaved16": (
        (64, 3),  # gate rows 0 to 31; up rows 32 to 63
        {
            (0, 0): 0,
            (1, 0): 3,
            (15, 2): 47,
            (32, 0): 48,
            (47, 2): 95,
            (16, 0): 96,
            (31, 2): 143,
            (48, 0): 144,
            (63, 2): 191,
        },
    ),
    "aiter_weight": (
        (32, 64),  # four tiles of 512 bytes, two beside each other
        {
            (0, 0): 0,
            (0, 1): 1,
            (0, 15): 15,
            (1, 0): 16,
            (15, 0): 240,
            (15, 15): 255,
            (0, 16): 256,
            (1, 16): 272,
            (15, 31): 511,
            (0, 32): 512,
            (0, 48): 768,
            (15, 63): 1023,
            (16, 0): 1024,
            (17, 33): 1553,  # tile 3: 1536; first half; row 1: 16; byte 1
            (20, 50): 1858,  # tile 3: 1536; second half: 256; row 4: 64; byte 2
            (31, 63): 2047,
        },
    ),
    "aiter_scale": (
        (256, 16),  # 8 x 2 tiles of 256 bytes
        {
            (0, 0): 0,
            (16, 0): 1,
            (0, 4): 2,
            (16, 4): 3,
            (1, 0): 4,
            (15, 0): 60,
            (31, 4): 63,
            (0, 1): 64,
            (0, 2): 128,
            (0, 3): 192,
            (31, 7): 255,
            (0, 8): 256,
            (32, 0): 512,
            (37, 13): 854,  # tile 3: 768; c & 3 = 1: 64; row 5: 20; c & 4: 2; no 16 in the row
            (255, 15): 4095,
        },
    ),
    "interleaved+aiter_weight": (
        (32, 32),  # gate rows 0..15, up rows 16..31: two tiles of 512 bytes, one below the other
        {
            (0, 0): 0,
            (16, 0): 16,  # up row 0 comes second
            (1, 0): 32,
            (17, 3): 51,
            (0, 16): 256,
            (16, 16): 272,
            (23, 31): 511,  # up row 7 is row 15 of the first tile
            (8, 0): 512,
            (31, 0): 752,
        },
    ),
    "interleaved+aiter_scale": (
        (64, 5),  # gate rows 0..31, up rows 32..63, in a matrix filled up to [256, 8]
        {(0, 0): 0, (32, 0): 4, (8, 0): 1, (40, 0): 5, (7, 4): 58, (39, 4): 62, (16, 0): 256},
    ),
    # Alone, (0, 16) goes to 256, which is row 8, byte 0 of a [32, 32] matrix, which becomes row 16.
    "aiter_weight+interleaved": ((32, 32), {(0, 16): 512, (16, 0): 32, (31, 31): 1023}),
}


def walk_flat(R: int, C: int) -> Iterator[Place]:
    """The row-major order."""
    yield from itertools.product(range(R), range(C))


def walk_interleaved(R: int, C: int) -> Iterator[Place]:
    """A gate row, its up row, the next gate row."""
    for pair in range(R // 2):
        for row in (pair, R // 2 + pair):
            yield from ((row, c) for c in range(C))


def walk_interleaved16(R: int, C: int) -> Iterator[Place]:
    """Sixteen gate rows, their up rows, the next sixteen gate rows."""
    for first in range(0, R // 2, 16):
        for row in (*range(first, first + 16), *range(R // 2 + first, R // 2 + first + 16)):
            yield from ((row, c) for c in range(C))


def walk_aiter_weight(R: int, C: int) -> Iterator[Place]:
    """Tile after tile of 16 rows x 32 bytes; in a tile the left halves of all rows, then the right."""
    for top in range(0, R, 16):
        for left in range(0, C, 32):
            for half in (left, left + 16):
                for row in range(top, top + 16):
                    yield from ((row, half + byte) for byte in range(16))


def walk_aiter_scale(R: int, C: int) -> Iterator[Place]:
    """Tile after tile of 32 rows x 8 scales; in a tile words of four, over rows, then over columns."""
    for top in range(0, R, 32):
        for left in range(0, C, 8):
            for c in range(left, left + 4):
                for r in range(top, top + 16):
                    yield from [(r, c), (r + 16, c), (r, c + 4), (r + 16, c + 4)]


WALKS: dict[str, Callable[[int, int], Iterator[Place]]] = {
    "flat": walk_flat,
    "interleaved": walk_interleaved,
    "interleaved16": walk_interleaved16,
    "aiter_weight": walk_aiter_weight,
    "aiter_scale": walk_aiter_scale,
}


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    """All 256 codes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def grids(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The row and the column of every element of a matrix."""
    rows, columns = torch.meshgrid(torch.arange(shape[-2]), torch.arange(shape[-1]), indexing="ij")
    return rows, columns


@st.composite
def shapes(draw: st.DrawFn, layout: str) -> tuple[int, ...]:
    """Shapes that every layout of a chain can hold, with up to two leading axes."""
    names = layout.split("+")
    takes = [LAYOUTS[name].multiple for name in names if not LAYOUTS[name].pads]
    rows = math.lcm(1, *(m[0] for m in takes))
    columns = math.lcm(1, *(m[1] for m in takes))
    leading = draw(st.lists(st.integers(0, 3), max_size=2))
    count = st.integers(0, 40 if rows * columns <= 2 else 4)
    return (*leading, rows * draw(count), columns * draw(count))


@pytest.mark.parametrize("layout", BY_HAND)
def test_offsets_worked_out_by_hand(layout: str) -> None:
    """The formula puts an element where the paper says, and so does packing it alone."""
    shape, places = BY_HAND[layout]
    for (row, column), expected in places.items():
        assert offset(layout, row, column, shape) == expected, (row, column)
        x = torch.zeros(shape, dtype=torch.uint8)
        x[row, column] = 255
        assert pack(x, layout).data.flatten().nonzero().flatten().tolist() == [expected]
    assert set(LAYOUTS) <= set(BY_HAND)


def test_gate_and_up_rows_worked_out_by_hand() -> None:
    """The checkpoint's halves become pairs."""
    halves = torch.tensor([[10, 11], [20, 21], [-10, -11], [-20, -21]], dtype=torch.bfloat16)
    pairs = [[10, 11], [-10, -11], [20, 21], [-20, -21]]
    packed = pack(halves, "interleaved")
    assert packed.data.tolist() == pairs
    assert packed.layout == "interleaved"
    assert packed.shape == (4, 2)


def test_filled_up_scales_worked_out_by_hand() -> None:
    """Fifteen scales in a matrix of 256 x 8; whatever is not one of them is zero, never NaN's 255."""
    x = torch.arange(1, 16, dtype=torch.uint8).view(3, 5)
    expected = {0: 1, 64: 2, 128: 3, 192: 4, 2: 5, 4: 6, 68: 7, 132: 8, 196: 9, 6: 10}
    expected |= {8: 11, 72: 12, 136: 13, 200: 14, 10: 15}
    packed = pack(x, "aiter_scale")
    assert packed.data.shape == (256, 8)
    assert packed.shape == (3, 5)
    assert packed.data.flatten().tolist() == [expected.get(i, 0) for i in range(2048)]
    assert pack(random_bytes(2, 257, 9), "aiter_scale").data.shape == (2, 512, 16)
    assert pack(random_bytes(2, 256, 8), "aiter_scale").data.shape == (2, 256, 8)


@pytest.mark.parametrize("shape", [(256, 32), (256, 96), (512, 64)], ids=str)
@pytest.mark.parametrize("layout", WALKS)
def test_the_walk(layout: str, shape: Place) -> None:
    """Read in memory's order, the data are the elements that the loops visit."""
    x = random_bytes(*shape)
    walk = list(WALKS[layout](*shape))
    assert sorted(walk) == list(itertools.product(*map(range, shape)))
    rows, columns = torch.tensor(walk).unbind(1)
    assert torch.equal(pack(x, layout).data.flatten(), x[rows, columns])
    assert torch.equal(offset(layout, rows, columns, shape), torch.arange(len(walk)))


@pytest.mark.parametrize("layout", CHAINS)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_there_and_back(layout: str, data: st.DataObject, seed: int) -> None:
    """Every byte of any shape comes back, the formula finds each, and the rest is filled with 0."""
    shape = data.draw(shapes(layout))
    x = random_bytes(*shape, seed=seed)
    packed = pack(x, layout)
    back = unpack(packed)
    assert torch.equal(back, x)
    assert back.dtype == packed.data.dtype == torch.uint8
    assert back.is_contiguous()
    assert packed.data.is_contiguous()
    assert packed.shape == shape
    places = offset(layout, *grids(shape), shape)
    matrices = packed.data.reshape(*shape[:-2], packed.data.shape[-2] * packed.data.shape[-1])
    assert torch.equal(matrices[..., places], x)
    matrices[..., places] = 0
    assert not matrices.any()


@pytest.mark.parametrize("layout", CHAINS)
def test_leading_axes_are_matrices_apart(layout: str) -> None:
    """An expert's bytes do not depend on its neighbours."""
    x = random_bytes(2, 3, 64, 96)
    data = pack(x, layout).data
    for i, j in itertools.product(range(2), range(3)):
        assert torch.equal(data[i, j], pack(x[i, j], layout).data)


@pytest.mark.parametrize("name", ["weight", "scale"])
def test_a_chain_is_one_layout_after_the_other(name: str) -> None:
    """The chain is read from the left: the rows are interleaved first. The other order gives other
    bytes."""
    x = random_bytes(2, 64, 96)
    chained = pack(x, f"interleaved+aiter_{name}").data
    assert torch.equal(chained, pack(pack(x, "interleaved").data, f"aiter_{name}").data)
    assert not torch.equal(chained, pack(x, f"aiter_{name}+interleaved").data)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.uint8, torch.int64]
)
@pytest.mark.parametrize("layout", ["flat", "interleaved"])
def test_any_dtype_bit_for_bit(layout: str, dtype: torch.dtype) -> None:
    """NaN, -0 and subnormal codes too: all that matters is the bits."""
    x = random_bytes(3, 10, 7 * dtype.itemsize).view(dtype)
    back = unpack(pack(x, layout))
    assert back.dtype == pack(x, layout).data.dtype == dtype
    assert torch.equal(back.view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("layout", CHAINS)
def test_strides_do_not_matter(layout: str) -> None:
    """Transposed, sliced and expanded tensors are packed as their contiguous copies."""
    whole = random_bytes(64, 2, 192)
    for x in (
        whole.transpose(0, 1)[..., ::2],
        whole[:, 0, :64].T,
        whole[:1, :1, :32].expand(2, 32, 32),
    ):
        assert not x.is_contiguous()
        packed = pack(x, layout)
        assert torch.equal(packed.data, pack(x.contiguous(), layout).data)
        assert torch.equal(unpack(packed), x)


@pytest.mark.parametrize("layout", CHAINS)
@pytest.mark.parametrize("shape", [(32, 32), (256, 32), (2, 32)], ids=str)
def test_neither_way_shares_memory(layout: str, shape: Place) -> None:
    """Writing into a result leaves what it came from as it was."""
    if shape[0] == 2 and ("weight" in layout or "16" in layout):
        shape = (32, 32)
    x = random_bytes(*shape)
    before = x.clone()
    packed = pack(x, layout)
    assert torch.equal(x, before)
    kept = packed.data.clone()
    unpack(packed).add_(1)
    assert torch.equal(packed.data, kept)
    packed.data.add_(1)
    assert torch.equal(x, before)


def test_offsets_of_narrow_integers() -> None:
    """Rows given in uint8 or int32 do not wrap around; numbers in, number out."""
    shape = (512, 4096)
    rows, columns = torch.tensor([0, 100, 255]), torch.tensor([1, 128, 254])
    expected = offset("aiter_weight", rows, columns, shape)
    # Tiles 0, 6 * 128 + 4 = 772, 15 * 128 + 7 = 1927; then half, row and byte.
    assert expected.tolist() == [1, 772 * 512 + 64, 1927 * 512 + 256 + 240 + 14]
    for dtype in (torch.uint8, torch.int32):
        found = offset("aiter_weight", rows.to(dtype), columns.to(dtype), shape)
        assert found.dtype == torch.int64
        assert torch.equal(found, expected)
    assert type(offset("aiter_weight", 1, 0, shape)) is int


BAD_INPUTS: list[tuple[str, Callable[[], object], list[str]]] = [
    ("unknown", lambda: pack(random_bytes(2, 2), "tiled"), ["'tiled'", *LAYOUTS]),
    (
        "unknown link",
        lambda: pack(random_bytes(2, 2), "flat+tiled"),
        ["'flat+tiled'", "'tiled'", *LAYOUTS],
    ),
    ("no name", lambda: pack(random_bytes(2, 2), ""), ["''", *LAYOUTS]),
    ("vector", lambda: pack(random_bytes(16), "flat"), ["flat", "[16]", "two axes"]),
    ("scalar", lambda: offset("flat", 0, 0, ()), ["flat", "[]", "two axes"]),
    (
        "odd rows",
        lambda: pack(random_bytes(5, 2), "interleaved"),
        ["interleaved", "[5, 2]", "[2, 1]"],
    ),
    ("rows", lambda: pack(random_bytes(3, 17, 32), "aiter_weight"), ["[17, 32]", "[16, 32]"]),
    ("columns", lambda: pack(random_bytes(16, 48), "aiter_weight"), ["[16, 48]", "[16, 32]"]),
    ("offset", lambda: offset("aiter_weight", 0, 0, (16, 48)), ["[16, 48]", "[16, 32]"]),
    (
        "second link",
        lambda: pack(random_bytes(8, 32), "interleaved+aiter_weight"),
        ["aiter_weight", "[8, 32]", "[16, 32]"],
    ),
    (
        "weight dtype",
        lambda: pack(torch.zeros(16, 32), "aiter_weight"),
        ["aiter_weight", "torch.float32", "torch.uint8"],
    ),
    (
        "scale dtype",
        lambda: pack(torch.zeros(16, 32, dtype=torch.int8), "aiter_scale"),
        ["aiter_scale", "torch.int8", "torch.uint8"],
    ),
    (
        "data of another shape",
        lambda: unpack(Packed(random_bytes(3, 5), "aiter_scale", (3, 5))),
        ["aiter_scale", "[3, 5]", "[256, 8]"],
    ),
    (
        "data of another dtype",
        lambda: unpack(Packed(torch.zeros(16, 32).bfloat16(), "aiter_weight", (16, 32))),
        ["aiter_weight", "torch.bfloat16", "torch.uint8"],
    ),
    (
        "another number of experts",
        lambda: unpack(replace(pack(random_bytes(3, 4, 2), "interleaved"), shape=(2, 4, 2))),
        ["interleaved", "[3, 4, 2]", "[2, 4, 2]"],
    ),
    ("row", lambda: offset("flat", 3, 0, (3, 5)), ["row 3", "3 rows"]),
    ("negative row", lambda: offset("aiter_scale", -1, 0, (3, 5)), ["row -1", "3 rows"]),
    ("column", lambda: offset("aiter_scale", 0, 5, (3, 5)), ["column 5", "5 columns"]),
    (
        "one of many columns",
        lambda: offset("flat", torch.tensor([0, 1]), torch.tensor([4, -7]), (3, 5)),
        ["column -7", "5 columns"],
    ),
]


@pytest.mark.parametrize(
    ("call", "named"), [bad[1:] for bad in BAD_INPUTS], ids=[bad[0] for bad in BAD_INPUTS]
)
def test_bad_input_is_named(call: Callable[[], object], named: list[str]) -> None:
    """One line with the thing and both values."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in named:
        assert part in message
