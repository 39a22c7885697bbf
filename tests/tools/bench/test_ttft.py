"""`tools.bench ttft`: its rows, its check of bits, and one line for bad input."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35.cli import Parser, run
from qwen35.load import TINY, load
from reference.model import Model
from tools.bench import ttft

MEASURED = {ttft.COLD, ttft.COLD_MEMORY, ttft.COLD_FOLDER, ttft.HIT_MEMORY, ttft.HIT_FOLDER}


@pytest.fixture(scope="module")
def model() -> Model:
    """The embedded one."""
    return load(TINY)


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr; the number of torch's threads is put back."""
    parser = Parser("ttft", "")
    parser.add_argument("--json", action="store_true")
    ttft.add_arguments(parser)
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as ended:
        run(parser, ttft.main, ["--threads", "1", *map(str, arguments)])
    torch.set_num_threads(threads)
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


def test_every_row_of_two_lengths(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five rows a length and the article's four; the bits were compared before each."""
    checked: list[int] = []
    check = ttft.check

    def noted(subject: ttft.Subject, ids: list[int], hits: Any) -> list[str]:
        checked.append(len(ids) - ttft.TAIL)
        return check(subject, ids, hits)

    monkeypatch.setattr(ttft, "check", noted)
    status, out, _ = command(capsys, "--lengths", 64, 128, "--repeats", 1, "--json")
    assert status == 0
    assert checked == [64, 128]
    document = json.loads(out)
    rows = {(row["name"], row["prefix_tokens"]): row for row in document["rows"]}
    quoted = {(ttft.ARTICLE, length) for length in ttft.QUOTED}
    assert rows.keys() == {(name, n) for name in MEASURED for n in (64, 128)} | quoted
    assert len(document["rows"]) == 14
    for (name, _), row in rows.items():
        assert row.get("quoted", False) == (name == ttft.ARTICLE)
        if name == ttft.ARTICLE:
            continue
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        if name in (ttft.COLD, ttft.COLD_MEMORY, ttft.COLD_FOLDER):
            assert row["total_ms"] >= row["median_ms"]
        else:
            assert row["cold_over_hit"] > 0
            assert all(row[f"{part}_ms"] > 0 for part in ("begin", "restore", "tail", "copy"))
            assert row["floor_ms"] > row["copy_ms"]
    in_memory, on_disk = rows[ttft.COLD_MEMORY, 128], rows[ttft.COLD_FOLDER, 128]
    assert 0 < in_memory["kept_bytes"] == rows[ttft.HIT_MEMORY, 128]["kept_bytes"]
    assert in_memory["kept_bytes"] < on_disk["kept_bytes"]
    assert in_memory["cost_of_cache"] > 0 and on_disk["cost_of_cache"] > 0


def test_a_tail_of_whole_blocks_is_new_in_every_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a hit would find them."""
    found: list[tuple[int, int, tuple[int, ...]]] = []
    first_token = ttft.Subject.first_token

    def noted(subject: ttft.Subject, ids: list[int], kept: Any, **settings: Any) -> Any:
        generation, seconds = first_token(subject, ids, kept, **settings)
        found.append((len(ids), generation.cached_tokens, tuple(ids[64:])))
        return generation, seconds

    monkeypatch.setattr(ttft.Subject, "first_token", noted)
    words = "--lengths 64 --repeats 2 --tail 130 --json"
    status, out, _ = command(capsys, *words.split())
    assert status == 0
    assert {length for length, _, _ in found} == {64 + 63, 64 + 130}
    hits = [tail for _, cached, tail in found if cached]
    assert len(hits) == 2 * 3  # in the check and twice in the measurement, from memory and folder
    assert {cached for _, cached, _ in found} == {0, 64}
    assert len({*hits}) == len(hits)
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert rows[ttft.HIT_MEMORY]["kept_bytes"] == rows[ttft.COLD_MEMORY]["kept_bytes"] > 0


def test_a_longer_tail_and_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of the cache in memory alone, and the settings in the document."""
    status, out, _ = command(
        capsys, "--lengths", 64, "--repeats", 1, "--tail", 40, "--prefill-chunk", 128,
        "--kv-cache-dtype", "fp8", "--no-folder", "--json",
    )  # fmt: skip
    assert status == 0
    document = json.loads(out)
    names = {row["name"] for row in document["rows"]} - {ttft.ARTICLE}
    assert names == {ttft.COLD, ttft.COLD_MEMORY, ttft.HIT_MEMORY}
    asked = {"tail_tokens": 40, "prefill_chunk": 128, "kv_cache_dtype": "fp8"}
    assert asked.items() <= document["config"].items()


@pytest.mark.parametrize("fault", ["k", "conv", "nothing"])
def test_the_check_sees_other_bits(
    model: Model, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Noise in one restored tensor, or a hit that is none."""
    subject = ttft.Subject(model, "")
    kept = subject.in_memory()
    begin = kept.begin

    def faulty(ids: list[int], **settings: Any) -> Any:
        reuse = begin(ids, **settings)
        if reuse.chain and fault == "nothing":
            reuse.chain, reuse.length = [], 0
        for name, tensor in reuse.chain[-1][1].items() if reuse.chain else ():
            # Of the MTP's tensors none is behind the first token.
            if name.endswith(f".{fault}") and not name.startswith("mtp."):
                tensor.add_(torch.randn_like(tensor))
        return reuse

    monkeypatch.setattr(kept, "begin", faulty)
    ids = [i % 1000 for i in range(64 + ttft.TAIL)]
    failed = ttft.check(subject, ids, {ttft.HIT_MEMORY: lambda: kept})
    assert failed
    assert all(line.startswith("hit in memory, 81 tokens, 64 to be cached: ") for line in failed)


def test_other_bits_end_the_measurement(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a line and status 1."""
    monkeypatch.setattr(ttft, "check", lambda *_: ["hit in memory: other bits"])
    status, out, err = command(capsys, "--lengths", 64, "--repeats", 1)
    assert (status, out, err) == (1, "", "hit in memory: other bits\n")


def test_what_the_cache_goes_on_without_ends_it(model: Model) -> None:
    """A cache that keeps nothing would give figures of something else."""
    subject = ttft.Subject(model, "")
    kept = subject.in_memory()
    kept.budget = 1
    with pytest.raises(ValueError, match="budget"):
        subject.first_token([1] * 81, kept)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--lengths", 64, 100), ["length 100", "multiple of 64", "32704", "32768"]),
        (("--lengths", 0), ["length 0", "64"]),
        (("--lengths", -64), ["length -64", "64"]),
        (("--lengths", 32768), ["length 32768", "32704"]),
        (("--repeats", 0), ["--repeats: '0'; expected a number of at least 1"]),
        (("--tail", 0), ["--tail", "at least 1"]),
        (("--prefill-chunk", 100), ["--prefill-chunk 100", "multiple of 64"]),
        (("--config", "397b"), ["cpu"]),
        (("--config", "35b", "tiny"), ["MODEL tiny", "--config 35b"]),
        (("--config", "35b", "--path", "fast"), ["--path fast", "--config 35b"]),
        (("--config", "35b", "--device", "cpu"), ["--device cpu", "--config 35b"]),
        (("--cold-repeats", 0), ["--cold-repeats: '0'; expected a number of at least 1"]),
        (("--plot", "plot.pdf"), ["plot.pdf", ".svg", ".png"]),
        (
            ("--plot", "nowhere/at/all.svg"),
            ["nowhere/at/all.svg'; expected a file in a folder"],
        ),
        (("--model", "/nowhere/at/all"), ["/nowhere/at/all"]),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[Any, ...], words: list[str]
) -> None:
    """It is refused before anything is measured."""
    status, out, err = command(capsys, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert not [word for word in words if word not in err], err


def test_a_plot_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of that name; and no matplotlib, which is an extra."""
    (tmp_path / "plot.svg").mkdir()
    status, _, err = command(capsys, "--plot", tmp_path / "plot.svg")
    assert (status, err.count("\n")) == (2, 1)
    assert "plot.svg' is a folder; expected the name of a file" in err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = command(capsys, "--plot", tmp_path / "other.svg")
    assert (status, err.count("\n")) == (2, 1)
    assert "matplotlib is not installed; pip install -e '.[plot]'" in err


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_plot_of_few_rows(tmp_path: Path, suffix: str) -> None:
    """One length will do."""
    pytest.importorskip("matplotlib")
    spread = {"median_ms": 2.0, "min_ms": 1.0, "max_ms": 4.0}
    rows = [{"name": name, "prefix_tokens": 64} | spread for name in sorted(MEASURED)]
    rows.append({"name": ttft.ARTICLE, "prefix_tokens": 16_000, "median_ms": 150.0})
    ttft.plot(rows, tmp_path / f"plot{suffix}", "a model")
    assert (tmp_path / f"plot{suffix}").stat().st_size > 1000
