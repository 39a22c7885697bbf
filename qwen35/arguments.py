"""Checks the arguments of Python callers and of requests, which may have the command line's forms."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from qwen35.errors import InputError

SHOWN = 60  # characters of a value in an error
WORDS = {
    int: "an integer", float: "a number", bool: "true or false", dict: "an object",
    str: "a text or a list of texts",
}  # fmt: skip


def shown(value: object) -> str:
    """A value on one line, cut if it is long."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"{type(value).__name__} of shape {list(value.shape)}"
    if isinstance(value, torch.nn.Module):
        return f"a {type(value).__name__}"
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def checked(name: str, value: Any, kind: type) -> Any:
    """Return a setting if it is of this kind: int, float, bool, dict or str.

    str stands for a text or a list of texts, and the result is a tuple of texts. Numbers of numpy
    become Python's. InputError, with the name and the value, for another kind.
    """
    if isinstance(value, np.integer | np.floating):
        value = value.item()
    kinds = {int: int, float: (int, float), bool: bool, dict: Mapping, str: (str, Sequence)}[kind]
    if not isinstance(value, kinds) or isinstance(value, bool) != (kind is bool):
        raise InputError(f"{name} = {shown(value)}; expected {WORDS[kind]}")
    if kind is float:
        try:
            return float(value)
        except OverflowError:  # an integer of JSON may have any number of digits
            raise InputError(f"{name} = {shown(value)}; expected {WORDS[kind]}") from None
    if kind is not str:
        return value
    texts = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(text, str) and text for text in texts):
        raise InputError(f"{name} = {shown(value)}; expected texts of at least one character")
    return texts


def token_ids(given: Any) -> list[int] | None:
    """Token ids from a sequence of integers, or from a tensor or array [T]. None if it is no such
    thing."""
    if isinstance(given, torch.Tensor | np.ndarray):
        given = given.tolist() if given.ndim == 1 else None
    is_sequence = isinstance(given, Sequence) and not isinstance(given, str | bytes)
    if not is_sequence or not all(type(i) is int or isinstance(i, np.integer) for i in given):
        return None
    return [int(i) for i in given]


def from_environment(name: str, otherwise: str | None = None) -> int:
    """A number that torchrun sets in the environment. InputError, with the name, for another value."""
    text = os.environ.get(name, otherwise)
    if text is None or not text.isdecimal() or len(text) > 9:
        raise InputError(
            f"{name} = {text!r} in the environment; expected a number, as torchrun sets it"
        )
    return int(text)


def as_device(device: Any) -> torch.device:
    """A device that can compute here, such as `cpu` or `cuda:1`. InputError for others."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        name = repr(device) if isinstance(device, str) else shown(device)
        raise InputError(f"device {name} is unknown; expected cpu, cuda or cuda:N") from None
    if found.type == "cuda" and from_environment("WORLD_SIZE", "1") > 1:
        return found  # qwen35/parallel/ranks.py chooses the GPU of each process of torchrun
    try:
        torch.zeros(1, device=found).item()  # a device without values, such as meta, fails here
    except (RuntimeError, AssertionError, ImportError) as error:
        # Without the backend, torch's message is a page. Its other messages begin with a sentence.
        no_backend = isinstance(error, NotImplementedError | ImportError)
        own = str(error).splitlines()[0].split(". ")[0]
        reason = f"torch {torch.__version__} is built without it" if no_backend else own
        raise InputError(f"device {str(device)!r} cannot be used here: {reason}") from None
    return found
