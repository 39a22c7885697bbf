"""The stop tokens and sampling settings in a checkpoint's files.

| what | read from |
|---|---|
| end of text | the union of `eos_token_id` in generation_config.json and in both levels of config.json, and `eos_token` in tokenizer_config.json |
| sampling, in a conversation | temperature, top_k, top_p and min_p of generation_config.json where its `do_sample` is true; its penalties in any case |
| limits | `max_new_tokens` and `stop_strings` of generation_config.json |

Other keys of generation_config.json that would change the text are not followed; `not_followed` has them.
"""  # noqa: E501

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen35.config import Config
from qwen35.config_json import as_ids, in_vocabulary
from qwen35.errors import InputError
from qwen35.sampling import Sampling
from qwen35.tokenizer import Tokenizer, end_of_text, read_config

GENERATION = "generation_config.json"
DRAWING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}  # transformers' defaults
PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0}
FOLLOWED = {*DRAWING, *PENALTIES, "do_sample", "eos_token_id", "max_new_tokens", "stop_strings"}

# Keys that never change the text: records, caches, drafts, outputs, and settings of other decoding
# methods (beam search, batches of other engines).
WITHOUT_EFFECT = {
    "transformers_version", "_from_model_config", "_commit_hash", "trust_remote_code", "use_cache",
    "cache_config", "cache_implementation", "max_cache_len", "low_memory", "pad_token_id",
    "bos_token_id", "decoder_start_token_id", "output_attentions", "output_hidden_states",
    "output_logits", "output_scores", "return_dict_in_generate", "return_legacy_cache",
    "compile_config", "disable_compile", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
    "target_lookbehind", "assistant_early_exit", "use_mtp", "prompt_lookup_num_tokens",
    "max_matching_ngram_size", "speculation_type", "prefill_chunk_size", "renormalize_logits",
    "early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty",
    "continuous_batching_config",
}  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _at_most_0(value: Any) -> bool:
    return _is_number(value) and value <= 0


def _is_1(value: Any) -> bool:
    return _is_number(value) and value == 1


def _at_least_1(value: Any) -> bool:
    return _is_number(value) and value >= 1


def _is_off(value: Any) -> bool:
    """Whether a value is false, zero, or an empty list or object."""
    return not value


def _cuts_nothing(value: Any) -> bool:
    return _is_number(value) and not 0 < value < 1


# Keys that change the text, each with a test for values that have no effect in transformers.
OFF: dict[str, Callable[[Any], bool]] = {
    "num_beams": _is_1, "num_return_sequences": _is_1, "guidance_scale": _is_1,
    "encoder_repetition_penalty": _is_1, "min_length": _at_most_0, "min_new_tokens": _at_most_0,
    "no_repeat_ngram_size": _at_most_0, "encoder_no_repeat_ngram_size": _at_most_0,
    "penalty_alpha": _at_most_0, "frequency_penalty": _is_off, "remove_invalid_values": _is_off,
    "token_healing": _is_off, "suppress_tokens": _is_off, "begin_suppress_tokens": _is_off,
    "bad_words_ids": _is_off, "sequence_bias": _is_off, "dola_layers": _is_off,
    "constraints": _is_off, "force_words_ids": _is_off, "watermarking_config": _is_off,
}  # fmt: skip
# The same for keys that matter only if tokens are sampled.
OFF_IN_DRAWING: dict[str, Callable[[Any], bool]] = {
    "typical_p": _at_least_1, "epsilon_cutoff": _cuts_nothing, "eta_cutoff": _cuts_nothing,
    "top_h": lambda _: False, "assistant_ensemble_weight": lambda _: False,
}  # fmt: skip


