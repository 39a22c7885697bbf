"""Bad values of a benchmark's options are refused in one line, before anything is measured."""

import tempfile
from types import ModuleType

import pytest

from qwen35.cli import Parser, run
from tools.bench import diff, mapped


@pytest.mark.parametrize(
    ("op", "arguments", "line"),
    [
        (diff, ("--layers", "4", "-1"), "argument --layers: '-1'; expected a number of at least 1"),
        *((mapped, ("--gigabytes", size), f"--gigabytes {size}; expected 0.101 to 500")
          for size in ("nan", "inf", "-1", "0", "0.05", "501")),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    op: ModuleType,
    arguments: tuple[str, ...],
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("load", "first_token"):
        monkeypatch.setattr(
            op, name, lambda *_: pytest.fail("something was measured"), raising=False
        )
    monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda: pytest.fail("a file was written"))
    parser = Parser("bench", "")
    op.add_arguments(parser)
    with pytest.raises(SystemExit) as ended:
        run(parser, op.main, [*arguments])
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", f"bench: {line}\n")
