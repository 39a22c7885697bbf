"""`tools.tune` without a GPU: which candidates there are, who wins, and how the table is written."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fast import catalogue, configs, moe
from fast.configs import Config
from qwen35.cli import run
from qwen35.errors import InputError
from qwen35.load import lay_out
from tools import tune
from tools.bench import gpu, mixture, router
from tools.gfx950.target import emulate

triton = pytest.importorskip("triton")

WIDE = {"BLOCK_N": 64, "BLOCK_K": 256, "num_warps": 4, "num_stages": 3}
TABLE = {"gfx950": {"down": {"D=1 I=2": {"x": 1}}}, "sm_90": {"down": {"D=4096 I=128": {"x": 2}}}}


def test_a_table_keeps_its_other_entries(tmp_path: Path) -> None:
    path = tmp_path / "configs.json"
    path.write_text(json.dumps(TABLE))
    tune.write(path, "sm_90", "down", "D=4096 I=256", WIDE)
    tune.write(path, "sm_90", "route", "E=512", {"num_warps": 1})
    tune.write(path, "sm_90", "route", "E=512", {"num_warps": 2})
    found = json.loads(path.read_text())
    assert found["gfx950"] == TABLE["gfx950"]
    assert found["sm_90"]["down"] == TABLE["sm_90"]["down"] | {"D=4096 I=256": WIDE}
    assert found["sm_90"]["route"] == {"E=512": {"num_warps": 2}}
    assert [file.name for file in tmp_path.iterdir()] == ["configs.json"]


def test_a_table_may_be_new(tmp_path: Path) -> None:
    tune.write(tmp_path / "new.json", "sm_90", "route", "E=8", {"num_warps": 1})
    assert json.loads((tmp_path / "new.json").read_text())["sm_90"]["route"]["E=8"]


def test_a_table_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "configs.json"
    path.write_text(json.dumps(TABLE))

    def full(self: Path, text: str, **options: str) -> int:
        with self.open("w") as file:
            file.write(text[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        tune.write(path, "sm_90", "route", "E=8", {"num_warps": 1})
    assert json.loads(path.read_text()) == TABLE
    assert [file.name for file in tmp_path.iterdir()] == ["configs.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"sm_90": 1}', '{"sm_90": {"down": []}}', "[" * 100_000]
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "configs.json").write_text(text)
    with pytest.raises(InputError, match=r"configs\.json is no table"):
        tune.read(tmp_path / "configs.json")


def test_the_committed_table_is_written_as_it_is(tmp_path: Path) -> None:
    """A sweep that changes nothing gives an empty diff, but for the end of the last line."""
    path = tmp_path / "configs.json"
    before = configs.TABLE.read_text()
    path.write_text(before)
    entry = json.loads(before)["sm_90"]["down"]["D=4096 I=512"]
    tune.write(path, "sm_90", "down", "D=4096 I=512", entry)
    assert path.read_text().rstrip("\n") == before.rstrip("\n")


@pytest.mark.parametrize(
    ("change", "fitting"),
    [
        ({}, True),
        ({"BLOCK_N": 48}, False),  # does not divide N
        ({"BLOCK_K": 384}, False),  # nor K
        ({"num_warps": 8}, False),  # fewer than 16 rows a warp
        ({"BLOCK_N": 32, "BLOCK_K": 1024, "num_warps": 1}, False),  # registers
        ({"BLOCK_N": 128, "BLOCK_K": 1024, "num_warps": 8, "num_stages": 3}, False),  # shared
        ({"BLOCK_N": 128, "BLOCK_K": 512, "num_warps": 8, "num_stages": 4}, True),
    ],
)
def test_what_fits(change: Config, fitting: bool) -> None:
    assert tune.fits(WIDE | change, 256, 4096, 4, "sm_90") == fitting


def test_shared_memory_by_hand() -> None:
    """Three stages of 64 x 256 codes, their scales, and 16 rows of 256 activations."""
    assert tune.shared_bytes(WIDE, 4) == 3 * (64 * 128 + 64 * 8 + 16 * 256 * 2)
    assert tune.shared_bytes(WIDE, 16) == 3 * (64 * 512 + 16 * 256 * 2)


@pytest.mark.parametrize("target", ["gfx950", "sm_90"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_shape_has_candidates(target: str, tp: int) -> None:
    I = mixture.intermediate(tp)
    sizes: list[tuple[list[tuple[int, ...]], int | None, int, int]] = [
        (tune.GATE_UP, 2 * I, 4096, 4), (tune.DOWN, 4096, I, 4),
        (tune.ROUTE, None, 4096, 16),
        *((tune.LINEAR, None, K, 16) for _, K in tune.products(tp)),
    ]  # fmt: skip
    for rows, N, K, bits in sizes:
        assert len(rows) == len(set(rows))
        fitting = [c for c in tune.blocked(rows) if tune.fits(c, N, K, bits, target)]
        assert len(fitting) >= 5
        assert all(set(WIDE) <= set(config) for config in fitting)


@pytest.mark.parametrize("target", ["gfx950", "sm_90"])
def test_every_configuration_that_the_project_looks_up_can_be_measured(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kernel and shape of the catalogue has a subject of that name."""
    asked: set[tuple[str, str]] = set()
    lookup = configs.lookup

    def noted(target: str, kernel: str, shape: str) -> Config:
        asked.add((kernel, shape))
        return lookup(target, kernel, shape)

    with monkeypatch.context() as patch:
        patch.setattr(configs, "lookup", noted)
        assert list(catalogue.launches(target, lay_out))
    # What takes much memory before it is prepared does not here.
    monkeypatch.setattr(tune, "of_experts", experts_alone)
    monkeypatch.setattr(tune, "of_product", product_alone)
    monkeypatch.setattr(tune, "random_model", lambda *_: None)
    monkeypatch.setattr(router, "random_weight", weight_alone)
    monkeypatch.setattr(gpu, "cache_bytes", lambda device: 1024)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = tune.subjects(list(tune.OPS), [1, 2, 4, 8], target, torch.device("cpu"))
    measured = {(subject.op, subject.shape) for subject in found}
    assert {kernel for kernel, _ in asked} == set(tune.OPS)
    assert asked <= measured
    assert measured - asked == {("route", "N=256 K=4096")}  # of the family's smaller mixtures


