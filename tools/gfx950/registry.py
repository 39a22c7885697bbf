"""From mnemonics to what executes them."""

from collections.abc import Callable

from tools.gfx950.assembly import Instruction
from tools.gfx950.waves import Waves

Action = Callable[[Waves], None]
Builder = Callable[[Instruction], Action]

# Mnemonic, without the suffixes _e32, _e64, _dpp and _sdwa of vector instructions' encodings -> its
# builder. A builder looks at the text once, when the kernel is loaded; the action that it returns runs
# many times.
BUILDERS: dict[str, Builder] = {}
ENCODINGS = ("_e32", "_e64", "_dpp", "_sdwa")


def instruction(*mnemonics: str) -> Callable[[Builder], Builder]:
    """Decorator: this function builds the instructions of these names."""

    def register(build: Builder) -> Builder:
        for mnemonic in mnemonics:
            BUILDERS[mnemonic] = build
        return build

    return register


def plain(mnemonic: str) -> str:
    """The mnemonic without the suffix that tells its encoding."""
    for suffix in ENCODINGS:
        if mnemonic.startswith("v_") and mnemonic.endswith(suffix):
            return mnemonic.removesuffix(suffix)
    return mnemonic


def parse_signature(signature: str) -> tuple[list[str], list[str]]:
    """ "u32 mask = u32 u32" -> (["u32", "mask"], ["u32", "u32"])."""
    results, _, sources = signature.partition("=")
    return results.split(), sources.split()
