"""Shows a generation in a terminal: its text on standard output, and everything else on standard
error."""

import sys
from collections.abc import Callable
from contextlib import closing

from qwen35.cli import counted, one_line
from qwen35.completion import Completion
from qwen35.logprobs import table
from qwen35.progress import Progress


class _Cursor:
    """Where the cursor of the terminal is. is_inside: behind text that has not ended its line."""

    is_inside = False


CURSOR = _Cursor()  # a process has one terminal


def say(line: str) -> None:
    """Print one line on standard error. If standard output is a terminal, an unfinished line of text
    is ended first, so that this line begins at its left edge."""
    if CURSOR.is_inside and sys.stdout.isatty():
        print(flush=True)
        CURSOR.is_inside = False
    print(one_line(line), file=sys.stderr, flush=True)


def show(
    completion: Completion, *, quiet: bool, check: Callable[[], object] = lambda: None
) -> None:
    """Print the text as it comes, then the figures.

    quiet: print no text, digest or log probabilities, because a document has them. check: called
    after each pass of the prefill and after each token. An exception of it ends the text; the
    figures are still printed.
    """
    result = completion.generation
    bar = Progress("prompt tokens", len(result.prompt))

    def progress(tokens: int) -> None:
        bar.update(tokens)
        check()

    result.progress = progress
    try:
        with closing(iter(completion)) as pieces:
            for piece in pieces:
                bar.close()
                if not quiet:
                    print(piece, end="", flush=True)
                    if piece:
                        CURSOR.is_inside = not piece.endswith("\n")
                check()
    finally:  # also when interrupted: the figures follow the printed text
        bar.close()
        if result.token_ids:
            if not quiet:
                print(flush=True)
                CURSOR.is_inside = False
            _show_figures(completion, quiet=quiet)


def _show_figures(completion: Completion, *, quiet: bool) -> None:
    result = completion.generation
    if completion.logprobs and not quiet:
        print(table(completion.logprobs, completion.tokenizer), file=sys.stderr, flush=True)
    given, made = (
        counted(len(result.prompt), "prompt token"),
        counted(len(result.token_ids), "token"),
    )
    line = (
        f"{given} ({result.cached_tokens} cached), first token after {result.ttft_s:.3f} s, {made}"
    )
    # The first token has no decode speed.
    if (speed := result.tokens_per_s) is not None:
        line += f" at {speed:.1f} tokens/s"
    if (drafted := result.draft.tokens_per_forward) is not None:
        line += f", {drafted:.2f} tokens/forward"
    say(line)
    if result.prefix_cache:
        say(f"prefix cache: {result.cached_tokens} tokens; {result.cache_reason}")
    if result.digest and not quiet:
        say(f"logits_sha256 {result.logits_sha256}")
