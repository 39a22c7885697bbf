"""Every event that ends all ranks. Each rank ends soon and with the same status, and rank 0 prints
one line."""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from qwen35.cli import device, run
from qwen35.errors import InputError
from qwen35.generate import build_parser, main
from qwen35.load import TINY
from qwen35.parallel import ranks as ranks_module
from qwen35.parallel.ranks import backend_of, given, on_ranks, place
from tests.support.checkpoints import edit_tensors
from tests.support.ranks import ROOT, ended, start

LOST_S = 10  # within which a rank that died is noticed


def program(out: Path, do: str, on: int | None = 1, size: int = 2) -> list[object]:
    which = [] if on is None else ["--on", on]
    return ["tests.support.rank_program", out, "--tp", size, "--do", do, *which]


@pytest.mark.parametrize(
    ("do", "on", "line"),
    [
        ("refuse", 1, "rank_program: rank 1: what rank 1 was given is bad\n"),
        ("refuse", 0, "rank_program: what rank 1 was given is bad\n"),
        ("everywhere", None, "rank_program: what everyone was given is bad\n"),
    ],
)
def test_an_error_is_one_line_and_ends_all(
    tmp_path: Path, do: str, on: int | None, line: str
) -> None:
    (status, out, err), other = ended(start(2, program(tmp_path, do, on)))
    assert (status, out, err) == (2, "", line)
    assert other == (2, "", "")


def test_a_bug_shows_its_traceback_once(tmp_path: Path) -> None:
    (status, _, err), (status_1, out_1, err_1) = ended(start(2, program(tmp_path, "bug")))
    assert (status, err) == (2, "rank_program: rank 1: KeyError: 'a name'\n")
    assert status_1 == 2 and out_1 == "" and err_1.count("Traceback") == 1


def test_a_reader_that_went_away_is_no_error(tmp_path: Path) -> None:
    for status, out, err in ended(start(2, program(tmp_path, "stop_reading", 0))):
        assert (status, out, err) == (0, "", "")


def left_over(processes: list[subprocess.Popen[str]], gone: int) -> tuple[float, int, str]:
    """How long the other rank goes on without the one that is gone, its status and what it says."""
    left, started = processes[1 - gone], time.monotonic()
    try:
        left.wait(timeout=60)
    finally:
        processes[gone].kill()
    waited = time.monotonic() - started
    status, _, err = ended(processes)[1 - gone]
    return waited, status, err


NO_SIGN = "rank 1 has ended or hangs: no sign of life from it"


@pytest.mark.parametrize(
    ("do", "on", "line"), [("die", 0, "rank 0 has ended"), ("hang", 1, NO_SIGN)]
)
def test_a_rank_that_is_gone_is_noticed(tmp_path: Path, do: str, on: int, line: str) -> None:
    """The rank may be the one that keeps the store. It is also gone if it lives and does nothing."""
    processes = start(2, program(tmp_path, do, on))
    while processes[on].poll() is None and not is_stopped(processes[on].pid):
        time.sleep(0.05)
    waited, status, err = left_over(processes, on)
    assert (status, err) == (2, f"rank_program: {line}\n") and waited < LOST_S


