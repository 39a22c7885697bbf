"""A prompt continued as text: what the command line, `--requests` and a notebook share.

`generation.py` works on ids. Here a prompt may be text, ids or a conversation; settings that nobody gave
come from the checkpoint's files; ids become text as they come, and a stop string ends them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qwen35.defaults import Defaults
from qwen35.errors import InputError
from qwen35.generation import Generation
from qwen35.messages import Answer, Message, parse_messages, parse_tools, split_reasoning
from qwen35.prefix.cache import PrefixCache
from qwen35.sampling import Sampling
from qwen35.tokenizer import Prompt, Tokenizer
from reference.model import Model

NEW_TOKENS = 128  # after a prompt that is no conversation


@dataclass(frozen=True)
class Settings:
    """How to continue a prompt; None leaves it to the checkpoint (`defaults.py`) or to the model.

    max_new_tokens: None is NEW_TOKENS, and for a conversation what the context holds. temperature 0 is
    greedy, the default of a prompt; a conversation takes what generation_config.json advises. stop: texts
    that end the answer and are not part of it. draft_tokens: None is 3 where there is an MTP head.
    thinking: None lets the chat template decide. template_kwargs: further variables of the template.
    allow_special_tokens: what a message contains may become control tokens.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    draft_tokens: int | None = None
    prefill_chunk: int = 2048
    digest: bool = False
    thinking: bool | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    allow_special_tokens: bool = False

    def __post_init__(self) -> None:
        if any(not text for text in self.stop):
            raise InputError("stop: a text is empty; expected at least one character")
