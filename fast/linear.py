"""The product of 1 to 8 rows with a bf16 matrix, with a norm before it and a residual after it."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fast import configs
from fast.launch import Launch, Scratch, constants, options
from fast.target import ROWS
from qwen35.errors import InputError


@dataclass(frozen=True)
class Norm:
    """An RMS norm: y = x / rms(x) * (1 + weight). weight [D] bf16."""

    weight: Tensor
    eps: float

    @classmethod
    def from_reference(cls, module: Any) -> "Norm":
        """From `reference.norm.RMSNorm`."""
        return cls(in_bf16(module), module.eps)


@dataclass(frozen=True)
class Stream:
    """Rows of the residual stream with what the norm behind them needs.

    x [N, D] bf16. scaled [N, D] bf16: x * (1 + weight) of that norm. squares [parts, ROWS] fp32: sums of
    x^2 over parts of the columns. The norm is scaled / sqrt(sum of squares / D + eps).
    """

    x: Tensor
    scaled: Tensor
    squares: Tensor
    eps: float

    @classmethod
    def empty(
        cls, name: str, rows: int, D: int, parts: int, target: str, eps: float, scratch: Scratch
    ) -> "Stream":
        """Buffers of that name, not written yet."""
        squares = scratch(f"{name} squares", parts, ROWS[target], dtype=torch.float32)
        return cls(scratch(name, rows, D), scratch(f"{name} scaled", rows, D), squares, eps)


def read_normed(x: Tensor | Stream) -> dict[str, Any]:
    """A kernel's arguments for rows that it reads, which are normalised where they are a stream's."""
    if isinstance(x, Stream):
        parts = x.squares.shape[-2]
        return {"x": x.scaled, "squares": x.squares, "eps": x.eps, "PARTS": parts}
    return {"x": x, "squares": x, "eps": 1.0, "PARTS": 0}


def written(
    name: str, rows: int, D: int, parts: int, target: str, then: Norm | None, scratch: Scratch
) -> tuple[dict[str, Any], Any]:
    """A kernel's arguments for rows that it writes, and the result: a stream where a norm follows."""
    if then is None:
        out = scratch(name, rows, D)
        unused = {"next_norm": out, "scaled": out, "out_squares": out, "HAS_NEXT": False}
        return {"out": out, **unused}, out
    stream = Stream.empty(name, rows, D, parts, target, then.eps, scratch)
    arguments = {
        "out": stream.x, "next_norm": then.weight, "scaled": stream.scaled,
        "out_squares": stream.squares, "HAS_NEXT": True,
    }  # fmt: skip
    return arguments, stream


def product(
    x: Tensor | Stream,
    weight: Tensor,
    target: str,
    scratch: Scratch,
    *,
    name: str = "linear",
    residual: Tensor | None = None,
    then: Norm | None = None,
    ring: tuple[Tensor, Tensor] | None = None,
    activated: bool = False,
    out: str | None = None,
) -> tuple[Launch, Any]:
    """x [N, K] bf16, weight [M, K] bf16 -> [N, M] bf16: (residual +) x W^T.

    x: a stream is normalised. residual [N, M] bf16.
    then: the norm that follows: the result is a stream. ring: a buffer [RING, M] bf16 and a position [1]
    int32: the rows are written where their positions fall, and the buffer is the result. activated: rows
    2 i and 2 i + 1 are a gate and an up; the result is silu(gate) * up, [N, M / 2]. out: the name of the
    result in `scratch`; default: that of the launch.
    """
    from fast.kernels import linear as kernels  # Triton is needed from here on

    M, K = weight.shape
    if K % 16:
        raise InputError(f"a product along {K} elements; the matrix unit takes multiples of 16")
    config = configs.lookup(target, "linear", configs.key(N=M, K=K))
    config = config | {"BLOCK_K": math.gcd(config["BLOCK_K"], K)}
    reads = read_normed(x)
    rows, blocks = len(reads["x"]), -(-M // config["BLOCK_N"])
    width = M // 2 if activated else M
    writes, result = written(out or name, rows, width, blocks, target, then, scratch)
    if ring is not None:
        writes["out"] = result = ring[0]
    launch = Launch(
        f"{name} {configs.key(N=M, K=K)}",
        kernels.linear,
        (blocks, 1, 1),
        {
            **reads, "weight": weight, "residual": weight if residual is None else residual,
            **writes, "start": weight if ring is None else ring[1], "rows": rows, "N": M, "K": K,
            "HAS_RESIDUAL": residual is not None, "ACTIVATED": activated,
            "RING": 0 if ring is None else len(result), "ROWS": ROWS[target], **constants(config),
        },
        options(config),
        config["BLOCK_N"] * config["BLOCK_K"] * 2,
    )  # fmt: skip
    return launch, result


def in_bf16(module: Any) -> nn.Parameter:
    """A module's weight, which has to be floating point."""
    weight = module.weight
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise InputError(f"a weight in {weight.dtype}; the fast path needs bf16 here")
    return nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)


def twin(module: Any) -> Any:
    """A module whose parts may be replaced while the first one keeps its own; they share all weights."""
    second = copy.copy(module)
    second._modules = dict(module._modules)
    return second


def stacked(*modules: Any) -> nn.Parameter:
    """The weights of several layers as one matrix; theirs become parts of it, so nothing exists twice."""
    whole = torch.cat([in_bf16(module) for module in modules])
    first = 0
    for module in modules:
        last = first + len(module.weight)
        module.weight = nn.Parameter(whole[first:last], requires_grad=False)
        first = last
    return nn.Parameter(whole, requires_grad=False)


def interleaved(gate: Any, up: Any) -> nn.Parameter:
    """Gate row 0, up row 0, gate row 1, ... [2 I, K]; the two layers' weights become parts of it."""
    whole = torch.stack([in_bf16(gate), in_bf16(up)], 1).flatten(0, 1)
    for first, module in enumerate((gate, up)):
        module.weight = nn.Parameter(whole[first::2], requires_grad=False)
    return nn.Parameter(whole, requires_grad=False)
