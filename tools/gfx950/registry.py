"""The table from mnemonics to the functions that execute them."""

from collections.abc import Callable

from tools.gfx950.assembly import Instruction
from tools.gfx950.waves import Waves

Action = Callable[[Waves], None]
Builder = Callable[[Instruction], Action]

# Mnemonic -> its builder. Mnemonics of vector instructions are without the suffix of their encoding. A
# builder reads the text once, when the kernel is loaded; the action that it returns runs many times.
BUILDERS: dict[str, Builder] = {}
# Mnemonic -> the types of its results and sources, of those that a `define` makes.
SIGNATURES: dict[str, str] = {}
ENCODINGS = ("_e32", "_e64", "_dpp", "_sdwa")


def instruction(*mnemonics: str) -> Callable[[Builder], Builder]:
    """Decorator that registers a function as the builder of these mnemonics."""

    def register(build: Builder) -> Builder:
        for mnemonic in mnemonics:
            BUILDERS[mnemonic] = build
        return build

    return register


def plain(mnemonic: str) -> str:
    """The mnemonic without the suffix of its encoding."""
    for suffix in ENCODINGS:
        if mnemonic.startswith("v_") and mnemonic.endswith(suffix):
            return mnemonic.removesuffix(suffix)
    return mnemonic


def parse_signature(signature: str) -> tuple[list[str], list[str]]:
    """ "u32 mask = u32 u32" -> (["u32", "mask"], ["u32", "u32"])."""
    results, _, sources = signature.partition("=")
    return results.split(), sources.split()
