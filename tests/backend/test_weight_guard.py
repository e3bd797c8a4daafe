"""Every way of changing a weight is noticed."""

from __future__ import annotations

import pytest
import torch

from blocksparse_compiler.weight_guard import _SLICE_WORDS, WeightGuard


def weights():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(300, 70)), torch.randn(5), torch.tensor(3), torch.zeros(0)]


@torch.no_grad()
def _in_place(t):
    t[0].mul_(2)


@torch.no_grad()
def _copy(t):
    t[0].copy_(torch.ones(300, 70))


def _data_in_place(t):
    t[0].data.mul_(1.001)


def _data_replaced(t):
    t[0].data = torch.randn(300, 70)


def _object_replaced(t):
    t[0] = torch.nn.Parameter(t[0].detach().clone())


def _data_of_a_small_one(t):
    t[1].data[4] += 1


@pytest.mark.parametrize("level", ["sample", "full"])
@pytest.mark.parametrize(
    "change",
    [_in_place, _copy, _data_in_place, _data_replaced, _object_replaced, _data_of_a_small_one],
)
def test_changes_are_noticed_at_once(level, change):
    tensors = weights()
    guard = WeightGuard(tensors, level)
    for _ in range(5):
        assert not guard.changed(tensors)
    change(tensors)
    assert guard.changed(tensors)


def test_a_single_element_behind_data_is_noticed_in_turn():
    tensors = [torch.randn(1 << 19), torch.randn(1 << 19)]
    guard, strict = WeightGuard(tensors, "sample"), WeightGuard(tensors, "full")
    tensors[1].data[12345] += 1
    assert strict.changed(tensors)
    calls = sum(t.numel() for t in tensors) // _SLICE_WORDS
    assert any(guard.changed(tensors) for _ in range(calls))


def test_versions_alone_miss_data_writes_and_see_the_rest():
    tensors = weights()
    guard = WeightGuard(tensors, "version")
    tensors[0].data.mul_(2)
    assert not guard.changed(tensors)
    _in_place(tensors)
    assert guard.changed(tensors)


def test_inference_tensors_and_nan_are_watched():
    with torch.inference_mode():
        frozen = torch.full((64,), float("nan"))
    guard = WeightGuard([frozen], "sample")
    assert not guard.changed([frozen])
    with torch.inference_mode():
        frozen.fill_(1)
    assert guard.changed([frozen])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.complex64])
def test_any_dtype(dtype):
    t = torch.ones(100).to(dtype)
    guard = WeightGuard([t])
    assert not guard.changed([t])
    t.data.zero_()
    assert guard.changed([t])


def test_strided_views_with_gaps_fall_back_to_versions():
    t = torch.randn(10, 10)[:, ::2]
    guard = WeightGuard([t])
    assert not guard.changed([t])
    t.mul_(2)
    assert guard.changed([t])
