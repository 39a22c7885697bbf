"""Every command and Python example of README and docs: the small ones run, the others can be parsed."""

import contextlib
import importlib
import io
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import qwen35.cli
from tests.support.printed import missing
from tools import documented
from tools.bench.__main__ import OPS
from tools.documented import ROOT, SHELL, SMALL, Example, examples

EXAMPLES = documented.documented()


@contextlib.contextmanager
def typed(text: str) -> Iterator[None]:
    """Text at standard input."""
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(text.encode()))
    try:
        yield
    finally:
        sys.stdin = before


def run_module(words: tuple[str, ...]) -> int:
    """`python -m` a module with its arguments, in this process, which has imported torch already."""
    if words[0] == "qwen35":
        words = ("python", "-m", "qwen35.generate", *words[1:])
    wanted = f"{shlex.join(words)} is not run here; give it an entry in tools/documented.py"
    assert words[:2] == ("python", "-m"), wanted
    assert hasattr(importlib.import_module(words[2]), "build_parser") or "bench" in words[2], wanted
    before, sys.argv = sys.argv, list(words[2:])
    try:
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv = before
    return 0


def outcome(example: Example, folder: Path) -> int:
    """The exit status."""
    one = example.filled()
    if one.file:
        (folder / one.file).write_text(one.text)
        return 0
    if one.is_python:
        exec(compile(one.text, f"{one.page}:{one.line}", "exec"), {"__name__": "__main__"})
        return 0
    with typed(one.input):
        if SHELL & {*one.words}:
            return subprocess.run(documented.process(one), check=False).returncode
        return run_module(one.words)


@pytest.fixture
def own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to be in, with modules of its own; what a command changes of the process is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize("page", documented.pages())
def test_the_small_examples_of_a_page_run(
    page: str, own_process: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [one for one in EXAMPLES if one.page == page and one.kind == SMALL]
    done: set[tuple[str, ...]] = set()
    for one in [*documented.prepare(page, own_process), *own]:
        if one.inline and one.words in done:
            continue
        done.add(one.words)
        status = outcome(one, own_process)
        out, err = capsys.readouterr()
        where = f"{page}:{one.line}: {one.text}"
        assert status == one.status, f"{where}: exit status {status}\n{err}"
        lost = missing("\n".join(one.printed), out + err)
        assert not lost, f"{where}: these lines are not printed: {lost}"


def test_the_second_run_of_a_prompt_hits(
    own_process: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/exactness.md says so: all whole blocks of the prompt are taken over, with the same
    digest."""
    first, second = (one for one in EXAMPLES if "--prompt-file" in one.words)
    assert first.page == second.page == "docs/exactness.md" and first.words == second.words
    documented.prepare(first.page, own_process)
    said: list[str] = []
    for one in (first, second):
        assert outcome(one, own_process) == 0
        said.append(capsys.readouterr().err)
    tokens, none = re.findall(r"(\d+) prompt tokens \((\d+) cached\)", said[0])[0]
    assert none == "0" and int(tokens) > 128
    assert f"{tokens} prompt tokens ({int(tokens) // 64 * 64} cached)" in said[1]
    digests = [re.findall(r"logits_sha256 (\w+)", text) for text in said]
    assert digests[0] == digests[1] and len(digests[0]) == 1


@pytest.mark.parametrize("command", documented.ELSEWHERE)
def test_a_long_command_can_be_parsed(command: str) -> None:
    """Its module is there, and has the options; nothing is run."""
    # A parser looks for the device that it is given, which need not be here.
    words = ["cpu" if word == "cuda" else word for word in shlex.split(command)]
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    if words[:2] != ["python", "-m"]:
        return
    if words[2] == "tools.bench":
        parser = qwen35.cli.Parser("bench", "")
        OPS[words[3]].add_arguments(parser)
        parser.parse_args(words[4:])
        return
    module = importlib.import_module(words[2])
    if hasattr(module, "build_parser"):
        module.build_parser().parse_args(words[3:])
    else:
        assert module.main


def test_no_entry_is_left_over() -> None:
    """Each entry has a kind and a reason."""
    assert documented.stale(EXAMPLES) == []
    for kind, reason in documented.ELSEWHERE.values():
        assert kind in documented.KINDS and kind != SMALL and reason


PAGE = """# Title

    python -m a.b 'x y' --n 3    # a comment
    (Pdb) p x      # a shape
    > Hello
    output of it

Then `python -m c
d` and `qwen35.load`.

```sh
pip install x && python -m e \\
    --f 'a # b'
```

```python
import math
print(math.pi)
```
"""


def test_what_is_taken_from_a_page() -> None:
    found = examples("page.md", PAGE)
    assert [one.words for one in found] == [
        ("python", "-m", "a.b", "x y", "--n", "3"), ("python", "-m", "c", "d"),
        ("pip", "install", "x"), ("python", "-m", "e", "--f", "a # b"), (),
    ]  # fmt: skip
    assert [one.line for one in found] == [3, 8, 13, 13, 17]
    assert found[0].typed == ["p x", "Hello"] and found[0].input == "p x\nHello\n"
    assert found[-1].is_python and found[-1].text == "import math\nprint(math.pi)\n"


def test_placeholders_are_filled() -> None:
    [one] = examples(
        "page.md", "    python -m x --model /path/to/Qwen3.5-35B-A3B --prefix-cache DIR\n"
    )
    assert one.filled().words[3:] == ("--model", "tiny", "--prefix-cache", "kept")


def test_a_command_that_does_not_run_is_named(
    own_process: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--run` says which, with its page and line."""
    text = "    python -m tools.inspect tiny --nonsense\n    python -m tools.inspect --help\n"
    monkeypatch.setattr(documented, "documented", lambda: examples("README.md", text))
    [line] = documented.run_page("README.md", {SMALL})
    assert line == "README.md:1: exit status 2: python -m tools.inspect tiny --nonsense"
