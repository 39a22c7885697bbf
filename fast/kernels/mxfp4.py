"""MXFP4 weights times bf16 activations, decoded in registers on the way into the matrix unit.

There are two ways, one of which is chosen when the kernel is compiled. gfx950 has an instruction for it
(v_cvt_scalef32_pk_bf16_fp4) and reads the checkpoint's own order. NVIDIA's Hopper has none; its weights
are in the order of weights/words.py, in which one or two ANDs, at most two rotations or shifts and a
product decode two of them.

`dot` is for up to 16 rows of activations, and `product_of_tiles` for the rows of a prompt.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_hip_cdna4

SPAN = tl.constexpr(128)  # elements along K that weights/words.py permutes among themselves


# Decodes word {0} of eight codes into the bf16 pairs {1} to {4}, by the scale {5} in both halves.
_DECODE = """
        and.b32 pair, {0}, 0x81C081C0;
        mul.rn.bf16x2 {1}, pair, {5};
        shl.b32 turned, {0}, 6;
        and.b32 pair, turned, 0x81C081C0;
        mul.rn.bf16x2 {2}, pair, {5};
        shf.l.wrap.b32 turned, {0}, {0}, 10;
        and.b32 pair, turned, 0x81C081C0;
        mul.rn.bf16x2 {3}, pair, {5};
        shf.l.wrap.b32 turned, {0}, {0}, 12;
        and.b32 pair, turned, 0x80C080C0;
        shf.l.wrap.b32 turned, {0}, {0}, 4;
        lop3.b32 pair, turned, 0x01000100, pair, 0xEA;
        mul.rn.bf16x2 {4}, pair, {5};
