"""`tools.bench hip_port` without a card: which outputs of many launches are compared."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tools.bench import hip_port, mixture


class Subject:
    """Launches whose outputs are right, but for one case."""

    def __init__(self, wrong: int) -> None:
        self.device, self.launched, self.wrong = torch.device("cpu"), 0, wrong

    def launch(self, case: int) -> tuple[Any, torch.Tensor]:
        return case, torch.tensor([-1 if case == self.wrong else case])

    def run(self, launch: Any) -> None:
        self.launched += 1

    def settled(self) -> list[str]:
        return []


@pytest.mark.parametrize("count", [8, 9, 10, 15])
def test_the_outputs_of_every_case_are_compared(count: int) -> None:
    """Of 10 cases too, although about every fifth output is compared."""
    for wrong in range(count):
        subject: Any = Subject(wrong)
        cases: Any = list(range(count))
        wanted = [torch.tensor([case]) for case in cases]
        found = hip_port.endure(subject, cases, wanted, 600)
        assert len(found) == 1 and found[0].startswith("bits: ") and subject.launched == 600
    assert hip_port.endure(Subject(-1), cases, wanted, 600) == []  # type: ignore[arg-type]


def test_a_finding_has_the_number_of_compared_outputs() -> None:
    """Not that of all launches."""
    subject: Any = Subject(0)
    cases: Any = [0, 1]
    wanted = [torch.tensor([case]) for case in cases]
    assert hip_port.endure(subject, cases, wanted, 20) == ["bits: 2 of 4 compared outputs differ"]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("rows", [1, 4])
def test_ids_of_no_expert_are_looked_for_with_any_top_k(
    rows: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The subject answers as the kernel should, so there is no finding."""
    monkeypatch.setattr(mixture, "check", lambda *_: (0.0, []))
    generator = torch.Generator().manual_seed(0)

    class Answering:
        workgroups, packed = 2, None

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __call__(self, case: mixture.Case) -> torch.Tensor:
            bad = ((case.experts < 0) | (case.experts >= 8)).any(-1, keepdim=True)
            return torch.where(bad, torch.nan, case.x.sum(-1, keepdim=True).float())

        def settled(self) -> list[str]:
            return []

    class Weights:
        sizes = 8, 64, 32

    monkeypatch.setattr(hip_port, "Subject", Answering)
    args: Any = type("Args", (), {"rows": rows, "top_k": k})()
    weights: Any = Weights()
    subject: Any = Answering()
    assert hip_port.check(subject, weights, args, generator) == (0.0, [])
