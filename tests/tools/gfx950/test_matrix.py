"""Matrix instructions: products of small matrices, each element put into its place by hand."""

import re

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("triton")
pytest.importorskip("tinygrad")

from tests.support.gfx950_runs import execute, fresh
from tools.gfx950.assembly import EmulatorError
from tools.gfx950.formats import MINIFLOATS, f32_to_bf16, f32_to_f16
from tools.gfx950.matrix import ANY_SMALL, INTEGER, PLAIN
from tools.gfx950.waves import Waves

WAVES = 2
Matrices = NDArray[np.float64]  # [W, rows, K]
BITS = {"f32": 32, "bf16": 16, "f16": 16, "i8": 8, "fp8": 8, "bf8": 8, "fp4": 4}
NUMBERS = np.array([0.5, -1, 1.5, 2, -3, 4])  # which every format has


def codes_of(matrix: NDArray[np.float64], kind: str) -> NDArray[np.int64]:
    if kind == "f32":
        return matrix.astype(np.float32).view(np.uint32).astype(np.int64)
    if kind in ("bf16", "f16"):
        encode = f32_to_bf16 if kind == "bf16" else f32_to_f16
        return encode(matrix.astype(np.float32)).astype(np.int64)
    if kind == "i8":
        return matrix.astype(np.int64) & 0xFF
    return MINIFLOATS[kind].encode(matrix).astype(np.int64)


