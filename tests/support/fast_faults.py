"""Faults that are planted in the fast path's kernels: small wrong edits that a check must find.

All kernels are copied into another package, with the edit in one of them. This package replaces
`fast.kernels`.
"""

import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import fast.kernels

KERNELS = Path(fast.kernels.__file__).parent
Check = Callable[[], list[str]]
numbered = count()


@dataclass(frozen=True)
class Fault:
    """Edits of one file of the kernels, the check that must find them, and the kind of its finding.

    module: the file's name, without its suffix. edits: (old, new) texts. kind: the kinds that the
    finding may have, separated by blanks.
    """

    module: str
    edits: tuple[tuple[str, str], ...]
    check: Check
    kind: str


class Faults(dict[str, Fault]):
    """All faults of a file of tests, by name."""

    def add(self, name: str, module: str, check: Check, kind: str, *edits: tuple[str, str]) -> None:
        """Register a fault; the arguments are those of `Fault`."""
        self[name] = Fault(module, edits, check, kind)

    @property
    def checks(self) -> list[Check]:
        """The checks without repetition."""
        return list({what.check: None for what in self.values()})


def plant(what: Fault, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Replace the project's kernels by copies with the edits. Each edit must fit in exactly one
    place."""
    package = f"planted_{next(numbered)}"
    names = sorted(file.relative_to(KERNELS) for file in KERNELS.rglob("*.py"))
    for name in names:
        source = (KERNELS / name).read_text()
        for old, new in what.edits if str(name.with_suffix("")) == what.module else ():
            assert source.count(old) == 1, f"{source.count(old)} places read {old!r}"
            source = source.replace(old, new)
        copied = folder / package / name
        copied.parent.mkdir(exist_ok=True)
        copied.write_text(source.replace("fast.kernels", package))
    patch.syspath_prepend(str(folder))
    for name in names:
        if name.stem != "__init__":
            part = ".".join(name.with_suffix("").parts)
            module = importlib.import_module(f"{package}.{part}")
            held = importlib.import_module(".".join(["fast.kernels", *name.parent.parts]))
            patch.setattr(held, name.stem, module, raising=False)
            patch.delitem(sys.modules, module.__name__)


def thirds(names: Iterable[str]) -> list[Any]:
    """Parameters of a test: every third name, and the others marked as slow.

    Each planted fault compiles its kernel anew, so all of them take a third of the suite's time.
    """
    return [
        pytest.param(name, id=name, marks=pytest.mark.slow if i % 3 else ())
        for i, name in enumerate(names)
    ]


def as_tests(
    faults: Faults, home: str, plant: Callable[[Fault, Path, pytest.MonkeyPatch], None] = plant
) -> tuple[Callable[..., None], Callable[..., None]]:
    """The two tests of a file of faults: each fault is found, and without a fault nothing is found.

    home: the name of the file's module. A check of another file runs without a fault there.
    plant: plants a fault with files in a folder.
    """

    @pytest.mark.parametrize("name", thirds(faults))
    def test_a_fault_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        what = faults[name]
        plant(what, tmp_path, monkeypatch)
        found = what.check()
        assert found, "nothing was found"
        assert {line.split(":")[0] for line in found} & set(what.kind.split()), found[0]

    own = [check for check in faults.checks if check.__module__ == home]

    @pytest.mark.parametrize("check", own)
    def test_without_a_fault_nothing_is_found(check: Check):
        assert not check()

    return test_a_fault_is_found, test_without_a_fault_nothing_is_found
