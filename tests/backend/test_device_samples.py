"""What watches weights on a GPU, on CPU tensors: what is compared, and when."""

from __future__ import annotations

import pytest
import torch

from blocksparse_compiler import device_samples
from blocksparse_compiler.device_samples import PERIOD, DeviceSamples, flat_memory


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def weights():
    torch.manual_seed(0)
    return [torch.randn(40, 70), torch.randn(5).bfloat16(), torch.full((3,), float("nan"))]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_change_shows_in_the_call_after_the_next_sample(which):
    tensors, clock = weights(), Clock()
    samples = DeviceSamples(tensors, clock=clock)
    for _ in range(3):
        clock.now += PERIOD
        assert not samples.changed()
    tensors[which].data.fill_(7)
    clock.now += PERIOD
    assert not samples.changed()  # compares the older sample, asks for a new one
    assert samples.changed()


def test_samples_see_several_input_channels():
    weight, clock = torch.zeros(128, 128, 3, 3), Clock()
    weight[:, 32:] = 1  # the first block column is pruned
    samples = DeviceSamples([weight], clock=clock)
    weight.data.mul_(2)
    clock.now += PERIOD
    assert not samples.changed()
    assert samples.changed()


def test_no_sample_is_taken_before_its_time(monkeypatch):
    clock = Clock()
    samples = DeviceSamples(weights(), clock=clock)
    reads = []
    monkeypatch.setattr(samples, "_read", lambda: reads.append(1) or samples._known)
    for _ in range(100):
        samples.changed()
    assert not reads
    clock.now += PERIOD
    for _ in range(100):
        samples.changed()
    assert len(reads) == 1


def test_nothing_is_awaited(monkeypatch):
    """While a copy is under way nothing is compared and no other copy is asked for."""
    tensors, clock = weights(), Clock()
    samples = DeviceSamples(tensors, clock=clock)
    tensors[0].data.zero_()
    clock.now += PERIOD
    assert not samples.changed()

    class UnderWay:
        def query(self):
            return False

    samples._arrived = UnderWay()
    clock.now += 10 * PERIOD
    monkeypatch.setattr(samples, "_request", lambda: pytest.fail("asked again"))
    assert not any(samples.changed() for _ in range(5))


def test_nothing_is_read_during_graph_capture(monkeypatch):
    tensors, clock = weights(), Clock()
    samples = DeviceSamples(tensors, full=True, clock=clock)
    tensors[0].data.zero_()
    monkeypatch.setattr(device_samples, "_is_capturing", lambda device: True)
    assert not samples.changed()


def test_full_compares_every_element_at_once():
    tensors = weights()
    samples = DeviceSamples(tensors, full=True, clock=Clock())
    assert not samples.changed()
    tensors[0].data[17, 33] += 1
    assert samples.changed()


def test_memory_with_gaps_is_left_out():
    assert flat_memory(torch.zeros(4, 6).t())
    assert not flat_memory(torch.zeros(4, 6)[:, ::2])
    assert not flat_memory(torch.zeros(0))
