"""Options of benchmarks that would give a traceback or a wrong figure are one line, before any work."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.bench import __main__ as bench
from tools.bench.language import HELDOUT

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "--new-tokens", "1"], "--new-tokens: '1'; expected a number of at least 2"),
        (["busy", "--new-tokens", "1"], "--new-tokens: '1'; expected a number of at least 2"),
        (["stream", "--new-tokens", "1"], "--new-tokens: '1'; expected a number of at least 2"),
        (["generate", "--prefill-tokens", "9999999"], "9999999; the held-out text has "),
        (["language", "--text", "empty"], "empty: no text; expected documents with <|endoftext|>"),
        (["language", "--text", "nowhere"], "nowhere: No such file or directory"),
        (["language", "--prompt-tokens", "63"], "--prompt-tokens 63; expected at least 64"),
        (["quantize", "--columns", "-32"], "--columns: '-32'; expected a number of at least 1"),
        (["step", "--plot", "x.svg", "--no-nodes"], "--plot x.svg draws the times of nodes"),
        (
            ["step", "--plot", "no/x.svg"],
            "--plot no/x.svg; expected the name of a file in a folder",
        ),
        (["step", "--plot", "."], "--plot .; expected the name of a file in a folder"),
        (["hip_port", "--tp", "8", "3"], "--tp 3; expected some of 1, 2, 4, 8"),
        (["hip_port", "--launches", "0"], "--launches: '0'; expected a number of at least 1"),
        (["hip_port", "--fault-launches", "-1"], "'-1'; expected a number of at least 0"),
        (["--threads", "2"], "the following arguments are required: op"),
    ],
)
def test_it_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("\n<|endoftext|>\n\n")
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as ended:
        bench.main()
    torch.set_num_threads(threads)
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1), err
    assert message in err


def test_help_on_a_full_disk_is_one_line() -> None:
    """That of the list of benchmarks too."""
    command = [sys.executable, "-m", "tools.bench", "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "python -m tools.bench: standard output: No space left on device\n"


def test_the_document_of_a_comparison_has_the_numbers_of_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Since tokens/s and the ratios depend on them."""
    pytest.importorskip("transformers")
    words = "generate --prefill-tokens 80 --prompt-tokens 8 --new-tokens 3 --prompts 1 --repeats 1 --json"
    monkeypatch.setattr(sys, "argv", ["bench", *words.split(), "--threads", "1"])
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as ended:
        bench.main()
    torch.set_num_threads(threads)
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and HELDOUT.exists()
    asked = {"prefill_tokens": 80, "prompt_tokens": 8, "new_tokens": 3}
    assert asked.items() <= document["config"].items()
    assert [row["name"] for row in document["rows"]] == [
        "prefill, ours", "prefill, transformers", "decode 1, ours", "decode 1, transformers",
        "decode, geometric mean",
    ]  # fmt: skip
