"""Work that becomes a graph: when it runs as it is, is captured, and is replayed."""

from collections.abc import Iterable

import pytest
import torch

from fast import graph
from fast.graph import Pass
from fast.launch import Work


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_pass_is_captured_in_its_second_run_on_a_gpu(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run compiles its kernels, which a capture cannot."""
    done: list[str] = []

    class Graph:
        def replay(self) -> None:
            done.append("replay")

    def captured(work: Iterable[Work]) -> Graph:
        done.append("capture")
        return Graph()

    monkeypatch.setattr(graph, "run", lambda work, where: done.append(f"run on {where}"))
    monkeypatch.setattr(graph, "captured", captured)
    one = Pass([], torch.device(device))
    for _ in range(3):
        one.run()
    later = ["capture", "replay", "replay"] if device == "cuda" else ["run on cpu"] * 2
    assert done == [f"run on {device}", *later]


@pytest.mark.parametrize("prepared", [True, False])
def test_what_is_run_on_the_device_is_what_is_captured(
    prepared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prepared pass is replayed from the first run on."""
    done: list[str] = []
    device = torch.device("cuda", 1)
    work: list[Work] = [lambda: None]

    class Graph:
        def replay(self) -> None:
            done.append("replay")

    def captured(given: Iterable[Work]) -> Graph:
        assert given is work
        done.append("capture")
        return Graph()

    def run(given: Iterable[Work], where: torch.device) -> None:
        assert given is work and where is device
        done.append("run")

    monkeypatch.setattr(graph, "run", run)
    monkeypatch.setattr(graph, "captured", captured)
    one = Pass(work, device)
    if prepared:
        one.prepare()
        assert done == ["run", "capture"]
    else:
        one.run()
        assert done == ["run"]
    one.run()
    assert done == (["run", "capture", "replay"])
