"""Continues a prompt as text, for the command line, `--requests` and notebooks.

`generation.py` works on ids. Here a prompt may be text, ids or a conversation. Missing settings
come from the checkpoint's files. Ids are converted to text as they come, and a stop string ends the
text.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen35.arguments import checked, shown, token_ids
from qwen35.cli import counted
from qwen35.config import Config
from qwen35.defaults import Defaults
from qwen35.errors import InputError
from qwen35.generation import Generation, check_counts
from qwen35.load import load
from qwen35.logprobs import TokenLogprobs
from qwen35.messages import Answer, parse_messages, parse_tools, split_reasoning
from qwen35.prefix.cache import PrefixCache
from qwen35.prefix.keys import identity
from qwen35.sampling import Sampling
from qwen35.swap import replaced
from qwen35.tokenizer import Prompt, Tokenizer
from reference.model import Model

NEW_TOKENS = 128  # default for a prompt that is no conversation
DRAFTS = 3


KINDS: dict[str, type] = {
    "max_new_tokens": int, "temperature": float, "top_k": int, "top_p": float, "min_p": float,
    "repetition_penalty": float, "presence_penalty": float, "seed": int, "ignore_eos": bool,
    "stop": str, "draft_tokens": int, "prefill_chunk": int, "digest": bool, "logprobs": int,
    "thinking": bool, "chat_template_kwargs": dict, "allow_special_tokens": bool,
}  # fmt: skip
SAMPLED = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
)  # fmt: skip
OF_CONVERSATIONS = ("thinking", "chat_template_kwargs", "allow_special_tokens")
OF_DRAWS = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}  # each with a value that is off


@dataclass(frozen=True)
class Settings:
    """How to continue a prompt. None means the default of the checkpoint's files or of the model.

    max_new_tokens: None is NEW_TOKENS, and for a conversation all that the context holds, unless
        generation_config.json has a limit.
    temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty: see `sampling.Sampling`. A
        conversation takes what generation_config.json advises; a prompt is continued greedily.
    ignore_eos: go on after an end-of-text token.
    stop: texts that end the answer and are not part of it, or one text.
    draft_tokens: drafts per round; None is 3 if the model has an MTP head, else 0.
    prefill_chunk: prompt tokens per pass, a multiple of 64; None is as many as fit (`qwen35.chunk`).
    digest: hash the logits.
    logprobs: compute the log probabilities of each token and of this many likeliest ids (None: no).
    thinking: whether to think in a conversation; None lets the chat template decide.
    chat_template_kwargs: further variables of the chat template.
    allow_special_tokens: let a control token's written form in a message become that token.
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
    stop: Sequence[str] | str = ()
    draft_tokens: int | None = None
    prefill_chunk: int | None = None
    digest: bool = False
    logprobs: int | None = None
    thinking: bool | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    allow_special_tokens: bool = False

    def __post_init__(self) -> None:
        for own in fields(self):
            value = getattr(self, own.name)
            if value is not None or own.default is not None:
                # The way to set a field of a frozen dataclass: one text becomes a tuple of it.
                object.__setattr__(self, own.name, checked(own.name, value, KINDS[own.name]))
        check_counts(self.max_new_tokens, self.prefill_chunk, self.draft_tokens)
        self.sampling(Defaults(), None, conversation=False)  # for the ranges of its numbers

    def idle(self, temperature: float, *, conversation: bool) -> dict[str, str]:
        """The settings that are given but change nothing, each with the reason.

        temperature: the one that tokens are drawn at. Beside a temperature of 0 that is given, settings
        of other temperatures are no error.
        """
        found: dict[str, str] = {}
        if not conversation:
            defaults = {own.name: own.default for own in fields(self)} | {
                "chat_template_kwargs": {}
            }
            found |= {
                name: "the prompt is no conversation; give messages" for name in OF_CONVERSATIONS
                if getattr(self, name) != defaults[name]
            }  # fmt: skip
        if temperature == 0 and self.temperature is None:
            found |= {
                name: "the temperature is 0 unless it is given" for name, off in OF_DRAWS.items()
                if getattr(self, name) not in (None, off)
            }  # fmt: skip
        return found

    def sampling(self, defaults: Defaults, vocab: int | None, *, conversation: bool) -> Sampling:
        """The sampling settings. In a conversation, the checkpoint's advice replaces those that are
        None."""
        advice = defaults.advice if conversation else {}
        chosen = {
            name: advice[name] if given is None else given
            for name in SAMPLED
            if (given := getattr(self, name)) is not None or name in advice
        }  # fmt: skip
        settings: dict[str, Any] = {**chosen, "seed": self.seed, "vocab": vocab}
        return Sampling(**settings)


