"""Helpers of the emulator's tests."""

import re

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("triton")
pytest.importorskip("tinygrad")

from tests.support.gfx950_pseudocode import evaluate, pseudocode
from tools.gfx950 import emulator  # noqa: F401  (fills the table of instructions)
from tools.gfx950.assembly import parse
from tools.gfx950.memory import Lds, Memory
from tools.gfx950.registry import BUILDERS
from tools.gfx950.waves import EXEC, VCC, Waves, lanes_of, mask_of

WAVES = 2
U32 = np.uint32


def fresh(waves: int = WAVES, lds: int = 4096) -> Waves:
    state = Waves(
        40, 8, np.zeros(waves, np.int64), np.arange(waves), Memory([]), Lds(1, lds, races=False)
    )
    state.write_s64(EXEC, np.array([2**64 - 1], np.uint64))
    return state


def execute(line: str, state: Waves) -> Waves:
    """Run one line of assembly on a state."""
    program = parse(f"one:\n\t{line}\n", "one")
    mnemonic = re.sub(r"_(e32|e64|dpp|sdwa)$", "", program.instructions[0].mnemonic)
    with np.errstate(all="ignore"):
        BUILDERS[mnemonic](program.instructions[0])(state)
    return state


EDGE_INTEGERS = [
    0,
    1,
    2,
    3,
    15,
    16,
    24,
    31,
    32,
    33,
    63,
    64,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
]
EDGE_INTEGERS += [0xFFFFFF, 0x7FFFFF, 0x800000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF8000]
EDGE_FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, np.inf, -np.inf, np.nan, 1e-40, -1e-45]
EDGE_FLOATS += [3e38, -3e38, 65504.0, 65520.0, 1e-8, 2.0**31, -(2.0**31), 2.0**32, 448.0, 500.0]
# NaNs of both signs, quiet and signaling, with payloads that every width keeps apart.
EDGE_NANS = {
    "f32": [0x7FC00000, 0xFFC00000, 0x7FD55000, 0xFFEAA000, 0x7FA06000, 0xFF90A000],
    "f64": [x << 40 for x in (0x7FF800, 0xFFF800, 0x7FFAAA, 0xFFFD55, 0x7FF40C, 0xFFF214)],
    "f16": [0x7E00, 0xFE00, 0x7EAA, 0xFF55, 0x7D03, 0xFC85],
    "bf16": [0x7FC0, 0xFFC0, 0x7FD5, 0xFFEA, 0x7FA0, 0xFF90],
}


def samples(rng: np.random.Generator, kind: str, count: int) -> NDArray[np.uint64]:
    """The bits of `count` operands: edge cases, random numbers and NaNs. kind: f16, bf16, f32, f64
    or int."""
    numbers = _samples(rng, kind, count)
    if kind not in EDGE_NANS:
        return numbers
    width = 16 if "16" in kind else int(kind[1:])
    nans = np.array(EDGE_NANS[kind], np.uint64)
    for part in range(0, 32 if width == 16 else 64, width):
        chosen = rng.random(count) < 1 / 12
        mask = np.uint64(((1 << width) - 1) << part)
        given = rng.choice(nans, count) << np.uint64(part)
        numbers = np.where(chosen, (numbers & ~mask) | given, numbers)
    return numbers


def _samples(rng: np.random.Generator, kind: str, count: int) -> NDArray[np.uint64]:
    if kind == "int":
        pool = np.array(
            [*EDGE_INTEGERS, *rng.integers(0, 2**32, 40), *rng.integers(0, 40, 20)], np.uint64
        )
        return rng.choice(pool, count) | (rng.choice(pool, count) << np.uint64(32))
    scale = 2.0 ** rng.integers(-30, 31, 50)
    values = np.concatenate([EDGE_FLOATS, rng.standard_normal(50) * scale, rng.standard_normal(20)])
    chosen = [rng.choice(values, count) for _ in range(2)]
    with np.errstate(all="ignore"):
        if kind == "f64":
            return chosen[0].view(np.uint64)
        if kind == "f32":
            low, high = (x.astype(np.float32).view(U32).astype(np.uint64) for x in chosen)
            return low | (high << np.uint64(32))
        if kind == "bf16":
            low, high = (x.astype(np.float32).view(U32).astype(np.uint64) >> 16 for x in chosen)
        else:
            low, high = (x.astype(np.float16).view(np.uint16).astype(np.uint64) for x in chosen)
    return low | (high << np.uint64(16))


