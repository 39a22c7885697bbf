"""`tools.bench busy`: what runs beside, in which environment, and the shares."""

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from qwen35.errors import InputError
from tools.bench import __main__ as bench
from tools.bench import busy


def test_the_loops_end_with_the_block() -> None:
    """They end if it fails, too."""
    started: list[Any] = []
    popen = subprocess.Popen

    def noted(*args: Any, **kwargs: Any) -> Any:
        started.append(popen(*args, **kwargs))
        return started[-1]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="broken"):
        patch.setattr(subprocess, "Popen", noted)
        with busy.beside(2):
            assert [loop.poll() for loop in started] == [None, None]
            raise InputError("broken")
    assert all(loop.poll() is not None for loop in started) and len(started) == 2


def test_a_run_has_none_of_the_users_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    monkeypatch.setenv("GOMP_SPINCOUNT", "9")
    seen: dict[str, str] = {}

    def run(command: list[str], *, env: dict[str, str], **_: Any) -> SimpleNamespace:
        seen.update(env)
        assert command[-2:] == ["--threads", "2"]
        return SimpleNamespace(returncode=0, stdout=json.dumps({"timing": {"tokens_per_s": 5.0}}))

    monkeypatch.setattr(subprocess, "run", run)
    assert busy.decoded(3, ["--threads", "2"], {"OMP_WAIT_POLICY": "active"}) == 5.0
    assert seen["OMP_WAIT_POLICY"] == "active"
    assert "OMP_NUM_THREADS" not in seen and "GOMP_SPINCOUNT" not in seen


def test_the_table_has_the_share_of_the_quiet_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    beside: list[int] = []

    class Beside:
        def __init__(self, busy: int) -> None:
            beside.append(busy)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(busy, "beside", Beside)
    monkeypatch.setattr(busy, "decoded", lambda *_: 100.0 if beside[-1] == 0 else 40.0)
    monkeypatch.setattr(sys, "argv", ["bench", "busy", "--busy", "3", "--repeats", "2", "--json"])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert beside == [0, 3, 0, 3]
    assert [row["busy"] for row in rows] == [0, 3] * 3
    assert [row["of_quiet"] for row in rows] == [1.0, 0.4] * 3
