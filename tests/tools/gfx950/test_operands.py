"""Operands: from their text to typed values, and results to bits."""

import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")
pytest.importorskip("tinygrad")

from tests.support.gfx950_runs import fresh
from tools.gfx950.assembly import EmulatorError, Instruction, parse
from tools.gfx950.operands import (
    Operand,
    bits_list,
    bits_of,
    number,
    only_modifiers,
    operands_of,
    parse_operand,
    register,
    source,
)
from tools.gfx950.waves import Waves


def line(text: str) -> Instruction:
    return parse(f"k:\n\t{text}\n", "k").instructions[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v7", {"kind": "v", "index": 7}),
        ("v[7:10]", {"kind": "v", "index": 7, "count": 4}),
        ("a[3]", {"kind": "a", "index": 3}),
        ("s12", {"kind": "s", "index": 12}),
        ("vcc", {"kind": "s", "index": 106, "count": 2}),
        ("vcc_lo", {"kind": "s", "index": 106}),
        ("vcc_hi", {"kind": "s", "index": 107}),
        ("m0", {"kind": "s", "index": 124}),
        ("exec", {"kind": "s", "index": 126, "count": 2}),
        ("exec_hi", {"kind": "s", "index": 127}),
        ("scc", {"kind": "scc"}),
        ("src_scc", {"kind": "scc"}),
        ("off", {"kind": "off"}),
        ("-17", {"kind": "constant", "value": -17}),
        ("0x1f", {"kind": "constant", "value": 31}),
        ("lit(0x1f)", {"kind": "constant", "value": 31}),
        ("0.5", {"kind": "constant", "value": 0.5}),
        ("-4.0", {"kind": "constant", "value": -4.0}),
        ("0.15915494", {"kind": "constant", "value": 0.15915494309189532}),
        ("-v3", {"kind": "v", "index": 3, "negate": True}),
        ("neg(v3)", {"kind": "v", "index": 3, "negate": True}),
        ("|v3|", {"kind": "v", "index": 3, "absolute": True}),
        ("-|s3|", {"kind": "s", "index": 3, "absolute": True, "negate": True}),
        ("neg(abs(v3))", {"kind": "v", "index": 3, "absolute": True, "negate": True}),
        ("sext(v3)", {"kind": "v", "index": 3, "sign_extend": True}),
        ("-m0", {"kind": "s", "index": 124, "negate": True}),
    ],
)
def test_an_operand(text: str, expected: dict[str, Any]) -> None:
    assert parse_operand(text) == Operand(text, **expected)


@pytest.mark.parametrize("text", ["w1", "v", "v[1:2", "3.0", "1e5", "0x", "vcc2", ""])
def test_what_is_no_operand(text: str) -> None:
    with pytest.raises(EmulatorError, match=re.escape(f"operand {text!r} is not known")):
        parse_operand(text)


def test_constants_are_encoded_in_the_width_of_their_source() -> None:
    half = parse_operand("0.5")
    assert [half.constant(bits) for bits in (16, 32, 64)] == [0x3800, 0x3F000000, 0x3FE << 52]
    minus = parse_operand("-2")
    assert [minus.constant(bits) for bits in (16, 32, 64)] == [0xFFFE, 0xFFFFFFFE, 2**64 - 2]


def test_modifiers() -> None:
    one = line("v_x v1, v2 offset:0x10 op_sel:[1,0,1] clamp")
    assert (number(one, "offset"), number(one, "other"), number(one, "other", 3)) == (16, 0, 3)
    assert bits_list(one, "op_sel", [0] * 5) == [1, 0, 1, 0, 0]
    assert bits_list(one, "op_sel", [0] * 2) == [1, 0, 1]
    assert bits_list(one, "op_sel_hi", [1, 1]) == [1, 1]
    only_modifiers(one, "clamp", "op_sel", "offset", "more")
    with pytest.raises(EmulatorError, match=r"^modifier 'op_sel' is not known here$"):
        only_modifiers(one, "clamp", "offset")
    with pytest.raises(EmulatorError, match=r"^modifier offset:x is not a number$"):
        number(line("v_x v1 offset:x"), "offset")
    assert [operand.text for operand in operands_of(one, 2)] == ["v1", "v2"]
    with pytest.raises(EmulatorError, match=r"^2 operands, expected 3$"):
        operands_of(one, 3)


def filled() -> Waves:
    state = fresh(2)
    for bank in (state.vgpr, state.agpr):
        bank[...] = np.random.default_rng(len(bank)).integers(0, 2**32, bank.shape, np.uint32)
    state.sgpr[:100] = np.random.default_rng(1).integers(0, 2**32, (100, 2), np.uint32)
    return state


