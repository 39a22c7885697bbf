"""The report for a bug, `--version`, and options that every command line refuses in the same way."""

import json
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import pytest
import torch

from qwen35.cli import Parser
from tools.environment import PACKAGES, build_parser, main

ROOT = Path(__file__).parents[2]
COMMANDS = ("qwen35.generate", "tools.exact", "tools.trace", "tools.inspect", "tools.bench")


def test_every_package_is_named_with_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(build_parser().parse_args(["--json"])) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= {*PACKAGES, "python", "system", "processor", "cores", "threads", "GPU"}
    assert found["torch"] == version("torch")
    assert found["threads"] == str(torch.get_num_threads())
    assert main(build_parser().parse_args([])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found) and lines[0].split() == ["qwen35", found["qwen35"]]


def test_a_package_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.environment.PACKAGES", ("no-such-package",))
    from tools.environment import environment

    assert environment()["no-such-package"] == "not installed"


def test_a_checkout_that_is_not_installed_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("qwen35.cli.version", missing)
    assert not vars(Parser("x", "y").parse_args([]))["debug"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        Parser("x", "y").parse_args(["--version"])
    assert ended.value.code == 0
    written = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert capsys.readouterr().out == f"qwen35 {written}\n"


def test_the_console_command_is_generate() -> None:
    [found] = entry_points(group="console_scripts", name="qwen35")
    assert found.load() is sys.modules["qwen35.generate"].command


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", ""])
def test_threads_are_a_number_of_at_least_one(text: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tools.bench", "ttft", "--threads", text],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert f"{text!r}; expected a number of at least 1" in ended.stderr.splitlines()[-1]
