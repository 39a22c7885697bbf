"""Rank folders read as the checkpoint that was cut: joined bit for bit, or refused by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qwen35.errors import InputError
from qwen35.load import load, locate
from tests.support.checkpoints import (
    INDEX,
    QUANTIZED_SIZES,
    QWEN3_5_FP8,
    QWEN3_6,
    QWEN3_NEXT,
    assert_names,
    edit_json,
    write,
)
from tests.support.conversions import (
    LITTLE,
    MEMBER,
    U8,
    assert_same,
    cli,
    contents,
    stop_at,
    tensors_of,
    untouched,
)
from tests.support.dialects import quiet_load
from tools.inspect import describe, open_model
from tools.inspect_ranks import describe_rank, is_rank_folder
from weights.checkpoint import Checkpoint
from weights.convert import convert
from weights.output import Options
from weights.ranks import join_command, rank_folders

# Two ranks split no block of 128: the intermediates have two of them, and so have the heads.
SIZES: dict[str, Any] = QUANTIZED_SIZES | {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "num_experts": 2,
    "num_experts_per_tok": 1,
}
CONVERSIONS = [
    (QWEN3_6, Options("bf16")),
    (QWEN3_5_FP8, Options("bf16")),
    (QWEN3_NEXT, Options("bf16")),
    (QWEN3_6, Options("mxfp4")),
    (QWEN3_6, Options("mxfp4", "all-linear", "bf16")),
    (QWEN3_6, Options("fp8", "all-linear")),
]


def without_order(document: dict[str, Any]) -> dict[str, Any]:
    """A config.json in which the lists of excluded modules are sorted."""
    claim = document.get("quantization_config", {})
    for key in ("exclude", "modules_to_not_convert"):
        if key in claim:
            claim[key] = sorted(claim[key])
    return document


@pytest.mark.parametrize(("dialect", "options"), CONVERSIONS, ids=str)
def test_joined_ranks_are_the_conversion_that_was_never_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dialect: Any, options: Options
) -> None:
    """The command that inspect names joins every tensor, config.json and the small files."""
    write(tmp_path / "in", MEMBER, replace(dialect, shards=2), **SIZES)
    convert(tmp_path / "in", tmp_path / "never-cut", options)
    cut = replace(options, tp=2, shard_bytes=200_000)
    convert(tmp_path / "in", tmp_path / "ranks", cut)
    command = describe_rank(tmp_path / "ranks/rank-1-of-2")["join"]
    assert command == join_command(tmp_path / "ranks")
    notes = describe(open_model(str(tmp_path / "ranks")))["notes"]
    assert any(command in note for note in notes)
    words = command.split()
    assert words[:3] == ["python", "-m", "tools.convert"]
    joined = [str(tmp_path / "joined") if word == "WHOLE" else word for word in words[3:]]
    with untouched(tmp_path / "ranks"):
        assert cli(capsys, *joined)[0] == 0
    assert_same(tensors_of(tmp_path / "joined"), tensors_of(tmp_path / "never-cut"))
    configs = [
        without_order(json.loads((tmp_path / name / "config.json").read_text()))
        for name in ("joined", "never-cut")
    ]
    assert configs[0] == configs[1]
    beside = [
        {n: c for n, c in contents(tmp_path / name).items() if not n.endswith("tensors")}
        for name in ("joined", "never-cut")
    ]
    assert beside[0].keys() == beside[1].keys()
    quiet_load(tmp_path / "joined")


def test_ranks_are_cut_anew(tmp_path: Path) -> None:
    """Two ranks become four: the same as four at once, with two KV heads that four ranks share."""
    write(tmp_path / "in", MEMBER, QWEN3_6, **SIZES)
    for name, size in (("two", 2), ("four", 4)):
        convert(tmp_path / "in", tmp_path / name, Options("bf16", tp=size))
    convert(tmp_path / "two", tmp_path / "again", Options("bf16", tp=4))
    convert(tmp_path / "four", tmp_path / "whole", Options("bf16"))
    for rank in range(4):
        folder = f"rank-{rank}-of-4"
        assert_same(tensors_of(tmp_path / "again" / folder), tensors_of(tmp_path / "four" / folder))
    assert_same(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "in"))


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """Two ranks of a small checkpoint."""
    write(tmp_path / "in", MEMBER, **LITTLE)
    convert(tmp_path / "in", tmp_path / "ranks", Options("bf16", tp=2))
    return tmp_path / "ranks"


def test_inspect_says_what_ranks_are(ranks: Path) -> None:
    """A rank's folder by itself, and the parent as the whole model, with the same sums as the source."""
    one = describe_rank(ranks / "rank-0-of-2")
    assert (one["rank"], one["size"], one["missing_ranks"], one["problems"]) == (0, 2, [], [])
    held = tensors_of(ranks / "rank-0-of-2")
    assert one["tensors"] == len(held)
    assert one["bytes"] == sum(tensor.nbytes for tensor in held.values())
    assert not is_rank_folder(ranks) and not is_rank_folder(ranks.parent / "in")
    whole, source = (describe(open_model(str(f))) for f in (ranks, ranks.parent / "in"))
    assert whole["problems"] == []
    for key in ("parameters", "parts", "ranks", "conversions", "config"):
        assert whole[key] == source[key], key
    shutil.rmtree(ranks / "rank-1-of-2")
    assert describe_rank(ranks / "rank-0-of-2")["missing_ranks"] == ["rank-1-of-2"]