def is_stopped(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_rank_that_is_killed_in_the_middle_of_a_text() -> None:
    """The text that rank 0 has printed stays, and its one line follows."""
    processes = start(2, generate("--tp", 2, "--ignore-eos", "--max-new-tokens", 20_000))
    shown = processes[0].stdout
    assert shown is not None and shown.read(4)
    processes[1].kill()
    waited, status, err = left_over(processes, 1)
    assert status == 2 and err.endswith(f"python -m qwen35.generate: {NO_SIGN}\n")
    assert waited < LOST_S


def generate(*arguments: object) -> list[object]:
    return ["qwen35.generate", "--prompt-ids", "1,2,3", *arguments]


def test_ranks_that_disagree(tmp_path: Path) -> None:
    """They disagree on the checkpoint, the arguments, the program itself, or the number of ranks."""
    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    edit_tensors(other, lambda tensors: next(iter(tensors.values())).view(-1)[:1].add_(1))
    code = tmp_path / "code"
    for package in ranks_module.SOURCES:
        shutil.copytree(
            ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    (code / "weights/shard.py").open("a", encoding="utf-8").write("\n# Another version.\n")

    def code_of(rank: int) -> dict[str, str]:
        return {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"} if rank else {}

    started = {
        "checkpoint is whole": start(
            2, generate("--tp", 2), of_rank=lambda r: ["--model", other if r else "tiny"]),
        "--tp is 2 on rank 0 and 4 on rank 1": start(
            2, generate(), of_rank=lambda r: ["--tp", 2 * (r + 1)]),
        "version is ": start(2, generate("--tp", 2), environment=code_of),
        "--tp 4, but torchrun started 2 processes": start(2, generate("--tp", 4)),
    }  # fmt: skip
    for line, processes in started.items():
        (status, out, err), other_rank = ended(processes, within_s=180)
        assert err.startswith(f"python -m qwen35.generate: {line}") and err.count("\n") == 1, err
        assert (status, out) == (2, "") and other_rank == (2, "", "")


def test_without_torchrun_there_is_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = build_parser()
    monkeypatch.setattr(sys, "argv", ["generate.py", "--tp", "2", "a text"])
    with pytest.raises(SystemExit) as exited:
        run(parser, on_ranks(parser, main), ["--tp", "2", "a text"])
    assert exited.value.code == 2
    err = capsys.readouterr().err
    command = "torchrun --nproc-per-node 2 -m qwen35.generate --tp 2 'a text'"
    assert err == f"python -m qwen35.generate: --tp 2 needs 2 processes: {command}\n"


def test_torchrun_ends_too(tmp_path: Path) -> None:
    """Its own report and status are its own; but no process is left, and our line is there."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "-m", *map(str, program(tmp_path, "refuse")),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=90
    )
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.count("rank_program: rank 1: what rank 1 was given is bad\n") == 1
    assert "exitcode  : 2" in done.stderr


# --- one process


def test_a_missing_backend_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend_of(torch.device("cpu")) == "gloo"
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    for kind, name in (("cpu", "gloo"), ("cuda", "nccl")):
        with pytest.raises(InputError, match=rf"has no {name}, which --tp needs on {kind}"):
            backend_of(torch.device(kind))


def test_cards_are_given_out_by_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")  # so that `device` leaves the choice of a card to `place`
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="local rank 1 needs cuda:1; this host has 1 card"):
        place(argparse.Namespace(device=device("cuda")))
    with pytest.raises(InputError, match="--device cuda:0: each rank takes a card of its own"):
        place(argparse.Namespace(device=device("cuda:0")))


def test_what_may_differ_between_machines_is_not_compared() -> None:
    here, there = (
        build_parser().parse_args(
            ["--tp", "2", "--model", f"{place}/model", "--prefix-cache", place]
        )
        for place in ("a", "b")
    )
    assert given(here) == given(there)
    assert given(here)["--prefix-cache"] is True and given(here)["--tp"] == 2


def test_a_debugger_stops_one_process_only() -> None:
    args = build_parser().parse_args(["--tp", "2", "--break", "layers.0", "a text"])
    args.ranks = ranks_module.Ranks(0, 2)
    with pytest.raises(InputError, match=r"--break layers\.0 stops one process; --tp is 2"):
        main(args)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE = 'abc' in the environment; expected a number"),
        ({"RANK": "-1"}, "RANK = '-1' in the environment"),
        ({"RANK": "2"}, "RANK = 2 and WORLD_SIZE = 2; expected a rank below the size"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT = 70000 do not say where rank 0 is"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR = '' and"),
    ],
)
def test_a_wrong_environment_is_one_line(wrong: dict[str, str], line: str) -> None:
    usual = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, generate("--tp", 2))], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, **usual, **wrong}, check=False, timeout=90,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("python -m qwen35.generate: ") and line in done.stderr


def test_a_device_in_a_wrong_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the variable, not the device."""
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(argparse.ArgumentTypeError, match="WORLD_SIZE = 'two'"):
        device("cuda")
