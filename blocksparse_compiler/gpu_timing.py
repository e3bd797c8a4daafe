"""Times calls on a GPU: each captured in a CUDA graph, so that the host's speed does not show; in turns.

Everything here needs a GPU, except to import.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

log = logging.getLogger("blocksparse_compiler")

Call = Callable[[], Any]

WARMUP = 3
ROUNDS = 5, 100
_SLEEP_CYCLES = 2_000_000  # about 1 ms: the host queues a call meanwhile


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
) -> dict[str, Timing]:
    """Times every call in turn, as many rounds as fit `seconds` (within `rounds`).

    Args:
        calls: may launch any number of kernels; they run in a graph where they can be captured.
        flush: empty the L2 cache before each; else calls must touch enough memory themselves.
    """
    with torch.cuda.device(device), torch.no_grad():
        scratch = _l2_sized(device) if flush else None
        pool = torch.cuda.graph_pool_handle()
        runs = {name: _captured(name, call, pool) for name, call in calls.items()}

        def once() -> dict[str, tuple[torch.cuda.Event, torch.cuda.Event]]:
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
    samples = {
        name: [start.elapsed_time(end) * 1e-3 for start, end in _column(events, name)] for name in runs
    }
    return {name: Timing(statistics.median(s), min(s), count) for name, s in samples.items()}


def _column(events: list[dict[str, Any]], name: str) -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
    return [row[name] for row in events]


def _timed(run: Call, scratch: torch.Tensor | None) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if scratch is not None:
        scratch.zero_()
    start.record()
    run()
    end.record()
    return start, end


def _captured(name: str, call: Call, pool: Any) -> Call:
    """Replays `call` from a CUDA graph; where it cannot be captured, calls it behind a busy stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            call()
    except Exception as error:
        log.info("%s cannot be captured in a CUDA graph: %s", name, error)
        torch.cuda.synchronize()
        return call
    return graph.replay


def _l2_sized(device: torch.device | str) -> torch.Tensor:
    """Memory that pushes everything else out of L2."""
    size = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or (64 << 20)
    return torch.empty(2 * size, dtype=torch.uint8, device=device)
