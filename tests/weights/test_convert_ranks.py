"""Conversions to BF16 and back, a folder for each rank, and what the report says."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.load import load
from tests.support.checkpoints import (
    INDEX,
    MXFP4,
    QUANTIZED_SIZES,
    QWEN3_5_FP8,
    QWEN3_6,
    assert_names,
    edit_tensors,
    logits_of,
    write,
)
from tests.support.conversions import (
    CONFIG,
    F32,
    LITTLE,
    MANY_SOURCES,
    MEMBER,
    TO_BF16,
    TO_MXFP4,
    U8,
    assert_same,
    check_refused,
    cli,
    contents,
    stop_at,
    tensors_of,
    wanted_of,
)
from tests.support.dialects import Written, quiet_load, written  # noqa: F401
from tests.support.family import FAMILY
from tests.support.oracle import within_twice
from weights.checkpoint import Checkpoint
from weights.convert import REPORT, convert
from weights.output import Options
from weights.quantization import PREFIX
from weights.shard import Plan, join

# --- to BF16 and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, d in MANY_SOURCES.items() if d.quantized])
def test_to_bf16(written: Written, tmp_path: Path, name: str) -> None:
    """The rounding of each exact value; of MXFP4 the value itself."""
    dialect = MANY_SOURCES[name]
    source, values = written(dialect)
    convert(source, tmp_path / "out", TO_BF16)
    found = tensors_of(tmp_path / "out")
    assert_same(found, wanted_of(source, values, dialect, CONFIG, None))
    assert Checkpoint(tmp_path / "out").quantization is None
    for stored, tensor in tensors_of(source).items():
        if tensor.dtype == U8 and stored.endswith(".weight"):
            exact = values[PREFIX.sub("", stored)]
            assert torch.equal(found[stored].double(), exact)
    quiet_load(tmp_path / "out")


def test_there_and_back_is_the_same(written: Written, tmp_path: Path) -> None:
    """MXFP4 to BF16 to MXFP4: each byte of a source in which no group has a smaller scale to offer."""
    dialect = replace(MXFP4, shards=1)
    shutil.copytree(written(dialect)[0], tmp_path / "in")

    def canonical(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if f"{n}_scale" in tensors]:
            codes = tensors[name].view(-1, 16)  # [groups, 16]
            codes[:, 3] |= 7  # element 6 of each group is 6 or -6
            codes[::3, :] |= 128  # negative numbers and negative zeros
            codes[::97, :] = 0  # a group of zeros
            tensors[f"{name}_scale"].view(-1)[::97] = 0

    edit_tensors(tmp_path / "in", canonical)
    convert(tmp_path / "in", tmp_path / "plain", TO_BF16)
    report = convert(tmp_path / "plain", tmp_path / "back", TO_MXFP4)
    assert_same(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "in"))
    assert {error["relative_rms"] for error in report["errors"].values()} == {0.0}
    claim = json.loads((tmp_path / "in/config.json").read_text())["quantization_config"]
    back = json.loads((tmp_path / "back/config.json").read_text())["quantization_config"]
    listed = {
        name for name in claim["exclude"] if "norm" not in name and "embed_tokens" not in name
    }
    missing = {
        n for n in listed - set(back["exclude"]) if not n.endswith(("A_log", "dt_bias", "bias"))
    }
    assert not missing


def test_transformers_loads_the_bf16_output(written: Written, tmp_path: Path) -> None:
    """Its logits are ours, by the two-times rule."""
    import transformers

    convert(written(MXFP4)[0], tmp_path / "out", TO_BF16)
    name = "Qwen3_5MoeForCausalLM"
    library = getattr(transformers, name).from_pretrained(
        tmp_path / "out", dtype=F32, attn_implementation="eager"
    )
    ids = torch.arange(3, 80)[None]
    with torch.inference_mode():
        theirs = library.eval()(ids).logits[0]
    ours = logits_of(quiet_load(tmp_path / "out", F32), ids)
    truth = logits_of(quiet_load(tmp_path / "out", torch.float64), ids)
    error, most = within_twice(ours, theirs, truth)
    assert error <= most


# --- a folder for each rank -----------------------------------------------------------------------


TP_SIZES = QUANTIZED_SIZES | {
    "linear_num_key_heads": 4,
    "linear_value_head_dim": 32,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("to", ["experts", "all-linear", "bf16"])
def test_ranks_join_to_the_whole(tmp_path: Path, size: int, to: str) -> None:
    """Each tensor of the whole conversion, bit for bit, from its parts; with two KV heads for four
    ranks, MXFP4's groups along K, and fused projections."""
    dialect = replace(QWEN3_5_FP8 if to == "bf16" else QWEN3_6, shards=2)
    write(tmp_path / "in", MEMBER, dialect, **TP_SIZES)
    options = Options("bf16") if to == "bf16" else Options("mxfp4", to, shard_bytes=200_000)
    convert(tmp_path / "in", tmp_path / "whole", options)
    report = convert(tmp_path / "in", tmp_path / "ranks", replace(options, tp=size))
    ranks = [f"rank-{rank}-of-{size}" for rank in range(size)]
    assert sorted(place.name for place in (tmp_path / "ranks").iterdir()) == ranks
    parts = [tensors_of(tmp_path / "ranks" / rank) for rank in ranks]
    whole = tensors_of(tmp_path / "whole")
    assert all(part.keys() == whole.keys() for part in parts)
    shards = Plan(Config.from_dict(FAMILY[MEMBER] | TP_SIZES), size)
    cut = 0
    for name, tensor in whole.items():
        weight = name.removesuffix("_scale")
        per = 1 if f"{weight}_scale" not in whole else 32 if name != weight else 2
        shape = list(tensor.shape)
        shape[-1] *= per
        held = [shards.shard(name, shape, rank) for rank in range(size)]
        along = per if held[0].axis == tensor.dim() - 1 else 1
        joined = join(held, [part[name] for part in parts], along)
        assert_same({name: joined}, {name: tensor})
        cut += parts[0][name].numel() < tensor.numel()
    assert cut > 90
    for rank, (name, part) in enumerate(zip(ranks, parts, strict=True)):
        folder = tmp_path / "ranks" / name
        document = json.loads((folder / "config.json").read_text())
        assert document.pop("tensor_parallel") == {"rank": rank, "size": size}
        assert document == json.loads((tmp_path / "whole/config.json").read_text())
        index = json.loads((folder / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in part.values())
        assert json.loads((folder / REPORT).read_text()) == report
    with pytest.raises(InputError) as caught:
        load(tmp_path / "ranks" / ranks[1])
    assert_names(caught, [ranks[1], "rank", str(size)])
    with pytest.raises(InputError, match=f"holds the folders of {size} ranks"):
        load(tmp_path / "ranks")


def test_ranks_of_a_checkpoint_that_stays_as_it_is(tmp_path: Path) -> None:
    """BF16 to BF16 changes no number."""
    write(tmp_path / "in", MEMBER, **LITTLE)
    convert(tmp_path / "in", tmp_path / "out", replace(TO_BF16, tp=2))
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    whole = tensors_of(tmp_path / "in")[name]  # [E, 2I, D]
    gate, up = whole.chunk(2, dim=1)
    for rank in range(2):
        part = tensors_of(tmp_path / f"out/rank-{rank}-of-2")[name]
        wanted = torch.cat([gate.chunk(2, dim=1)[rank], up.chunk(2, dim=1)[rank]], dim=1)
        assert torch.equal(part, wanted)


@pytest.mark.parametrize(
    ("changes", "size", "words"),
    [
        ({}, 2, ["layers.0.mlp.experts.0.down_proj", "16", "32"]),
        ({"moe_intermediate_size": 96}, 2, ["layers.0.mlp.experts.0.down_proj", "48", "32"]),
        (
            {"linear_num_key_heads": 6, "linear_num_value_heads": 6},
            4,
            ["linear_num_key_heads = 6", "4"],
        ),
        ({"vocab_size": 161}, 2, ["vocab_size = 161", "2"]),
    ],
)
def test_groups_and_heads_that_ranks_would_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, int], size: int,
    words: list[str],
) -> None:  # fmt: skip
    """The tensor and the numbers are named, and nothing is written."""
    write(tmp_path / "in", MEMBER, **LITTLE, **changes)
    check_refused(capsys, tmp_path / "in", tmp_path / "out", "--tp", size, words=words)


