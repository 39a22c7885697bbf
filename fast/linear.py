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
    """Rows of the residual stream, prepared for the norm that follows.

    x [N, D] bf16. scaled [N, D] bf16: x * (1 + weight), with the norm's weight. squares [parts, ROWS]
    fp32: each row's sum of x^2, over parts of the columns. The normalised rows are
    scaled / sqrt(sum of squares / D + eps).
    """

    x: Tensor
    scaled: Tensor
    squares: Tensor
    eps: float

    @classmethod
    def empty(
        cls, name: str, rows: int, D: int, parts: int, target: str, eps: float, scratch: Scratch
    ) -> "Stream":
        """Buffers in `scratch`, under names that begin with `name`, for some launch to write."""
        squares = scratch(f"{name} squares", parts, ROWS[target], dtype=torch.float32)
        return cls(scratch(name, rows, D), scratch(f"{name} scaled", rows, D), squares, eps)


def read_normed(x: Tensor | Stream) -> dict[str, Any]:
    """A kernel's arguments for the rows that it reads; the kernel normalises them if x is a stream."""
    if isinstance(x, Stream):
        parts = x.squares.shape[-2]
        return {"x": x.scaled, "squares": x.squares, "eps": x.eps, "PARTS": parts}
    return {"x": x, "squares": x, "eps": 1.0, "PARTS": 0}


def written(
    name: str, rows: int, D: int, parts: int, target: str, then: Norm | None, scratch: Scratch
) -> tuple[dict[str, Any], Any]:
    """A kernel's arguments for the rows [rows, D] that it writes, and the result: a stream if a norm
    follows (`then`), else a buffer. parts: blocks of columns that the kernel sums squares over."""
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
    """The launch of x W^T (+ residual), x [N, K] bf16 and weight [M, K] bf16, and its result [N, M] bf16.

    x: a stream is normalised first.
    residual: [N, M] bf16, added to the product.
    then: the norm that follows; the result is then a stream.
    ring: a buffer [RING, M] bf16 and the first row's position, [1] int32. The row of position p is
        written at p modulo RING, and the result is the buffer.
    activated: rows 2 i and 2 i + 1 of the weight are a gate and an up; the result is silu(gate) * up,
        [N, M / 2].
    name, out: the launch's name, and the result's in `scratch` (default: the same).
    InputError when K is not a multiple of 16.
    """
    from fast.kernels import linear as kernels  # Triton is needed from here on

    M, K = weight.shape
    if K % 16:
        raise InputError(f"a product along {K} elements; the matrix unit takes multiples of 16")
    config = configs.lookup(target, "linear", configs.key(N=M, K=K))
    config = config | {"BLOCK_K": math.gcd(config["BLOCK_K"], K)}
    reads = read_normed(x)
    rows, blocks = len(reads["x"]), -(-M // config["BLOCK_N"])
    # For arguments that are not read. The weight may have more elements than their offsets can count.
    unread = reads["x"]
    width = M // 2 if activated else M
    writes, result = written(out or name, rows, width, blocks, target, then, scratch)
    if ring is not None:
        writes["out"] = result = ring[0]
    launch = Launch(
        f"{name} {configs.key(N=M, K=K)}",
        kernels.linear,
        (blocks, 1, 1),
        {
            **reads, "weight": weight, "residual": unread if residual is None else residual,
            **writes, "start": unread if ring is None else ring[1], "rows": rows, "N": M, "K": K,
            "HAS_RESIDUAL": residual is not None, "ACTIVATED": activated,
            "RING": 0 if ring is None else len(result), "ROWS": ROWS[target], **constants(config),
        },
        options(config),
        config["BLOCK_N"] * config["BLOCK_K"] * 2,
    )  # fmt: skip
    return launch, result


def in_bf16(module: Any) -> nn.Parameter:
    """A module's weight in bf16. InputError when it is quantised."""
    weight = module.weight
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise InputError(f"a weight in {weight.dtype}; the fast path needs bf16 here")
    return nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)


def twin(module: Any) -> Any:
    """A copy of a module that shares its submodules; replacing one in the copy leaves the module as it
    is."""
    second = copy.copy(module)
    second._modules = dict(module._modules)
    return second


def stacked(*modules: Any) -> nn.Parameter:
    """The weights of several layers as one matrix, first rows first. The layers' own weights become views
    of it, so that nothing is in memory twice."""
    whole = torch.cat([in_bf16(module) for module in modules])
    first = 0
    for module in modules:
        last = first + len(module.weight)
        module.weight = nn.Parameter(whole[first:last], requires_grad=False)
        first = last
    return nn.Parameter(whole, requires_grad=False)


def interleaved(gate: Any, up: Any) -> nn.Parameter:
    """The weights of two layers as one matrix [2 I, K]: gate row 0, up row 0, gate row 1, and so on. The
    layers' own weights become views of it."""
    whole = torch.stack([in_bf16(gate), in_bf16(up)], 1).flatten(0, 1)
    for first, module in enumerate((gate, up)):
        module.weight = nn.Parameter(whole[first::2], requires_grad=False)
    return nn.Parameter(whole, requires_grad=False)
