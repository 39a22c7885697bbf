"""MXFP4 weights times bf16 activations, decoded in registers on the way into the matrix unit.

There are two ways, one of which is chosen when the kernel is compiled. gfx950 has an instruction for it
(v_cvt_scalef32_pk_bf16_fp4) and reads the checkpoint's own order. NVIDIA's Hopper has none; its weights
are in the order of weights/words.py, in which one or two ANDs, at most two rotations or shifts and a
product decode two of them.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_hip_cdna4

SPAN = tl.constexpr(128)  # elements along K that weights/words.py permutes among themselves


@triton.jit
def _decode_words(words, multiplier):
    """Words of four bytes, with eight codes each -> two bf16 tensors [N, K/2]: elements 0 to 3 of each
    word, and elements 4 to 7.

    words [N, K/2] uint8, as weights/words.py encodes them. multiplier [N, K/2] int32: 2^(scale - 1) as a
    bf16, in both halves. A code's magnitude bits at the bottom of a bf16's exponent are the code's value
    times 2^-126, subnormal or not. The layout decides which four bytes the instructions get together;
    `launch.check_packing` ensures that they are those of one word.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 pair, turned;
        and.b32 pair, $4, 0x81C081C0;
        mul.rn.bf16x2 $0, pair, $5;
        shl.b32 turned, $4, 6;
        and.b32 pair, turned, 0x81C081C0;
        mul.rn.bf16x2 $1, pair, $5;
        shf.l.wrap.b32 turned, $4, $4, 10;
        and.b32 pair, turned, 0x81C081C0;
        mul.rn.bf16x2 $2, pair, $5;
        shf.l.wrap.b32 turned, $4, $4, 12;
        and.b32 pair, turned, 0x80C080C0;
        shf.l.wrap.b32 turned, $4, $4, 4;
        lop3.b32 pair, turned, 0x01000100, pair, 0xEA;
        mul.rn.bf16x2 $3, pair, $5;
        }
        """,
        "=r,=r,=r,=r,r,r,r,r,r",
        [words, multiplier],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def place(n, j, LENGTH: tl.constexpr, WIDTH: tl.constexpr, TILE_N: tl.constexpr):
    """The offset of row n, column j in a matrix [..., LENGTH] that is stored in contiguous tiles of
    TILE_N rows by WIDTH columns. TILE_N = 1 is row-major order."""
    inside = n % TILE_N * WIDTH + j % WIDTH
    return n // TILE_N * (TILE_N * LENGTH) + j // WIDTH * (TILE_N * WIDTH) + inside


@triton.jit
def _element(byte):
    """The first of the two elements of K that a byte holds; the other one is 8 further.

    Byte 16 c + 8 t + 4 u + i of a span holds element 64 t + 16 c + 4 u + i.
    """
    return byte // 64 * SPAN + byte // 8 % 2 * 64 + byte // 16 % 4 * 16 + byte % 8


@triton.jit
def _decoded(weight, scale, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Bytes [BLOCK_N, BLOCK_K/2] of Hopper's words -> the first and the second element of each, bf16."""
    # With t and c as in `_element`, the scales of a span are in the order (t, c // 2), and its bytes in
    # the order (c, t). Each byte gets its group's 2^(scale - 1) as a bf16, in both halves.
    SPANS: tl.constexpr = BLOCK_K // SPAN
    twice = (scale.to(tl.int32) + 126) * 0x00800080
    by_group = twice.reshape(BLOCK_N, SPANS, 2, 2).permute(0, 1, 3, 2)
    by_word = by_group.reshape(BLOCK_N, SPANS, 2, 1, 2, 1)
    multiplier = by_word.broadcast_to(BLOCK_N, SPANS, 2, 2, 2, 8)
    return _decode_words(weight, multiplier.reshape(BLOCK_N, BLOCK_K // 2))


@triton.jit
def _decoded_runs(weight, scale, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """As `_decoded`, for weight [BLOCK_N, BLOCK_K/16, 8]."""
    SPANS: tl.constexpr = BLOCK_K // SPAN
    twice = (scale.to(tl.int32) + 126) * 0x00800080
    by_group = twice.reshape(BLOCK_N, SPANS, 2, 2).permute(0, 1, 3, 2)
    by_run = by_group.reshape(BLOCK_N, SPANS, 2, 1, 2).broadcast_to(BLOCK_N, SPANS, 2, 2, 2)
    multiplier = by_run.reshape(BLOCK_N, BLOCK_K // 16)[:, :, None]
    low, high = _decode_words(  # pyright: ignore
        weight, multiplier.broadcast_to(BLOCK_N, BLOCK_K // 16, 8)
    )
    return low.reshape(BLOCK_N, BLOCK_K // 2), high.reshape(BLOCK_N, BLOCK_K // 2)


@triton.jit
def dot(
    weight, scale, x, K, rows, acc,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_N, ROWS] fp32 + weight @ x^T, over BLOCK_K elements of K.

    weight [BLOCK_N, BLOCK_K/2] and scale [BLOCK_N, BLOCK_K/32] uint8 are loaded values. x points to the
    first of the BLOCK_K elements in row 0 of a matrix [rows, K] bf16; rows from `rows` on count as zeros.
    """
    m = tl.arange(0, ROWS)[None, :]
    if is_hip_cdna4():
        k = tl.arange(0, BLOCK_K)[:, None]
        x_block = tl.load(x + m * K + k, mask=m < rows, other=0.0)  # [BLOCK_K, ROWS]
        # fast_math leaves out a select for scales that are NaN; packing refuses those.
        acc = tl.dot_scaled(weight, scale, "e2m1", x_block, None, "bf16", acc, fast_math=True)
    else:
        pointers = x + m * K + _element(tl.arange(0, BLOCK_K // 2)[:, None])
        first = tl.load(pointers, mask=m < rows, other=0.0)  # [BLOCK_K/2, ROWS]
        second = tl.load(pointers + 8, mask=m < rows, other=0.0)
        low, high = _decoded(weight, scale, BLOCK_N, BLOCK_K)  # pyright: ignore
        acc = tl.dot(high, second, tl.dot(low, first, acc))
    return acc


@triton.jit
def dot_many(
    weight, scale, rows, acc, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """acc [M, BLOCK_N] fp32 + x @ weight^T, over BLOCK_K elements of K, for many rows.

    weight [BLOCK_N, BLOCK_K/16, 8] and scale [BLOCK_N, BLOCK_K/32] uint8 are values; rows [M, 1] points
    to the first of these elements in each row x, bf16.
    """
    if is_hip_cdna4():
        x = tl.load(rows + tl.arange(0, BLOCK_K)[None, :])  # [M, BLOCK_K]
        codes = tl.trans(weight.reshape(BLOCK_N, BLOCK_K // 2))
        acc = tl.dot_scaled(x, None, "bf16", codes, scale, "e2m1", acc, fast_math=True)
    else:
        element = _element(tl.arange(0, BLOCK_K // 2)[None, :])
        low, high = _decoded_runs(  # pyright: ignore
            weight, scale, BLOCK_N, BLOCK_K
        )
        acc = tl.dot(tl.load(rows + element), tl.trans(low), acc)
        acc = tl.dot(tl.load(rows + element + 8), tl.trans(high), acc)
    return acc