def never(config: Config) -> Any:
    raise AssertionError("prepared")


def experts_alone(
    ops: list[str], tp: int, target: str, device: torch.device
) -> Iterator[tune.Subject]:
    for op in ("gate_up", "down"):
        shape = configs.key(D=tune.HIDDEN, I=mixture.intermediate(tp))
        yield tune.Subject(op, shape, [], never)


def product_alone(N: int, K: int, target: str, device: torch.device) -> tune.Subject:
    return tune.Subject("linear", configs.key(N=N, K=K), [], never)


def weight_alone(sizes: router.Sizes, D: int, generator: torch.Generator) -> torch.Tensor:
    rows = sizes.E + (1 + 2 * sizes.I if sizes.I else 0)
    return torch.empty(rows, D, dtype=torch.bfloat16, device="meta")


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Small sizes, and each launch in the emulator of gfx950."""
    for module in (tune, router):
        monkeypatch.setattr(module, "run", emulate)
    monkeypatch.setattr(moe, "target_of", lambda device: "gfx950")
    monkeypatch.setattr(gpu, "cache_bytes", lambda device: 1024)
    monkeypatch.setattr(tune, "HIDDEN", 256)
    monkeypatch.setattr(mixture, "INTERMEDIATE", 128)
    monkeypatch.setattr(tune, "E", 16)
    monkeypatch.setattr(tune, "TOP_K", 3)
    table = json.loads(json.dumps(configs.table()))
    monkeypatch.setattr(configs, "table", lambda: table)
    with torch.inference_mode():
        yield torch.device("cpu")
    configs.lookup.cache_clear()


SMALL = {"BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 1, "num_stages": 2}


@pytest.mark.filterwarnings("ignore:.*is not in configs.json")
def test_subjects_of_the_experts_launch_and_are_judged(
    emulated: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate_up, down = tune.of_experts(["gate_up", "down"], 1, "gfx950", emulated)
    assert (gate_up.shape, down.shape) == ("D=256 I=128", "D=256 I=128")
    for subject in (gate_up, down):
        calls, wrong = subject.prepare(SMALL)
        assert not wrong and len(calls) >= mixture.CALLS
    launch = gate_up.prepare(SMALL)[0][0]
    assert isinstance(launch, tune.Launch)
    assert launch.name == "gate_up D=256 I=128" and launch.arguments["BLOCK_N"] == 32
    monkeypatch.setattr(tune, "run", lambda launches, device: launches[-1].arguments["out"].zero_())
    assert "error" in down.prepare(SMALL)[1][0]


def test_subjects_of_a_product_launch_and_are_judged(
    emulated: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = tune.of_product(50, 256, "gfx950", emulated)
    calls, wrong = subject.prepare(SMALL)
    assert not wrong and len(calls) == 16 and subject.shape == "N=50 K=256"
    assert isinstance(calls[0], tune.Launch) and calls[0].grid == (2, 1, 1)
    monkeypatch.setattr(tune, "run", lambda launches, device: launches[0].arguments["out"].zero_())
    assert "linear: error" in subject.prepare(SMALL)[1][0]


@pytest.mark.parametrize("sizes", [router.Sizes(16, 3, 32), router.Sizes(24, 4, 0)])
def test_subjects_of_the_router_launch_and_are_judged(
    emulated: torch.device, sizes: router.Sizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = tune.of_route(sizes, "gfx950", emulated)
    config = SMALL | {"SPLITS": 2, "num_warps": 2}
    calls, wrong = subject.prepare(config)
    assert not wrong and len(calls) == 16
    assert isinstance(calls[0], tune.Launch) and calls[0].name.startswith(f"route {subject.shape}")
    assert calls[0].arguments["SPLITS"] == 2 and calls[0].options["num_warps"] == 2

    def falsified(launches: Any, device: torch.device) -> None:
        emulate(launches, device)
        for launch in launches:
            launch.arguments["weights"].mul_(1.1)

    monkeypatch.setattr(router, "run", falsified)
    assert "weights: error" in subject.prepare(config)[1][0]


class NoGraph:
    """Calls say how long they took."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def microseconds(self, repeats: int) -> list[float]:
        return [self.calls[0]()] * repeats


