"""Which device is a target, and what a pass's rows are."""

from types import SimpleNamespace

import pytest
import torch

from fast.target import check_kernel, check_rows, check_width, target_of
from qwen35.errors import InputError

CARD = torch.device("cuda", 1)


def line(call: object, *arguments: object) -> str:
    with pytest.raises(InputError) as raised:
        call(*arguments)  # pyright: ignore
    return str(raised.value)


@pytest.mark.parametrize(
    ("name", "target"),
    [("gfx950:sramecc+:xnack-", "gfx950"), ("gfx950", "gfx950"), ("gfx942:x", None)],
)
def test_a_card_of_amd(monkeypatch: pytest.MonkeyPatch, name: str, target: str | None) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    asked: list[object] = []

    def properties(device: torch.device) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace(gcnArchName=name)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    if target:
        assert target_of(CARD) == target
    else:
        message = "the fast path runs on gfx950 and sm_90; this is gfx942"
        assert line(target_of, CARD) == message
    assert asked == [CARD]


@pytest.mark.parametrize(("capability", "name"), [((9, 0), "sm_90"), ((10, 3), "sm_103")])
def test_a_card_of_nvidia(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    asked: list[object] = []

    def capability_of(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return capability

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability_of)
    if name == "sm_90":
        assert target_of(CARD) == name
    else:
        assert line(target_of, CARD) == f"the fast path runs on gfx950 and sm_90; this is {name}"
    assert asked == [CARD]


def test_another_device() -> None:
    message = "the fast path runs on gfx950 and sm_90; this is meta"
    assert line(target_of, torch.device("meta")) == message


def test_kernels() -> None:
    check_kernel("experts", "triton")
    check_kernel("experts", "hip")
    message = "experts with kernel 'cuda'; expected triton or hip"
    assert line(check_kernel, "experts", "cuda") == message


@pytest.mark.parametrize("rows", [1, 8])
def test_rows_that_are_taken(rows: int) -> None:
    x = torch.zeros(rows, 64, dtype=torch.bfloat16)
    check_rows("a node", x, 64)
    check_width("a node", x, 64)
    check_width("a node", x.repeat(9, 1), 64)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(0, 64).bfloat16(),
        torch.zeros(9, 64).bfloat16(),
        torch.zeros(8, 63).bfloat16(),
        torch.zeros(64).bfloat16(),
        torch.zeros(1, 8, 64).bfloat16(),
        torch.zeros(8, 64),
    ],
)
def test_rows_that_are_refused(x: torch.Tensor) -> None:
    assert line(check_rows, "a node", x, 64) == (
        f"a node: x of shape {list(x.shape)} and {x.dtype}; expected [1 to 8, 64], torch.bfloat16"
    )
    if x.shape not in ((0, 64), (9, 64)):
        assert line(check_width, "a node", x, 64) == (
            f"a node: x of shape {list(x.shape)} and {x.dtype}; expected [rows, 64], torch.bfloat16"
        )
