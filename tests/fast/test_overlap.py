"""Launches that begin before the one before them has ended (programmatic dependent launch, Hopper): read
from the PTX, since neither the emulator nor a launch in a test lets the two run at once."""

from dataclasses import dataclass
from functools import cache

import pytest
import torch

from fast.catalogue import launches
from fast.launch import Launch, Scratch
from fast.moe import Experts
from qwen35.load import lay_out
from tests.support.ptx import WAIT, before_the_wait, without, written
from tools.gfx950.target import compile_launch

pytest.importorskip("triton")

META = torch.device("meta")
# (intermediate size, MXFP4, with a shared expert). With MXFP4 the weights of the sizes 128 and 256 are a
# single block, which is loaded before the wait; those of 512 are two.
WHOLE = [(128, True, True), (256, True, False)]
CASES = [*WHOLE, (512, True, True), (128, False, True)]


@dataclass
class Compiled:
    """launch, with its PTX, the names of its parameters, and those through which it writes."""

    launch: Launch
    text: str
    names: list[str]
    written: set[str]


@cache
def pair(I: int, fp4: bool, with_shared: bool) -> tuple[Compiled, Compiled]:
    """A launch that begins early, behind the one before it."""
    D, width = 4096, 256
    node = Experts(8, D, I, "sm_90", META, fp4=fp4)
    x = torch.empty(4, D, dtype=torch.bfloat16, device=META)
    experts = torch.empty(4, 2, dtype=torch.int32, device=META)
    parts = torch.empty(2, 4, 9 + 2 * width, device=META)
    shared = (parts, x.new_empty(D, width)) if with_shared else None
    work, _ = node.launches(
        x, experts, experts.float(), Scratch(META), shared=shared, residual=x
    )  # fmt: skip
    assert work[1].options["launch_pdl"]
    made = [compile_launch(launch, "sm_90") for launch in work]
    names = [[name for name, _ in one.parameters] for one in made]
    before, early = (
        Compiled(launch, one.text, own, written(one.text, own))
        for launch, one, own in zip(work, made, names, strict=True)
    )
    return before, early


def too_early(text: str, before: Compiled, early: Compiled) -> list[str]:
    """The lines that a text executes without having waited, and that have to wait: all writes, and
    reads of what the launch before may still write."""
    unsafe = [before.launch.arguments[name] for name in before.written]
    safe = {
        name
        for name, value in early.launch.arguments.items()
        if isinstance(value, torch.Tensor) and all(value is not other for other in unsafe)
    }
    return [
        access.line
        for access in before_the_wait(text, early.names)
        if access.writes or not access.parameters or not access.parameters <= safe
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_depends_on_the_launch_before_comes_after_the_wait(
    case: tuple[int, bool, bool],
) -> None:
    before, early = pair(*case)
    assert before.written == {"first", "hidden"} | ({"shared"} if case[2] else set())
    assert too_early(early.text, before, early) == []
    found = before_the_wait(early.text, early.names)
    weights = {"weight", "scale"} if case in WHOLE else set()
    assert {name for access in found for name in access.parameters} == {"experts"} | weights


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_wait_is_needed(case: tuple[int, bool, bool]) -> None:
    """If any one of them is left out, something is too early. This includes the wait of programs
    that compute nothing."""
    before, early = pair(*case)
    waits = early.text.count(WAIT)
    # One more where weights are loaded before it, and the shared expert's programs have their own.
    assert waits == 1 + (case in WHOLE) + case[2]
    for number in range(waits):
        assert too_early(without(early.text, number), before, early), number


def test_no_other_launch_begins_early() -> None:
    """These are all kernels of the published model. Another one that begins early needs cases of
    its own."""
    early = {
        launch.kernel.__name__
        for launch in launches("sm_90", lay_out)
        if "launch_pdl" in launch.options
    }
    assert early == {"down"}
