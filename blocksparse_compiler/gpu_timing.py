"""Times calls on a GPU: each captured in a CUDA graph, so that the host's speed does not show; in turns.

Everything here needs a GPU, except to import.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
Run = Callable[[], Call]
"""Prepares the stream for a call, and returns what to time."""
Events = tuple[torch.cuda.Event, torch.cuda.Event]

WARMUP = 3
ROUNDS = 5, 100
SLEEP_CYCLES = 2_000_000
"""About 1 ms: the host queues a call meanwhile."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    minimum: float
    rounds: int = 0


def interleave(
    calls: Mapping[str, Call],
    seconds: float,
    device: torch.device | str = "cuda",
    *,
    flush: bool = True,
    rounds: tuple[int, int] = ROUNDS,
    uncaptured: Collection[str] = (),
) -> dict[str, Timing]:
    """Times every call in turn, as many rounds as fit `seconds` (within `rounds`).

    Args:
        calls: may launch any number of kernels; they run in a graph where they can be captured.
        flush: empty the L2 cache before each; else calls must touch enough memory themselves.
        uncaptured: names of calls that may wait for the GPU, which no graph can hold.
    """
    with torch.cuda.device(device), torch.no_grad():
        scratch = _l2_sized(device) if flush else None
        pool = torch.cuda.graph_pool_handle()
        runs = {
            name: _queued(call) if name in uncaptured else _captured(call, pool)
            for name, call in calls.items()
        }

        def once() -> dict[str, Events]:
            return {name: _timed(run, scratch) for name, run in runs.items()}

        once()
        torch.cuda.synchronize()
        began = time.perf_counter()
        once()
        torch.cuda.synchronize()
        per_round = max(time.perf_counter() - began, 1e-6)
        count = max(rounds[0], min(rounds[1], int(seconds / per_round)))
        events = [once() for _ in range(count)]
        torch.cuda.synchronize()
    return {name: _summary([row[name] for row in events]) for name in runs}


def _summary(events: list[Events]) -> Timing:
    seconds = [start.elapsed_time(end) * 1e-3 for start, end in events]
    return Timing(statistics.median(seconds), min(seconds), len(seconds))


def _timed(run: Run, scratch: torch.Tensor | None) -> Events:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if scratch is not None:
        scratch.zero_()
    call = run()
    start.record()
    call()
    end.record()
    return start, end


def _captured(call: Call, pool: Any) -> Run:
    """The call as a CUDA graph."""
    _warm_up(call)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the GPU meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        call()
    return lambda: graph.replay


def _queued(call: Call) -> Run:
    """The call behind a busy GPU, so that its kernels wait for each other and not for the host."""
    _warm_up(call)

    def run() -> Call:
        torch.cuda._sleep(SLEEP_CYCLES)
        return call

    return run


def _warm_up(call: Call) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()


def _l2_sized(device: torch.device | str) -> torch.Tensor:
    """Memory that pushes everything else out of L2."""
    size = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or (64 << 20)
    return torch.empty(2 * size, dtype=torch.uint8, device=device)
