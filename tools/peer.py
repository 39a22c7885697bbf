"""Loads a checkpoint with the transformers library, which some tools compare with ours."""

from pathlib import Path
from typing import Any

import torch

from qwen35.config import Config
from qwen35.errors import InputError
from weights.storage import some


def in_transformers(folder: Path, dtype: torch.dtype) -> Any:
    """The folder's model of the transformers library, for inference. Its head is tied if ours is.

    InputError if the library is not installed, does not load the folder, or finds no tensor for a
    parameter.
    """
    try:
        import transformers
    except ImportError:
        raise InputError("transformers is not installed; pip install -e '.[test]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    is_tied = Config.from_file(folder / "config.json").tie_word_embeddings
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        # The library does not look for it at the top of a nested config.json, where Qwen has it.
        config.get_text_config().tie_word_embeddings = is_tied
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True
        )
        model, found = loaded
    except Exception as error:  # of any kind, such as the lack of a package for quantised weights
        raise InputError(
            f"transformers does not load {folder}: {type(error).__name__}: {error}"
        ) from error
    if missing := sorted(found["missing_keys"]):  # their values would be random
        raise InputError(f"transformers finds no tensor in {folder} for {some(missing)}")
    return model.eval()