def shape_of(text: str) -> tuple[list[tuple[str, bool]], bool]:
    """Read the sources, as (kind, has 64 bits), from a pseudocode, and whether the result has 64
    bits."""
    sources: list[tuple[str, bool]] = []
    if not re.search(r"\bS[01]\b|SRC0", text):  # comparisons that are always true or false
        return [("int", "64" in text), ("int", "64" in text)], False
    for i in range(3):
        if not re.search(rf"\b(S{i}|SRC{i})\b", text):
            break
        found = re.search(rf"\bS{i}(?:\[[^\]]*\])?\.(bf|f)(16|32|64)", text)
        wide = re.search(rf"\bS{i}\.[uifb]64|\bS{i}\[63", text) is not None
        sources.append(("".join(found.groups()) if found else "int", wide))
    return sources, re.search(r"D0\.[uifb]64(?!\[laneId)|D0\[63|D0\.u64 \}", text) is not None


APPROXIMATE = re.compile(r"v_(exp|log|sin|cos|rcp|rsq|sqrt)")


def vector_line(mnemonic: str, text: str, sources: list, wide: bool) -> str:
    """A line of assembly. Sources are v[0:1], v[2:3], v[4:5]; the result is v[10:11], or the mask
    s[20:21]; the carry in is s[22:23]."""
    operands = []
    if "D0.u64[laneId]" in text:
        operands.append("s[20:21]")
    else:
        operands.append("v[10:11]" if wide else "v10")
        if re.search(r"VCC\.u64\[laneId\] = |D1\.[ui]1", text):
            operands.append("s[20:21]")
    operands += [
        f"v[{2 * i}:{2 * i + 1}]" if w else f"v{2 * i}" for i, (_, w) in enumerate(sources)
    ]
    takes_carry = len(re.findall(r"VCC\.u64\[laneId\]", text)) > len(
        re.findall(r"VCC\.u64\[laneId\] = ", text)
    )
    if takes_carry and "div_fmas" not in mnemonic:
        operands.append("s[22:23]")
    return f"{mnemonic} {', '.join(operands)}"


def same(got: int, want: int, kind: str, approximate: bool) -> bool:
    """Return whether the bits are equal, or the values are close where the GPU's result is only
    approximate."""
    if got == want:
        return True
    width = {"f16": 16, "f32": 32, "f64": 64}.get(kind)
    if width is None or not approximate:
        return False
    a, b = (
        np.array(x & ((1 << width) - 1), f"u{width // 8}").view(f"f{width // 8}")
        for x in (got, want)
    )
    return bool(np.isclose(a, b, rtol=1e-3 if width == 16 else 3e-7, atol=1e-37))


def is_nan(bits: int, width: int) -> bool:
    mantissa = {16: 10, 32: 23, 64: 52}[width]
    return bits & ((1 << (width - 1)) - 1) > ((1 << (width - 1 - mantissa)) - 1) << mantissa


def passed_on(sources: list[int], width: int) -> int:
    """The bits of a NaN that arithmetic gives. AMD's text does not define them; see
    `tools/gfx950/nans.py`."""
    mantissa = {16: 10, 32: 23, 64: 52}[width]
    infinity = ((1 << (width - 1 - mantissa)) - 1) << mantissa
    for bits in sources:
        if bits & ((1 << (width - 1)) - 1) > infinity:
            return bits | 1 << (mantissa - 1)
    return 1 << (width - 1) | infinity | 1 << (mantissa - 1)


