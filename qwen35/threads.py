"""How many threads torch computes with. How they wait is set in `qwen35/__init__.py`, before torch is
imported."""

import json
import os
from pathlib import Path

# Below this, a second thread costs a decode pass more than it brings (LOG.md): the rows of a product are
# done before the thread has woken up.
HIDDEN_SIZE = 1024
ASKED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # variables of the environment, which torch obeys


def set_threads(asked: int | None, model: str | None) -> None:
    """Set torch's number of threads for a command.

    asked: what `--threads` says; None is one thread for a small checkpoint, and otherwise torch's own
    choice, usually the number of cores. A variable of the environment is obeyed in both cases.
    model: the checkpoint's folder, or "tiny"; a hub id counts as large.
    """
    if asked is None:
        if any(name in os.environ for name in ASKED) or not (model and is_small(model)):
            return
        asked = 1
    import torch  # here: a command that computes nothing does without

    torch.set_num_threads(asked)


def is_small(model: str) -> bool:
    """Whether config.json names a hidden size below HIDDEN_SIZE; False where that cannot be read, which
    the loader then reports."""
    from qwen35.load import TINY

    folder = TINY if model == "tiny" else Path(model)
    try:
        config = json.loads((folder / "config.json").read_bytes())
        return int(config.get("text_config", config)["hidden_size"]) < HIDDEN_SIZE
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return False
