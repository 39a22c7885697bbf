"""`tools.peer`: a checkpoint in the transformers library, or one line on why it is not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("transformers")

from qwen35.config import Config
from qwen35.errors import InputError
from tests.support.checkpoints import edit_json, edit_tensors, write
from tests.support.command import in_process
from tests.support.family import FAMILY
from tools import diff
from tools.peer import in_transformers


@pytest.mark.parametrize("member", ["35B-A3B", "0.8B"])
def test_a_checkpoint_is_loaded_whole(member: str, tmp_path: Path) -> None:
    """One with a tied head too, which has no tensor of its own and must not be random."""
    write(tmp_path, member)
    model = in_transformers(tmp_path, torch.float32)
    assert model.dtype == torch.float32 and not model.training
    head = load_file(tmp_path / "model.safetensors").get("lm_head.weight")
    weight = model.model.embed_tokens.weight if head is None else head.float()
    assert (head is None) == (member == "0.8B") and torch.equal(model.lm_head.weight, weight)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    """transformers would go on with random numbers for it."""
    write(tmp_path, "0.8B")

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.language_model.norm.weight"]

    edit_tensors(tmp_path, change)
    with pytest.raises(InputError, match=r"finds no tensor in .* for model\.norm\.weight"):
        in_transformers(tmp_path, torch.float32)


def test_what_transformers_does_not_load_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it raises; and ids that it would look up beyond its table are refused before."""
    cli = in_process(diff.build_parser, diff.main, capsys)
    write(tmp_path, "0.8B")
    status, out, err = cli(tmp_path, "--against", "transformers", "--ids", "1,99999")
    assert (status, out, err.count("\n")) == (2, "", 1) and "prompt id 99999" in err
    edit_json(tmp_path / "config.json", model_type="nothing")
    monkeypatch.setattr(Config, "from_file", lambda file: Config.from_dict(FAMILY["0.8B"]))
    with pytest.raises(InputError, match=f"transformers does not load {tmp_path}: ValueError: "):
        in_transformers(tmp_path, torch.float32)
