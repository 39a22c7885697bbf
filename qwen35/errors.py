"""The one exception that bad input raises."""


class InputError(ValueError):
    """Bad input: one line that names the thing and both values. Command lines exit with status 2."""
