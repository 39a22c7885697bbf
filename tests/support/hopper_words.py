"""The decoding of Hopper's MXFP4 words, `fast/kernels/mxfp4.py`, computed by numpy from its source text.

sm_90 code has no emulator here, and Triton's interpreter has no inline assembly and multiplies bf16
numbers by their bits. So the source is executed with another `tl`, which has what this file uses: blocks
are arrays, and lines of PTX are executed one by one. A bf16 number is a float32. Products are exact, so
that every order of a sum gives the same.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import fast.kernels

SOURCE = Path(fast.kernels.__file__).with_name("mxfp4.py")
Registers = dict[str, NDArray[np.uint32]]


def evaluated(*edits: tuple[str, str], hopper: bool = True) -> SimpleNamespace:
    """The functions of the file, to be called with `Block`s and numbers; edits: (old, new) texts, each of
    which has to fit in one place."""
    source = SOURCE.read_text(encoding="utf-8")
    for old, new in edits:
        assert source.count(old) == 1, f"{source.count(old)} places read {old!r}"
        source = source.replace(old, new)
    imports = re.compile(
        r"^(?:import triton\S*(?: as tl)?|from triton\.\S+ import \w+)$", re.MULTILINE
    )
    names: dict[str, Any] = {
        "triton": SimpleNamespace(jit=lambda function: function),
        "tl": tl,
        "is_hip_cdna4": lambda: not hopper,
    }
    exec(compile(imports.sub("", source), str(SOURCE), "exec"), names)
    return SimpleNamespace(**names)


class Block(np.ndarray):
    """A block of numbers, with the methods that Triton's tensors have."""

    def to(self, dtype: Any) -> Any:
        return self.astype(dtype)

    def permute(self, *axes: int) -> Any:
        return self.transpose(axes)

    def broadcast_to(self, *shape: int) -> Any:
        return np.broadcast_to(self, shape).view(Block)


def block(values: Any) -> Any:
    if isinstance(values, torch.Tensor):
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.asarray(values).view(Block)


class Pointer:
    """Addresses of elements of a flat array."""

    def __init__(self, memory: Any, offsets: Any = 0) -> None:
        self.memory, self.offsets = np.asarray(memory).reshape(-1), offsets

    def __add__(self, more: Any) -> "Pointer":
        return Pointer(self.memory, self.offsets + np.asarray(more, np.int64))

    def to(self, dtype: Any) -> "Pointer":
        """The same memory as elements of another type."""
        assert isinstance(self.offsets, int) and self.offsets == 0
        return Pointer(self.memory.view(dtype))

    def load(self, mask: Any) -> Any:
        places = np.asarray(self.offsets)
        on = np.broadcast_to(True if mask is None else mask, places.shape)
        assert ((places >= 0) & (places < len(self.memory)))[on].all(), (
            "an access outside of an array"
        )
        return np.where(on, self.memory[np.where(on, places, 0)], 0).view(Block)


def pointer(values: torch.Tensor) -> Pointer:
    return Pointer(block(values.contiguous()))


def _dot(a: Any, b: Any, acc: Any) -> Any:
    return (a.astype(np.float64) @ b.astype(np.float64) + acc).view(Block)


def _inline(
    asm: str, constraints: str, args: list[Any], *, dtype: Any, is_pure: bool, pack: int
) -> Any:
    """Lines of PTX, for `pack` neighbouring elements at a time, which fill registers of 32 bits."""
    assert is_pure
    if not asm:
        assert constraints == "=r,0"
        return args[0]
    outputs = constraints.split(",").count("=r")
    registers: Registers = {}
    for arg in args:
        packed = np.ascontiguousarray(arg).reshape(-1, pack)
        words = packed.view(np.uint8).view(np.uint32)
        for column in words.T:
            registers[f"${outputs + len(registers)}"] = column
    assert len(registers) == constraints.split(",").count("r")
    execute(asm, registers)
    each = outputs // len(dtype)
    found = []
    for first in range(0, outputs, each):
        words = np.stack([registers[f"${i}"] for i in range(first, first + each)], -1)
        halves = np.ascontiguousarray(words).view(np.uint16).astype(np.uint32) << 16
        found.append(halves.view(np.float32).reshape(args[0].shape).view(Block))
    return tuple(found)


def execute(asm: str, registers: Registers) -> None:
    """Execute PTX without branches on registers by name."""
    for name, target, *sources in _lines(asm):
        a, *more = (registers[s] if s in registers else np.uint32(int(s, 0)) for s in sources)
        match name, more:
            case "and.b32", [b]:
                result = a & b
            case "shl.b32", [by]:
                result = a << by
            case "shf.l.wrap.b32", [high, by]:
                result = high << by | a >> np.uint32(32 - by)
            case "lop3.b32", [b, c, table]:
                assert table == 0xEA, "expected (a & b) | c"
                result = a & b | c
            case "mul.rn.bf16x2", [b]:
                result = _multiplied(a, b)
            case _:
                raise AssertionError(f"{name} is not modelled")
        registers[target] = result


def _lines(asm: str) -> Iterator[list[str]]:
    """The instructions, as words without commas."""
    for line in re.sub(r"[{}]|\.reg [^;]*;", "", asm).split(";"):
        if words := line.replace(",", " ").split():
            yield words


def _multiplied(pair: NDArray[np.uint32], multiplier: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """mul.rn.bf16x2: two bf16 times two bf16, rounded to the nearest."""
    halves = []
    for shift in (0, 16):
        a, b = ((x >> np.uint32(shift) & 0xFFFF) << 16 for x in (pair, multiplier))
        with np.errstate(invalid="ignore", over="ignore"):
            exact = a.view(np.float32).astype(np.float64) * b.view(np.float32).astype(np.float64)
        bits = torch.from_numpy(exact).bfloat16().view(torch.int16).numpy().view(np.uint16)
        halves.append(bits.astype(np.uint32) << shift)
    return halves[0] | halves[1]


def _load(source: Pointer, mask: Any = None, other: float = 0.0) -> Any:
    assert other == 0
    return source.load(mask)


def _same(value: Any, *_: Any) -> Any:
    return value


_range: Callable[..., range] = range
tl = SimpleNamespace(
    constexpr=_same, multiple_of=_same, static_assert=_same, range=_range,
    int32=np.int32, int64=np.int64, float32=np.float64, bfloat16=np.float32, pointer_type=_same,
    arange=lambda first, end: np.arange(first, end, dtype=np.int32).view(Block),
    zeros=lambda shape, dtype: np.zeros(shape, dtype).view(Block),
    join=lambda a, b: np.stack([a, b], -1).view(Block),
    trans=lambda x: x.T, load=_load, dot=_dot, inline_asm_elementwise=_inline,
)  # fmt: skip
