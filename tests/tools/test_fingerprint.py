"""tools.fingerprint: equal outputs have equal digests, others do not, and a failing command is a line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen35.compare.trace import trace
from qwen35.load import TINY, load
from tests.support.command import Cli, in_process
from tools import fingerprint
from tools.fingerprint import ROOT, build_parser, main, of_documents, of_folder, of_tensors


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return in_process(build_parser, main, capsys)


def saved(tensors: dict[str, torch.Tensor], file: Path) -> Path:
    """Tensors that share memory, as a trace's do, in a file of their own."""
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file)
    return file


def test_a_trace_has_the_digest_of_its_tensors(cli: Cli, tmp_path: Path) -> None:
    """The command line's trace is the library's; the last bit of one number is another digest."""
    status, out, _ = cli("--only", "trace", "locals", "--json")
    found = json.loads(out)
    assert status == 0 and found.keys() == {"trace", "locals"}
    held = trace(load(TINY), [7 * i % 1000 for i in range(70)], named_locals=True)
    file = saved(held, tmp_path / "trace.safetensors")
    assert of_tensors(file, lambda name: ":" not in name) == found["trace"]
    assert of_tensors(file, lambda name: ":" in name) == found["locals"]
    other = held["layers.3.mlp"].clone()
    other.view(torch.int16)[0, 3, 5] ^= 1
    file = saved(held | {"layers.3.mlp": other}, tmp_path / "trace.safetensors")
    assert of_tensors(file, lambda name: ":" not in name) != found["trace"]
    assert of_tensors(file, lambda name: ":" in name) == found["locals"]


def test_it_is_the_checkouts_code_that_runs(cli: Cli, tmp_path: Path) -> None:
    """A copy of this checkout, whose delta rule reads with the key and not with the query."""
    for name in ("qwen35", "reference", "weights", "tools", "fast"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    rule = tmp_path / "reference" / "deltanet.py"
    text = rule.read_text(encoding="utf-8")
    assert text.count("inner = q_c @ k_t * decay") == 1
    rule.write_text(text.replace("inner = q_c @ k_t", "inner = k_c @ k_t"), encoding="utf-8")
    status, other, _ = cli("--only", "trace", "--checkout", tmp_path)
    assert status == 0 and other.split()[0] == "trace"
    assert other != cli("--only", "trace")[1]


def test_documents_without_their_times() -> None:
    one = {"text": "a", "timing": 1.5}
    assert of_documents([one], ["text"]) == of_documents([one | {"timing": 2.5}], ["text"])
    assert of_documents([one], None) != of_documents([one | {"timing": 2.5}], None)
    assert of_documents([one], ["text"]) != of_documents([one | {"text": "b"}], ["text"])
    two = [{"text": "a"}, {"text": "b"}]
    assert of_documents(two, None) != of_documents(two[::-1], None)


def test_a_folder_by_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "rank-0").mkdir()
    (tmp_path / "rank-0" / "a").write_bytes(b"1")
    first = of_folder(tmp_path)
    (tmp_path / "rank-0" / "a").write_bytes(b"2")
    second = of_folder(tmp_path)
    (tmp_path / "rank-0" / "a").rename(tmp_path / "rank-0" / "b")
    assert len({first, second, of_folder(tmp_path)}) == 3


def test_a_command_that_fails_is_a_line_and_the_others_go_on(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = {
        "text": lambda runner: runner("qwen35.generate", "--no-such-option"),
        "trace": lambda runner: runner("tools.no_such_command"),
        "diff": lambda runner: "0" * 64,
    }
    monkeypatch.setattr(fingerprint, "LINES", lines)
    status, out, _ = cli()
    failed, missing, other = out.splitlines()
    assert status == 1 and other.split() == ["diff", "0" * 64]
    assert missing.endswith("failed: tools.no_such_command: this checkout has no such command")
    assert failed.startswith("text ") and "failed: qwen35.generate: " in failed
    assert "--no-such-option" in failed


@pytest.mark.parametrize(
    ("printed", "line"),
    [
        ("no JSON", "failed: tools.emulate: no JSON document: Expecting value"),
        ("", "failed: tools.emulate: no JSON document is printed"),
        ("[1]", "failed: tools.emulate: no JSON document is printed"),
        ('{"text": "a"}', "failed: the document of this checkout has no 'token_ids'"),
    ],
)
def test_another_document_than_expected_is_a_line(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, printed: str, line: str
) -> None:
    """As an older checkout may print it."""
    monkeypatch.setattr(fingerprint, "mxfp4", lambda runner: tmp_path)
    monkeypatch.setattr(fingerprint.Runner, "__call__", lambda *_, **__: printed)
    status, out, _ = cli("--only", "emulate")
    assert status == 1 and line in out


def test_a_kernel_that_does_not_compile_is_no_digest(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table has no row of it, so that two such tables could be equal."""
    printed = json.dumps({"kernels": [], "worse": ["route gfx950: TritonError: no"]})
    monkeypatch.setattr(fingerprint.Runner, "__call__", lambda *_, **__: printed)
    status, out, _ = cli("--only", "compile")
    assert status == 1
    assert out.count("failed: tools.compile: route gfx950: TritonError: no\n") == 2


def test_a_folder_that_is_no_checkout_is_one_line(cli: Cli, tmp_path: Path) -> None:
    status, out, err = cli("--checkout", tmp_path)
    assert (status, out) == (2, "") and "is no checkout of this project" in err