def test_registers_are_read_as_they_are() -> None:
    """A row for each wave, a column for each lane or one for all; without a copy."""
    state = filled()
    assert register(parse_operand("v5"))(state) is not None
    assert np.shares_memory(register(parse_operand("v[5:6]"), 1)(state), state.vgpr)
    assert (register(parse_operand("v[5:6]"), 1)(state) == state.vgpr[6]).all()
    assert (register(parse_operand("a2"))(state) == state.agpr[2]).all()
    assert register(parse_operand("s[4:5]"), 1)(state).tolist() == state.sgpr[5][:, None].tolist()
    state.scc = np.array([True, False])
    found = register(parse_operand("scc"))(state)
    assert found.tolist() == [[1], [0]] and found.dtype == np.uint32
    assert register(parse_operand("-2"))(state).tolist() == [[2**32 - 2]]
    assert register(parse_operand("-2"), 1)(state).tolist() == [[2**32 - 1]]
    assert register(parse_operand("7"), 1)(state).tolist() == [[0]]
    with pytest.raises(EmulatorError, match="operand 'off' cannot be read"):
        register(parse_operand("off"))


@pytest.mark.parametrize(
    "kind", ["u32", "i32", "f32", "b32", "u16", "i16", "f16", "u64", "i64", "f64"]
)
def test_typed_sources(kind: str) -> None:
    state = filled()
    bits = {"b32": 32}.get(kind) or int(kind[1:])
    numpy = np.dtype({"b": "u4"}.get(kind[0], f"{kind[0]}{bits // 8}"))
    whole = state.vgpr[4].astype(np.uint64) | state.vgpr[5].astype(np.uint64) << np.uint64(32)
    words = (0, 1) if bits == 16 else (0,)
    for word in words:
        plain = (whole >> np.uint64(16 * word)).astype(f"u{bits // 8}")
        sign = plain.dtype.type(1 << (bits - 1))
        for text, want in (
            ("v[4:5]", plain), ("-v[4:5]", plain ^ sign), ("|v[4:5]|", plain & ~sign),
            ("-|v[4:5]|", plain | sign),
        ):  # fmt: skip
            operand = parse_operand(text)
            if text != "v[4:5]" and kind[0] not in "fb":
                said = f"operand {text!r}: an integer cannot have a float's modifier"
                with pytest.raises(EmulatorError, match=re.escape(said)):
                    source(operand, kind, word=word)
                continue
            found = source(operand, kind, word=word)(state)
            assert found.dtype == numpy
            assert (found.view(plain.dtype) == want).all(), text
    scalar = source(parse_operand("s[4:5]"), kind)(state)
    assert scalar.shape == (2, 1) and scalar.dtype == numpy
    low = state.sgpr[4].astype(np.uint64) | state.sgpr[5].astype(np.uint64) << np.uint64(32)
    assert (scalar[:, 0].view(f"u{bits // 8}") == low.astype(f"u{bits // 8}")).all()


def test_constants_as_sources() -> None:
    """The upper half of a constant of 16 bits is 0; a sign counts for floats."""
    state = fresh(1)
    assert source(parse_operand("1.0"), "f16")(state).tolist() == [[1]]
    assert source(parse_operand("1.0"), "f16", word=1)(state).tolist() == [[0]]
    assert source(parse_operand("1.0"), "f64")(state).tolist() == [[1]]
    assert source(parse_operand("-3"), "i64")(state).tolist() == [[-3]]
    assert source(parse_operand("abs(-2.0)"), "f32")(state).tolist() == [[2]]
    base = lambda waves: np.full((1, 1), 0x12345678, np.uint32)  # noqa: E731
    assert source(parse_operand("v0"), "u32", base)(state).tolist() == [[0x12345678]]
    assert source(parse_operand("v0"), "u16", base, 1)(state).tolist() == [[0x1234]]


def test_masks_are_read_by_lanes() -> None:
    state = fresh(2)
    state.write_s64(4, np.array([5, 1 << 63], np.uint64))
    found = source(parse_operand("s[4:5]"), "mask")(state)
    assert found.dtype == bool and found.shape == (2, 64)
    assert np.flatnonzero(found[0]).tolist() == [0, 2] and np.flatnonzero(found[1]).tolist() == [63]
    with pytest.raises(EmulatorError, match="operand 'v4': a mask must be in SGPRs"):
        source(parse_operand("v4"), "mask")


@pytest.mark.parametrize(
    ("values", "kind", "bits", "dtype"),
    [
        ([1.0, -2.0], "f32", [0x3F800000, 0xC0000000], np.uint32),
        ([1.0, -2.0], "f16", [0x3C00, 0xC000], np.uint32),
        ([1.0], "f64", [0x3FF << 52], np.uint64),
        ([-1], "i16", [0xFFFF], np.uint32),
        ([-1], "i32", [2**32 - 1], np.uint32),
        ([-1], "i64", [2**64 - 1], np.uint64),
        ([0, 2], "mask", [False, True], np.bool_),
    ],
)
def test_results_as_bits(values: list[Any], kind: str, bits: list[int], dtype: Any) -> None:
    found = bits_of(np.array(values), kind)
    assert found.dtype == dtype and found.tolist() == bits
