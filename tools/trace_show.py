"""`python -m tools.trace --show FILE`: statistics of a saved trace, node by node, without a model."""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen35.cli import one_line, print_json
from qwen35.compare.trace_file import Statistics, trace_statistics

BARS = " ▁▂▃▄▅▆▇█"
PLAIN = " .:-=+*#@"  # if the encoding of standard output lacks the bars
WIDTH = 50  # characters of the longest bar


def show(file: Path, pattern: str, *, histograms: bool, as_json: bool) -> None:
    """Print one line per node, or one JSON document. histograms: then also print a histogram per
    node."""
    found = list(trace_statistics(file, pattern))
    if as_json:
        print_json({"file": str(file), "nodes": [_described(one) for one in found]})
        return
    header = ("node", "shape", "dtype", "mean", "std", "|max|", "zeros", "non-finite", "histogram")
    rows = [header, *map(_row, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for node, shape, dtype, *numbers, bars in rows:
        texts = (text.ljust(width) for text, width in
                 zip((node, shape, dtype), widths, strict=False))  # fmt: skip
        figures = (text.rjust(width) for text, width in zip(numbers, widths[3:], strict=False))
        print("  ".join([*texts, *figures, bars]))
    if histograms:
        for one in found:
            _print_histogram(one)


def _row(one: Statistics) -> tuple[str, ...]:
    return (
        one_line(one.name), str(list(one.shape)), one.dtype, _number(one.mean), _number(one.std),
        _number(one.max_abs), f"{one.zeros:.1%}", _share(one.not_finite), _sparkline(one.counts),
    )  # fmt: skip


def _sparkline(counts: Sequence[int]) -> str:
    """One character per interval. Its height is the logarithm of the count, so that outliers are
    visible."""
    bars, most = _bars(), math.log1p(max(counts))
    heights = (math.log1p(n) / most if most else 0 for n in counts)
    return "|" + "".join(bars[math.ceil(h * (len(bars) - 1))] for h in heights) + "|"


def _print_histogram(one: Statistics) -> None:
    """Print one line per interval: its start, its count, and a bar whose length is the count."""
    most = max(one.counts)
    step = (one.high - one.low) / len(one.counts)
    full = _bars()[-1]
    print(f"\n{one_line(one.name)}: from {_number(one.low)} to {_number(one.high)}")
    for i, n in enumerate(one.counts):
        bar = full * round(n / most * WIDTH) if most else ""
        print(f"{_number(one.low + i * step):>10}  {n:>{len(str(most))}}  {bar}".rstrip())


def _bars() -> str:
    try:
        BARS.encode(sys.stdout.encoding or "utf-8")
    except (LookupError, UnicodeEncodeError):
        return PLAIN
    return BARS


def _described(one: Statistics) -> dict[str, Any]:
    """The statistics for JSON, with None for NaN and infinity, which JSON lacks."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(one).items()
    }


def _number(value: float) -> str:
    return f"{value:.3g}"


def _share(value: float) -> str:
    """A fraction in two significant digits, so that even a tiny one does not look like 0."""
    return "0" if value == 0 else f"{value:.2g}"
