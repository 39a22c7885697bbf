"""`python -m qwen35.generate --chat`: a conversation in a terminal. Ctrl-C ends only the answer."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

from qwen35.cli import counted
from qwen35.completion import Completer, Completion, Settings
from qwen35.errors import InputError
from qwen35.messages import Message
from qwen35.parallel.ranks import ALONE, Ranks
from qwen35.terminal import say, show


class Stopped(KeyboardInterrupt):
    """Raised after the pass in which Ctrl-C was pressed once, while an answer was computed."""


def converse(
    completer: Completer,
    settings: Settings,
    opening: list[Message],
    message: str | None,
    ranks: Ranks = ALONE,
) -> None:
    """Take turns until an empty line or the end of the input.

    opening: messages before the first turn, such as a system message. message: the first one of the
    user; None asks for it. ranks: the group that computes; rank 0 asks.

    Ctrl-C during an answer ends the answer. The printed part stays in the conversation, except for
    an unfinished thought. At the prompt, or a second time before the answer has ended, Ctrl-C is a
    KeyboardInterrupt. With several ranks every Ctrl-C is one, because the ranks would stop in different
    passes.
    """
    history = list(opening)
    while message := message or ranks.share(_ask):
        history.append({"role": "user", "content": message})
        completion = completer.complete(completer.prompt(history, settings), settings)
        stopped = False
        try:
            with first_interrupt_stops() if ranks.size == 1 else nullcontext(_go_on) as check:
                show(completion, quiet=False, check=check)
        except Stopped:
            stopped = True
        history.append(_said(completion, stopped=stopped))
        message = None


def _go_on() -> None:
    """Do nothing."""


def _said(completion: Completion, *, stopped: bool) -> Message:
    """The assistant's message for the next turns. A line is printed if it was cut."""
    answer = completion.answer
    assert answer is not None
    count = counted(len(completion.token_ids), "token")
    cause = f"Ctrl-C after {count}" if stopped else f"the limit of {count}"
    if not answer.finished:
        rest = "the thought, which is not part of the conversation"
        if not stopped and completion.finish_reason == "stop":
            say(f"no answer: the text ended inside {rest}; --no-thinking asks for none")
        else:
            say(f"no answer: {cause} cut {rest}")
        return {"role": "assistant", "content": ""}
    if stopped and answer.content:
        say(f"{cause}: the answer so far is part of the conversation; Ctrl-C here ends it")
    elif stopped:
        say("no answer: Ctrl-C came before it; the message is part of the conversation")
    return {"role": "assistant", "content": answer.content, "reasoning_content": answer.reasoning}


@contextmanager
def first_interrupt_stops() -> Iterator[Callable[[], None]]:
    """Delay the first Ctrl-C while the block runs. Yields a function that raises Stopped after it.

    Therefore a pass, and its storing in the prefix cache, is never interrupted in the middle. A
    second Ctrl-C is a KeyboardInterrupt at once. A process that ignores SIGINT goes on doing so.
    """
    pressed: list[int] = []

    def press(number: int, _: FrameType | None) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check() -> None:
        if pressed:
            raise Stopped

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield check
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _ask() -> str:
    print("> ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline().strip()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not text: {error}") from None
