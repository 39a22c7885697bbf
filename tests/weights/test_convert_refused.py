"""Conversions that are refused: one line, and nothing half-written."""

import json
import math
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from qwen35.errors import InputError
from qwen35.load import TINY
from tests.support.checkpoints import (
    MXFP4_ATTENTION,
    QUANTIZED_SIZES,
    QWEN3_5,
    QWEN3_5_FP8,
    SINGLE,
    Dialect,
    assert_names,
    edit_tensors,
    write,
)
from tests.support.conversions import (  # noqa: F401
    LITTLE,
    MEMBER,
    TO_MXFP4,
    U8,
    check_refused,
    cli,
    contents,
    little,
    stop_at,
    untouched,
)
from weights.command import TASK
from weights.convert import FINISHED, REPORT, convert

# --- what is refused ------------------------------------------------------------------------------


def test_a_missing_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named, and no folder is made."""
    (tmp_path / "file").write_text("x")
    for name in ("absent", "file"):
        source = tmp_path / name
        check_refused(capsys, source, tmp_path / "out", words=[str(source), "no such folder"])
    (tmp_path / "empty").mkdir()
    check_refused(
        capsys, tmp_path / "empty", tmp_path / "out", words=["config.json", "no such file"]
    )


def test_a_target_with_content(little: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with anything in it, or a file, stays as it is; an empty folder will do."""
    target = little.parent / "out"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    check_refused(capsys, little, target, words=[str(target), "already"], left=True)
    shutil.rmtree(target)
    target.write_text("a file")
    check_refused(capsys, little, target, words=[str(target), "already"], left=True)
    assert target.read_text() == "a file"
    target.unlink()
    target.mkdir()
    assert cli(capsys, little, target, "--to", "mxfp4")[0] == 0
    check_refused(capsys, little, target, words=[str(target), "already"], left=True)


