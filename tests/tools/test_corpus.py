"""`tools.corpus`: its command line, and what it says of packages that cannot be had."""

from pathlib import Path

import pytest

from qwen35.errors import InputError
from tests.support.command import in_process
from tools import corpus
from tools.corpus import Source, build_parser, cut, main, pick, unpack, unshared


def program(folder: Path, name: str, script: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def test_help_writes_and_fetches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "build", lambda target: pytest.fail("the text is built"))
    status, out, err = in_process(build_parser, main, capsys)("--help")
    assert (status, err) == (0, "") and "usage: python -m tools.corpus " in out
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program, its last line and the package; a program that is missing is named."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(corpus, "SOURCES", (Source("dict-devil", "PD"),))
    cli = in_process(build_parser, main, capsys)
    status, out, err = cli(tmp_path / "dst")
    assert (status, out, err.count("\n")) == (2, "", 1) and "apt-get: No such file" in err
    program(
        tmp_path / "bin", "apt-get", "echo a notice >&2; echo 'E: no such package' >&2; exit 100"
    )
    status, out, err = cli(tmp_path / "dst")
    assert (status, out) == (2, "") and list((tmp_path / "dst").iterdir()) == []
    assert err == "python -m tools.corpus: dict-devil: apt-get download: E: no such package\n"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_the_place_of_the_folder(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is downloaded."""
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(corpus, "extract", lambda source: pytest.fail("a package was fetched"))
    status, out, err = in_process(build_parser, main, capsys)(tmp_path / place)
    assert (status, out, err.count("\n")) == (2, "", 1) and str(tmp_path / place) in err


def test_the_version_is_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin", "apt-get", ': > "${3}_1_all.deb"')
    program(tmp_path / "bin", "dpkg-deb", '[ "$1" = -f ] && echo 0.1-2; exit 0')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    (tmp_path / "here").mkdir()
    assert unpack(Source("dict-devil", "PD"), tmp_path / "here") == "0.1-2"
    program(tmp_path / "bin", "dpkg-deb", "exit 2")
    with pytest.raises(InputError, match=r"^dict-devil: dpkg-deb -x: exit status 2$"):
        unpack(Source("dict-devil", "PD"), tmp_path / "here")


def test_the_parts_of_a_corpus() -> None:
    """Documents are cut, chosen within a budget, and share no line between the two texts."""
    paragraphs = ["x" * 10_000] * 6
    pieces = list(cut("book", paragraphs))
    assert [name for name, _ in pieces] == ["book#0", "book#1"]
    assert sum(len(piece) for _, piece in pieces) == 6
    assert list(cut("short", ["x" * 200])) == []
    documents = [(str(n), ["x" * 98]) for n in range(9)]
    assert len(pick(documents, 350)) == 3 and pick(documents, 350) <= pick(documents, 500)
    assert unshared(["Title\n\nOwn line", "title"], ["TITLE\n\nother"]) == ["Own line"]
