"""The one exception that bad input raises."""

LONGEST = 1500  # characters of a message
FIRST, LAST = 1000, 300  # those that stay of a longer one


class InputError(ValueError):
    """Bad input: one line that names the thing and both values. Command lines exit with status 2.

    A message that quotes a whole file, or a list of a million, is cut in the middle.
    """

    def __init__(self, message: object) -> None:
        super().__init__(shortened(str(message)))


def shortened(text: str) -> str:
    """A message without its middle, where it is longer than anybody reads."""
    if len(text) <= LONGEST:
        return text
    out = len(text) - FIRST - LAST
    return f"{text[:FIRST]} ... ({out} characters are left out) ... {text[-LAST:]}"
