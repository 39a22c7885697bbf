"""Compares what a command prints with what a page of the documentation shows."""

import math
import re
from itertools import dropwhile

NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]\d+)?")
PIECE = re.compile(rf"({NUMBER.pattern}| ?\.\.\. ?)")


def says(expected: str, line: str) -> bool:
    """Return whether a line is the page's: `...` is anything, and figures may be 5% off."""
    pieces = PIECE.split(" ".join(expected.split()))
    pattern = "".join(
        ".*" if piece.strip() == "..." else
        f"({NUMBER.pattern})" if NUMBER.fullmatch(piece) else re.escape(piece)
        for piece in pieces
    )  # fmt: skip
    found = re.fullmatch(pattern, " ".join(line.split()))
    if not found:
        return False
    pairs = zip(NUMBER.findall(expected), found.groups(), strict=True)
    return all(math.isclose(float(a), float(b), rel_tol=0.05) for a, b in pairs)


def missing(expected: str, output: str) -> list[str]:
    """The page's lines that the output does not have, in this order."""
    rest = output.splitlines()
    lost: list[str] = []
    for wanted in filter(str.strip, expected.splitlines()):
        after = list(dropwhile(lambda line, wanted=wanted: not says(wanted, line), rest))
        if after:
            rest = after[1:]
        else:
            lost.append(wanted)
    return lost
