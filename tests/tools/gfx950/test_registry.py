"""The table of instructions, and how mnemonics and signatures are read."""

import pytest

from tools.gfx950.registry import BUILDERS, instruction, parse_signature, plain


def test_a_builder_is_found_under_each_of_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        monkeypatch.setitem(BUILDERS, name, len)  # and taken out again after the test

    @instruction("a", "b")
    def build(ins: object) -> object:
        return ins

    assert BUILDERS["a"] is BUILDERS["b"] is build  # pyright: ignore


def test_a_mnemonic_without_its_encoding() -> None:
    for encoding in ("_e32", "_e64", "_dpp", "_sdwa"):
        assert plain(f"v_add_f32{encoding}") == "v_add_f32"
        assert plain(f"s_add_u32{encoding}") == f"s_add_u32{encoding}"
    assert plain("v_e32_add") == "v_e32_add" and plain("v_mov_b32") == "v_mov_b32"


def test_a_signature() -> None:
    assert parse_signature("u32 mask = u32 u32") == (["u32", "mask"], ["u32", "u32"])
