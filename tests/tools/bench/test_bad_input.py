"""Options of benchmarks that would give a traceback or a wrong figure are one line, before any work."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.bench import __main__ as bench
from tools.bench import generate
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
        (["language", "--text", "nowhere"], "nowhere: no such file"),
        (["language", "--prompt-tokens", "63"], "--prompt-tokens 63; expected at least 64"),
        (["quantize", "--columns", "-32"], "--columns: '-32'; expected a number of at least 1"),
        (["step", "--plot", "x.svg", "--no-nodes"], "--plot x.svg draws the times of nodes"),
        (
            ["step", "--plot", "no/x.svg"],
            "--plot: 'no/x.svg'; expected a file in a folder that exists",
        ),
        (["step", "--plot", "."], "--plot: '.' is a folder; expected the name of a file"),
        (["hip_port", "--tp", "8", "3"], "--tp 3; expected some of 1, 2, 4, 8"),
        (["hip_port", "--launches", "0"], "--launches: '0'; expected a number of at least 1"),
        (["hip_port", "--fault-launches", "-1"], "'-1'; expected a number of at least 0"),
        (["--threads", "2"], "the following arguments are required: OP"),
        (
            ["generate", "--prompt-tokens", "99999", "--new-tokens", "40000"],
            "the context 32768; 40000",
        ),
        (["generate", "--draft-tokens", "99999"], "draft_tokens = 99999; expected at most 32768"),
        (["language", "--draft-tokens", "99999"], "draft_tokens = 99999; expected at most 32768"),
        (["language", "--temperature", "nan"], "temperature = nan; expected a number >= 0"),
        (
            ["exactness", "--prompt-tokens", "99999"],
            "the prompt has 32769 tokens, the context 32768",
        ),
        (["exactness", "--new-tokens", "32768"], "the context 32768; 32768 are to follow"),
        (["diff", "--lengths", "99999"], "--lengths 99999; the embedded model's context has 32768"),
        (["diff", "--layers", "1001"], "--layers 1001; expected at most 1,000"),
        (
            ["diff", "--intermediate", "1000001"],
            "--intermediate 1000001; expected at most 1,000,000",
        ),
        (["busy", "--busy", "1025"], "--busy: '1025'; expected a number of at most 1,024"),
        (["ttft", "--tp", "4"], "--tp 4 goes with --config; a checkpoint is timed whole"),
        (["ttft", "--lengths", "65"], "length 65; expected a multiple of 64, at most 32704"),
        *((["mapped", "--repeats", text], "--repeats: ") for text in ("", "-1", "1000000000001")),
    ],
)
def test_it_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for op in bench.OPS.values():
        if hasattr(op, "load"):
            monkeypatch.setattr(op, "load", lambda *_, **__: pytest.fail("the weights were read"))
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


def test_a_difference_of_times_that_is_none_gives_no_speed() -> None:
    """The time of the first token is subtracted. On a busy machine it may be the longer one."""
    rows = generate._rows("decode", {"ours": [-0.5], "theirs": [1.0]}, 4)
    assert [row["tokens_per_s"] for row in rows] == [None, 4.0] and rows[0]["times_faster"] is None
    rows = generate._rows("decode", {"ours": [0.5], "theirs": [1.0]}, 4)
    assert [row["tokens_per_s"] for row in rows] == [8.0, 4.0] and rows[0]["times_faster"] == 2
