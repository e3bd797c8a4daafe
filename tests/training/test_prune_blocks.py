import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune
from training_cases import block_of_each_weight, layers, small_net

import blocksparse_compiler as bsc
from blocksparse_compiler.errors import LayerError, OptionError, PatternError
from blocksparse_compiler.passes.prune_blocks import block_strength
from blocksparse_compiler.pattern import BlockPattern
from blocksparse_compiler.scales import block_scale_of


@settings(deadline=None, max_examples=60)
@given(layers(), st.floats(0.01, 1))
def test_keeps_exactly_the_strongest_blocks(case, density):
    layer, _, block = case
    where = block_of_each_weight(layer, block)
    before = layer.weight.detach().clone()
    model = nn.Sequential(layer)
    assert bsc.prune_blocks(model, block, density) is model

    rows, cols = (where.flatten(0, -2).amax(0) + 1).tolist()
    strength, kept = torch.zeros(rows, cols), torch.zeros(rows, cols, dtype=torch.bool)
    for row in range(rows):
        for col in range(cols):
            inside = (where[..., 0] == row) & (where[..., 1] == col)
            strength[row, col] = before[inside].square().mean().sqrt()
            kept[row, col] = bool(layer.weight[inside].any())
            after = layer.weight[inside]
            assert torch.equal(after, before[inside]) or (after == 0).all()
    assert int(kept.sum()) == max(1, int(density * rows * cols + 0.5))
    if not kept.all():
        assert strength[kept].min() >= strength[~kept].max()


def test_strength_of_ragged_blocks_is_per_element():
    weight = torch.ones(5, 5, 3)
    assert torch.equal(
        block_strength(weight, BlockPattern.full((5, 5, 3), (4, 4))), torch.ones(2, 2).double()
    )


def test_ties_are_broken_by_position_so_that_counts_stay_exact():
    layer = nn.Linear(8, 8)
    nn.init.ones_(layer.weight)
    bsc.prune_blocks(nn.Sequential(layer), (4, 4), 0.5)
    assert int(layer.weight.count_nonzero()) == 32


def test_global_scope_keeps_the_fraction_of_the_model_and_no_layer_dies():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    with torch.no_grad():
        model[0].weight.mul_(100)
        model[2].weight.mul_(1e-3)
    bsc.prune_blocks(model, (4, 4), 0.5, scope="global")
    kept = [int(m.weight.count_nonzero()) // 16 for m in model]
    assert sum(kept) == 24
    assert kept[0] == 16
    assert kept[2] == 1


def test_pruning_in_place_is_seen_by_version_counters():
    layer = nn.Linear(8, 8)
    parameter, version = layer.weight, layer.weight._version
    bsc.prune_blocks(nn.Sequential(layer), (4, 4), 0.5)
    assert layer.weight is parameter
    assert parameter._version > version


def test_scaled_layers_are_pruned_through_their_scales():
    model = bsc.insert_block_scales(nn.Sequential(nn.Linear(8, 8)), (4, 4))
    scale = block_scale_of(model[0])
    with torch.no_grad():
        scale.scale.copy_(torch.tensor([[0.01, 1.0], [1.0, 0.02]]))
    weight = model[0].parametrizations.weight.original.detach().clone()
    bsc.prune_blocks(model, None, 0.5)
    assert scale.kept.tolist() == [[False, True], [True, False]]
    assert torch.equal(model[0].parametrizations.weight.original, weight)
    with pytest.raises(PatternError, match=r"^0: expected the block shape of its scales, \(4, 4\)"):
        bsc.prune_blocks(model, (2, 2), 0.5, include="0")


def test_masked_layers_and_tied_weights():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    prune.l1_unstructured(model[0], "weight", 0.1)
    model[2].weight = model[1].weight
    bsc.prune_blocks(model, (4, 4), 0.5)
    model(torch.randn(1, 8))
    for layer in model:
        assert BlockPattern.from_weight(layer.weight, (4, 4)).num_kept == 2
    assert model[2].weight is model[1].weight


def test_density_one_changes_nothing():
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    bsc.prune_blocks(model, (2, 2), 1.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((4, 4), 0.0), OptionError, r"density in \(0, 1\], got 0.0"),
        (((4, 4), 1.5), OptionError, r"density in \(0, 1\], got 1.5"),
        (((4, 4), float("nan")), OptionError, "density"),
        (((4, 0), 0.5), PatternError, "two positive integers"),
        (((99, 99), 0.5), PatternError, "No other layer of the model could be used"),
        ((None, 0.5), LayerError, "insert_block_scales first"),
    ],
)
def test_errors(arguments, error, message):
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        bsc.prune_blocks(model, *arguments)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_unknown_scope():
    with pytest.raises(OptionError, match='"layer" or "global"'):
        bsc.prune_blocks(small_net(), (2, 2), 0.5, scope="everywhere")


def test_a_layer_too_small_is_left_alone_unless_named():
    model = small_net()
    stem = model[0].weight.detach().clone()
    bsc.prune_blocks(model, (4, 4), 0.5)
    assert torch.equal(model[0].weight, stem)
    with pytest.raises(PatternError, match=r"^0: "):
        bsc.prune_blocks(model, (4, 4), 0.5, include="0")


@pytest.mark.parametrize("spoil", ["folded", "parametrized"])
def test_layers_that_cannot_be_pruned_say_why(spoil):
    model = nn.Sequential(nn.Linear(8, 8))
    if spoil == "folded":
        bsc.fold_zero_blocks(bsc.prune_blocks(model, (4, 4), 0.5), (4, 4))
    else:
        parametrizations.weight_norm(model[0])
    with pytest.raises(LayerError, match=r"^0: "):
        bsc.prune_blocks(model, (4, 4), 0.25)


def test_nan_is_an_error_and_no_layer_is_changed():
    model = small_net()
    model[8].weight.data[0, 0] = torch.nan
    before = model[3].weight.detach().clone()
    with pytest.raises(LayerError, match=r"^8: expected finite weights"):
        bsc.prune_blocks(model, (2, 2), 0.5)
    assert torch.equal(model[3].weight, before)
