"""The output of all benchmarks (a table, or one JSON document), and helpers for timing."""

import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qwen35.cli import print_json
from qwen35.errors import InputError
from qwen35.progress import Progress
from tools.table import aligned

Row = dict[str, Any]


def device_name() -> str:
    """The processor and the number of threads that torch uses."""
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"


def emit(op: str, config: dict[str, Any], rows: list[Row], *, only_json: bool, **more: Any) -> None:
    """Print the configuration and the rows as a table, or as one JSON document (only_json). more:
    further fields of the document, or other values, as for the device."""
    document = {"op": op, "config": config, "device": device_name(), **more, "rows": rows}
    if only_json:
        print_json(document)
        return
    for name, value in {**config, "device": document["device"], **more}.items():
        print(f"{name}: {_shown(value)}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_shown(row.get(name, ""), "#.4g") for name in names] for row in rows)]
    print()
    for line in aligned(cells, left=len(names)):
        print(line, flush=True)


def _shown(value: Any, digits: str = ".4g") -> str:
    """A value as text. Floats have four significant digits, or all before the point from 10,000
    on. None, where there is no figure, is a dash. digits: their format; "#.4g" keeps zeros at the end,
    so that 17.60 has as many as 17.62."""
    if isinstance(value, list | tuple):
        return ", ".join(_shown(part, digits) for part in value)
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:{digits}}".removesuffix(".")


def alternate(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """The seconds of each run. The runs take turns, `repeats` times, after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with Progress("runs", len(runs) * (repeats + 1)) as progress:
        for run in runs.values():
            run()
            progress.update()
        for _ in range(repeats):
            for name, run in runs.items():
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
                progress.update()
    return seconds


def spread(seconds: list[float]) -> Row:
    """Median, minimum and maximum in milliseconds."""
    return {
        "median_ms": statistics.median(seconds) * 1e3,
        "min_ms": min(seconds) * 1e3,
        "max_ms": max(seconds) * 1e3,
    }


def watch(module: Sequence[str]) -> tuple[float, int]:
    """Run `python -m` with these words. Returns its seconds and its peak of anonymous memory in
    bytes, sampled every 5 ms. InputError with its standard error if it fails."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:  # a pipe could fill up
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", *module], stdout=subprocess.DEVNULL, stderr=errors
        )
        peak = 0
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            except OSError:
                break
            sizes = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
            peak = max([peak, *(int(size) * 1024 for size in sizes)])
            time.sleep(0.005)
        failed, seconds = process.wait(), time.perf_counter() - started
        errors.seek(0)
        if failed:
            raise InputError(f"{' '.join(module)}: {errors.read().strip()}")
    return seconds, peak
