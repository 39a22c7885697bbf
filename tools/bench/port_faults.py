"""What the parts of `tools.bench hip_port` share: faults planted in a kernel, and waits that end."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fast.hip_compiler import sources
from qwen35.errors import InputError

HANGS = 60.0  # seconds without an end
BATCH = 256  # launches between two looks at the counters


@dataclass(frozen=True)
class Fault:
    """Edits of a kernel, each of which fits in one place of its source or of a file that it includes.

    workgroups: of a persistent kernel; default, all that fit."""

    name: str
    edits: tuple[tuple[str, str], ...]
    workgroups: int | None = None


def plant(fault: Fault, kernel: Path, folder: Path) -> Path:
    """Write a kernel's source with a fault, and the files that it includes, into a folder. Returns the
    source. InputError if an edit does not fit in exactly one place."""
    texts = {file.name: file.read_text(encoding="utf-8") for file in sources(kernel)}
    for old, new in fault.edits:
        places = [name for name, text in texts.items() for _ in range(text.count(old))]
        if len(places) != 1:
            raise InputError(f"fault {fault.name!r}: {len(places)} places read {old!r}")
        texts[places[0]] = texts[places[0]].replace(old, new)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder / kernel.name


def ended(name: str) -> None:
    """Wait for all launches. Ends the process if they do not end: nothing else stops such a kernel."""
    event, started = torch.cuda.Event(), time.monotonic()
    event.record()
    while not event.query():
        if time.monotonic() - started > HANGS:
            tell(f"{name}: no end after {HANGS:g} s")
            os._exit(1)
        time.sleep(1e-4)


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