def test_loading_ranks_names_the_way_on(ranks: Path) -> None:
    """The parent, a part, and an unfinished conversion: one line with the command."""
    command = join_command(ranks)
    for folder in (ranks, ranks / "rank-1-of-2"):
        with pytest.raises(InputError) as caught:
            load(folder)
        assert_names(caught, [str(folder), "rank", "2", command])
        assert "{" not in str(caught.value)
    target = ranks.parent / "out"
    options = Options("fp8", "experts", shard_bytes=20_000)
    stop_at(ranks.parent / "in", target, options, 0.4)
    words = f"python -m tools.convert {ranks.parent / 'in'} {target} --to fp8 --what experts"
    for read in (locate, Checkpoint, lambda folder: open_model(str(folder))):
        with pytest.raises(InputError) as caught:
            read(target)
        assert_names(caught, ["unfinished", f"{words} --shard-bytes 20000"])


def test_ranks_that_do_not_belong_together(ranks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rank is missing or swapped, or has another size or other numbers. The line names it, and
    nothing is written."""
    one, two = ranks / "rank-0-of-2", ranks / "rank-1-of-2"

    def refused(*words: str) -> None:
        status, out, err = cli(capsys, ranks, ranks.parent / "out", "--to", "bf16")
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert not [word for word in words if word not in err], err
        assert not (ranks.parent / "out").exists()

    file = two / "model-00001-of-00001.safetensors"
    before, config = file.read_bytes(), (two / "config.json").read_text()
    held = load_file(file)
    norm = "model.language_model.norm.weight"
    save_file(held | {norm: held[norm] + 1}, file)
    refused(str(file), norm, "differs")
    save_file(held | {norm: held[norm][:-1]}, file)
    refused(str(file), norm, "rank 0 has")
    save_file({name: tensor for name, tensor in held.items() if name != norm}, file)
    edit_json(two / INDEX, weight_map={name: file.name for name in held if name != norm})
    refused(str(two), norm)
    file.write_bytes(before[:-5])
    refused(str(file), "not a whole safetensors file")
    file.write_bytes(before)
    edit_json(two / "config.json", tensor_parallel={"rank": 0, "size": 2})
    refused(str(two), "rank 1 of 2")
    edit_json(two / "config.json", tensor_parallel={"rank": "x"})
    refused(str(two), "tensor_parallel")
    (two / "config.json").write_text(config)
    two.rename(ranks / "rank-1-of-4")
    refused(str(ranks), "2 and of 4")
    shutil.rmtree(ranks / "rank-1-of-4")
    refused(str(ranks), "not rank-1-of-2")
    assert rank_folders(one) == []


def test_a_head_that_neighbours_share_has_to_be_the_same(tmp_path: Path) -> None:
    """Two KV heads on four ranks: each is there twice."""
    write(tmp_path / "in", MEMBER, QWEN3_6, **SIZES)
    convert(tmp_path / "in", tmp_path / "ranks", Options("bf16", tp=4))
    for file in (tmp_path / "ranks/rank-1-of-4").glob("*.safetensors"):
        held = load_file(file)
        names = [name for name in held if name.endswith("k_proj.weight")]
        for name in names:
            held[name].view(U8)[3] ^= 1
        save_file(held, file)
    with pytest.raises(InputError, match=r"k_proj\.weight differs from what other ranks hold"):
        convert(tmp_path / "ranks", tmp_path / "out", Options("bf16"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["3", "9999999999"])
def test_a_group_of_an_unknown_size(size: str, tmp_path: Path) -> None:
    """The answer comes at once, however many folders the group would have."""
    (tmp_path / f"rank-0-of-{size}").mkdir()
    with pytest.raises(
        InputError, match=f"holds a rank of {size}; known sizes of a group are 1, 2"
    ):
        rank_folders(tmp_path)
