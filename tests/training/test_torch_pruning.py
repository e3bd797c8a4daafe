"""Masks made by torch's own pruning tools, and gradual magnitude pruning: all fold, and all compile."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import blocksparse_compiler as bsc
from blocksparse_compiler import BlockSparsifier, SparsitySchedule

BLOCK = (16, 16)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)).eval()


def weight_norm_sparsifier(model):
    sparsifier_type = pytest.importorskip("torch.ao.pruning").WeightNormSparsifier
    sparsifier = sparsifier_type(sparsity_level=0.5, sparse_block_shape=BLOCK, zeros_per_block=16 * 16)
    sparsifier.prepare(model, config=[{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
    sparsifier.step()
    return sparsifier


def squashed(model):
    weight_norm_sparsifier(model).squash_mask()


def custom_mask(model):
    for layer in (model[0], model[2]):
        pattern = bsc.RandomBlocks(BLOCK, 0.5).pattern("layer", tuple(layer.weight.shape), 1)
        prune.custom_from_mask(layer, "weight", pattern.mask())


def gradual(model):
    sparsifier = BlockSparsifier(
        model,
        BLOCK,
        target_density=0.5,
        importance="magnitude",
        scope="layer",
        schedule=SparsitySchedule(ramp=4),
    )
    for _ in range(5):
        sparsifier.step()


def structured(model):
    """Whole output channels."""
    for layer in (model[0], model[2]):
        prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=0)


@pytest.mark.parametrize("tool", [weight_norm_sparsifier, squashed, custom_mask, gradual, structured])
@pytest.mark.parametrize("folded", [False, True])
def test_their_zeros_fold_and_compile(tool, folded):
    model = mlp()
    tool(model)
    x = torch.randn(256, 256)
    with torch.no_grad():
        expected = model(x)
        if folded:
            bsc.fold_zero_blocks(model)
            assert all(model[i].pattern.density == 0.5 for i in (0, 2))
            torch.testing.assert_close(model(x), expected)
        torch._dynamo.reset()
        torch.testing.assert_close(
            torch.compile(model, backend="blocksparse")(x), expected, rtol=1e-4, atol=1e-5
        )
        decisions = bsc.plan(bsc.trace(model, x))
    if tool is not structured:  # scattered channels fill no tile that a kernel has
        assert [d.density for d in decisions] == [0.5, 0.5], [d.reason for d in decisions]
    assert all(d.reason for d in decisions)


@pytest.mark.parametrize("block", [(1, 1), (2, 1), (4, 1), (16, 16)])
def test_gradual_magnitude_pruning_follows_the_cubic_schedule(block):
    """`s(t) = s_f + (s_i - s_f)(1 - τ)³`, down to whole blocks, at every step."""
    model = mlp()
    sparsifier = BlockSparsifier(
        model,
        block,
        target_density=0.1,
        importance="magnitude",
        scope="layer",
        schedule=SparsitySchedule(warmup=2, ramp=10, shape="cubic", freeze=14),
    )
    originals = [copy.deepcopy(model[i].parametrizations.weight.original.detach()) for i in (0, 2)]
    for step in range(1, 17):
        sparsifier.step()
        tau = min(1.0, max(0.0, (step - 2) / 10))
        sparsity = 0.9 + (0 - 0.9) * (1 - tau) ** 3
        for i, original in zip((0, 2), originals, strict=True):
            blocks = original.numel() // math.prod(block)
            kept = model[i].weight.detach() != 0
            assert kept.sum() == math.floor((1 - sparsity) * blocks * (1 + 1e-12)) * math.prod(block)
            strength = original.square().unfold(0, block[0], block[0]).unfold(1, block[1], block[1])
            strength = strength.mean((2, 3))
            whole = kept.unfold(0, block[0], block[0]).unfold(1, block[1], block[1])[..., 0, 0]
            if not whole.all():
                assert strength[whole].min() >= strength[~whole].max()
    assert sparsifier.frozen
    sparsifier.fold()
    assert model[0].pattern.block_shape == block


def test_pruned_weights_get_no_gradient_and_may_return():
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.5]]))
    model = nn.Sequential(layer)
    sparsifier = BlockSparsifier(model, (1, 1), target_density=0.5, importance="magnitude")
    sparsifier.step()
    assert layer.weight.tolist() == [[1.0, 0.0]]
    layer.weight.sum().backward()
    assert layer.parametrizations.weight.original.grad.tolist() == [[1.0, 0.0]]
    with torch.no_grad():
        layer.parametrizations.weight.original[0, 0] = 0.1  # the kept one has become weaker
    sparsifier.step()
    assert layer.weight.tolist() == [[0.0, 0.5]]


def test_masks_may_change_after_compiling_for_training(monkeypatch):
    """Outputs and gradients are those of eager before pruning, after it, and after another choice."""
    monkeypatch.setenv("BLOCKSPARSE_CALIBRATE", "0")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))
    sparsifier = BlockSparsifier(model, (32, 32), target_density=0.25, importance="magnitude", scope="layer")
    torch._dynamo.reset()
    fast, x = torch.compile(model, backend="blocksparse"), torch.randn(64, 128)

    def results(call):
        model.zero_grad()
        y = call(x)
        y.square().mean().backward()
        return [y.detach(), *(p.grad.clone() for p in model.parameters())]

    def roll():
        for layer in sparsifier.layers:
            layer.gate.select(layer.gate.kept.roll(1, 0))

    for change in (lambda: None, sparsifier.step, roll, sparsifier.freeze):
        change()
        for got, expected in zip(results(fast), results(model), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
