"""The tokenizer and the training ids of `tools.train_tiny`, from texts and conversations."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
END_OF_TEXT = "<|endoftext|>"
# Qwen3.5's pre-tokenizer: contractions, words with their marks, single digits, punctuation, white
# space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(text: Path, vocab: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer in Qwen's form. It has `vocab` ids, of which the last are
    SPECIAL."""
    backend = Tokenizer(BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_documents(text), trainer)
    backend.add_special_tokens(SPECIAL[:3])
    backend.add_tokens(SPECIAL[3:])
    return backend


def _documents(path: Path) -> Iterator[str]:
    for document in path.read_text(encoding="utf-8").split(f"\n{END_OF_TEXT}\n"):
        if document.strip():
            yield document.strip()


def as_chat(paragraphs: list[str], rng: np.random.Generator) -> str:
    """Turn a passage into a conversation: user and assistant take its paragraphs in turn."""
    turns = []
    for asked, answer in zip(paragraphs[::2], paragraphs[1::2], strict=False):
        thought = answer.split(". ")[0][:200] + "\n" if rng.random() < 0.5 and not turns else "\n"
        turns.append(
            f"<|im_start|>user\n{asked}<|im_end|>\n"
            f"<|im_start|>assistant\n<think>\n{thought}</think>\n\n{answer}<|im_end|>\n"
        )
    return "".join(turns)


def encode_corpus(path: Path, backend: Tokenizer, *, chat_share: float, seed: int) -> Tensor:
    """All documents in shuffled order, as one row of ids [N] int16. About `chat_share` of the
    longer ones become conversations."""
    rng = np.random.default_rng(seed)
    texts = list(_documents(path))
    rng.shuffle(texts)
    for i, text in enumerate(texts):
        paragraphs = text.split("\n\n")
        if len(paragraphs) > 3 and rng.random() < chat_share:
            first = int(rng.integers(len(paragraphs) - 3))
            texts[i] = as_chat(paragraphs[first : first + 6], rng)
    end = backend.token_to_id(END_OF_TEXT)
    ids: list[np.ndarray] = []
    for first in range(0, len(texts), 512):
        for encoding in backend.encode_batch(texts[first : first + 512], add_special_tokens=False):
            ids.append(np.asarray([*encoding.ids, end], dtype=np.int16))
    return torch.from_numpy(np.concatenate(ids))
