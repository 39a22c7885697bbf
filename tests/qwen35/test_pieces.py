"""What one id stands for: text, a control token, or bytes that are no whole characters."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qwen35.load import TINY
from qwen35.pieces import Piece, _byte_of, piece
from qwen35.tokenizer import Tokenizer
from tests.qwen35.test_tokenizer import falling_back
from tests.support.checkpoints import write_tokenizer

__all__ = ["falling_back"]  # a fixture


def test_the_byte_level_alphabet() -> None:
    """Derived from the library's list of characters; transformers has the same table."""
    assert {char: byte for byte, char in bytes_to_unicode().items()} == _byte_of()


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=30))
def test_the_pieces_of_a_text_are_its_bytes(text: str) -> None:
    """However its characters are cut."""
    tokenizer = Tokenizer(TINY)
    ids = tokenizer.encode(text)
    pieces = [piece(tokenizer, token) for token in ids]
    joined = b"".join(one.raw or one.text.encode() for one in pieces)
    assert joined.decode() == tokenizer._backend.decode(ids, skip_special_tokens=False)


def test_what_ids_stand_for(tmp_path: Path) -> None:
    """A byte of a character, a whole one, a control token, one that is not special, a hole."""
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    first, *_ = tokenizer.encode("é")
    (space,), (end,), (think,) = map(tokenizer.encode, (" ", "<|im_end|>", "<think>"))
    assert piece(tokenizer, first) == Piece(first, "\ufffd", b"\xc3")
    assert piece(tokenizer, space) == Piece(space, " ")
    assert piece(tokenizer, end) == Piece(end, "<|im_end|>", is_control=True)
    assert piece(tokenizer, think) == Piece(think, "<think>", is_control=True)
    assert piece(tokenizer, 5000) == Piece(5000, "")
    shown = [str(piece(tokenizer, token)) for token in (first, space, end)]
    assert shown == ["b'\\xc3'", "' '", "<|im_end|>"]
    assert str(Piece(1, "<\x1b[2J>", is_control=True)) == "<\\x1b[2J>"


def test_a_vocabulary_that_falls_back_to_bytes(falling_back: Tokenizer) -> None:
    """The space in front of a word is shown, which its decoder drops at the start of a text."""
    space_a, byte = falling_back.id_of("▁a"), falling_back.id_of("<0xC3>")
    assert space_a is not None and byte is not None
    assert piece(falling_back, space_a) == Piece(space_a, " a")
    assert piece(falling_back, byte) == Piece(byte, "\ufffd", b"\xc3")
    letter = falling_back.id_of("<0x41>")
    assert letter is not None
    assert piece(falling_back, letter) == Piece(letter, "A")
