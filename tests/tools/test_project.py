"""`tools.project`: the rows of a small round, the check against measured times, and bad input."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from qwen35.config import Config
from tests.support.command import Cli, in_process
from tools.gfx950.timeline import H200, MI355X, execute, launch_time
from tools.project import build_parser, kinds_of, main, step_of

SMALL = {"hidden_size": 256, "num_experts": 16, "num_experts_per_tok": 2, "vocab_size": 512}
SMALL |= {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
SHORT = "--tp", "1", "--context", "300"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line, whose default is a small model of four layers."""
    published = Config.published
    whole = published("35B-A3B")
    small = replace(whole, num_hidden_layers=4, layer_types=whole.layer_types[:4], **SMALL)
    monkeypatch.setattr(
        Config, "published", lambda name: small if name == "397B-A17B" else published(name)
    )
    return in_process(build_parser, main, capsys)


def result(tmp_path: Path, **changes: object) -> Path:
    """A file as tools.bench step --json prints it."""
    config = {"config": "397b", "tp": 1, "drafts": 3, "context": 300, "kv_cache_dtype": "auto"}
    rows = [
        {"name": "round", "launches": 60, "us": 900.0},
        {"name": "round of all layers, by proportion", "us": 900.0},
        {"name": "delta", "launches": 3, "us": 30.0},
    ]
    told = {"config": config, "device": "NVIDIA H200", "rows": rows}
    config |= {name: value for name, value in changes.items() if name in config}
    told |= {n: value for n, value in changes.items() if n in told and n not in config}
    path = tmp_path / "step.json"
    path.write_text(json.dumps(told))
    return path


def test_a_small_round(cli: Cli, tmp_path: Path):
    status, out, _ = cli(*SHORT, "--json", "--measured", result(tmp_path))
    found = json.loads(out)
    rows = {row["name"].split()[0]: row for row in found["rows"]}
    assert status == 0
    # Three layers of the trunk have a delta rule; one has attention, and the MTP layer, which runs
    # three times.
    assert rows["delta"]["launches"] == 3 and rows["attend"]["launches"] == 1 + 3
    assert rows["route"]["launches"] == rows["down"]["launches"] == 4 + 3
    for row in rows.values():
        parts = {name: row[name] for name in ("latency", "issue", "loads", "memory")}
        assert row["us"] == pytest.approx(max(parts.values()) + MI355X.launch_us)
        assert row["limit"] == max(parts, key=parts.__getitem__)
        assert row["all_us"] == pytest.approx(row["us"] * row["launches"])
        assert row["latency"] * 1e3 > MI355X.load_ns  # each loads something and waits for it
    total = found["round"]
    assert total["us"] == pytest.approx(sum(row["all_us"] for row in rows.values()))
    assert total["launches"] == sum(row["launches"] for row in rows.values())
    # The cache of 300 positions and the vocabulary's matrix, each once.
    assert rows["attend"]["memory"] * 6910e3 == pytest.approx(2 * 2 * 2 * 256 * 300)
    assert rows["head"]["memory"] * 6910e3 == pytest.approx(2 * 512 * 256)
    delta = rows.pop("delta")
    assert delta["h200_us"] == 10 and delta["model_h200_us"] > H200.launch_us
    assert delta["model_to_measured"] == pytest.approx(delta["model_h200_us"] / 10)
    assert not any("h200_us" in row for row in rows.values())


def test_a_slower_memory_takes_longer(cli: Cli):
    slow, fast = (
        json.loads(cli(*SHORT, "--drafts", 0, "--json", "--load-ns", ns)[1])["rows"]
        for ns in (1600, 800)
    )
    for a, b in zip(slow, fast, strict=True):
        assert a["name"] == b["name"] and b["latency"] < a["latency"] <= 2 * b["latency"]


def test_the_last_workgroup_chooses_the_experts(cli: Cli):
    """The workgroups of `route` count each other, and the one that comes last has more to do."""
    config = Config.published("397B-A17B")
    step = step_of(config, 8, 0, "auto")
    route = next(one for one, _ in kinds_of(step, 8, 16) if one.name.startswith("route"))
    done = execute(route)
    *others, last = [sum(map(len, waves)) for waves in done.waves]
    assert others and last > 1.5 * max(others)
    assert (
        launch_time(done, 0, MI355X).latency
        > launch_time(replace(done, waves=done.waves[:-1]), 0, MI355X).latency
    )


def test_the_table_says_that_it_is_no_measurement(cli: Cli):
    status, out, _ = cli(*SHORT, "--drafts", 0)
    *table, told = out.splitlines()
    assert status == 0 and table[0].split()[:3] == ["name", "launches", "workgroups"]
    shares = [float(line.split()[-1]) for line in table[1:]]
    assert shares == sorted(shares, reverse=True)
    assert "a projection, not measured" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tp", "3"), "does not divide by 3 ranks"),
        (("--config", "400B"), "400B"),
        (("--measured", "nowhere.json"), "nowhere.json: no such file"),
        (("--measured", "."), ".: is a folder; expected a file"),
        (("--measured", ""), "argument --measured: ''; expected the name of a file or folder"),
    ],
)
def test_bad_input_is_one_line(cli: Cli, arguments: tuple[str, ...], message: str):
    status, out, err = cli(*arguments)
    assert status == 2 and not out and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "NVIDIA H100"}, "measured on 'NVIDIA H100'; the model knows an H200"),
        ({"device": None}, "measured on None; the model knows an H200"),
        ({"config": "35b"}, "config = '35B-A3B'; this is a round of '397B-A17B'"),
        ({"tp": 8}, "tp = 8; this is a round of 1"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype = 'fp8'; this is a round of 'auto'"),
        ({"tp": [8]}, "tp = [8]; this is a round of 1"),
        ({"rows": None}, "no result of tools.bench step --json: rows = None; expected a list"),
        ({"rows": [3]}, "rows[0] = 3; expected an object with a name"),
        ({"rows": [{"name": 3}]}, "rows[0] = {'name': 3}; expected an object with a name"),
        *(
            (
                {"rows": [{"name": "delta", "us": us, "launches": 3}]},
                f"rows[0]: us = {us!r}; expected a number above 0",
            )
            for us in ("30", None, True, 0, -3.5)
        ),
        (
            {"rows": [{"name": "delta", "us": 3}]},
            "rows[0]: launches = None; expected a number above 0",
        ),
    ],
)
def test_times_of_another_round_are_refused(
    cli: Cli, tmp_path: Path, changes: dict[str, object], message: str
):
    status, out, err = cli(*SHORT, "--measured", result(tmp_path, **changes))
    assert status == 2 and not out and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON: it is empty"),
        ("[1, 2]", "no result of tools.bench step --json: a JSON object was expected, not a list"),
        ('"x"', "a JSON object was expected, not a text"),
        ("3", "a JSON object was expected, not a number"),
        ("NaN", "not JSON: NaN is no JSON number"),
        ("[" * 100_000, "not JSON: objects or lists are nested too deeply"),
        ('{"config": 3, "rows": []}', "config = 3; expected an object"),
        (
            '{"config": {}, "rows": [{"name": "a", "us": 1e999, "launches": 1}]}',
            "us = inf; expected a",
        ),
    ],
)
def test_documents_of_another_shape(cli: Cli, tmp_path: Path, text: str, message: str):
    """None of Python's words: they would say how the file is read, not what is wrong with it."""
    (tmp_path / "it.json").write_text(text)
    status, out, err = cli("--measured", tmp_path / "it.json")
    assert status == 2 and not out and err.count("\n") == 1
    assert f"it.json: {message}" in err or f"step --json: {message}" in err or message in err, err
