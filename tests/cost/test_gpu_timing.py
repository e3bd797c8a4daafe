"""How calls are timed on a GPU, on a stand-in for torch.cuda whose clock is set by the calls."""

from __future__ import annotations

import contextlib
import inspect
from types import SimpleNamespace

import pytest
import torch

from blocksparse_compiler import gpu_timing


class Gpu:
    """Runs work at once; a graph replays what was called while it was captured."""

    def __init__(self):
        self.now, self.order, self.capturing = 0.0, [], None
        gpu = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class Graph:
            def __init__(self):
                self.work = []

            def replay(self):
                for work in self.work:
                    work()

        @contextlib.contextmanager
        def graph(graph, pool=None, stream=None, capture_error_mode="global"):
            gpu.capturing = graph.work
            yield
            gpu.capturing = None

        stream = SimpleNamespace(wait_stream=lambda other: None)
        self.api = {
            "device": lambda device: contextlib.nullcontext(),
            "Stream": lambda: stream,
            "stream": lambda s: contextlib.nullcontext(),
            "current_stream": lambda: stream,
            "synchronize": lambda: None,
            "graph_pool_handle": lambda: (0, 1),
            "_sleep": lambda cycles: gpu.launch("sleep", 1e-3),
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": graph,
        }

    def launch(self, name, seconds):
        def work():
            self.now += seconds
            self.order.append(name)

        self.capturing.append(work) if self.capturing is not None else work()


@pytest.fixture
def gpu(monkeypatch):
    found = Gpu()
    for name, value in found.api.items():
        monkeypatch.setattr(torch.cuda, name, value)
    scratch = SimpleNamespace(zero_=lambda: found.launch("flush", 0.5))
    monkeypatch.setattr(gpu_timing, "_l2_sized", lambda device: scratch)
    return found


def test_medians_of_calls_in_turn_on_a_cold_cache(gpu):
    calls = {"a": lambda: gpu.launch("a", 0.002), "b": lambda: gpu.launch("b", 0.003)}
    timings = gpu_timing.interleave(calls, 0, rounds=(4, 9))
    assert {name: t.median for name, t in timings.items()} == pytest.approx({"a": 0.002, "b": 0.003})
    assert {t.rounds for t in timings.values()} == {4}
    after_warm_up = gpu.order[2 * gpu_timing.WARMUP :]
    assert after_warm_up == ["flush", "a", "flush", "b"] * (2 + 4)


def test_what_cannot_be_captured_is_called_behind_a_busy_gpu(gpu):
    calls = {"graph": lambda: gpu.launch("graph", 0.002), "plain": lambda: gpu.launch("plain", 0.004)}
    timings = gpu_timing.interleave(calls, 0, flush=False, rounds=(3, 3), uncaptured=["plain"])
    assert timings["plain"].median == pytest.approx(0.004)  # without the wait before it
    assert gpu.order[2 * gpu_timing.WARMUP :] == ["graph", "sleep", "plain"] * (2 + 3)


def test_torch_takes_the_arguments_that_we_pass():
    parameters = inspect.signature(torch.cuda.graph.__init__).parameters
    assert {"pool", "capture_error_mode"} <= set(parameters)