def swept(
    monkeypatch: pytest.MonkeyPatch, us: dict[int, list[float] | None], wrong: tuple[int, ...] = ()
) -> tuple[dict[str, Any], Config, list[int]]:
    """A sweep of 1 (the old number), 2 and 4 warps. `us` has their times, in the order in which
    they are taken."""
    now: list[int] = []
    monkeypatch.setattr(tune, "in_force", lambda *_: {"num_warps": 1})
    monkeypatch.setattr(tune, "put_in_force", lambda *_: None)
    monkeypatch.setattr(gpu, "Graph", NoGraph)

    def prepare(config: Config) -> tuple[list[Any], list[str]]:
        warps = config["num_warps"]
        now.append(warps)
        times = us[warps]
        if times is None:
            raise triton.errors.TritonError("out of resources")
        return [lambda: times.pop(0)], ["error"] if warps in wrong else []

    candidates = [{"num_warps": warps} for warps in (1, 2, 4)]
    subject = tune.Subject("route", "E=8", candidates, prepare)
    row, config = tune.tune(subject, "sm_90", 3, True)
    return row, config, now


def test_the_fastest_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    us: dict[int, list[float] | None] = {1: [5.0, 5.1, 5.2], 2: [3.0, 3.1, 3.2], 4: [4.0]}
    row, config, now = swept(monkeypatch, us)
    assert config == {"num_warps": 2}
    assert now == [1, 2, 4, 1, 2, 1, 2, 2]
    assert (row["old_us"], row["old_us_again"], row["us"], row["us_again"]) == (5.1, 5.2, 3.1, 3.2)
    assert (row["old"], row["new"]) == ("num_warps=1", "num_warps=2")
    assert (row["tried"], row["failed"]) == (3, 0)


def test_the_old_one_stays_unless_beaten_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    us: dict[int, list[float] | None] = {1: [5.0, 5.1, 3.0], 2: [3.0, 3.1, 3.2], 4: [4.0]}
    row, config, _ = swept(monkeypatch, us)
    assert config == {"num_warps": 1}
    assert (row["us"], row["us_again"]) == (5.1, 3.0)


def test_what_is_wrong_or_fails_does_not_win(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    us: dict[int, list[float] | None] = {1: [5.0, 5.1, 5.2, 5.3, 5.4], 2: [3.0], 4: None}
    row, config, _ = swept(monkeypatch, us, wrong=(2,))
    assert config == {"num_warps": 1} and row["failed"] == 2
    err = capsys.readouterr().err
    assert "num_warps=2: error" in err and "num_warps=4: TritonError: out of resources" in err


def test_an_old_one_that_fails_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    row, config, _ = swept(monkeypatch, {1: None, 2: [3.0], 4: [2.0, 2.1, 2.2, 2.3, 2.4]})
    assert config == {"num_warps": 4}
    assert (row["us"], row["us_again"]) == (2.1, 2.2) and "old_us" not in row


def test_none_that_works_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="route E=8: none of 3 configurations works"):
        swept(monkeypatch, {1: None, 2: None, 4: None})


def test_in_force_until_the_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    table = json.loads(json.dumps(TABLE))
    monkeypatch.setattr(configs, "table", lambda: table)
    before = configs.TABLE.read_text()
    tune.put_in_force("sm_90", "down", "D=4096 I=128", WIDE)
    assert tune.in_force("sm_90", "down", "D=4096 I=128") == WIDE
    assert tune.in_force("sm_90", "down", "D=4096 I=64") == WIDE  # the nearest, without a warning
    assert configs.TABLE.read_text() == before
    configs.lookup.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tp", 3), ["--tp 3", "1, 2, 4, 8"]),
        (("--repeats", 0), ["--repeats 0"]),
        (("--op", "up"), ["up", "gate_up"]),
        (("--output", "nowhere/at/all.json"), ["nowhere/at/all.json"]),
        (("--output", __file__), ["test_tune.py is no table"]),
        pytest.param((), ["gfx950", "sm_90", "cpu"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[Any, ...], words: list[str]
) -> None:
    """It is refused before anything is measured, and so is a missing GPU."""
    with pytest.raises(SystemExit) as ended:
        run(tune.build_parser(), tune.main, [*map(str, arguments)])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1), err
    assert not [word for word in words if word not in err], err