def put(waves: Waves, first: int, matrix: NDArray[np.float64], kind: str) -> int:
    """Put matrices [W, rows, K] into registers from `first` on. Returns how many they take.

    Lane l holds row l % rows, and of it the elements of group l // rows: as many as the lanes of a row
    leave for each, one after the other. Of 32 elements of a byte, 16 come from the first half of K and
    16 from the second.
    """
    _, rows, K = matrix.shape
    groups, bits, codes = 64 // rows, BITS[kind], codes_of(matrix, kind)
    count = K // groups
    waves.vgpr[first : first + count * bits // 32] = 0
    for lane in range(64):
        row, group = lane % rows, lane // rows
        for i in range(count):
            k = group * count + i
            if kind in ("fp8", "bf8") and count == 32:
                k = i // 16 * (K // 2) + group * 16 + i % 16
            word, shift = divmod(i * bits, 32)
            waves.vgpr[first + word, :, lane] |= (codes[:, row, k] << shift).astype(np.uint32)
    return count * bits // 32


def taken(registers: NDArray[np.uint32], rows: int) -> NDArray[np.uint32]:
    """The tiles [W, rows, rows] in result registers: lane l has column l % rows, and four rows in a
    row of registers before the next group of lanes has the next four."""
    tiles = np.zeros((WAVES, rows, rows), np.uint32)
    for i, register in enumerate(registers):
        for lane in range(64):
            row = i // 4 * (4 * 64 // rows) + lane // rows * 4 + i % 4
            tiles[:, row, lane % rows] = register[:, lane]
    return tiles


def span(bank: str, first: int, count: int) -> str:
    return f"{bank}[{first}:{first + count - 1}]"


def multiplied(
    shape: tuple[int, int], kinds: tuple[str, str], mnemonic: str, *, bank: str = "v",
    start: str = "", modifiers: str = "", scales: NDArray[np.uint32] | None = None,
) -> tuple[Matrices, NDArray[np.uint32], Matrices, Matrices]:  # fmt: skip
    """Run one instruction. Returns A @ B, the result's bits, and A and B."""
    rng = np.random.default_rng(0)
    rows, K = shape
    numbers = np.arange(-5, 6) if kinds[0] == "i8" else NUMBERS
    a, b = (rng.choice(numbers, (WAVES, rows, K)).astype(np.float64) for _ in range(2))
    waves = fresh(WAVES)
    waves.vgpr = np.full((80, WAVES, 64), 0x7FC00000, np.uint32)
    waves.agpr = np.full((80, WAVES, 64), 0x7FC00000, np.uint32)
    count_a = put(waves, 40, a, kinds[0])
    count_b = put(waves, 56, b, kinds[1])
    count = rows * rows // 64
    if not start:
        held = rng.integers(-9, 9, (count, WAVES, 64)).astype(np.int32)
        bits = held.view(np.uint32) if kinds[0] == "i8" else held.astype(np.float32).view(np.uint32)
        (waves.vgpr if bank == "v" else waves.agpr)[20 : 20 + count] = bits
        begin = taken(held.view(np.uint32), rows).view(np.int32).astype(np.float64)
        start = span(bank, 20, count)
    else:
        begin = np.full((WAVES, rows, rows), float(start))
    sources = f"{span('v', 40, count_a)}, {span('v', 56, count_b)}"
    line = f"{mnemonic} {span(bank, 0, count)}, {sources}, {start}"
    if scales is not None:
        waves.vgpr[72], waves.vgpr[73] = scales
        line += ", v72, v73"
    execute(line + modifiers, waves)
    registers = waves.vgpr if bank == "v" else waves.agpr
    product = a @ b.transpose(0, 2, 1) + begin
    assert (registers[count] == 0x7FC00000).all()
    return product, taken(registers[:count], rows), a, b


@pytest.mark.parametrize(("rows", "K", "kind"), PLAIN)
@pytest.mark.parametrize("bank", ["v", "a"])
def test_a_product_of_one_format(rows: int, K: int, kind: str, bank: str) -> None:
    """Added to what the registers hold."""
    kinds = ("bf16", "bf16") if "1k" in kind else tuple(kind.split("_") * 2)[:2]
    mnemonic = f"v_mfma_f32_{rows}x{rows}x{K}_{kind}"
    product, bits, *_ = multiplied((rows, K), kinds, mnemonic, bank=bank)  # pyright: ignore
    assert (bits.view(np.float32) == product).all()


@pytest.mark.parametrize(("rows", "K", "kind"), INTEGER)
@pytest.mark.parametrize("start", ["", "7"])
def test_a_product_of_integers(rows: int, K: int, kind: str, start: str) -> None:
    mnemonic = f"v_mfma_i32_{rows}x{rows}x{K}_{kind}"
    product, bits, *_ = multiplied((rows, K), ("i8", "i8"), mnemonic, start=start)
    assert (bits.view(np.int32) == product).all()


CODES = {"fp8": 0, "bf8": 1, "fp4": 4}


@pytest.mark.parametrize(("rows", "K", "kind"), ANY_SMALL)
@pytest.mark.parametrize("kinds", [("fp8", "bf8"), ("bf8", "fp4"), ("fp4", "fp4"), ("fp4", "fp8")])
@pytest.mark.parametrize("start", ["", "2.0", "0"])
def test_a_product_of_small_formats(
    rows: int, K: int, kind: str, kinds: tuple[str, str], start: str
) -> None:
    modifiers = "".join(
        f" {name}:{CODES[one]}"
        for name, one in zip(("cbsz", "blgp"), kinds, strict=True)
        if CODES[one]
    )
    product, bits, *_ = multiplied(
        (rows, K), kinds, f"v_mfma_f32_{rows}x{rows}x{K}_{kind}", start=start, modifiers=modifiers
    )
    assert (bits.view(np.float32) == product).all()


@pytest.mark.parametrize(("rows", "K", "kind"), ANY_SMALL)
@pytest.mark.parametrize("byte", [(0, 0), (1, 2), (3, 1), (2, 3)])
def test_scales(rows: int, K: int, kind: str, byte: tuple[int, int]) -> None:
    """Of each row and of each 32 elements, one byte of a lane's register: op_sel has the low bit of its
    number, op_sel_hi the high one."""
    rng = np.random.default_rng(1)
    scales = rng.integers(120, 134, (2, 4, WAVES, 64)).astype(np.uint32)
    words = sum(scales[:, i] << np.uint32(8 * i) for i in range(4))
    low, high = ([b & 1 for b in byte], [b >> 1 for b in byte])
    modifiers = f" op_sel:[{low[0]},{low[1]},0] op_sel_hi:[{high[0]},{high[1]},0] cbsz:4 blgp:4"
    _, bits, a, b = multiplied(
        (rows, K), ("fp4", "fp4"), f"v_mfma_scale_f32_{rows}x{rows}x{K}_{kind}", start="0",
        modifiers=modifiers, scales=words,  # pyright: ignore
    )  # fmt: skip
    for matrix, which in ((a, 0), (b, 1)):
        for row in range(rows):
            for block in range(K // 32):
                codes = scales[which, byte[which], :, block * rows + row].astype(np.float64)
                matrix[:, row, 32 * block : 32 * block + 32] *= 2.0 ** (codes - 127)[:, None]
    assert np.allclose(bits.view(np.float32), a @ b.transpose(0, 2, 1), rtol=1e-6)


def test_any_nan_gives_the_same_one() -> None:
    found = set()
    for bits in (0xFF90A000, 0x7FC00123):
        waves = fresh(WAVES)
        waves.vgpr[:], waves.vgpr[4] = 0, bits
        execute("v_mfma_f32_16x16x4_f32 v[0:3], v4, v5, 0", waves)
        assert np.isnan(waves.vgpr[0:4].view(np.float32)).all()
        found |= set(waves.vgpr[0:4].flatten().tolist())
    assert len(found) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("v_mfma_f32_16x16x4_f32 v[0:3], v4, v5", "3 operands, expected 4"),
        (
            "v_mfma_scale_f32_16x16x128_f8f6f4 v[0:3], v[4:11], v[12:19], 0, v20",
            "5 operands, expected 6",
        ),
        ("v_mfma_f32_16x16x128_f8f6f4 v[0:3], v[4:9], v[4:9], 0 cbsz:2", "operand format 2 is not"),
        ("v_mfma_f32_16x16x4_f32 v[0:3], v4, v5, 0 cbsz:1", "modifier 'cbsz' is not known here"),
        ("v_mfma_f32_16x16x4_f32 v[0:3], v4, v5, 0 op_sel:[1,0,0]", "modifier 'op_sel' is not"),
    ],
)
def test_what_is_refused(line: str, said: str) -> None:
    with pytest.raises(EmulatorError, match=re.escape(said)):
        execute(line, fresh(WAVES))