@dataclass(repr=False)
class Completion:
    """One continuation as text. Iterate over it for the pieces, and then read the results.

    generation: the ids and the figures. tokenizer: None prints ids. reasoning_content and content:
    the two parts of an answer in a conversation. text: the whole generated text.
    """

    generation: Generation
    tokenizer: Tokenizer | None
    prompt: Prompt
    stop: Sequence[str] = ()
    text: str = ""

    def __iter__(self) -> Generator[str, None, None]:
        stream = self.tokenizer.stream() if self.tokenizer else None
        shown = UntilStop(self.stop)
        for token, _ in self.generation:
            yield self._shown(shown.push(stream.push(token) if stream else f"{token} "))
            if shown.found:
                self.generation.finish_reason = "stop"
                return
        rest = shown.push(stream.flush()) if stream else ""
        if shown.found:
            self.generation.finish_reason = "stop"
        yield self._shown(rest + shown.flush())

    def _shown(self, piece: str) -> str:
        self.text += piece
        return piece

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        shown = self.text if len(self.text) <= 60 else f"{self.text[:60]}..."
        tokens = counted(len(self.token_ids), "token")
        return f"Completion({shown!r}, {tokens}, {self.finish_reason})"

    @property
    def token_ids(self) -> list[int]:
        return self.generation.token_ids

    @property
    def finish_reason(self) -> str:
        return self.generation.finish_reason

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """The log probabilities of each of `token_ids`; empty without the setting `logprobs`."""
        return self.generation.token_logprobs

    @property
    def answer(self) -> Answer | None:
        """The parts of an answer in a conversation, or None after other prompts."""
        opened = self.prompt.opens_thinking
        return None if opened is None else split_reasoning(self.text, opened=opened)

    def document(self) -> dict[str, Any]:
        """The figures, as `--json` prints them. A rate is None if only the first token was computed."""
        result = self.generation
        parts: dict[str, Any] = {}
        if (answer := self.answer) is not None:
            parts = {"reasoning_content": answer.reasoning, "content": answer.content}
        found: dict[str, Any] = {
            "text": self.text,
            **parts,
            "token_ids": result.token_ids,
            "prompt_tokens": len(result.prompt),
            "cached_tokens": result.cached_tokens,
            "finish_reason": result.finish_reason,
            "path": result.path,
            "swaps": replaced(result.model),
            "kv_cache_dtype": result.model.kv_cache_dtype,
            "threads": torch.get_num_threads(),
            "draft": {
                "proposed": result.draft.proposed,
                "accepted": result.draft.accepted,
                "tokens_per_forward": rounded(result.draft.tokens_per_forward, 4),
            },
            "timing": {
                "prepare_s": round(result.prepare_s, 4),
                "ttft_s": round(result.ttft_s, 4),
                "decode_s": round(result.decode_s, 4),
                "tokens_per_s": rounded(result.tokens_per_s, 2),
            },
        }
        if result.prefix_cache:
            found["cache_reason"] = result.cache_reason
        if result.digest:
            found["logits_sha256"] = result.logits_sha256
        if result.logprobs is not None:
            found["logprobs"] = [row.document(self.tokenizer) for row in self.logprobs]
        return found


def rounded(rate: float | None, digits: int) -> float | None:
    """A rate with this many decimals, or None if there is none."""
    return None if rate is None else round(rate, digits)


class UntilStop:
    """Passes text on up to the first complete stop string. Text that may begin one is held back."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop, self.held, self.found = stop, "", False

    def push(self, piece: str) -> str:
        """The text that may be shown now. `found` is True if a stop string ended it."""
        text = self.held + piece
        ended = [(first + len(s), first) for s in self.stop if (first := text.find(s)) >= 0]
        if ended:
            self.held, self.found = "", True
            _, first = min(ended)
            return text[:first]
        longest = max(map(len, self.stop), default=1) - 1
        begun = range(max(0, len(text) - longest), len(text))
        cut = next((i for i in begun if any(s.startswith(text[i:]) for s in self.stop)), len(text))
        self.held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The text that was held back. Call it after the last piece."""
        held, self.held = self.held, ""
        return held


