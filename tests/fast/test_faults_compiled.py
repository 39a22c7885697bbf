"""Planted faults in the compiled assembly of the kernels: barriers, waits and the choice of nibbles,
which their source does not have. The checks of this folder must find each."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

pytest.importorskip("triton")

from fast.launch import Launch
from tests.fast.prefill.test_faults import attention as prefill_attention
from tests.fast.prefill.test_faults import delta_net as prefill_delta_net
from tests.fast.test_faults import choice, experts
from tests.fast.test_faults_mixers import attention, delta_net
from tests.support.fast_faults import Check, thirds
from tools.gfx950 import target


@dataclass(frozen=True)
class Fault:
    """An edit of the assembly of launches whose name begins with `launch`.

    old: a regular expression, of which the match of number `which` is replaced by new(match). check: must
    have a finding that `said` matches. kind: as in docs/trust.md.
    """

    kind: str
    launch: str
    check: Check
    said: str
    old: str
    new: Callable[[re.Match[str]], str]
    which: int = 0


FAULTS: dict[str, Fault] = {}


def barriers(launch: str, check: Check, *which: int) -> None:
    """Leave out barriers, one at a time."""
    for number in which:
        FAULTS[f"{launch}: barrier {number} left out"] = Fault(
            "barriers",
            launch,
            check,
            "memory: .*LDS race",
            r"\ts_barrier\n",
            lambda match: "\ts_nop 0\n",
            number,
        )


def waits(launch: str, check: Check, counter: str, *which: int) -> None:
    """Raise the number of a wait by one."""
    for number in which:
        FAULTS[f"{launch}: wait {number} for {counter} leaves one more"] = Fault(
            "waits",
            launch,
            check,
            rf"memory: .*no s_waitcnt {counter}\(\d+\)",
            rf"{counter}\((\d+)\)",
            lambda match: f"{counter}({int(match[1]) + 1})",
            number,
        )


def bytes_of_a_word(launch: str, check: Check, what: str, op_sel: str) -> None:
    """Decode another byte of four than the second one, which op_sel:[1,0,0] names."""
    FAULTS[f"{launch}: {what} byte of a word for its second one"] = Fault(
        "nibbles",
        launch,
        check,
        "numbers",
        r"(v_cvt_scalef32_pk_bf16_fp4 [^\n]*?) op_sel:\[1,0,0\]",
        lambda match: f"{match[1]} {op_sel}",
    )


barriers("gate_up", experts, 0, 2)
barriers("down", experts, 1, 4)
barriers("route", choice, 0, 1, 7)
barriers("attend", attention, 1, 2)
barriers("combine", attention, 0)
barriers("prefill delta_in", prefill_delta_net, 0, 1)
barriers("prefill solve", prefill_delta_net, 1, 2)
barriers("prefill attend", prefill_attention, 0)

waits("gate_up", experts, "vmcnt", 0)
waits("gate_up", experts, "lgkmcnt", 4)
waits("down", experts, "vmcnt", 1)
waits("route", choice, "vmcnt", 0)
waits("delta ", delta_net, "vmcnt", 0)
waits("attend", attention, "lgkmcnt", 0)
waits("attention_in", attention, "vmcnt", 0)
waits("prefill solve", prefill_delta_net, "lgkmcnt", 2)

for name in ("gate_up", "down"):
    bytes_of_a_word(name, experts, "the first", "")
    bytes_of_a_word(name, experts, "the third", "op_sel:[0,1,0]")


def plant(what: Fault, patch: pytest.MonkeyPatch) -> list[str]:
    """Edit what is compiled; the names of the launches whose text has changed."""
    compile_launch, changed = target.compile_launch, []

    def edited(launch: Launch, architecture: str) -> target.CompiledKernel:
        made = compile_launch(launch, architecture)
        matches = list(re.finditer(what.old, made.text))
        if not launch.name.startswith(what.launch) or len(matches) <= what.which:
            return made
        match = matches[what.which]
        changed.append(launch.name)
        text = made.text[: match.start()] + what.new(match) + made.text[match.end() :]
        return replace(made, text=text)

    patch.setattr(target, "compile_launch", edited)
    return changed


@pytest.mark.parametrize("name", thirds(FAULTS))
def test_a_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    what = FAULTS[name]
    changed = plant(what, monkeypatch)
    found = what.check()
    assert changed, "the fault was not planted"
    assert any(re.match(what.said, line) for line in found), found or "nothing was found"
