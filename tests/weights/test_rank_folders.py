"""The folders of ranks by themselves: what is one, what they say, and the tensors that are joined."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen35.config import Config
from qwen35.errors import InputError
from tests.support.checkpoints import QUANTIZED_SIZES, QWEN3_6, edit_json, write
from tests.support.conversions import MEMBER
from weights.checkpoint import Checkpoint
from weights.command import UNFINISHED
from weights.convert import convert
from weights.output import Options
from weights.ranks import (
    folder_names,
    join_command,
    open_ranks,
    rank_folders,
    rank_of,
    without_config,
)

SIZES = QUANTIZED_SIZES | {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
SIZES |= {"num_experts": 2, "num_experts_per_tok": 1}


def line(call: Any, *arguments: Any) -> str:
    with pytest.raises(InputError) as raised:
        call(*arguments)
    return str(raised.value)


def made(parent: Path, *names: str) -> Path:
    for name in names:
        (parent / name).mkdir(parents=True)
    return parent


def test_folders_of_a_group(tmp_path: Path) -> None:
    """In the order of the ranks; files and other folders with such names do not count."""
    names = folder_names(8)
    assert names[0] == "rank-0-of-8" and len(names) == 8
    parent = made(tmp_path / "a", *reversed(names), "rank-9-of-16x", "other")
    (parent / "rank-3-of-4").touch()
    assert rank_folders(parent) == [parent / name for name in names]
    (parent / "config.json").touch()
    assert rank_folders(parent) == []
    assert rank_folders(tmp_path / "absent") == rank_folders(made(tmp_path / "b", "x")) == []


def test_groups_that_are_none(tmp_path: Path) -> None:
    both = made(tmp_path / "a", "rank-0-of-2", "rank-0-of-4")
    assert line(rank_folders, both) == f"{both}: holds the ranks of groups of 2 and of 4"
    odd = made(tmp_path / "b", "rank-0-of-3")
    assert line(rank_folders, odd) == (
        f"{odd}: holds a rank of 3; known sizes of a group are 1, 2, 4, 8"
    )
    few = made(tmp_path / "c", "rank-1-of-4", "rank-2-of-4")
    assert line(rank_folders, few) == (
        f"{few}: holds the folders of 4 ranks, but not rank-0-of-4, rank-3-of-4"
    )


def test_what_a_config_says_of_its_rank() -> None:
    assert rank_of({}, Path("c")) is None
    assert rank_of({"tensor_parallel": {"rank": 0, "size": 2}}, Path("c")) == (0, 2)
    assert rank_of({"tensor_parallel": {"rank": 1, "size": 2}}, Path("c")) == (1, 2)
    for claim in (
        {"rank": 2, "size": 2}, {"rank": -1, "size": 2}, {"rank": 0}, {"size": 2}, [0, 2],
        {"rank": "0", "size": 2}, {"rank": 0, "size": 2.0},
    ):  # fmt: skip
        assert line(rank_of, {"tensor_parallel": claim}, Path("c")) == (
            f"c: tensor_parallel = {claim!r}; expected a rank below a size, both whole numbers"
        )


def test_the_command_that_joins_them(tmp_path: Path) -> None:
    """In the format of the report, if there is one that can be read."""
    begin = f"python -m tools.convert {tmp_path} WHOLE --to"
    assert join_command(tmp_path) == f"{begin} bf16"
    for name in folder_names(2):
        (tmp_path / name).mkdir()
    report = tmp_path / "rank-0-of-2" / "conversion.json"
    for written, rest in (
        ({"to": "mxfp4", "what": "all-linear", "activations": "bf16", "tp": 2, "shard_bytes": 5},
         "mxfp4 --what all-linear --activations bf16"),
        ({"to": "fp8", "what": "all-linear", "activations": 3}, "fp8"),
        ({}, "bf16"),
    ):  # fmt: skip
        report.write_text(json.dumps(written))
        assert join_command(tmp_path) == f"{begin} {rest}"
    report.write_text("{")
    assert join_command(tmp_path) == f"{begin} bf16"


def test_why_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert without_config(tmp_path) == f"{tmp_path / 'config.json'}: no such file"
    for name in folder_names(2):
        (tmp_path / name).mkdir()
    assert without_config(tmp_path) == (
        f"{tmp_path}: holds the folders of 2 ranks, which are joined by: {join_command(tmp_path)}"
    )
    (tmp_path / UNFINISHED).mkdir()
    assert without_config(tmp_path).startswith(f"{tmp_path}: an unfinished conversion; ")


# --- joined tensors


def cut(folder: Path, to: Any) -> tuple[Path, list[Path], Config, dict[str, Tensor]]:
    """A conversion for two ranks, and the tensors of the same for one."""
    write(folder / "in", MEMBER, QWEN3_6, **SIZES)
    convert(folder / "in", folder / "ranks", Options(to, tp=2))
    convert(folder / "in", folder / "whole", Options(to))
    folders = rank_folders(folder / "ranks")
    whole = {
        n: t for f in (folder / "whole").glob("*.safetensors") for n, t in load_file(f).items()
    }
    return folder / "ranks", folders, Config.from_file(folder / "in" / "config.json"), whole


@pytest.mark.parametrize("to", ["bf16", "mxfp4"])
def test_tensors_are_joined(to: str, tmp_path: Path) -> None:
    """Bit for bit, and each one is read once for all its experts."""
    _, folders, config, whole = cut(tmp_path, to)
    opened = open_ranks(folders, config)
    assert (opened.unlisted, opened.problems) == ([], [])
    assert {stored.name for stored in opened.listed} == whole.keys()
    for stored in opened.listed:
        expected = whole[stored.name]
        assert stored.file.parent == folders[0]
        assert (stored.dtype, stored.shape) == (expected.dtype, tuple(expected.shape))
        read = stored.read()
        assert torch.equal(read.view(torch.uint8), expected.view(torch.uint8))
        assert stored.read() is read


def changed(folder: Path, name: str, change: Any) -> Path:
    """The file of a rank that holds a tensor, which is replaced there."""
    for file in folder.glob("*.safetensors"):
        held = {n: t.clone() for n, t in load_file(file).items()}
        if name in held:
            held |= {name: change(held[name])}
            save_file(held, file)
            return file
    raise AssertionError(name)


def test_ranks_that_do_not_fit(tmp_path: Path) -> None:
    parent, folders, config, _ = cut(tmp_path, "bf16")
    assert line(Checkpoint, folders[0]) == (
        f"{folders[0]}: holds rank 0 of 2, but a whole checkpoint is needed here; "
        f"the ranks are joined by: {join_command(parent)}"
    )
    for rank, size in ((0, 2), (1, 4)):
        edit_json(folders[1] / "config.json", tensor_parallel={"rank": rank, "size": size})
        said = f"{folders[1] / 'config.json'}: is not that of rank 1 of 2"
        assert line(open_ranks, folders, config) == said
    edit_json(folders[1] / "config.json", tensor_parallel={"rank": 1, "size": 2})
    norm, head = "model.language_model.norm.weight", "lm_head.weight"
    assert line(open_ranks, [folders[1], folders[0]], config).endswith("rank 0 of 2")
    file = changed(folders[1], norm, lambda t: t + 1)
    (stored,) = (s for s in open_ranks(folders, config).listed if s.name == norm)
    said = f"{file}: {norm} differs from what other ranks hold of the same rows"
    assert line(stored.read) == said
    file = changed(folders[1], head, lambda t: t.float())
    said = line(open_ranks, folders, config)
    assert said.startswith(f"{file}: {head} ") and "F32" in said and "BF16" in said
    for folder in folders:
        file = changed(folder, head, lambda t: torch.zeros(0, 64).bfloat16())
    said = f"{folders[0] / file.name}: {head} has shape [0, 64]; a rank holds 80 elements on axis 0"
    assert line(open_ranks, folders, config) == said
    (index,) = folders[1].glob("*.index.json")
    index.unlink()
    save_file({"more": torch.zeros(1)}, folders[1] / "more.safetensors")
    said = f"{folders[1]}: holds other tensors than rank-0-of-2: more"
    assert line(open_ranks, folders, config) == said
    assert parent == folders[0].parent