def check_vector(mnemonic: str, select: int = 0) -> None:
    """Compare one vector instruction with its pseudocode. UnsupportedError if it cannot be
    evaluated.

    select: OPSEL as a number; if it is not 0, the assembly has an op_sel.
    """
    text = pseudocode()[mnemonic]
    sources, wide = shape_of(text)
    rng = np.random.default_rng(sum(map(ord, mnemonic)))
    count = WAVES * 64
    inputs = [samples(rng, kind, count) for kind, _ in sources]
    if "scalef32" in mnemonic:  # a scale of 255 is NaN; the text does not say so
        scale = inputs[-1]
        scale[scale >> np.uint64(23) & np.uint64(255) == 255] = 0x3F800000
    old = samples(rng, "f32", count)
    carry = rng.integers(0, 2, count).astype(np.uint64)
    state = fresh()
    for i, bits in enumerate(inputs):
        for part in range(2):
            half = (bits >> np.uint64(32 * part)).astype(U32).reshape(WAVES, 64)
            state.vgpr[2 * i + part] = half
    state.vgpr[10], state.vgpr[11] = old.astype(U32).reshape(WAVES, 64), 0
    masks = mask_of(carry.astype(bool).reshape(WAVES, 64))
    state.write_s64(22, masks)
    state.write_s64(VCC, masks)
    line = vector_line(mnemonic, text, sources, wide)
    if select:
        line += f" op_sel:[{','.join(str(select >> bit & 1) for bit in range(4))}]"
    execute(line, state)
    mask_out = lanes_of(state.read_s64(20)).reshape(-1)
    low, high = state.vgpr[10].reshape(-1), state.vgpr[11].reshape(-1)
    result = re.search(r"D0(?:\[[^\]]*\])?\.(f16|f32|f64)", text)
    for i in range(count):
        registers = {
            f"S{j}": int(bits[i]) if w else int(bits[i]) & 0xFFFFFFFF
            for j, (bits, (_, w)) in enumerate(zip(inputs, sources, strict=True))
        }
        start = int(old[i]) & 0xFFFFFFFF if re.search(r"= .*\bD0\b|D0\[15 : 0\]|VDST", text) else 0
        vcc, lane = int(carry[i]) << (i % 64), i % 64
        machine = evaluate(
            mnemonic, lane, **registers, D0=start, VCC=vcc, OPSEL=select, EXEC=1 << lane
        )
        want = machine.registers["D0"]
        context = f"{mnemonic} of {[hex(r) for r in registers.values()]}"
        if "D0.u64[laneId]" in text:
            assert bool(mask_out[i]) == bool(want >> lane & 1), context
            continue
        got = int(low[i]) | (int(high[i]) << 32 if wide else 0)
        kind, step = result[1] if result else "", 64 if wide else 32
        if "pk_" in mnemonic and "cvt" not in mnemonic:  # halves, each with a NaN of its own
            kind, step = ("f32", 32) if wide else ("f16", 16)
        elif kind:
            step = int(kind[1:])
        is_approximate = bool(APPROXIMATE.match(mnemonic))
        for part in range(0, 64 if wide else 32, step):
            mask = (1 << step) - 1
            a, b = got >> part & mask, want >> part & mask
            if machine.is_silent and kind and is_nan(b, step):
                given = [*registers.values(), start] if "fmac" in mnemonic else registers.values()
                kinds = [k for k, _ in sources]
                own = [bits >> part & mask for bits, k in zip(given, [*kinds, kind], strict=False)
                       if k == kind]  # fmt: skip
                b = passed_on(own, step)
            is_close = same(a, b, kind, is_approximate)
            assert is_close, f"{context}: {got:#x}, AMD's is {want:#x}"
        if re.search(r"D1\.[ui]1", text):
            assert bool(mask_out[i]) == bool(machine.registers["D1"]), f"{context}: carry"
        elif "VCC.u64[laneId] = " in text:
            assert bool(mask_out[i]) == bool(machine.registers["VCC"] >> lane & 1), (
                f"{context}: carry"
            )
