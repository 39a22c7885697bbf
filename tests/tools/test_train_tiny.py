"""The batched forms that train the embedded model compute what the reference computes."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen35.load import load
from reference.model import Model
from tests.support.command import in_process
from tests.support.family import FAMILY, small_model
from tools import train_tiny
from tools.train_tiny import batched, chained_mtp, published
from tools.training_text import as_chat

MEMBER = "397B-A17B"


@pytest.fixture(scope="module")
def pair() -> tuple[Model, Model]:
    """A random model in float64, and its batched form."""
    model = small_model(MEMBER, dtype=torch.float64)
    return model, batched(copy.deepcopy(model))


def prompt(model: Model, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_the_batched_trunk_is_the_reference(pair: tuple[Model, Model]) -> None:
    model, fast = pair
    ids = prompt(model, 3, 130)
    assert relative(fast(ids, fast.new_cache(3)), model(ids, model.new_cache(3))) < 1e-12


@pytest.mark.parametrize("start", [0, 1, 7])
def test_a_chain_sees_what_a_draft_sees(pair: tuple[Model, Model], start: int) -> None:
    """Depth by depth against the MTP head drafting with its cache, fed the true tokens."""
    model, fast = pair
    ids = prompt(model, 1, 14)
    hidden = model(ids, model.new_cache())
    chains = chained_mtp(fast, ids, hidden, 3)
    cache = model.new_cache()
    state = model.draft(ids[:, 1 : start + 2], hidden[:, : start + 1], cache)[:, -1:]
    assert relative(chains[0][:, start : start + 1], state) < 1e-12
    for depth in (1, 2):
        token = ids[:, start + 1 + depth : start + 2 + depth]
        state = model.draft(token, state, cache)
        assert relative(chains[depth][:, start : start + 1], state) < 1e-12


def test_what_is_written_loads_as_the_same_model(pair: tuple[Model, Model], tmp_path: Path) -> None:
    """Qwen3.5's BF16 dialect: fused trunk experts, single MTP experts, two tensors in float32."""
    model, fast = pair
    tensors = published(fast)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(FAMILY[MEMBER]))
    loaded = dict(load(tmp_path).named_parameters())
    for name, parameter in model.named_parameters():
        exact = name.endswith((".A_log", ".linear_attn.norm.weight"))
        expected = parameter.to(torch.float32 if exact else torch.bfloat16)
        assert torch.equal(loaded[name], expected), name
    prefix = "model.language_model.layers.0.mlp.experts"
    config = model.config
    shape = (config.num_experts, 2 * config.moe_intermediate_size, config.hidden_size)
    assert tensors[f"{prefix}.gate_up_proj"].shape == shape
    assert "mtp.layers.0.mlp.experts.0.gate_proj.weight" in tensors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--depths", 0), ["--depths", "at least 1"]),
        (("--tokens", 1024), ["--length 512; expected 5 to 256", "--depths 3", "--tokens 1024"]),
        (("--length", 4), ["--length 4; expected 5 to 16384"]),
        (("--device", "cuda:99"), ["cuda:99"]),
        *(
            (("--lr", rate), [f"--lr {float(rate)}; expected a number above 0"])
            for rate in ("0", "-1", "nan", "inf")
        ),
        (("--device", "cpu"), ["train.txt: ", "tokens; expected more than 2048, a window"]),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...],
    words: list[str],
) -> None:  # fmt: skip
    """Before a step is trained, and nothing is written."""
    for name in ("train.txt", "heldout.txt"):
        (tmp_path / name).write_text("A few words only.\n")
    cli = in_process(train_tiny.build_parser, train_tiny.main, capsys)
    status, _, err = cli(tmp_path, tmp_path / "dst", *arguments)
    assert (status, err.count("\n")) == (2, 1), err
    assert not [word for word in words if word not in err], err
    assert not (tmp_path / "dst").exists()


def test_a_passage_as_a_conversation() -> None:
    """Turns alternate and each is closed."""
    import numpy as np

    text = as_chat(["One.", "Two.", "Three.", "Four."], np.random.default_rng(0))
    assert text.count("<|im_start|>user\n") == text.count("<|im_start|>assistant\n<think>\n") == 2
    assert text.count("<|im_end|>\n") == 4
    assert text.index("One.") < text.index("Two.") < text.index("Three.")
