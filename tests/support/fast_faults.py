"""Faults that are planted in the fast path's kernels: a small wrong edit each, which a check must find.

All kernels are copied into a package of their own with the edit in one of them, which stands in for
`fast.kernels`.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

import fast.kernels

KERNELS = Path(fast.kernels.__file__).parent
Check = Callable[[], list[str]]
numbered = count()


@dataclass(frozen=True)
class Fault:
    """What is edited, in which file of the kernels; and the check that must find it, as what."""

    module: str
    edits: tuple[tuple[str, str], ...]
    check: Check
    kind: str


class Faults(dict[str, Fault]):
    """By name, in the order in which they are added."""

    def add(self, name: str, module: str, check: Check, kind: str, *edits: tuple[str, str]) -> None:
        """Register edits of a file of the kernels, and the check that must find them, as what."""
        self[name] = Fault(module, edits, check, kind)

    @property
    def checks(self) -> list[Check]:
        """Each check once."""
        return list({what.check: None for what in self.values()})


def plant(what: Fault, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Put kernels with its edits, each of which fits in one place, in the place of the project's."""
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


def assert_found(what: Fault, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Plant a fault; its check must find something of its kind."""
    plant(what, folder, patch)
    found = what.check()
    assert found, "nothing was found"
    assert {line.split(":")[0] for line in found} & set(what.kind.split()), found[0]
