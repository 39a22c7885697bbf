"""Small Triton kernels, each with random inputs and the outputs that numpy computes in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fast.launch import Launch

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@triton.jit
def fp4_gemv(w, s, x, o, N, K, BN: tl.constexpr, BK: tl.constexpr):
    """Decode e2m1 by integer arithmetic: its low three bits become exponent and mantissa of a tiny
    f32."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK // 2)
    acc = tl.zeros((BN, BK // 2), tl.float32)
    for start in range(0, K, BK):
        packed = tl.load(w + rows[:, None] * (K // 2) + (start // 2 + k)[None, :]).to(tl.int32)
        scale = tl.load(s + rows[:, None] * (K // 32) + (start // 32 + k // 16)[None, :]).to(
            tl.int32
        )
        low = (((packed & 7) << 22) | ((packed & 8) << 28)).to(tl.float32, bitcast=True)
        high = (((packed & 0x70) << 18) | ((packed & 0x80) << 24)).to(tl.float32, bitcast=True)
        even = tl.load(x + start + 2 * k)[None, :].to(tl.float32)
        odd = tl.load(x + start + 2 * k + 1)[None, :].to(tl.float32)
        factor = (scale << 23).to(tl.float32, bitcast=True)
        acc += (low * 8.507059173023462e37 * even + high * 8.507059173023462e37 * odd) * factor
    tl.store(o + rows, tl.sum(acc, 1))


@triton.jit
def scaled_matmul(
    a, a_s, b, b_s, o, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FP8: tl.constexpr
):
    """o = a @ b^T. b is MXFP4; a is bf16, or fp8 with its own scales."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        A = tl.load(a + rm[:, None] * K + (k + tl.arange(0, BK))[None, :])
        B = tl.load(b + (k // 2 + tl.arange(0, BK // 2))[:, None] + rn[None, :] * (K // 2))
        blocks = (k // 32 + tl.arange(0, BK // 32))[None, :]
        B_s = tl.load(b_s + rn[:, None] * (K // 32) + blocks)
        if FP8:
            A_s = tl.load(a_s + rm[:, None] * (K // 32) + blocks)
            acc = tl.dot_scaled(A, A_s, "e4m3", B, B_s, "e2m1", acc)
        else:
            acc = tl.dot_scaled(A, None, "bf16", B, B_s, "e2m1", acc)
    tl.store(o + rm[:, None] * N + rn[None, :], acc)


@triton.jit
def matmul(a, b, o, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """o = a @ b with b [K, N] row-major, which uses the transposing loads from the LDS."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        A = tl.load(a + rm[:, None] * K + (k + tl.arange(0, BK))[None, :])
        B = tl.load(b + (k + tl.arange(0, BK))[:, None] * N + rn[None, :])
        acc = tl.dot(A, B, acc)
    tl.store(o + rm[:, None] * N + rn[None, :], acc.to(tl.bfloat16))


@triton.jit
def rmsnorm(x, w, o, N, eps, B: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, B)
    v = tl.load(x + row * N + i, mask=i < N, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v) / N + eps)
    weight = tl.load(w + i, mask=i < N, other=0.0).to(tl.float32)
    tl.store(o + row * N + i, (v * scale * weight).to(tl.bfloat16), mask=i < N)


@triton.jit
def softmax(x, o, N, B: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, B)
    v = tl.load(x + row * N + i, mask=i < N, other=-float("inf"))
    e = tl.exp(v - tl.max(v, 0))
    tl.store(o + row * N + i, e / tl.sum(e, 0), mask=i < N)


@triton.jit
def top_k(x, value, index, N, K: tl.constexpr, B: tl.constexpr):
    """The K largest values and their indices. Of equal values the lowest index comes first."""
    row, i = tl.program_id(0), tl.arange(0, B)
    v = tl.load(x + row * N + i, mask=i < N, other=-float("inf"))
    for k in tl.static_range(K):
        best = tl.argmax(v, 0)
        tl.store(value + row * K + k, tl.max(v, 0))
        tl.store(index + row * K + k, best)
        v = tl.where(i == best, -float("inf"), v)


@triton.jit
def sort(x, o, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + i, tl.sort(tl.load(x + i)))


@triton.jit
def integers(x, o, N, B: tl.constexpr):
    """Uses signed comparisons, shifts, division, 64-bit integers and a masked tail."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + i, mask=i < N, other=-7)
    small = tl.where(v < 0, -v // 3, v % 1000)
    wide = v.to(tl.int64) * 1000003 + (small >> 2)
    tl.store(o + i, wide ^ (wide >> 17), mask=i < N)


@triton.jit
def histogram(x, counts, total, N, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + i, mask=i < N, other=0)
    tl.atomic_add(counts + v, 1, mask=i < N)
    tl.atomic_add(total, tl.sum(v))


@triton.jit
def in_turn(x, partial, done, o, B: tl.constexpr):
    """Each workgroup waits for those with lower ids, and then adds to their result."""
    pid, i = tl.program_id(0), tl.arange(0, B)
    v = tl.load(x + pid * B + i)
    while tl.atomic_add(done, 0, sem="acquire", scope="gpu") < pid:
        pass
    before = tl.load(partial + i, volatile=True)
    tl.store(partial + i, before * 3 + v)
    tl.debug_barrier()
    tl.atomic_add(done, 1, sem="acq_rel", scope="gpu")
    tl.store(o + pid * B + i, before)


@dataclass(frozen=True)
class Sample:
    """A launch, its output, and the expected output. tolerance: relative to the largest value."""

    launch: Launch
    output: Tensor
    expected: np.ndarray
    tolerance: float


def fp4(rng: np.random.Generator, rows: int, columns: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Random MXFP4 codes, scales, and values [rows, columns]."""
    codes = rng.integers(0, 256, (rows, columns // 2), np.uint8)
    scales = rng.integers(120, 131, (rows, columns // 32), np.uint8)
    values = np.stack([E2M1[codes & 15], E2M1[codes >> 4]], -1).reshape(rows, columns)
    values = values * np.repeat(2.0 ** (scales.astype(int) - 127), 32, 1)
    return torch.from_numpy(codes), torch.from_numpy(scales), values


def normal(rng: np.random.Generator, *shape: int, dtype: torch.dtype) -> tuple[Tensor, np.ndarray]:
    x = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
    return x, x.double().numpy()


def empty(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"))


def make_fp4_gemv(rng: np.random.Generator) -> Sample:
    N, K = 12, 1024
    codes, scales, W = fp4(rng, N, K)
    x, X = normal(rng, K, dtype=torch.bfloat16)
    o = empty(N)
    arguments = {"w": codes, "s": scales, "x": x, "o": o, "N": N, "K": K, "BN": 4, "BK": 1024}
    return Sample(
        Launch("fp4_gemv", fp4_gemv, (3, 1, 1), arguments, {"num_warps": 4}), o, W @ X, 1e-5
    )


def make_scaled(fp8: bool, nonkdim: int, num_warps: int) -> Callable[[np.random.Generator], Sample]:
    def make(rng: np.random.Generator) -> Sample:
        M, N, K = 32, 64, 256
        codes, scales, W = fp4(rng, N, K)
        a, A = normal(rng, M, K, dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16)
        a_s = torch.from_numpy(rng.integers(120, 131, (M, K // 32), np.uint8))
        if fp8:
            A = A * np.repeat(2.0 ** (a_s.numpy().astype(int) - 127), 32, 1)
        o = empty(M, N)
        arguments = {
            "a": a,
            "a_s": a_s,
            "b": codes,
            "b_s": scales,
            "o": o,
            "N": N,
            "K": K,
            "BM": 32,
            "BN": 32,
            "BK": 128,
            "FP8": fp8,
        }
        options = {"num_warps": num_warps, "matrix_instr_nonkdim": nonkdim}
        return Sample(
            Launch("scaled", scaled_matmul, (1, 2, 1), arguments, options), o, A @ W.T, 1e-5
        )

    return make


def make_matmul(rng: np.random.Generator) -> Sample:
    M, N, K = 64, 64, 128
    a, A = normal(rng, M, K, dtype=torch.bfloat16)
    b, B = normal(rng, K, N, dtype=torch.bfloat16)
    o = empty(M, N).bfloat16()
    arguments = {"a": a, "b": b, "o": o, "N": N, "K": K, "BM": 32, "BN": 64, "BK": 64}
    return Sample(Launch("matmul", matmul, (2, 1, 1), arguments, {"num_warps": 4}), o, A @ B, 4e-3)


def make_rmsnorm(rng: np.random.Generator) -> Sample:
    N = 500
    x, X = normal(rng, 3, N, dtype=torch.bfloat16)
    w, W = normal(rng, N, dtype=torch.bfloat16)
    o = empty(3, N).bfloat16()
    expected = X / np.sqrt((X * X).mean(1, keepdims=True) + 1e-5) * W
    expected = torch.from_numpy(expected).bfloat16().double().numpy()
    launch = Launch(
        "rmsnorm",
        rmsnorm,
        (3, 1, 1),
        {"x": x, "w": w, "o": o, "N": N, "eps": 1e-5, "B": 512},
        {"num_warps": 4},
    )
    return Sample(launch, o, expected, 1e-3)  # a few values round the other way


def make_softmax(rng: np.random.Generator) -> Sample:
    N = 1000
    x = torch.from_numpy(rng.standard_normal((3, N)).astype(np.float32) * 3)
    e = np.exp(x.double().numpy() - x.double().numpy().max(1, keepdims=True))
    o = empty(3, N)
    launch = Launch(
        "softmax", softmax, (3, 1, 1), {"x": x, "o": o, "N": N, "B": 1024}, {"num_warps": 4}
    )
    return Sample(launch, o, e / e.sum(1, keepdims=True), 1e-5)


def make_top_k(rng: np.random.Generator) -> Sample:
    N, K = 200, 4
    x = torch.from_numpy(rng.integers(0, 50, (3, N)).astype(np.float32))  # with many ties
    both = torch.full((2, 3, K), -1, dtype=torch.int32)
    value, index = both[0].view(torch.float32), both[1]
    places = np.argsort(-x.numpy(), axis=1, kind="stable")[:, :K]
    largest = np.take_along_axis(x.numpy(), places, 1)
    expected = np.stack([largest.view(np.int32), places])
    arguments = {"x": x, "value": value, "index": index, "N": N, "K": K, "B": 256}
    return Sample(Launch("top_k", top_k, (3, 1, 1), arguments, {"num_warps": 4}), both, expected, 0)


def make_sort(rng: np.random.Generator) -> Sample:
    x = torch.from_numpy(rng.integers(-1000, 1000, (2, 256)).astype(np.int32))
    o = torch.zeros_like(x)
    launch = Launch("sort", sort, (2, 1, 1), {"x": x, "o": o, "B": 256}, {"num_warps": 2})
    return Sample(launch, o, np.sort(x.numpy(), 1), 0)


def make_integers(rng: np.random.Generator) -> Sample:
    N = 300
    x = torch.from_numpy(rng.integers(-(2**31), 2**31, N).astype(np.int32))
    o = torch.full((512,), -1, dtype=torch.int64)
    v = x.numpy().astype(np.int64)
    with np.errstate(all="ignore"):
        small = np.where(v < 0, -v // 3, v % 1000)
        wide = v * 1000003 + (small >> 2)
    expected = np.concatenate([wide ^ (wide >> 17), np.full(212, -1)])
    launch = Launch(
        "integers", integers, (2, 1, 1), {"x": x, "o": o, "N": N, "B": 256}, {"num_warps": 4}
    )
    return Sample(launch, o, expected, 0)


def make_histogram(rng: np.random.Generator) -> Sample:
    N = 300
    x = torch.from_numpy(rng.integers(0, 10, N).astype(np.int32))
    counts = torch.zeros(11, dtype=torch.int32)
    arguments = {"x": x, "counts": counts[:10], "total": counts[10:], "N": N, "B": 128}
    expected = np.append(np.bincount(x.numpy(), minlength=10), x.sum())
    return Sample(
        Launch("histogram", histogram, (3, 1, 1), arguments, {"num_warps": 2}), counts, expected, 0
    )


def make_in_turn(rng: np.random.Generator) -> Sample:
    n, B = 6, 128
    x = torch.from_numpy(rng.integers(0, 10, (n, B)).astype(np.int32))
    o = torch.full((n, B), -1, dtype=torch.int32)
    expected, sums = np.empty((n, B), np.int64), np.zeros(B, np.int64)
    for i in range(n):
        expected[i], sums = sums, sums * 3 + x[i].numpy()
    arguments = {
        "x": x,
        "partial": torch.zeros(B, dtype=torch.int32),
        "done": torch.zeros(1, dtype=torch.int32),
        "o": o,
        "B": B,
    }
    return Sample(
        Launch("in_turn", in_turn, (n, 1, 1), arguments, {"num_warps": 2}), o, expected, 0
    )


SAMPLES: dict[str, Callable[[np.random.Generator], Sample]] = {
    "fp4_gemv": make_fp4_gemv,
    "bf16_fp4_16": make_scaled(fp8=False, nonkdim=16, num_warps=4),
    "bf16_fp4_32": make_scaled(fp8=False, nonkdim=32, num_warps=1),
    "fp8_fp4_16": make_scaled(fp8=True, nonkdim=16, num_warps=4),
    "fp8_fp4_32": make_scaled(fp8=True, nonkdim=32, num_warps=4),
    "matmul": make_matmul,
    "rmsnorm": make_rmsnorm,
    "softmax": make_softmax,
    "top_k": make_top_k,
    "sort": make_sort,
    "integers": make_integers,
    "histogram": make_histogram,
    "in_turn": make_in_turn,
}