class Completer:
    """Makes completions of prompts, with a model and the tokenizer and defaults of its folder.

    tokenizer: None if the folder has none; then prompts and outputs are ids.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        defaults: Defaults,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        self.model, self.tokenizer, self.defaults = model, tokenizer, defaults
        self.prefix_cache = prefix_cache

    def prompt(self, given: Any, settings: Settings, *, tools: Any = None) -> Prompt:
        """Encode a text, ids, or a conversation (a list of messages). InputError for anything else, and
        for tools without a conversation."""
        ids = token_ids(given)
        if tools is not None and (ids is not None or isinstance(given, str)):
            raise InputError("tools are offered, but there are no messages")
        if ids is not None:
            return Prompt(ids)
        if not isinstance(given, str) and not _are_messages(given):
            raise InputError(f"prompt = {shown(given)}; expected a text, token ids or messages")
        if self.tokenizer is None:
            raise InputError(
                f"{self.model.folder}: there is no tokenizer.json, so a prompt has to be given as ids"
            )
        context = self.model.config.max_position_embeddings
        if isinstance(given, str):
            return Prompt(self.tokenizer.encode(given, context=context), given)
        return self.tokenizer.chat(
            parse_messages(given),
            tools=parse_tools(tools),
            thinking=settings.thinking,
            template_kwargs=settings.chat_template_kwargs,
            allow_special_tokens=settings.allow_special_tokens,
            context=context,
        )

    def idle(self, prompt: Prompt, settings: Settings) -> dict[str, str]:
        """The settings that have no effect on a prompt, each with the reason."""
        conversation = prompt.opens_thinking is not None
        sampling = settings.sampling(self.defaults, None, conversation=conversation)
        return settings.idle(sampling.temperature, conversation=conversation)

    def complete(self, prompt: Prompt, settings: Settings) -> Completion:
        """A completion of a prompt, which does not run yet. InputError for invalid settings, and for
        settings that have no effect on it."""
        conversation = prompt.opens_thinking is not None
        limit = settings.max_new_tokens
        if limit is None and conversation:
            limit = self.defaults.max_new_tokens or self.model.config.max_position_embeddings
        drafts = settings.draft_tokens
        if drafts is None:
            drafts = DRAFTS if self.model.mtp is not None else 0
        stop = [*settings.stop, *(self.defaults.stop if conversation else ())]
        if stop and self.tokenizer is None:
            raise InputError(f"stop = {stop!r}, but {self.model.folder} has no tokenizer.json")
        vocab = self.tokenizer.size if self.tokenizer else None
        for name, reason in self.idle(prompt, settings).items():
            value = shown(getattr(settings, name))
            raise InputError(f"{name} = {value} has no effect: {reason}")
        generation = Generation(
            self.model,
            prompt.ids,
            max_new_tokens=NEW_TOKENS if limit is None else limit,
            sampling=settings.sampling(self.defaults, vocab, conversation=conversation),
            stop=frozenset(() if settings.ignore_eos else self.defaults.stop_ids),
            draft_tokens=drafts,
            prefill_chunk=settings.prefill_chunk,
            prefix_cache=self.prefix_cache,
            digest=settings.digest,
            logprobs=settings.logprobs,
        )
        return Completion(generation, self.tokenizer, prompt, stop)


def _are_messages(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(message, Mapping) for message in given)


@lru_cache(maxsize=4)
def _beside(folder: Path, config: Config) -> tuple[Tokenizer | None, Defaults]:
    """The tokenizer and the defaults of a folder. The model is no argument, because the cache would
    keep it in memory."""
    tokenizer = Tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    return tokenizer, Defaults.of_folder(folder, config, tokenizer)


def _check_cache(prefix_cache: Any, model: Model) -> None:
    """InputError unless a prefix cache was made for this model, or for one that computes the same bits:
    it knows what it keeps by the name of its own model."""
    if not isinstance(prefix_cache, PrefixCache):
        raise InputError(f"prefix_cache = {shown(prefix_cache)}; expected a PrefixCache")
    theirs = prefix_cache.model
    if theirs is model:
        return
    kept, own = (identity(one, str(one.folder)) for one in (theirs, model))
    for name in own:
        there, here = kept.get(name), own[name]
        if there != here:
            raise InputError(
                f"prefix_cache was made for a model with {name} {there}; this one has {here}"
            )


def generate(
    model: Model | str | Path,
    prompt: str | Sequence[int] | Tensor | list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    prefix_cache: PrefixCache | None = None,
    on_text: Callable[[str], object] | None = None,
    **settings: Any,
) -> Completion:
    """Continue a prompt. Returns a Completion, which prints as its text.

    model: from `load`; a name or folder is loaded, at each call. prompt: a text, token ids (a list
    or a tensor [T]), or messages ({"role": ..., "content": ...}).
    tools: functions that a conversation offers. prefix_cache: stores prefixes for later prompts.
    on_text: called with each piece of text as it comes. settings: fields of `completion.Settings`,
    with the names of the command line's options: max_new_tokens, temperature, seed, stop, ...

        completion = qwen35.generate(model, "In the beginning", max_new_tokens=20, temperature=0.7)
        completion.text, completion.token_ids, completion.finish_reason

    InputError, one line, for an invalid prompt or setting, or one that has no effect (`thinking` with a
    prompt that is no conversation, `top_p` without a temperature).
    """
    unknown = settings.keys() - Settings.__dataclass_fields__
    if unknown:
        known = ", ".join(Settings.__dataclass_fields__)
        raise InputError(f"unknown setting {min(unknown)!r}; known are {known}")
    chosen = Settings(**settings)
    if on_text is not None and not callable(on_text):
        raise InputError(f"on_text = {shown(on_text)}; expected a function of a text")
    if not isinstance(model, Model):
        model = load(model)
    if model.folder is None:
        raise InputError("the model was not loaded from a folder, so it has no tokenizer")
    if prefix_cache is not None:
        _check_cache(prefix_cache, model)
    completer = Completer(model, *_beside(model.folder, model.config), prefix_cache)
    completion = completer.complete(completer.prompt(prompt, chosen, tools=tools), chosen)
    for piece in completion:
        if on_text is not None:
            on_text(piece)
    return completion
