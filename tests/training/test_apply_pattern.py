import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from training_cases import small_net

import blocksparse_compiler as bsc
from blocksparse_compiler import PeriodicKernels, RandomBlocks, StructuredBand
from blocksparse_compiler.errors import LayerError, OptionError, PatternError
from blocksparse_compiler.layers import KeptTiles


def integers(*shape):
    """Small whole numbers, so that sums are exact in any order."""
    return torch.randint(-8, 9, shape, dtype=torch.float64)


def masked_names(model):
    return [name for name, m in model.named_modules() if parametrize.is_parametrized(m)]


# ---- StructuredBand: its special cases are torch's own layers ----------------------------------------


def check_equal(scheme, kernel, channels, out_channels, reference, weight_of_reference):
    layer = nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2, bias=False, dtype=torch.float64)
    bsc.apply_pattern(nn.Sequential(layer), scheme)
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(integers(*layer.weight.shape))
        reference.weight.copy_(weight_of_reference(layer.weight))
    x = integers(2, channels, 6, 6)
    assert torch.equal(layer(x), reference(x))
    assert int(parametrize_mask(layer).sum()) == reference.weight.numel()


def parametrize_mask(layer):
    return layer.parametrizations.weight[0].mask


@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise(multiplier):
    reference = nn.Conv2d(6, 6 * multiplier, 3, padding=1, groups=6, bias=False, dtype=torch.float64)
    rows = torch.arange(6 * multiplier)
    check_equal(
        StructuredBand.depthwise(multiplier),
        3,
        6,
        6 * multiplier,
        reference,
        lambda weight: weight[rows, rows // multiplier][:, None],
    )


def test_groupwise():
    reference = nn.Conv2d(6, 9, 3, padding=1, groups=3, bias=False, dtype=torch.float64)
    blocks = [(slice(3 * g, 3 * g + 3), slice(2 * g, 2 * g + 2)) for g in range(3)]
    check_equal(
        StructuredBand.groupwise(2, 3),
        3,
        6,
        9,
        reference,
        lambda w: torch.cat([w[rows, cols] for rows, cols in blocks]),
    )


def test_pointwise():
    reference = nn.Conv2d(5, 7, 1, bias=False, dtype=torch.float64)
    check_equal(StructuredBand.pointwise((3, 3)), 3, 5, 7, reference, lambda w: w[:, :, 1:2, 1:2])


def test_band_wraps_around_and_cycles_through_tap_sets():
    pattern = StructuredBand(2, stride=1, taps=((0,), (1, 2))).pattern("conv", (4, 3, 3), 1)
    kept = pattern.mask()
    for o in range(4):
        for c in range(3):
            in_band = c in (o % 3, (o + 1) % 3)
            taps = ((0,), (1, 2))[(o + c) % 2] if in_band else ()
            assert kept[o, c].nonzero().flatten().tolist() == list(taps)


# ---- PeriodicKernels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [4, 8, 16])
@pytest.mark.parametrize("support", [1, 2, 4])
def test_periodic_densities_are_the_papers(support, period):
    plain = PeriodicKernels(support, period).pattern("conv", (32, 16, 3, 3), 1)
    assert plain.density == support / 9
    boosted = PeriodicKernels(support, period, boosted=True).pattern("conv", (32, 16, 3, 3), 1)
    assert boosted.density == ((period - 1) * support + 9) / (9 * period)


def test_periodic_supports_one_by_one():
    kept = PeriodicKernels(4, 8, boosted=True).pattern("conv", (8, 8, 3, 3), 1).mask().flatten(2)
    windows = [{0, 1, 3, 4}, {1, 2, 4, 5}, {3, 4, 6, 7}, {4, 5, 7, 8}]
    for o in range(8):
        for c in range(8):
            r = (o + c + 1) % 8
            expected = set(range(9)) if r == 0 else windows[r % 4]
            assert set(kept[o, c].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize(
    ("support", "kernel", "expected"),
    [
        (1, (5,), [{t} for t in range(5)]),
        (2, (3,), [{0, 1}, {1, 2}]),
        (2, (3, 1), [{0, 1}, {1, 2}]),
        (2, (1, 3), [{0, 1}, {1, 2}]),
        (2, (2, 3), [{0, 1}, {1, 2}, {3, 4}, {4, 5}]),
        (4, (2, 4), [{0, 1, 4, 5}, {1, 2, 5, 6}, {2, 3, 6, 7}]),
        (4, (2, 2, 2), [{0, 1, 2, 3}, {4, 5, 6, 7}]),
    ],
)
def test_periodic_supports_of_other_kernels(support, kernel, expected):
    kept = PeriodicKernels(support, 8).pattern("conv", (8, 3, *kernel), 1).mask().flatten(2)
    for o in range(8):
        for c in range(3):
            taps = set(kept[o, c].nonzero().flatten().tolist())
            assert taps == expected[(o + c + 1) % 8 % len(expected)]


def test_kernels_without_such_windows_stay_dense():
    with pytest.raises(PatternError, match=r"conv: expected a kernel with windows of 4 taps, got 3x1"):
        PeriodicKernels(4, 8).pattern("conv", (8, 8, 3, 1), 1)


# ---- RandomBlocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.01, 0.25, 0.5, 1.0])
def test_random_blocks_have_exact_counts_and_repeat(density):
    scheme = RandomBlocks((4, 3), density)
    pattern = scheme.pattern("a", (10, 7, 3), 1)
    assert pattern.num_kept == 3 * max(1, math.floor(density * 9 + 0.5))
    assert pattern == scheme.pattern("a", (10, 7, 3), 1)
    if density == 0.5:
        assert pattern != scheme.pattern("b", (10, 7, 3), 1)
        assert pattern != RandomBlocks((4, 3), density, seed=1).pattern("a", (10, 7, 3), 1)


# ---- the pass ------------------------------------------------------------------------------------------


def test_training_stays_inside_the_pattern_and_folding_keeps_the_outputs():
    model = bsc.apply_pattern(small_net(), RandomBlocks((4, 4), 0.5))
    assert masked_names(model) == ["3", "5", "8"]
    mask = parametrize_mask(model[5]).clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        original = model[5].parametrizations.weight.original
        assert (original.grad[~mask] == 0).all()
        assert (original.grad[mask] != 0).any()
        optimizer.step()
    assert ((model[5].weight != 0) == mask).all()
    model.eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    bsc.fold_zero_blocks(model)
    assert torch.equal(model(x), expected)
    assert all(isinstance(model[i], KeptTiles) and model[i].block_shape == (4, 4) for i in (3, 5, 8))


def test_periodic_layers_fold_to_single_weights():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    bsc.fold_zero_blocks(bsc.apply_pattern(model, PeriodicKernels(2, 4)))
    assert model[1].values.shape == (8 * 8 * 2, 1, 1)


def test_a_mask_that_keeps_everything_leaves_a_dense_layer():
    model = bsc.fold_zero_blocks(bsc.apply_pattern(nn.Sequential(nn.Linear(4, 4)), RandomBlocks((2, 2), 1.0)))
    assert type(model[0]) is nn.Linear


def test_scales_go_on_top_of_a_pattern():
    model = bsc.apply_pattern(nn.Sequential(nn.Linear(8, 8)), RandomBlocks((2, 2), 0.5))
    bsc.insert_block_scales(model, (4, 4))
    assert torch.equal(model[0].weight != 0, parametrize_mask(model[0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PeriodicKernels(3, 4), "support 1, 2 or 4, got 3"),
        (lambda: PeriodicKernels(4, 0), "period >= 1, got 0"),
        (lambda: StructuredBand(0), "width >= 1, got 0"),
        (lambda: StructuredBand(2, taps=((),)), "tap sets"),
        (lambda: RandomBlocks((2, 2), 0.0), r"density in \(0, 1\]"),
    ],
)
def test_bad_schemes(make, message):
    with pytest.raises(OptionError, match=message):
        make()


@pytest.mark.parametrize(
    ("scheme", "name", "error", "message"),
    [
        (PeriodicKernels(4, 8), "0", LayerError, r"^0: expected a layer after the first convolution"),
        (PeriodicKernels(4, 8), "8", PatternError, r"^8: expected a kernel larger than 1x1, got a linear"),
        (StructuredBand(9), "3", PatternError, r"^3: expected a band no wider than 8"),
        (StructuredBand(1, taps=((4,),)), "5", PatternError, r"^5: expected taps below 4"),
        (RandomBlocks((16, 16), 0.5), "8", PatternError, r"^8: expected a block no larger"),
    ],
)
def test_schemes_that_do_not_fit_a_layer(scheme, name, error, message):
    model = small_net()
    with pytest.raises(error, match=message):
        bsc.apply_pattern(model, scheme, include=name)
    assert masked_names(model) == []


def test_a_layer_is_masked_once():
    model = bsc.apply_pattern(small_net(), RandomBlocks((2, 2), 0.5))
    with pytest.raises(LayerError, match=r"^3: expected a plain dense weight"):
        bsc.apply_pattern(model, RandomBlocks((2, 2), 0.5), include="3")
