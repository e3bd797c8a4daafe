"""Interleaved timing: the candidates take turns, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

import ctypes
import functools
import itertools
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

TURN = 0.05
"""Seconds of a turn of a whole network: long against what refilling the caches takes."""

MOST_OTHER_LOAD = 0.05
"""Of all processors' time: when other processes take more, the times are not to be trusted."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call, and the share of all processors' time that other processes took meanwhile.

    `in_a_row` counts the calls of each turn that were timed.
    """

    median: float
    minimum: float
    rounds: int
    in_a_row: int = 1
    other_load: float = 0.0

    def to_json(self, copies: int = 1) -> dict[str, float | int]:
        """Milliseconds of one of the `copies` of a layer that a call runs."""
        ms = 1e3 / copies
        return {
            "median_ms": self.median * ms,
            "minimum_ms": self.minimum * ms,
            "rounds": self.rounds,
            "in_a_row": self.in_a_row,
            "other_load": round(self.other_load, 3),
        }


def interleave(
    calls: Mapping[str, Call],
    *,
    budget: float = 0.5,
    rounds: tuple[int, int] = (7, 50),
    warmup: int = 3,
    turn: float = 0.0,
) -> dict[str, Timing]:
    """Gives every call a turn per round, as many rounds as fit `budget` seconds (within `rounds`).

    Warns if other processes took much of the machine meanwhile.

    Args:
        turn: seconds of a turn. 0 is one call, which finds the caches as the other builds left them. Longer
            turns are of at least two calls, of which the first does not count: the others find them as they
            left them themselves, like a model that is called in a row.
    """
    lengths = {name: _calls_per_turn(call, warmup, turn) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with OtherLoad() as others:
        began, done = time.perf_counter(), 0
        while done < rounds[0] or (done < rounds[1] and time.perf_counter() - began < budget):
            for name, call in calls.items():
                seconds[name] += _turn(call, lengths[name])
            done += 1
    if others.fraction > MOST_OTHER_LOAD:
        log.warning("other processes took %.0f%% of the machine: measure again", 100 * others.fraction)
    return {
        name: Timing(statistics.median(s), min(s), done, max(1, lengths[name] - 1), others.fraction)
        for name, s in seconds.items()
    }


def _calls_per_turn(call: Call, warmup: int, turn: float) -> int:
    """As many as fit `turn` seconds, by the last of some first calls."""
    last = _turn(call, warmup)[-1]
    return max(2, int(turn / last)) if turn else 1


def _turn(call: Call, count: int) -> list[float]:
    """Seconds of each of so many calls in a row; of several, without the first."""
    clock = [time.perf_counter()]
    for _ in range(count):
        call()
        clock.append(time.perf_counter())
    return [end - start for start, end in itertools.pairwise(clock)][count > 1 :]


def time_networks(
    builds: Mapping[str, Callable[[Any], Any]], x: Any, budget: float
) -> dict[str, dict[str, float | int]]:
    """JSON of the timing of every build on one input, each in turns of `TURN` seconds."""
    calls = {name: functools.partial(build, x) for name, build in builds.items()}
    timings = interleave(calls, budget=budget, rounds=(5, 50), turn=TURN)
    return {name: timing.to_json() for name, timing in timings.items()}


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
