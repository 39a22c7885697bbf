"""Sets the number of torch's threads. How they wait is set in `qwen35/__init__.py`, before torch is
imported."""

import json
import os
from pathlib import Path

from qwen35.errors import InputError

# Below this size a second thread makes a decode pass slower (LOG.md), because products end before
# the thread has woken up.
HIDDEN_SIZE = 1024
ASKED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # environment variables that torch obeys
MOST_THREADS = 1024  # far more end the process in torch's thread pool, without an exception


def set_threads(asked: int | None, model: str | None) -> None:
    """Set torch's number of threads for a command.

    asked: the value of `--threads`. None is one thread for a small checkpoint, and otherwise
    torch's default, usually the number of cores; an environment variable of ASKED has precedence
    over both. model: the checkpoint's folder, or "tiny"; a hub id counts as large. InputError if a
    variable asks for more than MOST_THREADS.
    """
    if asked is None:
        for name in ASKED:
            number = os.environ.get(name, "").partition(",")[0].strip()  # a list is one per level
            if number.isdecimal() and (len(number) > 9 or int(number) > MOST_THREADS):
                raise InputError(
                    f"{name} = {number}; expected a number of at most {MOST_THREADS:,}"
                )
        if any(name in os.environ for name in ASKED) or not (model and is_small(model)):
            return
        asked = 1
    import torch  # here, because commands that compute nothing do not need it

    torch.set_num_threads(asked)


def is_small(model: str) -> bool:
    """Whether the hidden size in config.json is below HIDDEN_SIZE. False if it cannot be read; the
    loader then reports the error."""
    from qwen35.load import TINY

    folder = TINY if model == "tiny" else Path(model)
    try:
        config = json.loads((folder / "config.json").read_bytes())
        return int(config.get("text_config", config)["hidden_size"]) < HIDDEN_SIZE
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        OverflowError,
        RecursionError,
    ):
        return False
