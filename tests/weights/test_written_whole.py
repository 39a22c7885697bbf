"""Every file that the project writes is there whole or not at all, also where the disk is full."""

import ast
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen35.cli import run
from tools import diff, trace
from weights.storage import whole, write_whole

ROOT = Path(__file__).parents[2]
WRITERS = ("write_text", "write_bytes", "save_file", "savefig")
# Where a file is written otherwise, and why that leaves nothing half-written.
OTHERWISE = {
    ("weights/convert.py", "_write"): "several files at once, renamed when all are whole",
    ("weights/convert.py", "_locked"): "a lock, without content",
    ("qwen35/parallel/watch.py", "__enter__"): "the terminal, and the null device",
    ("tools/documented.py", "prepare"): "in a temporary folder",
    ("tools/documented.py", "run_page"): "in a temporary folder",
    ("tools/exact.py", "in_other_processes"): "in a temporary folder",
    ("tools/fingerprint.py", "text"): "in a temporary folder",
    ("tools/hostile.py", "write_undamaged"): "in a temporary folder",
    ("tools/hostile.py", "damage"): "in a temporary folder, which is to be damaged",
    ("tools/hostile.py", "special"): "in a temporary folder, which is to be damaged",
    ("tools/mutate.py", "prepare"): "a copy of the checkout, which is made again",
    ("tools/bench/port_faults.py", "plant"): "in a temporary folder",
    ("tools/bench/mapped.py", "write_sparse"): "in a temporary folder",
    ("tools/bench/mapped.py", "evict"): "opens that file for its descriptor",
}


def writes(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(function, line) of each call that writes a file outside of a `with whole(...)`."""

    def visit(node: ast.AST, function: str, inside: bool) -> Iterator[tuple[str, int]]:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.With):
            calls = [item.context_expr for item in node.items]
            named = [call.func for call in calls if isinstance(call, ast.Call)]
            inside |= any(isinstance(f, ast.Name) and f.id == "whole" for f in named)
        if isinstance(node, ast.Call) and not inside and is_write(node):
            yield function, node.lineno
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function, inside)

    yield from visit(tree, "", False)


def is_write(call: ast.Call) -> bool:
    """`path.write_text(x)`, `save_file(x, path)`, `path.open("wb")`, `open(path, mode="a")`."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in WRITERS:
        return True
    given = [*call.args[:2], *(k.value for k in call.keywords if k.arg == "mode")]
    modes = [a.value for a in given if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return name == "open" and any(set(mode) & set("wax+") for mode in modes if len(mode) < 4)


def test_every_file_goes_through_the_helper() -> None:
    """A writer that does not is in the list above, with its reason. The list holds nothing else."""
    found: dict[tuple[str, str], list[int]] = {}
    for package in ("qwen35", "weights", "reference", "fast", "tools"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for function, line in writes(ast.parse(file.read_text())):
                found.setdefault((str(file.relative_to(ROOT)), function), []).append(line)
    assert found.keys() == OTHERWISE.keys(), {k: v for k, v in found.items() if k not in OTHERWISE}


def test_the_finder_finds() -> None:
    """Each form of a write; what is inside of the helper is none."""
    code = (
        "def f():\n p.write_text(x)\n p.open('wb')\n open(p, 'a')\n np.save_file(x, p)\n p.open()\n"
        " open(p)\n with whole(p) as q:\n  q.write_text(x)\n with p.open('x') as q:\n  pass\n"
    )
    assert [line for _, line in writes(ast.parse(code))] == [2, 3, 4, 5, 10]


def full(*_: object, **__: object) -> None:
    """A write to a disk that is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the file, and nothing is left beside it. A new file is treated in the same
    way."""
    file = tmp_path / "report.json"
    write_whole(file, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for name in ("report.json", "other.json"):
            with pytest.raises(OSError, match="No space left") as caught:
                write_whole(tmp_path / name, "new" * 1000)
            assert caught.value.filename == str(tmp_path / name)
    with pytest.raises(OSError) as caught, whole(file) as unfinished:
        unfinished.write_text("half")
        full()
    assert caught.value.filename == str(file)
    assert [(place.name, place.read_text()) for place in tmp_path.iterdir()] == [
        ("report.json", "old")
    ]


def test_the_bytes_are_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a machine that loses its power leaves the new name with no bytes behind it."""
    calls: list[tuple[str, bytes]] = []
    fsync, replace = os.fsync, Path.replace

    def synced(number: int) -> None:
        calls.append(("fsync", Path(f"/proc/self/fd/{number}").read_bytes()))
        fsync(number)

    def renamed(path: Path, target: Path) -> Path:
        calls.append(("rename", path.read_bytes()))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    write_whole(tmp_path / "report.json", "all of it")
    assert calls == [("fsync", b"all of it"), ("rename", b"all of it")]


def half(path: Any) -> None:
    """Half a file, then the end of the disk."""
    Path(path).write_bytes(b"half")
    full()


@pytest.mark.parametrize("tool", ["trace", "diff"])
def test_command_lines_say_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tool: str
) -> None:
    """Exit status 2, the file's name, no half of it."""
    file = tmp_path / "written"
    write_text = Path.write_text

    def text(path: Path, content: str, **kwargs: Any) -> int:
        if path.parent == tmp_path:
            half(path)
        return write_text(path, content, **kwargs)

    monkeypatch.setattr(Path, "write_text", text)
    if tool == "trace":
        saving = "qwen35.compare.trace_file.save_file"
        monkeypatch.setattr(saving, lambda tensors, path, metadata: half(path))
        module, arguments = trace, ["tiny", "--ids", "1,2,3", "-o", file]
    else:
        short = ["tiny", "--ids", "1,2,3", "--layers", "0", "--dtype", "bfloat16"]
        module, arguments = diff, [*short, "--report", file]
    with pytest.raises(SystemExit) as left:
        run(module.build_parser(), module.main, [str(argument) for argument in arguments])
    err = capsys.readouterr().err
    assert left.value.code == 2
    assert err.count("\n") == 1 and str(file) in err and "No space left" in err, err
    assert list(tmp_path.iterdir()) == []
