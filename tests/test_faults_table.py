"""The planted faults of kernels, assembly and emulator, by kind, and the table of docs/trust.md."""

import re
import sys
from collections import Counter

import pytest

pytest.importorskip("triton")
pytest.importorskip("tinygrad")

from fast.hip_compiler import sources
from tests.support.fast_faults import KERNELS
from tests.support.fault_kinds import COMPUTED, KINDS, PLACES, planted
from tests.test_architecture import ROOT


def test_a_fault_has_one_kind() -> None:
    """No fault is in two lists of KINDS, and each name in a list is that of a fault."""
    names = [name for of_kind in KINDS.values() for name in of_kind]
    assert len(names) == len(set(names))
    assert set(names) <= {what.name for what in planted() if what.place != "assembly"}
    assert len({what.test for what in planted()}) == len(list(planted()))
    assert {what.kind for what in planted()} == {*KINDS, COMPUTED}


def test_each_check_runs_without_a_fault() -> None:
    """It does so in the file that it is of, if faults are planted for it there."""
    for modules in (PLACES["Triton"], PLACES["HIP"]):
        for check in (check for module in modules for check in module.FAULTS.checks):
            home = sys.modules[check.__module__]
            assert check in home.FAULTS.checks and home in modules, check


def test_each_edit_fits_in_one_place() -> None:
    """Two thirds of the faults are marked as slow, so none of these would notice that a kernel no longer
    has the text that it replaces."""
    faults = [
        fault for place in ("Triton", "HIP") for of in PLACES[place] for fault in of.FAULTS.items()
    ]
    for name, what in faults:
        file = KERNELS / what.module
        files = sources(file) if file.suffix else [file.with_suffix(".py")]
        text = "".join(part.read_text() for part in files)
        for old, new in what.edits:
            assert text.count(old) == 1, f"{name}: {text.count(old)} places read {old!r}"
            text = text.replace(old, new)


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs/trust.md").read_text()
    counted = Counter((what.kind, what.place) for what in planted())
    rows = re.findall(
        r"^\| ([a-zA-Z ]+?) \|" + r" (\d+) \|" * (len(PLACES) + 1) + "$", page, re.MULTILINE
    )
    found = {kind: tuple(map(int, counts)) for kind, *counts in rows}
    wanted = {}
    for kind in (*KINDS, COMPUTED):
        counts = [counted[kind, place] for place in PLACES]
        wanted[kind] = (*counts, sum(counts))
    wanted["all"] = tuple(map(sum, zip(*wanted.values(), strict=True)))
    assert found == wanted


def test_the_kinds_that_authors_slip_on_have_sixty_faults_and_more() -> None:
    by_kind = Counter(what.kind for what in planted())
    assert all(by_kind[kind] >= 6 for kind in KINDS)
    assert sum(by_kind[kind] for kind in KINDS) >= 60
