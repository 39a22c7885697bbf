"""What every command line shares: one-line errors, exit statuses, `--debug`."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from qwen35.errors import InputError


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and a `--debug` switch."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse_ids(text: str) -> list[int]:
    """Token ids written as `1,2,3`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"ids {text!r}; expected numbers with commas between, as in 1,2,3"
        ) from None


def run(
    parser: Parser, main: Callable[[argparse.Namespace], int], argv: list[str] | None = None
) -> NoReturn:
    """Parse, run, exit: 0 fine, 1 a check failed, 2 bad input, 130 interrupted."""
    args = parser.parse_args(argv)
    warnings.showwarning = lambda message, *_, **__: print(
        f"{parser.prog}: warning: {message}", file=sys.stderr
    )
    try:
        status = main(args)
        sys.stdout.flush()
    except InputError as error:
        if args.debug:
            raise
        parser.exit(2, f"{parser.prog}: {' '.join(str(error).split())}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\n")
    except BrokenPipeError:  # the reader of stdout went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except OSError as error:  # such as a name that is too long, or a folder that may not be read
        if args.debug:
            raise
        parser.exit(2, f"{parser.prog}: {error.filename or 'error'}: {error.strerror or error}\n")
    parser.exit(status)
