"""Interleaved timing: the candidates take turns, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

import ctypes
import logging
import statistics
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from blocksparse_compiler.busy import OtherLoad

Call = Callable[[], Any]
F = TypeVar("F", bound=Callable[..., Any])

log = logging.getLogger(__name__)

MOST_OTHER_LOAD = 0.05
"""Of all processors' time: when other processes take more, the times are not to be trusted."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call, and the share of all processors' time that other processes took meanwhile."""

    median: float
    minimum: float
    rounds: int
    other_load: float = 0.0

    def to_json(self, copies: int = 1) -> dict[str, float | int]:
        """Milliseconds of one of the `copies` of a layer that a call runs."""
        ms = 1e3 / copies
        return {
            "median_ms": self.median * ms,
            "minimum_ms": self.minimum * ms,
            "rounds": self.rounds,
            "other_load": round(self.other_load, 3),
        }


def interleave(
    calls: Mapping[str, Call], *, budget: float = 0.5, rounds: tuple[int, int] = (7, 50), warmup: int = 3
) -> dict[str, Timing]:
    """Times every call once per round, as many rounds as fit `budget` seconds (within `rounds`).

    Warns if other processes took much of the machine meanwhile.
    """
    for _ in range(warmup):
        began = time.perf_counter()
        for call in calls.values():
            call()
    per_round = time.perf_counter() - began
    count = max(rounds[0], min(rounds[1], int(budget / per_round)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with OtherLoad() as others:
        for _ in range(count):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
    if others.fraction > MOST_OTHER_LOAD:
        log.warning("other processes took %.0f%% of the machine: measure again", 100 * others.fraction)
    return {name: Timing(statistics.median(s), min(s), count, others.fraction) for name, s in seconds.items()}


def keep_freed_memory() -> bool:
    """Tells glibc to hand freed memory out again instead of returning it to the system; whether it could.

    By default every large output of every build, dense or sparse, page-faults anew on each call: a tenth
    of the time of ResNet-50 at batch 8, and most of the noise. Servers avoid it with another allocator,
    or with `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592` in the environment.
    """
    trim_threshold, mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def fresh_code(function: F) -> F:
    """The same function with a code object of its own.

    Dynamo keeps one list of compiled variants per code object and searches it at every call: without
    this, the tenth layer that a benchmark compiles would pay for the guards of nine others.
    """
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return copy  # type: ignore[return-value]


def geometric_mean(values: list[float]) -> float:
    return statistics.geometric_mean(values) if values else float("nan")
