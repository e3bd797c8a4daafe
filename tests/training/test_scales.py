"""DBSR as an optimization: penalty, proximal step, and what their fixed points must be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from training_cases import small_net

import blocksparse_compiler as bsc
from blocksparse_compiler.errors import LayerError, OptionError
from blocksparse_compiler.scales import block_scale_of, block_scales


def set_scales(model, *values):
    for (_, scale), value in zip(block_scales(model), values, strict=True):
        with torch.no_grad():
            scale.scale.copy_(torch.as_tensor(value))


def test_penalty_is_the_sum_of_absolute_scales_and_its_gradient_the_sign():
    model = bsc.insert_block_scales(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), (2, 2))
    set_scales(model, [[1.5, -0.5], [0.0, 1.0]], [[2.0, -3.0]])
    penalty = bsc.scale_penalty(model)
    assert penalty.shape == ()
    assert penalty.item() == 8.0
    penalty.backward()
    assert block_scale_of(model[0]).scale.grad.tolist() == [[1, -1], [0, 1]]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4), st.floats(0, 1.5, width=32))
def test_proximal_step_is_the_soft_threshold(values, threshold):
    model = bsc.insert_block_scales(nn.Sequential(nn.Linear(4, 4)), (2, 2))
    set_scales(model, torch.tensor(values).reshape(2, 2))
    assert bsc.proximal_step(model, threshold) is model
    for before, after in zip(values, block_scale_of(model[0]).scale.flatten().tolist(), strict=True):
        if abs(before) <= threshold:
            assert after == 0.0  # exactly
        else:
            sign = 1 if before > 0 else -1
            assert after == pytest.approx(sign * (abs(before) - threshold), abs=1e-6)


def test_frozen_scales_stay():
    model = bsc.insert_block_scales(nn.Sequential(nn.Linear(4, 4)), (2, 2))
    bsc.proximal_step(bsc.freeze_scales(model), 10.0)
    assert (block_scale_of(model[0]).scale == 1).all()
    model(torch.randn(1, 4)).sum().backward()
    assert block_scale_of(model[0]).scale.grad is None


@pytest.mark.parametrize(
    "function", [bsc.scale_penalty, lambda m: bsc.proximal_step(m, 0.1), bsc.freeze_scales], ids=str
)
def test_without_scales_it_is_an_error(function):
    with pytest.raises(LayerError, match=r"insert_block_scales\(model\) first"):
        function(small_net())


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf")])
def test_bad_thresholds(threshold):
    model = bsc.insert_block_scales(nn.Sequential(nn.Linear(4, 4)), (2, 2))
    with pytest.raises(OptionError, match="learning_rate"):
        bsc.proximal_step(model, threshold)


def test_param_groups_decay_everything_but_the_scales():
    model = bsc.insert_block_scales(small_net(), (2, 2))
    decayed, scales = bsc.param_groups(model, 1e-4)
    assert decayed["weight_decay"] == 1e-4
    assert scales["weight_decay"] == 0
    assert {id(p) for p in scales["params"]} == {id(s.scale) for _, s in block_scales(model)}
    everything = [id(p) for group in (decayed, scales) for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())


def test_weight_decay_and_scale_penalty_together_are_a_group_penalty():
    """At a minimum `s = (wd ‖u‖² / γ)^(1/3)`, and both penalties are `1.5 wd^(1/3) γ^(2/3) ‖u‖^(2/3)`."""
    torch.manual_seed(0)
    wd, gamma = 0.05, 0.2
    layer = nn.Linear(4, 6, bias=False, dtype=torch.float64)
    target = layer.weight.detach() * torch.rand_like(layer.weight) * 0.8
    model = bsc.insert_block_scales(nn.Sequential(layer), (3, 4))
    optimizer = torch.optim.SGD(bsc.param_groups(model, wd), lr=0.05)
    for _ in range(8000):
        loss = 0.5 * (layer.weight - target).square().sum() * 20 + gamma * bsc.scale_penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    s, w = block_scale_of(layer).scale.detach(), layer.parametrizations.weight.original.detach()
    assert ((s > 0) & (s < 1)).all()
    for row in range(2):
        w_block, scale = w[3 * row : 3 * row + 3], s[row, 0]
        u = (scale * w_block).norm()
        torch.testing.assert_close(scale, (wd * u**2 / gamma) ** (1 / 3), rtol=1e-6, atol=0)
        penalty = wd / 2 * w_block.square().sum() + gamma * scale
        expected = 1.5 * wd ** (1 / 3) * gamma ** (2 / 3) * u ** (2 / 3)
        torch.testing.assert_close(penalty, expected, rtol=1e-6, atol=0)


def test_a_dead_block_comes_back_when_the_data_asks_for_it():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, bias=False)
    target = layer.weight.detach().clone()
    model = bsc.insert_block_scales(nn.Sequential(layer), (2, 2))
    set_scales(model, [[-0.1, 1.0], [1.0, 1.0]])
    assert (layer.weight[:2, :2] == 0).all()
    (layer.weight - target).square().sum().backward()
    assert (layer.parametrizations.weight.original.grad[:2, :2] == 0).all()
    assert block_scale_of(layer).scale.grad[0, 0] < 0

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        (layer.weight - target).square().sum().backward()
        optimizer.step()
        bsc.proximal_step(model, 1e-4)
    assert block_scale_of(layer).kept.all()
    torch.testing.assert_close(layer.weight, target, atol=0.02, rtol=0)


def test_training_finds_a_planted_block_support():
    """A teacher with half of its blocks zero: the student, dense at the start, ends with the same blocks."""
    torch.manual_seed(0)
    support = torch.rand(4, 4) < 0.5
    teacher = torch.randn(16, 16) * support.repeat_interleave(4, 0).repeat_interleave(4, 1)
    student = nn.Sequential(nn.Linear(16, 16, bias=False))
    bsc.insert_block_scales(student, (4, 4))
    lr, gamma = 0.05, 0.05
    optimizer = torch.optim.SGD(bsc.param_groups(student, 1e-3), lr=lr, momentum=0.9)
    for _ in range(400):
        x = torch.randn(64, 16)
        optimizer.zero_grad()
        (student(x) - x @ teacher.T).square().sum(1).mean().backward()
        optimizer.step()
        bsc.proximal_step(student, lr * gamma)
    assert torch.equal(block_scale_of(student[0]).kept, support)
    bsc.fold_zero_blocks(student)
    assert torch.equal(student[0].pattern.kept[:, 0], support)
