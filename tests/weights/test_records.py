"""The JSON files that a conversion keeps may have been changed by somebody else: one line names them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from qwen35.errors import InputError
from tests.support.conversions import (  # noqa: F401
    TO_MXFP4,
    check_refused,
    cli,
    little,
    stop_at,
)
from tools import inspect
from weights.checkpoint import Checkpoint
from weights.convert import FINISHED, REPORT, UNFINISHED, convert
from weights.ranks import join_command
from weights.source import Hub

NO_RECORDS = ("garbage", "[]", '{"source": 5}', '{"options": {}}', '{"source": {}, "asked": 3}')


@pytest.mark.parametrize("content", NO_RECORDS)
def test_a_damaged_task(content: str, little: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the conversion nor a reader of its folder ends in a traceback."""
    target = little.parent / "out"
    options = replace(TO_MXFP4, shard_bytes=20_000)
    stop_at(little, target, options, 0.5)
    task = target / UNFINISHED / "task.json"
    task.write_text(content)
    check_refused(capsys, little, target, "--shard-bytes", 20_000, words=[str(target)], left=True)
    with pytest.raises(SystemExit) as stopped:
        inspect.run(inspect.build_parser(), inspect.main, [str(target)])
    assert stopped.value.code == 2
    assert "out" in capsys.readouterr().err


def test_damaged_errors_of_a_file(little: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rounding errors of a file that is done are read again at the end."""
    target = little.parent / "out"
    options = replace(TO_MXFP4, shard_bytes=20_000)
    stop_at(little, target, options, 0.5)
    (target / UNFINISHED / "00001.json").write_text('{"a": {"nothing": 1}}')
    status, _, err = cli(capsys, little, target, "--to", "mxfp4", "--shard-bytes", 20_000)
    assert (status, err.count("\n")) == (2, 1) and "00001.json" in err


@pytest.mark.parametrize("content", ["garbage", "[]", '{"repository": "a/b"}'])
def test_a_damaged_commit(content: str, tmp_path: Path) -> None:
    """The commit of a hub repository is read before the hub is asked for anything."""
    (tmp_path / "source.json").write_text(content)
    with pytest.raises(InputError, match=r"source\.json"):
        Hub("a/b", tmp_path, keep=False)


@pytest.mark.parametrize("content", [*NO_RECORDS, "{}"])
def test_a_damaged_report(content: str, little: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may be all that is left to say whether a killed conversion was this one."""
    target = little.parent / "out"
    convert(little, target, TO_MXFP4)
    (target / FINISHED).mkdir()
    (target / REPORT).write_text(content)
    check_refused(capsys, little, target, words=[str(target)], left=True)
    (target / FINISHED / "task.json").write_text(content)
    check_refused(capsys, little, target, words=[str(target)], left=True)


@pytest.mark.parametrize("content", [*NO_RECORDS, '{"to": "x"}', '{"to": 3}'])
def test_ranks_with_a_damaged_report(content: str, little: Path) -> None:
    """The command that joins them is still known."""
    target = little.parent / "ranks"
    convert(little, target, replace(TO_MXFP4, to="bf16", tp=2))
    usual = join_command(target)
    for report in target.glob(f"*/{REPORT}"):
        written = json.loads(report.read_text())
        report.write_text(content)
    assert written["to"] == "bf16"
    assert join_command(target).startswith(usual.rpartition(" ")[0])


@pytest.mark.parametrize("content", ["garbage", "[]", '{"tensor_parallel": [1]}', "{}", None])
def test_a_rank_with_a_damaged_config(content: str | None, little: Path) -> None:
    """Whichever rank it is, its file is named."""
    target = little.parent / "ranks"
    convert(little, target, replace(TO_MXFP4, to="bf16", tp=2))
    config = target / "rank-1-of-2" / "config.json"
    if content is None:
        config.unlink()
    else:
        config.write_text(content)
    with pytest.raises(InputError, match=re.escape(str(config))):
        Checkpoint(target)
