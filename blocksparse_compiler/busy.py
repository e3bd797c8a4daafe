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


class OtherLoad:
    """Context manager: the share of all processors' time that other processes took meanwhile.

    Afterwards it is in `fraction`; 0 where it is not known (it is on Linux).
    """

    fraction = 0.0

    def __enter__(self) -> OtherLoad:
        self._start = self._clocks()
        return self

    def __exit__(self, *_: object) -> None:
        wall, busy, own = (now - then for now, then in zip(self._clocks(), self._start, strict=True))
        self.fraction = max(0.0, busy - own) / (wall * (os.cpu_count() or 1))

    @staticmethod
    def _clocks() -> tuple[float, float, float]:
        """Seconds on the clock, of work of all processors, and of this process and its ended children."""
        return time.perf_counter(), _busy_seconds(), sum(os.times()[:4])


@contextmanager
def alone() -> Iterator[None]:
    """Raises `Busy` afterwards if other processes took much of the processors' time (known on Linux)."""
    with OtherLoad() as others:
        yield
    if others.fraction > MAX_OTHERS:
        raise Busy(f"the machine is busy: other processes took {others.fraction:.0%} of its time")


def _busy_seconds(stat: Path = Path("/proc/stat")) -> float:
    """Time that all processors have worked since they started; 0 where that is not known."""
    try:
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.read_text().split()[1:11])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
