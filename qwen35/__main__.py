"""`python -m qwen35`: the same as `python -m qwen35.generate`."""

from qwen35.generate import command

command()
