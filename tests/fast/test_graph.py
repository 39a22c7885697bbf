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


def test_a_prepared_pass_is_replayed_from_the_first_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Graph:
        def replay(self) -> None:
            done.append("replay")

    monkeypatch.setattr(graph, "run", lambda work, where: done.append("run"))
    monkeypatch.setattr(graph, "captured", lambda work: Graph())
    one = Pass([], torch.device("cuda"))
    one.prepare()
    one.run()
    assert done == ["run", "replay"]
