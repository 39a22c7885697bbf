"""`python -m tools` lists the command lines."""

from importlib import import_module
from pathlib import Path

import pytest

from tools.__main__ import commands, main

ROOT = Path(__file__).parents[2]


def test_every_command_is_listed_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(None) == 0
    out = capsys.readouterr().out
    known = {
        file.stem
        for file in (ROOT / "tools").glob("*.py")
        if "run(build_parser(), main)" in file.read_text(encoding="utf-8")
    }
    assert {"inspect", "convert", "trace"} <= known
    for name in (*known, "bench", "diff", "exact"):
        assert len(commands()[f"python -m tools.{name}"]) > 5
        assert f"python -m tools.{name} " in out
    assert "`" not in out and "python -m qwen35.generate" in out


@pytest.mark.parametrize("command", commands())
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As the last line of the list says."""
    name = command.removeprefix("python -m ")
    if name == "tools.bench":
        return  # which chooses its parser by the operation
    with pytest.raises(SystemExit) as ended:
        import_module(name).build_parser().parse_args(["--help"])
    assert ended.value.code == 0 and f"usage: {command} " in capsys.readouterr().out