"""
_REGISTERS = ".reg .b32 pair, turned;"
_ONE_WORD = tl.constexpr(f"{{ {_REGISTERS} {_DECODE.format('$4', '$0', '$1', '$2', '$3', '$5')} }}")
_TWO_WORDS = tl.constexpr(
    f"{{ {_REGISTERS} {_DECODE.format('$8', '$0', '$1', '$2', '$3', '$10')}"
    f"{_DECODE.format('$9', '$4', '$5', '$6', '$7', '$10')} }}"
)


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
        _ONE_WORD,  # pyright: ignore[reportArgumentType]
        "=r,=r,=r,=r,r,r,r,r,r",
        [words, multiplier],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _decode_two_words(words, multiplier):
    """As `_decode_words`, for words [N, K/8] int32, of which a row's words 2 p and 2 p + 1 are decoded
    together by the multiplier of the first. Returns eight bf16 tensors [N, K/8]. In columns 2 p and 2 p
    + 1, tensor i has the pair i of the first word, or, from i = 4 on, the pair i - 4 of the second."""
    return tl.inline_asm_elementwise(
        _TWO_WORDS,  # pyright: ignore[reportArgumentType]
        "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r",
        [words, multiplier],
        dtype=(tl.bfloat16,) * 8,
        is_pure=True,
        pack=2,
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
def arranged(k):
    """Where Hopper's `product_of_tiles` wants element k of a row of activations.

    Seven bits number the elements of a span: k is (b q r1 j r0 h), where q has two bits, and its place
    is (j r1 r0 b q h). So pair r = 2 r1 + r0 of the word 4 q + 2 b + j, which is in tensor i = 4 j + r
    of `_decode_two_words`, meets the 16 places from 16 i on.
    """
    e = k % SPAN
    tensor = e // 4 % 2 * 4 + e // 8 % 2 * 2 + e // 2 % 2
    return k - e + tensor * 16 + e // 64 * 8 + e // 16 % 4 * 2 + e % 2


@triton.jit
def scale_shift(word):
    """Where the bits of a word's scale begin in the four scales of its span. Word 4 q + 2 b + j of a
    row has elements of the group 2 b + q / 2."""
    return word // 2 % 2 * 16 + word // 8 * 8


@triton.jit
def _left_half(pairs, BLOCK_N: tl.constexpr):
    """Tensors of `_decode_two_words`, joined to [BLOCK_N, 16, 2, 2] with the bits r1 and r0 last -> the
    left matrix [BLOCK_N, 64] of a product over 64 places. `_left` tells the order of its rows."""
    WARPS: tl.constexpr = BLOCK_N // 16
    parts = pairs.reshape(2, WARPS, 8, 4, 2, 2, 2, 2)  # rows (2, warps, 8), words (q b j), r1, r0
    return parts.permute(1, 0, 2, 6, 7, 4, 3, 5).reshape(BLOCK_N, 64)


@triton.jit
def _left(words, scales, BLOCK_N: tl.constexpr):
    """Words [BLOCK_N, 16] int32 of one span, and its four scales [BLOCK_N, 1] int32 -> two left matrices
    [BLOCK_N, 64] bf16, of the places 0 to 63 and 64 to 127.

    A thread loads 16 bytes, which are four words of a row, and the eight threads of a column load eight
    rows. A thread of Hopper's product (wgmma) holds the columns 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 of two
    rows that are 8 apart. So that no number has to change its thread, those columns are the four words
    4 q + 2 b + j, and row 16 w + 8 u + i of the product is row 8 WARPS u + 8 w + i of the weights.
    """
    word = tl.arange(0, 16)[None, :]
    multiplier = ((scales >> scale_shift(word) & 255) + 126) * 0x00800080
    t0, t1, t2, t3, t4, t5, t6, t7 = _decode_two_words(words, multiplier)  # pyright: ignore
    low = tl.join(tl.join(t0, t2), tl.join(t1, t3))
    high = tl.join(tl.join(t4, t6), tl.join(t5, t7))
    return _left_half(low, BLOCK_N), _left_half(high, BLOCK_N)


@triton.jit
def _waited(acc):
    """acc, when the products before are done. They read registers until then, and ptxas reuses these
    before: without this some configurations gave wrong numbers on an H200."""
    return tl.inline_asm_elementwise("", "=r,0", [acc], dtype=tl.float32, is_pure=True, pack=1)


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
def product_of_tiles(
    rows, weight, scale, n, K: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x @ weight^T for many rows of x, [BLOCK_M, BLOCK_N] fp32.

    rows [BLOCK_M, 1] points to the rows x [K] bf16; on Hopper their elements are `arranged`. weight [...,
    K/2] and scale [..., K/32] uint8 point to all rows of the weights, in tiles of TILE_N rows by TILE_K
    elements; n [BLOCK_N, 1] int64 are the rows that count.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if is_hip_cdna4():
        codes = weight + place(n, tl.arange(0, BLOCK_K // 2)[None, :], K // 2, TILE_K // 2, TILE_N)
        scales = scale + place(
            n, tl.arange(0, BLOCK_K // 32)[None, :], K // 32, TILE_K // 32, TILE_N
        )
        for k in tl.range(0, K, BLOCK_K):
            beyond = k // TILE_K * (TILE_N * TILE_K) + k % TILE_K  # a multiple of BLOCK_K
            w = tl.load(codes + tl.multiple_of(beyond // 2, BLOCK_K // 2))  # [BLOCK_N, BLOCK_K/2]
            s = tl.load(scales + tl.multiple_of(beyond // 32, BLOCK_K // 32))
            x = tl.load(rows + k + tl.arange(0, BLOCK_K)[None, :])  # [BLOCK_M, BLOCK_K]
            acc = tl.dot_scaled(x, None, "bf16", tl.trans(w), s, "e2m1", acc, fast_math=True)
    else:
        tl.static_assert(BLOCK_K == SPAN)
        along = tl.arange(0, SPAN // 2)[None, :]
        codes = weight.to(tl.pointer_type(tl.int32))
        codes += place(n, tl.arange(0, SPAN // 8)[None, :], K // 8, TILE_K // 8, TILE_N)
        scales = scale.to(tl.pointer_type(tl.int32)) + place(
            n, 0, K // SPAN, TILE_K // SPAN, TILE_N
        )
        # The weights are the left matrix, which Hopper can read from registers.
        turned = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for k in tl.range(0, K, SPAN):
            beyond = k // TILE_K * (TILE_N * TILE_K) + k % TILE_K
            w = tl.load(codes + tl.multiple_of(beyond // 8, SPAN // 8))
            low, high = _left(w, tl.load(scales + beyond // SPAN), BLOCK_N)  # pyright: ignore
            turned = tl.dot(low, tl.trans(tl.load(rows + k + along)), turned)
            turned = tl.dot(high, tl.trans(tl.load(rows + k + SPAN // 2 + along)), turned)
            turned = _waited(turned)
        ordered = turned.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(1, 0, 2, 3)
        acc = tl.trans(ordered.reshape(BLOCK_N, BLOCK_M))
    return acc