# --- the report -----------------------------------------------------------------------------------


def relative_rms(exact: list[Tensor], found: list[Tensor]) -> float:
    """Over several tensors, in float64."""
    lost = sum((a.double() - b.double()).square().sum() for a, b in zip(exact, found, strict=True))
    return math.sqrt(lost / sum(a.double().square().sum() for a in exact))


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Relative RMS errors are those of a plain computation; the worst group is the one planted; file,
    --json and the table say the same."""
    write(tmp_path / "in", MEMBER, QWEN3_5_FP8, **QUANTIZED_SIZES)
    # Codes 4 and 0.75: the latter is a tie, which goes to 1. No group of random codes loses as much.
    worst = "model.language_model.layers.1.mlp.experts.5.up_proj.weight"
    for file in (tmp_path / "in").glob("*.safetensors"):
        held = load_file(file)
        if worst in held:
            held[worst].view(U8)[77, 96:128] = 0x34  # 0.75
            held[worst].view(U8)[77, 101] = 0x48  # 4
        if f"{worst}_scale_inv" in held:
            held[f"{worst}_scale_inv"].fill_(2.0**-9)
        save_file(held, file)
    status, out, err = cli(
        capsys,
        tmp_path / "in",
        tmp_path / "out",
        "--to",
        "mxfp4",
        "--shard-bytes",
        200_000,
        "--json",
    )
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report == json.loads((tmp_path / "out" / REPORT).read_text())
    exact, found = Checkpoint(tmp_path / "in").entries, Checkpoint(tmp_path / "out").entries
    kinds: dict[str, list[str]] = {}
    for name, entry in exact.items():
        if entry.format == "fp8":
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    assert report["errors"].keys() == kinds.keys()
    for kind, names in kinds.items():
        said = report["errors"][kind]
        before = [exact[name].read(torch.float64) for name in names]
        after = [found[name].read(torch.float64) for name in names]
        assert said["tensors"] == len(names)
        assert said["elements"] == sum(tensor.numel() for tensor in before)
        assert said["relative_rms"] == pytest.approx(relative_rms(before, after), rel=1e-6)
        groups = [
            relative_rms([a], [b])
            for x, y in zip(before, after, strict=True)
            for a, b in zip(x.view(-1, 32), y.view(-1, 32), strict=True)
        ] if "layers.*.mlp.experts.*.up_proj" in kind else []  # fmt: skip
        assert not groups or said["worst_group"] == pytest.approx(max(groups), rel=1e-6)
    planted = report["errors"]["layers.*.mlp.experts.*.up_proj.weight"]
    assert planted["worst_at"] == f"{worst}[77, 96:128]"
    wanted = math.sqrt(31 * 0.25**2 / (16 + 31 * 0.75**2))
    assert planted["worst_group"] == pytest.approx(wanted, rel=1e-6)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert report["files"] == len(files) > 5
    assert report["bytes"] == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "out").values())
    status, table, _ = cli(capsys, tmp_path / "in", tmp_path / "again", "--to", "mxfp4")
    assert status == 0
    assert f"{planted['worst_group']:.3%}" in table
    assert f"the worst group is {worst}[77, 96:128]" in table
    assert all(kind in table for kind in kinds)


def test_the_report_of_a_continued_conversion(written: Written, tmp_path: Path) -> None:
    """It counts the files that an earlier run wrote, too."""
    source = written(QWEN3_6)[0]
    options = replace(TO_MXFP4, shard_bytes=100_000)
    whole = convert(source, tmp_path / "whole", options)
    stop_at(source, tmp_path / "out", options, 0.5)
    assert convert(source, tmp_path / "out", options) == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
