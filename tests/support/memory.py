"""The memory of a process, from /proc. Tests use it to show that some data is never read."""

import time
from collections.abc import Callable
from pathlib import Path


def peak_anonymous_memory(pid: int, is_running: Callable[[], bool]) -> int:
    """The largest RssAnon, in bytes, seen while a process ran."""
    peak = 0
    while is_running():
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            break
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.02)
    return peak
