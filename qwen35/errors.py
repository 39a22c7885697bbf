"""The one exception that bad input raises."""

FIRST, LAST = (
    1000,
    300,
)  # characters of a message that stay where it quotes more than a person reads


class InputError(ValueError):
    """Bad input: one line that names the thing and both values. Command lines exit with status 2.

    A message that quotes a whole file, or a list of a million, is cut in the middle.
    """

    def __init__(self, message: object) -> None:
        text = str(message)
        out = len(text) - FIRST - LAST
        if out > 0:
            text = f"{text[:FIRST]} ... ({out} characters are left out) ... {text[-LAST:]}"
        super().__init__(text)