def test_a_target_inside_the_source(little: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The source is only read: neither below it nor in its place, by whatever path."""
    (little.parent / "link").symlink_to(little)
    for target in (little / "out", little / "a/b", little.parent / "link/out"):
        check_refused(capsys, little, target, words=[str(target), "inside"])
    check_refused(capsys, little, little, words=[str(little), "inside"], left=True)


@pytest.mark.parametrize(
    ("member", "dialect", "args", "words"),
    [
        ("27B", QWEN3_5, ("--to", "mxfp4"), ["nothing to convert", "experts", "--what all-linear"]),
        ("27B", QWEN3_5, ("--to", "fp8", "--what", "experts"), ["nothing to convert", "fp8"]),
        ("27B", QWEN3_5, ("--to", "mxfp4", "--tp", "2"), ["nothing to convert", "mxfp4"]),
    ],
    ids=["a dense model's experts", "the same to fp8", "the same for ranks"],
)
def test_nothing_to_convert(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], member: str, dialect: Dialect,
    args: tuple[str, ...], words: list[str],
) -> None:  # fmt: skip
    """The output would hold nothing in the format that was asked for."""
    write(tmp_path / "in", member, dialect)
    check_refused(capsys, tmp_path / "in", tmp_path / "out", *args, words=words)


@pytest.mark.parametrize(
    ("what", "changes", "words"),
    [
        (
            "experts",
            {"moe_intermediate_size": 24},
            ["experts.0.down_proj.weight", "[64, 24]", "32"],
        ),
        ("experts", {"hidden_size": 80}, ["experts.0.gate_proj.weight", "[32, 80]", "32"]),
        (
            "all-linear",
            {"shared_expert_intermediate_size": 40},
            ["shared_expert.down_proj.weight", "[64, 40]", "32"],
        ),
    ],
)
def test_rows_that_groups_do_not_divide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, changes: dict[str, int],
    words: list[str],
) -> None:  # fmt: skip
    """The matrix, its shape and the size of a group are named before a weight is read."""
    write(tmp_path / "in", MEMBER, **LITTLE, **changes)
    check_refused(capsys, tmp_path / "in", tmp_path / "out", "--what", what, words=words)


FUSED = "model.language_model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**127 * 1.75])
def test_a_weight_that_is_not_finite(
    little: Path, capsys: pytest.CaptureFixture[str], bad: float
) -> None:
    """Found when it is converted: the stored tensor is named, and no checkpoint comes of it."""
    edit_tensors(little, lambda tensors: tensors[FUSED][1, 40, 3].fill_(bad))
    check_stopped(capsys, little, [FUSED, "infinity", "NaN"])


def check_stopped(capsys: pytest.CaptureFixture[str], source: Path, words: list[str]) -> None:
    """A bad weight stops a conversion with one line; the source has to change, so nothing stays."""
    target = source.parent / "out"
    with untouched(source):
        status, out, err = cli(capsys, source, target, "--to", "mxfp4", "--shard-bytes", 20_000)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert not [word for word in words if word not in err], err
    assert not target.exists()


def test_a_nan_scale_of_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """255 in e8m0: it is copied no more than it is decoded."""
    dialect = replace(MXFP4_ATTENTION, shards=1)
    write(tmp_path / "in", MEMBER, dialect, **QUANTIZED_SIZES)
    name = "model.language_model.layers.1.mlp.experts.2.up_proj.weight"
    edit_tensors(tmp_path / "in", lambda t: t[f"{name}_scale"][3, 1].fill_(255))
    check_stopped(capsys, tmp_path / "in", [name, "255"])
    status, _, err = cli(capsys, tmp_path / "in", tmp_path / "other", "--to", "bf16")
    assert (status, err.count("\n")) == (2, 1)
    assert name in err


def test_an_fp8_code_that_is_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An e4m3 NaN has no MXFP4."""
    write(tmp_path / "in", MEMBER, replace(QWEN3_5_FP8, shards=1), **QUANTIZED_SIZES)
    name = "model.language_model.layers.0.mlp.experts.7.down_proj.weight"
    edit_tensors(tmp_path / "in", lambda t: t[name].view(U8)[9, 9].fill_(0x7F))
    check_stopped(capsys, tmp_path / "in", [name, "NaN"])
    status, _, err = cli(capsys, tmp_path / "in", tmp_path / "other", "--to", "bf16")
    assert (status, err.count("\n")) == (2, 1)
    assert name in err


@pytest.mark.parametrize("size", [1, 2])
def test_a_disk_that_is_too_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Seen before the first byte is written; both numbers are said."""
    write(tmp_path / "in", MEMBER, **LITTLE | {"moe_intermediate_size": 64})
    usage = shutil.disk_usage(tmp_path)._replace(free=1234)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        check_refused(
            capsys,
            tmp_path / "in",
            tmp_path / "out",
            "--tp",
            size,
            words=["1234", "needed", "free on the disk; nothing is written"],
        )


def test_a_target_that_cannot_be_written(little: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Below a file, and where no file can be made."""
    (little.parent / "file").write_text("x")
    for target in (little.parent / "file/out", Path("/proc/out"), Path("/proc/self/fd/out")):
        check_refused(capsys, little, target, words=[str(target)])


def test_two_at_once(little: Path) -> None:
    """The second of two processes is told so, and does the first no harm."""
    options = replace(TO_MXFP4, shard_bytes=20_000)
    refused = []

    def second(done: int, total: int) -> None:
        with pytest.raises(InputError) as caught:
            convert(little, little.parent / "out", options)
        assert_names(caught, [str(little.parent / "out"), "another process"])
        refused.append(done)

    convert(little, little.parent / "out", options, progress=second)
    convert(little, little.parent / "alone", options)
    assert len(refused) > 5
    assert contents(little.parent / "out") == contents(little.parent / "alone")


def test_an_unfinished_conversion_of_something_else(
    little: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other options, or a source that has changed: both values are named, and what is done stays."""
    target = little.parent / "out"
    options = replace(TO_MXFP4, shard_bytes=20_000)
    stop_at(little, target, options, 0.5)
    asked = ("--shard-bytes", 20_000)
    check_refused(
        capsys, little, target, "--what", "all-linear", *asked, left=True,
        words=["unfinished", "options", "what = experts", "all-linear"],
    )  # fmt: skip
    check_refused(
        capsys, little, target, "--shard-bytes", 30_000, left=True, words=["20000", "30000"]
    )
    check_refused(
        capsys, little, target, "--tp", 2, *asked, left=True, words=["tp = 1", "now it is 2"]
    )
    stat = (little / SINGLE).stat()
    os.utime(little / SINGLE, ns=(stat.st_atime_ns, stat.st_mtime_ns + 5))
    words = ["unfinished", SINGLE, str(stat.st_mtime_ns), str(stat.st_mtime_ns + 5)]
    check_refused(capsys, little, target, *asked, left=True, words=words)
    os.utime(little / SINGLE, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    config = (little / "config.json").read_text()
    times = (little / "config.json").stat()
    (little / "config.json").write_text(f"{config} ")
    words = ["config.json", str(len(config)), str(len(config) + 1)]
    check_refused(capsys, little, target, *asked, left=True, words=words)
    (little / "config.json").write_text(config)
    os.utime(little / "config.json", ns=(times.st_atime_ns, times.st_mtime_ns))
    convert(little, target, options)
    convert(little, little.parent / "alone", options)
    assert contents(target) == contents(little.parent / "alone")


def test_bad_arguments(little: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line each, before anything is opened."""
    for args in (("--to", "fp7"), ("--tp", 3), ("--what", "some"), ("--shard-bytes", 0)):
        check_refused(capsys, little, little.parent / "out", *args, words=[str(args[1])])
    status, _, err = cli(capsys, little, little.parent / "out")
    assert (status, err.count("\n")) == (2, 1)


def test_a_source_that_is_no_model(little: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tensor too few, and one too many, are named before anything is written."""
    edit_tensors(little, lambda tensors: tensors.pop("model.language_model.norm.weight"))
    check_refused(capsys, little, little.parent / "out", words=["missing norm.weight"])
    edit_tensors(little, lambda t: t.update({"model.language_model.norm.weight": torch.ones(64)}))
    edit_tensors(little, lambda tensors: tensors.update(extra=torch.ones(3)))
    check_refused(capsys, little, little.parent / "out", words=["not part of this model", "extra"])


def test_folders_made_for_a_target_go_again(
    little: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folders above it go, too. One that was there before stays, and so does what a link points
    to."""
    edit_tensors(little, lambda tensors: tensors[FUSED][1, 40, 3].fill_(math.nan))
    check_refused(capsys, little, little.parent / "a/b/c", words=[FUSED])
    assert not (little.parent / "a").exists()
    (little.parent / "there").mkdir()
    (little.parent / "link").symlink_to("there")
    check_refused(capsys, little, little.parent / "link", words=[FUSED], left=True)
    assert list((little.parent / "there").iterdir()) == []


def test_names_that_are_too_long(little: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, as for any other name."""
    for source, target in ((little, "x" * 5000), ("y" * 5000, little.parent / "out")):
        status, out, err = cli(capsys, source, target, "--to", "mxfp4")
        assert (status, out, err.count("\n")) == (2, "", 1), err


def test_folders_beside_the_weights_are_left_out(little: Path) -> None:
    """One that is called like a small file too."""
    (little / "notes.txt").mkdir()
    convert(little, little.parent / "out", TO_MXFP4)
    assert not (little.parent / "out" / "notes.txt").exists()


def test_traces_of_another_conversion(little: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If a conversion was killed while it cleared up, only the same command finishes it."""
    target = little.parent / "out"
    convert(little, target, TO_MXFP4)
    (target / FINISHED).mkdir()
    check_refused(capsys, little, target, "--tp", 2, words=["other options"], left=True)
    assert cli(capsys, little, target, "--to", "mxfp4")[0] == 0
    assert not (target / FINISHED).exists()
    (target / FINISHED).mkdir()
    (target / REPORT).unlink()
    check_refused(capsys, little, target, words=[FINISHED, REPORT], left=True)


def test_traces_of_a_conversion_from_the_hub(little: Path) -> None:
    """The same repository finishes it, whatever its newest commit is by now."""
    target = little.parent / "out"
    report = convert(little, target, TO_MXFP4)
    traces = target / FINISHED

    def finish(source: str, record: object) -> object:
        traces.mkdir(exist_ok=True)
        (traces / TASK).write_text(json.dumps(record))
        return convert(source, target, TO_MXFP4)

    task = {"source": {"repository": "a/b", "commit": "c0ffee"}, "options": asdict(TO_MXFP4)}
    with pytest.raises(InputError, match="source had repository = a/b; now it is a/c"):
        finish("a/c", task)
    other = task | {"options": asdict(replace(TO_MXFP4, tp=2))}
    with pytest.raises(InputError, match="options had tp = 2; now it is 1"):
        finish("a/b", other)
    with pytest.raises(InputError, match=f"{TASK}: not what a conversion writes"):
        finish("a/b", {"options": {}})
    assert finish("a/b", task) == report
    assert not traces.exists()


def test_the_name_of_the_embedded_model_is_no_target(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder of that name could not be read again by it."""
    monkeypatch.chdir(tmp_path)
    for target in ("tiny", "./tiny"):
        words = ["DST tiny: this name means the embedded checkpoint"]
        check_refused(capsys, TINY, Path(target), words=words)
    assert not Path("tiny").exists()


def test_files_that_are_not_fetched_need_not_be_kept(
    little: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--keep-source is for the files of a hub id; {little} is none"]
    check_refused(capsys, little, tmp_path / "out", "--keep-source", words=words)
