"""Whether the machine did something else while we measured."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_OTHERS = 0.1  # of all processors' time


class Busy(RuntimeError):
    """Something else used the machine meanwhile: the times mean nothing."""


@contextmanager
def alone() -> Iterator[None]:
    """Raises `Busy` afterwards if other processes took much of the processors' time (known on Linux)."""
    start, busy, own = time.perf_counter(), _busy_seconds(), time.process_time()
    yield
    wall = (time.perf_counter() - start) * (os.cpu_count() or 1)
    others = (_busy_seconds() - busy) - (time.process_time() - own)
    if others > MAX_OTHERS * wall:
        raise Busy(f"the machine is busy: other processes took {others / wall:.0%} of its time")


def _busy_seconds(stat: Path = Path("/proc/stat")) -> float:
    """Time that all processors have worked since they started; 0 where that is not known."""
    try:
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.read_text().split()[1:11])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
