"""`python -m tools` lists the command lines, and their help says what each option does."""

import argparse
from importlib import import_module
from pathlib import Path

import pytest

from qwen35.cli import Parser
from tools.__main__ import commands, main
from tools.bench.__main__ import OPS

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


def parsers() -> dict[str, Parser]:
    """The parser of every command, and of every benchmark."""
    names = [name.removeprefix("python -m ") for name in commands()]
    found = {name: import_module(name).build_parser() for name in names if name != "tools.bench"}
    for op, module in OPS.items():
        found[f"tools.bench {op}"] = Parser(op, "")
        module.add_arguments(found[f"tools.bench {op}"])
    return found


@pytest.mark.parametrize(("name", "parser"), parsers().items(), ids=parsers())
def test_every_option_says_what_happens_and_what_its_default_is(name: str, parser: Parser) -> None:
    """A value has a name (N tokens), and is told if it is not given."""
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._VersionAction):
            continue
        option, text = action.option_strings[-1:] or [action.dest], action.help or ""
        assert len(text.split()) >= 3, f"{name} {option}: {text!r}"
        if action.nargs != 0 and action.choices is None:
            assert action.metavar, f"{name} {option}: its value has no name"
        twins = [other for other in parser._actions if other.dest == action.dest]
        is_switch = action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction)
        if not is_switch and action.default not in (None, []):
            text = " ".join(other.help or "" for other in twins)  # MODEL, and --model in its place
            assert "default" in text, f"{name} {option}: {text!r}"