@dataclass(frozen=True)
class Defaults:
    """The settings in a checkpoint's files.

    stop_ids: the tokens that end a text, each with the files that name it. advice: the recommended
    sampling settings for a conversation. max_new_tokens: None if no file limits it. stop: texts
    that end an answer. not_followed: keys of generation_config.json, with their values. no_ends: a
    line for each end-of-text token whose id is unknown or outside of the vocabulary.
    """

    stop_ids: dict[int, list[str]] = field(default_factory=dict)
    advice: dict[str, float] = field(default_factory=dict)
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    not_followed: dict[str, Any] = field(default_factory=dict)
    no_ends: tuple[str, ...] = ()

    @property
    def warning(self) -> str:
        """One line on settings that are not followed, or "" if all are."""
        keys = ", ".join(f"{name} = {value!r}" for name, value in self.not_followed.items())
        lines = [f"{GENERATION}: not followed: {keys}"] if keys else []
        return "; ".join([*lines, *self.no_ends])

    @classmethod
    def of_folder(cls, folder: Path, config: Config, tokenizer: Tokenizer | None) -> "Defaults":
        """Read the files beside a model's weights. InputError, with the file, the key and its
        value."""
        document = read_config(folder / GENERATION)
        try:
            found = cls._of_document(document, config)
        except InputError as error:
            raise InputError(f"{folder / GENERATION}: {error}") from None
        name, number = end_of_text(folder)
        if tokenizer is not None:
            name = tokenizer.special_tokens.get("eos_token")
            number = None if name is None else tokenizer.id_of(name)
        source, no_ends = "tokenizer_config.json", list(found.no_ends)
        if name is not None and number is None:
            no_ends.append(f"eos_token {name!r} in {source} is left out: its id is not known")
        elif number is not None:
            ids, lines = in_vocabulary([number], config.vocab_size, f"({name!r} in {source})")
            no_ends += lines
            for number in ids:
                found.stop_ids.setdefault(number, []).append(source)
        ordered = dict(sorted(found.stop_ids.items()))
        return replace(found, stop_ids=ordered, no_ends=tuple(no_ends))

    @classmethod
    def _of_document(cls, document: Mapping[str, Any], config: Config) -> "Defaults":
        """Read the settings of generation_config.json and config.json."""
        named = as_ids(document.get("eos_token_id"))
        ids, no_ends = in_vocabulary(named, config.vocab_size, f"in {GENERATION}")
        stop_ids: dict[int, list[str]] = {}
        for file, numbers in ((GENERATION, ids), ("config.json", config.eos_token_id)):
            for number in dict.fromkeys(numbers):
                stop_ids.setdefault(number, []).append(file)
        draws = document.get("do_sample", False)
        if not isinstance(draws, bool):
            raise InputError(f"do_sample = {draws!r}; expected true or false")
        advised = (DRAWING if draws else {}) | PENALTIES
        advice: dict[str, Any] = {
            n: _number(document, n, default) for n, default in advised.items()
        }
        Sampling(**advice)  # raises InputError for a number out of range
        limit = document.get("max_new_tokens")
        if limit is not None and (type(limit) is not int or limit < 1):
            raise InputError(f"max_new_tokens = {limit!r}; expected an integer >= 1")
        return cls(
            stop_ids=stop_ids,
            advice=advice,
            max_new_tokens=limit,
            stop=_texts(document.get("stop_strings")),
            not_followed={
                name: value
                for name, value in document.items()
                if name not in FOLLOWED and not _has_no_effect(name, document, config)
            },
            no_ends=tuple(no_ends),
        )


def _number(document: Mapping[str, Any], name: str, default: float) -> float:
    """A number of the document: an integer if the default is one, or a float. InputError
    otherwise."""
    value = document.get(name, default)
    if isinstance(default, int) and type(value) is not int:
        raise InputError(f"{name} = {value!r}; expected an integer")
    if not _is_number(value) or abs(value) > sys.float_info.max:
        raise InputError(f"{name} = {value!r}; expected a number")
    return type(default)(value)


def _texts(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise InputError(f"stop_strings = {value!r}; expected a text or a list of texts")
    return tuple(texts)


def _has_no_effect(name: str, document: Mapping[str, Any], config: Config) -> bool:
    value = document[name]
    if name == "max_length":  # max_new_tokens has precedence; or it is as long as the context
        reaches = isinstance(value, int) and value >= config.max_position_embeddings
        return "max_new_tokens" in document or reaches
    if name == "min_length" and "min_new_tokens" in document:
        return True
    if name in OFF_IN_DRAWING:
        return not document.get("do_sample") or OFF_IN_DRAWING[name](value)
    return name in WITHOUT_EFFECT or (name in OFF and OFF[name](value))
