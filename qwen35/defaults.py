"""Where a continuation stops and how it is drawn, as a checkpoint's files say.

| what | read from |
|---|---|
| end of text | the union of `eos_token_id` in generation_config.json and in both levels of config.json, and `eos_token` in tokenizer_config.json |
| drawing, in a conversation | temperature, top_k, top_p and min_p of generation_config.json where its `do_sample` is true; its penalties in any case |
| limits | `max_new_tokens` and `stop_strings` of generation_config.json |

What else that file holds and would change the text, were it followed, is named in `not_followed`.
"""  # noqa: E501

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen35.config import Config
from qwen35.config_json import as_ids, in_vocabulary
from qwen35.errors import InputError
from qwen35.tokenizer import Tokenizer, read_config

GENERATION = "generation_config.json"
DRAWING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}  # transformers' defaults
PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0}

# Keys that change nothing here. None: whatever the value; else only with that value, which is "off".
WITHOUT_EFFECT: dict[str, Any] = {
    "transformers_version": None, "_from_model_config": None, "use_cache": None, "cache_config": None,
    "cache_implementation": None, "max_cache_len": None, "pad_token_id": None, "bos_token_id": None,
    "decoder_start_token_id": None, "output_attentions": None, "output_hidden_states": None,
    "output_logits": None, "output_scores": None, "return_dict_in_generate": None,
    "return_legacy_cache": None, "trust_remote_code": None, "compile_config": None,
    "disable_compile": None, "is_assistant": None, "num_assistant_tokens": None,
    "num_assistant_tokens_schedule": None, "assistant_confidence_threshold": None,
    "assistant_lookbehind": None, "target_lookbehind": None, "assistant_early_exit": None,
    "prefill_chunk_size": None, "renormalize_logits": None, "early_stopping": None,
    "length_penalty": None, "continuous_batching_config": None,
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "diversity_penalty": 0,
    "min_length": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1, "frequency_penalty": 0,
    "guidance_scale": 1, "remove_invalid_values": False, "token_healing": False,
}  # fmt: skip
FOLLOWED = {*DRAWING, *PENALTIES, "do_sample", "eos_token_id", "max_new_tokens", "stop_strings"}


@dataclass(frozen=True)
class Defaults:
    """What nobody has to say since the files say it.

    stop_ids: the tokens that end a text, each with the files that name it. advice: of a conversation's
    sampling settings those that are advised. max_new_tokens: None where no file limits it. stop: texts
    that end an answer. not_followed: keys of generation_config.json, with their values.
    """

    stop_ids: dict[int, list[str]] = field(default_factory=dict)
    advice: dict[str, float] = field(default_factory=dict)
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    not_followed: dict[str, Any] = field(default_factory=dict)

    @property
    def warning(self) -> str:
        """One line on what is not followed; empty where all is."""
        keys = ", ".join(f"{name} = {value!r}" for name, value in self.not_followed.items())
        return f"{GENERATION}: not followed: {keys}" if keys else ""

    @classmethod
    def of_folder(cls, folder: Path, config: Config, tokenizer: Tokenizer | None) -> "Defaults":
        """Read the files beside a model's weights. InputError naming the file, the key and its value."""
        document = read_config(folder / GENERATION)
        try:
            return cls._of_document(document, config, tokenizer)
        except InputError as error:
            raise InputError(f"{folder / GENERATION}: {error}") from None

    @classmethod
    def _of_document(
        cls, document: Mapping[str, Any], config: Config, tokenizer: Tokenizer | None
    ) -> "Defaults":
        sources = {
            GENERATION: as_ids(document.get("eos_token_id")),
            "config.json": config.eos_token_id,
        }
        eos = tokenizer.special_tokens.get("eos_token") if tokenizer else None
        if tokenizer and eos is not None and (number := tokenizer.id_of(eos)) is not None:
            sources["tokenizer_config.json"] = (number,)
        stop_ids: dict[int, list[str]] = {}
        for file, ids in sources.items():
            for number in ids:
                stop_ids.setdefault(number, []).append(file)
        draws = bool(document.get("do_sample"))
        advised = (DRAWING if draws else {}) | PENALTIES
        advice = {name: _number(document, name, default) for name, default in advised.items()}
        limit = document.get("max_new_tokens")
        if limit is not None and (type(limit) is not int or limit < 1):
            raise InputError(f"max_new_tokens = {limit!r}; expected an integer >= 1")
        return cls(
            stop_ids=dict(sorted(stop_ids.items())),
            advice=advice,
            max_new_tokens=limit,
            stop=_texts(document.get("stop_strings")),
            not_followed={
                name: value
                for name, value in document.items()
                if name not in FOLLOWED and not _has_no_effect(name, value, config)
            },
        )


def _number(document: Mapping[str, Any], name: str, default: float) -> float:
    value = document.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{name} = {value!r}; expected a number")
    return type(default)(value)


def _texts(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise InputError(f"stop_strings = {value!r}; expected a text or a list of texts")
    return tuple(texts)


def _has_no_effect(name: str, value: Any, config: Config) -> bool:
    if name == "max_length":  # reaches as far as the context: no limit
        return isinstance(value, int) and value >= config.max_position_embeddings
    return name in WITHOUT_EFFECT and WITHOUT_EFFECT[name] in (None, value)
