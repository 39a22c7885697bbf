"""Describes one id: a piece of text, a control token, or bytes that are no complete characters."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import pre_tokenizers

from qwen35.tokenizer import UNFINISHED, Tokenizer


@dataclass(frozen=True)
class Piece:
    """One id with its meaning.

    text: the decoded text of the id alone. For a control token it is the written form; incomplete
    characters are U+FFFD. raw: the bytes of the id if they are no complete characters, else None.
    is_control: whether it is an added token such as `<|im_end|>`, which is not text.
    """

    id: int
    text: str
    raw: bytes | None = None
    is_control: bool = False

    def __str__(self) -> str:
        """As printed: text in quotes (' whale'), control tokens without, bytes as b'\\xe2\\x82'."""
        if self.is_control:
            return repr(self.text)[1:-1]  # a vocabulary may contain terminal escapes
        return repr(self.text if self.raw is None else self.raw)

    def document(self) -> dict[str, Any]:
        """For JSON: {"id", "text"}, with "bytes" if they are no complete characters, and with
        "control": true for a control token."""
        found: dict[str, Any] = {"id": self.id, "text": self.text}
        if self.raw is not None:
            found["bytes"] = list(self.raw)
        if self.is_control:
            found["control"] = True
        return found


def piece(tokenizer: Tokenizer, token: int) -> Piece:
    """The piece of an id. Its text is empty if the vocabulary has no such id."""
    written = tokenizer.written(token)
    if written is None or tokenizer.is_control(token):
        return Piece(token, written or "", is_control=written is not None)
    # The second of two is used, because some decoders drop the space before the first.
    once, twice = tokenizer.decode([token]), tokenizer.decode([token, token])
    text = twice[len(once) :]
    if UNFINISHED not in text:
        return Piece(token, text)
    raw = _bytes(tokenizer, token, written)
    try:
        return Piece(token, raw.decode() if raw else text)
    except UnicodeDecodeError:
        return Piece(token, text, raw)


def _bytes(tokenizer: Tokenizer, token: int, written: str) -> bytes | None:
    """The bytes of a token that is written in the byte-level alphabet or as `<0x41>`."""
    if tokenizer.is_byte(token):
        return bytes([int(written[3:5], 16)])
    alphabet = _byte_of()
    return bytes(alphabet[c] for c in written) if set(written) <= alphabet.keys() else None


@cache
def _byte_of() -> dict[str, int]:
    """The byte of each character of the byte-level alphabet. Printable Latin-1 characters stand for
    themselves. The characters from U+0100 on stand for the other bytes, in order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {char: ord(char) for char in alphabet if ord(char) < 256}
    others = (byte for byte in range(256) if byte not in own.values())
    return own | dict(zip(alphabet[len(own) :], others, strict=True))
