"""Tensors that do not matter by the config: each is compared with what stands for it, or named."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qwen35.errors import InputError
from qwen35.load import load
from tests.support.checkpoints import QWEN3_5, edit_json, edit_tensors, logits_of, write
from tests.support.dialects import quiet_load
from tools.convert import check
from tools.inspect import describe, open_model
from weights.checkpoint import Checkpoint
from weights.convert import convert
from weights.output import Options

PREFIX = "model.language_model."
Tensors = dict[str, Tensor]


def tied(folder: Path, head: Callable[[Tensor], Tensor]) -> None:
    """A tied model whose file has a head all the same."""
    write(folder, "0.8B")

    def add(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = head(tensors[f"{PREFIX}embed_tokens.weight"]).clone()

    edit_tensors(folder, add)


def test_a_head_that_is_the_embedding_is_tied(tmp_path: Path) -> None:
    tied(tmp_path, lambda embedding: embedding)
    model = quiet_load(tmp_path)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert describe(open_model(str(tmp_path)))["problems"] == []


def test_a_head_that_differs_from_the_embedding_is_used(tmp_path: Path) -> None:
    """transformers takes it too, and says so."""
    tied(tmp_path, lambda embedding: embedding.flip(0))
    with pytest.warns(UserWarning, match=r"lm_head\.weight differs from embed_tokens\.weight"):
        model = load(tmp_path)
    assert torch.equal(model.lm_head.weight, model.embed_tokens.weight.flip(0))
    [problem] = describe(open_model(str(tmp_path)))["problems"]
    assert "the file's head is used" in problem


def test_one_bit_of_a_head_counts(tmp_path: Path) -> None:
    def flip(embedding: Tensor) -> Tensor:
        head = embedding.clone()
        head.view(torch.int16)[-1, -1] ^= 1
        return head

    tied(tmp_path, flip)
    with pytest.warns(UserWarning, match="differs"):
        load(tmp_path)


def test_a_head_of_another_dtype_is_compared_by_its_numbers(tmp_path: Path) -> None:
    tied(tmp_path, lambda embedding: embedding.float())
    assert quiet_load(tmp_path).config.tie_word_embeddings
    edit_tensors(tmp_path, lambda t: t["lm_head.weight"].mul_(1 + 2**-20))
    with pytest.warns(UserWarning, match="differs"):
        load(tmp_path)


def test_a_head_alone_is_the_embedding_too(tmp_path: Path) -> None:
    """transformers ties them in the same way: the one that is there stands for both. A conversion
    keeps it so."""
    write(tmp_path / "a", "0.8B")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    name = f"{PREFIX}embed_tokens.weight"
    edit_tensors(tmp_path / "b", lambda t: t.update({"lm_head.weight": t.pop(name)}))
    config = tmp_path / "b" / "config.json"
    text = json.loads(config.read_text())["text_config"]
    edit_json(config, text_config=text | {"tie_word_embeddings": True})
    model = quiet_load(tmp_path / "b")
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(logits_of(model), logits_of(load(tmp_path / "a")))
    assert describe(open_model(str(tmp_path / "b")))["problems"] == []
    edit_tensors(tmp_path / "b", lambda t: [t.pop(n) for n in list(t) if ".visual." in n])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype="auto")
    assert torch.equal(theirs.get_input_embeddings().weight, model.embed_tokens.weight)
    convert(tmp_path / "b", tmp_path / "c", Options("fp8", "all-linear"), check=check)
    embedding = quiet_load(tmp_path / "c").embed_tokens.weight
    assert torch.equal(embedding, model.embed_tokens.weight)


@pytest.mark.parametrize("inner", [True, False])
def test_a_conversion_says_what_its_head_is(tmp_path: Path, inner: bool) -> None:
    """Where the head differs from the embedding, the config that is written does not tie them, for the
    ranks either, whose folders engines load."""
    tied(tmp_path / "a", lambda embedding: embedding.flip(0))
    text = json.loads((tmp_path / "a" / "config.json").read_text())["text_config"]
    changed = text | {"tie_word_embeddings": True} if inner else text
    edit_json(tmp_path / "a" / "config.json", text_config=changed)
    with pytest.warns(UserWarning, match="differs"):
        head = load(tmp_path / "a").lm_head.weight
    with pytest.warns(UserWarning, match="the file's head is used"):
        convert(tmp_path / "a", tmp_path / "b", Options("fp8", "all-linear"), check=check)
    written = quiet_load(tmp_path / "b")
    assert not written.config.tie_word_embeddings
    assert torch.equal(written.lm_head.weight, head)
    assert describe(open_model(str(tmp_path / "b")))["problems"] == []
    for folder in ("a", "same"):
        if folder == "same":
            tied(tmp_path / folder, lambda embedding: embedding)
        convert(tmp_path / folder, tmp_path / f"{folder}-ranks", Options("bf16", tp=2))
        configs = (tmp_path / f"{folder}-ranks").glob("rank-*/config.json")
        flags = [json.loads(file.read_text())["tie_word_embeddings"] for file in configs]
        assert flags == [folder == "same"] * 2


COPIES = {
    "mtp.embed_tokens.weight": "embed_tokens",
    "mtp.lm_head.weight": "lm_head",
    "mtp.layers.0.shared_head.head.weight": "lm_head",
}


@pytest.mark.parametrize("member", ["27B", "0.8B"], ids=["untied", "tied"])
@pytest.mark.parametrize("name", COPIES)
def test_copies_under_the_mtp_head(tmp_path: Path, member: str, name: str) -> None:
    """The same bytes are put aside; others would be a dedicated embedding, which is not implemented:
    neither `load` nor `convert` takes them."""
    write(tmp_path / "a", member)
    of_head = COPIES[name] == "lm_head" and member == "27B"
    original = "lm_head.weight" if of_head else f"{PREFIX}embed_tokens.weight"
    edit_tensors(tmp_path / "a", lambda t: t.update({name: t[original].clone()}))
    quiet_load(tmp_path / "a")
    found = describe(open_model(str(tmp_path / "a")))
    assert found["problems"] == []
    assert any("the same as" in reason for reason in found["ignored"])
    edit_tensors(tmp_path / "a", lambda t: t.update({name: t[original] + 1}))
    message = f"{name} differs from {original.removeprefix(PREFIX)}"
    with pytest.raises(InputError, match=message):
        load(tmp_path / "a")
    [problem] = describe(open_model(str(tmp_path / "a")))["problems"]
    assert message in problem
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "a", tmp_path / "b", Options("fp8", "all-linear"), check=check)
    assert not (tmp_path / "b").exists()


def test_a_copy_alone_is_no_mtp_head(tmp_path: Path) -> None:
    write(tmp_path, "27B", replace(QWEN3_5, mtp=False))
    copied = {"mtp.lm_head.weight": "lm_head.weight"}
    edit_tensors(tmp_path, lambda t: t.update({n: t[o].clone() for n, o in copied.items()}))
    assert load(tmp_path).mtp is None


def test_an_mtp_head_that_the_config_does_not_have(tmp_path: Path) -> None:
    """It is not used, and that is said on loading and by a conversion, which keeps it."""
    expected = write(tmp_path / "a", "0.8B")
    text = json.loads((tmp_path / "a" / "config.json").read_text())["text_config"]
    edit_json(tmp_path / "a" / "config.json", text_config=text | {"mtp_num_hidden_layers": 0})
    said = r"mtp_num_hidden_layers is 0, and an MTP head is stored, .* mtp\.fc\.weight"
    with pytest.warns(UserWarning, match=said):
        model = load(tmp_path / "a")
    assert model.mtp is None
    assert {name for name, _ in model.named_parameters()} == {
        name for name in expected if not name.startswith("mtp.")
    }
    with pytest.warns(UserWarning, match=said):
        convert(tmp_path / "a", tmp_path / "b", Options("fp8", "all-linear"), check=check)
    assert "mtp.fc.weight" in Checkpoint(tmp_path / "b").stored


def test_what_is_put_aside_is_cut_for_ranks(tmp_path: Path) -> None:
    """A copy as what it is a copy of; frequencies are whole on each rank."""
    rotary(tmp_path / "a", lambda right: right)
    name = f"{PREFIX}embed_tokens.weight"
    edit_tensors(tmp_path / "a", lambda t: t.update({copy_: t[name].clone() for copy_ in COPIES}))
    convert(tmp_path / "a", tmp_path / "b", Options("bf16", tp=2), check=check)
    for rank in range(2):
        [file] = (tmp_path / "b" / f"rank-{rank}-of-2").glob("*.safetensors")
        tensors = load_file(file)
        assert all(torch.equal(tensors[copy_], tensors[name]) for copy_ in COPIES)
        assert any(n.endswith("inv_freq") and len(t) == 4 for n, t in tensors.items())


# --- frequencies of RoPE, which older versions of transformers stored -----------------------------


def rotary(folder: Path, change: Callable[[Tensor], Tensor]) -> None:
    """A model with stored frequencies, those of its config after `change`."""
    write(folder, "0.8B")
    config = Checkpoint(folder).config
    exponents = torch.arange(0, config.rotary_dim, 2) / config.rotary_dim
    right = (config.rope_theta ** -exponents.double()).float()
    name = f"{PREFIX}layers.3.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda t: t.update({name: change(right).contiguous()}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_frequencies_of_the_config(tmp_path: Path, dtype: torch.dtype) -> None:
    rotary(tmp_path, lambda right: right.to(dtype))
    quiet_load(tmp_path)
    assert describe(open_model(str(tmp_path)))["problems"] == []


FREQUENCIES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "scaled": (lambda right: right / 4, r"\[0\] is 0\.25 in the file, 1 by the config"),
    "the last": (
        lambda right: torch.cat([right[:-1], right[-1:] * 1.1]),
        r"\[3\] is 6\.18\S+ in the file, 5\.62\S+ by the config",
    ),
    "NaN": (lambda right: right * float("nan"), r"\[0\] is nan in the file, 1 by the config"),
    "more": (
        lambda right: torch.cat([right, right]),
        r"shape \[8\] in the file, \[4\] by the config",
    ),
    "none": (lambda right: right[:0], r"shape \[0\] in the file, \[4\] by the config"),
    "bytes": (lambda right: right.to(torch.uint8) + 7, r"\[0\] is 8 in the file, 1 by the config"),
}


@pytest.mark.parametrize(("change", "said"), FREQUENCIES.values(), ids=FREQUENCIES.keys())
def test_other_frequencies_are_named(
    tmp_path: Path, change: Callable[[Tensor], Tensor], said: str
) -> None:
    """The config's are used, as transformers does."""
    rotary(tmp_path / "a", change)
    with pytest.warns(UserWarning, match=rf"layers\.3\.self_attn\.rotary_emb\.inv_freq.* {said}"):
        load(tmp_path / "a")
    with pytest.warns(UserWarning, match=said):
        convert(tmp_path / "a", tmp_path / "b", Options("fp8", "all-linear"), check=check)


def test_every_tensor_that_is_not_used_is_named(tmp_path: Path) -> None:
    """`tools.inspect` names it with its reason."""
    write(tmp_path, "35B-A3B", mtp_num_hidden_layers=0)
    buffer = f"{PREFIX}rotary_emb.inv_freq"
    edit_tensors(
        tmp_path, lambda t: t.update({buffer: torch.ones(4), "mtp.fc.weight": torch.ones(1)})
    )
    found = describe(open_model(str(tmp_path)))
    reasons = " ".join(found["ignored"])
    for words in ("vision tower", "computed from the config", "mtp_num_hidden_layers is 0"):
        assert words in reasons
