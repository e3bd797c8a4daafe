"""BlockSparsifier: exact budgets, the modes and importances, resuming, and what it refuses."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import FIXED
from torch import nn
from torch.nn.utils import parametrize
from training_cases import block_of_each_weight, layers, small_net

import blocksparse_compiler as bsc
from blocksparse_compiler import BlockSparsifier, SparsitySchedule
from blocksparse_compiler.budget import block_elements, choose_blocks, weight_budget
from blocksparse_compiler.errors import LayerError, OptionError, PatternError
from blocksparse_compiler.importance import IMPORTANCES
from blocksparse_compiler.layout import canonical_shape, groups_of
from blocksparse_compiler.pattern import BlockPattern
from blocksparse_compiler.scales import block_scales

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 10


def train(model, sparsifier, optimizer, steps, lr=0.05):
    model.train()
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(X), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sparsifier.step(lr)


def set_up(seed=0, block=(4, 3), lr=0.05, **options):
    torch.manual_seed(seed)
    model = small_net()
    sparsifier = BlockSparsifier(model, block, **options)
    return model, sparsifier, torch.optim.SGD(sparsifier.param_groups(1e-3), lr, momentum=0.9)


# ---- exact budgets -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(layers(), min_size=1, max_size=3), st.floats(0, 1), st.integers(1, 50), st.booleans())
def test_a_budget_of_weights_is_spent_to_less_than_one_block(cases, density, uses, per_tap):
    fulls = []
    for layer, _, block in cases:
        fulls.append(BlockPattern.full(canonical_shape(layer), block, groups_of(layer)))
    budget = weight_budget(fulls, [uses] * len(fulls), per_tap)
    scores = [torch.rand(e.shape, dtype=torch.float64) for e in budget.elements]
    total = budget.total([torch.ones_like(s, dtype=torch.bool) for s in scores])
    assert total == uses * sum(math.prod(full.weight_shape) for full in fulls)
    kept = choose_blocks(scores, budget, density * total)
    least = budget.total(choose_blocks(scores, budget, 0))
    assert all(bool(mask.any()) for mask in kept)
    spent = budget.total(kept)
    assert spent <= max(density * total, least)
    pruned = [uses * int(c) for e, m in zip(budget.elements, kept, strict=True) for c in e[~m]]
    assert not pruned or density * total - spent < min(pruned)


def test_large_costs_are_counted_exactly():
    """Where float32 would be off by one: 2^24 + 1 positions."""
    full = BlockPattern.full((4, 4), (1, 1))
    budget = weight_budget([full], [2**24 + 1], per_tap=False)
    scores = [torch.arange(16.0).reshape(4, 4)]
    for n in range(1, 16):
        assert int(choose_blocks(scores, budget, n * (2**24 + 1))[0].sum()) == n
        assert int(choose_blocks(scores, budget, n * (2**24 + 1) - 1)[0].sum()) == max(1, n - 1)


@settings(deadline=None, max_examples=30)
@given(layers())
def test_elements_of_each_block(case):
    layer, _, block = case
    where = block_of_each_weight(layer, block).flatten(0, -2)
    counts = block_elements(BlockPattern.full(canonical_shape(layer), block, groups_of(layer)))
    for row in range(counts.shape[0]):
        for col in range(counts.shape[1]):
            assert counts[row, col] == ((where[:, 0] == row) & (where[:, 1] == col)).sum()


@pytest.mark.parametrize("importance", list(IMPORTANCES))
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("density", [0.3, 0.5, 1.0])
def test_parameters_kept_are_those_asked_for(importance, scope, density):
    model, sparsifier, optimizer = set_up(
        target_density=density,
        importance=importance,
        scope=scope,
        schedule=SparsitySchedule(ramp=4, freeze=6),
    )
    train(model, sparsifier, optimizer, 8)
    rows = [bsc.sparsity_report(model)[name] for layer in sparsifier.layers for name in layer.names]
    weights = {r.name: model.get_submodule(r.name).weight.count_nonzero().item() for r in rows}
    dense = {r.name: model.get_submodule(r.name).weight.numel() for r in rows}
    block = 4 * 3 * 9
    assert density * sum(dense.values()) - (block if scope == "global" else 3 * block) < sum(weights.values())
    assert sum(weights.values()) <= density * sum(dense.values())
    assert sparsifier.density == sum(weights.values()) / sum(dense.values())
    if scope == "layer":
        assert all(weights[n] <= density * dense[n] for n in weights)
    assert sparsifier.frozen


def test_a_budget_of_macs_prunes_where_positions_are_many():
    densities = {}
    for budget in ("parameters", "macs"):
        model, sparsifier, _ = set_up(
            target_density=0.5, budget=budget, example_inputs=(X,), importance="magnitude"
        )
        sparsifier.step()
        total = bsc.sparsity_report(model, X)
        kept = [total[n] for layer in sparsifier.layers for n in layer.names]
        if budget == "macs":
            macs, dense = sum(r.macs for r in kept), sum(r.dense_macs for r in kept)
            assert 0.5 * dense - 8 * 64 * 4 * 3 * 9 < macs <= 0.5 * dense
            assert sparsifier.density == macs / dense
        densities[budget] = {r.name: r.parameters / r.dense_parameters for r in kept}
    assert densities["macs"]["8"] > densities["parameters"]["8"]  # the linear layer, used once per image
    assert densities["macs"]["8"] == 1


def test_a_budget_of_latency_is_what_the_planner_predicts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 64, 1)).eval()
    x = torch.randn(8, 64, 14, 14)

    def predicted():
        return sum(d.estimates[d.kernel] for d in bsc.plan(bsc.trace(model, x), FIXED))

    dense = predicted()
    sparsifier = BlockSparsifier(
        model, (32, 32), target_density=0.6, budget="latency", device=FIXED, example_inputs=(x,)
    )
    assert sparsifier._dense_cost == pytest.approx(dense)
    sparsifier.step()
    sparsifier.fold()
    assert 0.5 * dense < predicted() <= 0.6 * dense
    assert predicted() / dense == pytest.approx(sparsifier.density)


@pytest.mark.parametrize("budget", ["parameters", "latency"])
def test_a_target_that_no_structure_reaches(budget):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = copy.deepcopy(model)
    options = {"budget": budget, "device": FIXED, "example_inputs": (torch.zeros(1, 8),)}
    with pytest.raises(OptionError, match=r"at least .*, which one block in each layer costs"):
        BlockSparsifier(model, (4, 4), target_density=0.1, **options)
    assert model.state_dict().keys() == before.state_dict().keys()


# ---- importances -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"gamma": 0.1}, *({"importance": i} for i in IMPORTANCES)], ids=str)
def test_gates_change_nothing_at_first(options):
    expected = small_net().eval()(X)
    if "gamma" not in options:
        options = {**options, "target_density": 0.5}
    model, sparsifier, _ = set_up(**options)
    torch.testing.assert_close(model.eval()(X), expected)
    assert sparsifier.density == 1


@settings(deadline=None, max_examples=40)
@given(layers(), st.sampled_from(list(IMPORTANCES)), st.integers(0, 99))
def test_gates_zero_exactly_the_blocks_not_selected(case, importance, seed):
    layer, _, block = case
    before, where = layer.weight.detach().clone(), block_of_each_weight(layer, block)
    sparsifier = BlockSparsifier(nn.Sequential(layer), block, target_density=1.0, importance=importance)
    gate = sparsifier.layers[0].gate
    kept = torch.rand(gate.kept.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    kept[0, 0] = True
    gate.select(kept)
    expected = torch.where(kept[where[..., 0], where[..., 1]], before, 0)
    torch.testing.assert_close(layer.weight.detach(), expected)
    assert torch.equal(gate.kept, kept)


def test_single_weights_of_any_kernel():
    model, sparsifier, optimizer = set_up(
        block=(1, 1), target_density=0.1, importance="magnitude", per_tap=True
    )
    magnitudes = model[3].parametrizations.weight.original.detach().abs()
    sparsifier.step()
    kept, pruned = magnitudes[model[3].weight != 0], magnitudes[model[3].weight == 0]
    assert kept.min() >= pruned.max()
    nonzero = sum(model[i].weight.count_nonzero().item() for i in (0, 3, 5, 8))
    assert nonzero == math.floor(0.1 * sum(model[i].weight.numel() for i in (0, 3, 5, 8)))
    train(model, sparsifier, optimizer, 3)
    model.eval()
    before = model(X)
    sparsifier.fold()
    torch.testing.assert_close(model(X), before)
    assert sum(model[i].values.numel() for i in (0, 3, 5, 8)) == nonzero


def test_a_pruned_block_returns_when_the_data_asks_for_it():
    """Scales learn straight through the selection; the block that the target needs replaces a useless one."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(layer)
    sparsifier = BlockSparsifier(model, (2, 2), target_density=0.5)
    needed = torch.tensor([[True, False], [False, True]])
    target = layer.parametrizations.weight.original.detach().clone()
    target *= needed.repeat_interleave(2, 0).repeat_interleave(2, 1)
    sparsifier.layers[0].gate.select(~needed)
    optimizer = torch.optim.SGD(sparsifier.param_groups(1e-3), 0.1)
    for _ in range(100):
        optimizer.zero_grad()
        (layer.weight - target).square().sum().backward()
        optimizer.step()
        sparsifier.step()
    assert torch.equal(sparsifier.masks[0], needed)
    torch.testing.assert_close(layer.weight, target, atol=0.02, rtol=0)


def test_attention_starts_even_and_goes_where_the_gradient_is():
    layer = nn.Linear(4, 4, bias=False)
    sparsifier = BlockSparsifier(nn.Sequential(layer), (2, 2), target_density=0.5, importance="attention")
    optimizer = torch.optim.SGD(sparsifier.param_groups(0), 0.1)
    (layer.weight[:2].square().sum() - layer.weight[2:].square().sum()).backward()  # lower rows should grow
    optimizer.step()
    sparsifier.step()
    assert torch.equal(sparsifier.masks[0], torch.tensor([[False, False], [True, True]]))


def uneven_scales(model):
    generator = torch.Generator().manual_seed(0)
    for _, scale in block_scales(model):
        with torch.no_grad():
            scale.scale.uniform_(0.3, 1, generator=generator)


def test_gamma_is_dbsr_step_by_step():
    """The same numbers as insert_block_scales, param_groups and proximal_step by hand."""
    by_hand = bsc.insert_block_scales(small_net(), (4, 3))
    uneven_scales(by_hand)
    optimizer = torch.optim.SGD(bsc.param_groups(by_hand, 1e-3), 0.05, momentum=0.9)
    for step in range(12):
        if step == 8:
            bsc.freeze_scales(by_hand)
        optimizer.zero_grad()
        nn.functional.cross_entropy(by_hand(X), LABELS).backward()
        optimizer.step()
        bsc.proximal_step(by_hand, 0.05 * 1.5)
    model, sparsifier, optimizer = set_up(gamma=1.5, schedule=SparsitySchedule(freeze=8))
    uneven_scales(model)
    train(model, sparsifier, optimizer, 12)
    for (name, a), b in zip(model.state_dict().items(), by_hand.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert 0 < sparsifier.density < 1


def test_gamma_ramps_and_the_penalty_is_its_gradient():
    model, sparsifier, _ = set_up(gamma=0.5, schedule=SparsitySchedule(warmup=1, ramp=4, shape="linear"))
    scales = sum(layer.gate.scale.numel() for layer in sparsifier.layers)
    for step in range(7):
        factor = min(1.0, max(0.0, step / 4))
        assert sparsifier.penalty().item() == pytest.approx(0.5 * factor * scales, rel=1e-6)
        before = sparsifier.layers[0].gate.scale.detach().clone()
        sparsifier.step(0.0)
        assert torch.equal(sparsifier.layers[0].gate.scale, before)
    sparsifier.penalty().backward()
    assert (sparsifier.layers[0].gate.scale.grad == 0.5).all()
    del model


def test_frozen_gates_stay_under_momentum():
    model, sparsifier, optimizer = set_up(gamma=0.5)
    train(model, sparsifier, optimizer, 5)
    sparsifier.freeze()
    before = [layer.gate.scale.detach().clone() for layer in sparsifier.layers]
    for layer in sparsifier.layers:  # as under a reducer that goes on handing out gradients
        layer.gate.scale.requires_grad_(True)
    train(model, sparsifier, optimizer, 3)
    assert all(torch.equal(layer.gate.scale, b) for layer, b in zip(sparsifier.layers, before, strict=True))
    assert sparsifier.penalty() == 0


def test_a_layer_that_loses_all_its_blocks_is_named(caplog):
    model, sparsifier, optimizer = set_up(gamma=100.0)
    train(model, sparsifier, optimizer, 3)
    sparsifier.freeze()
    assert "no block is left in 0, 3, 5, 8: use a smaller gamma" in caplog.text


def test_tied_weights_are_pruned_and_counted_once():
    a, b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    b.weight = a.weight
    model = nn.Sequential(a, nn.ReLU(), b)
    sparsifier = BlockSparsifier(model, (4, 4), target_density=0.5)
    assert [layer.names for layer in sparsifier.layers] == [("0", "2")]
    sparsifier.step()
    sparsifier.fold()
    assert model[0].values is model[2].values
    assert model[0].values.numel() == 32


def test_a_gate_goes_on_top_of_a_fixed_pattern():
    model = bsc.apply_pattern(nn.Sequential(nn.Linear(8, 8)), bsc.RandomBlocks((4, 4), 0.75, seed=1))
    dead = (model[0].weight == 0).all(1).any()
    sparsifier = BlockSparsifier(model, (4, 4), target_density=0.5, importance="magnitude")
    sparsifier.step()
    assert model[0].weight.count_nonzero() == 32 or dead


# ---- resuming ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 1.0},
        *({"target_density": 0.4, "importance": i} for i in IMPORTANCES),
        {"target_density": 0.4, "importance": "magnitude", "per_tap": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("saved_at", [5, 8])  # before and after the freeze
def test_resuming_changes_not_one_bit(options, saved_at, tmp_path):
    schedule = SparsitySchedule(warmup=1, ramp=4, freeze=7, every=2)
    model, sparsifier, optimizer = set_up(schedule=schedule, **options)
    train(model, sparsifier, optimizer, saved_at)
    parts = {"model": model, "sparsifier": sparsifier, "optimizer": optimizer}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "checkpoint.pt")
    train(model, sparsifier, optimizer, 12 - saved_at)

    resumed, again, optimizer = set_up(seed=1, schedule=schedule, **options)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["sparsifier"])
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, again, optimizer, 12 - saved_at)
    assert again.state_dict() == sparsifier.state_dict()
    for (name, a), b in zip(resumed.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_resuming_something_else_is_an_error_and_changes_nothing():
    _, sparsifier, _ = set_up(target_density=0.5)
    sparsifier.step()
    state = sparsifier.state_dict()
    others = [
        (
            set_up(block=(4, 4), target_density=0.5)[1],
            PatternError,
            r"expected blocks of \(4, 4\), got \(4, 3\)",
        ),
        (set_up(target_density=0.5, importance="attention")[1], OptionError, "importance='attention'"),
        (set_up(gamma=0.5)[1], OptionError, "gamma and target_density"),
        (set_up(target_density=0.5, exclude="8")[1], PatternError, ": 8: expected blocks of no such layer"),
    ]
    for other, error, message in others:
        before = other.state_dict()
        with pytest.raises(error, match=message):
            other.load_state_dict(state)
        assert other.state_dict() == before
    with pytest.raises(OptionError, match="what state_dict returned"):
        sparsifier.load_state_dict({"steps": 3})
    assert sparsifier.steps == 1


# ---- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either gamma or target_density, got neither"),
        ({"gamma": 0.1, "target_density": 0.5}, "got both"),
        ({"gamma": -0.1}, "a finite gamma >= 0, got -0.1"),
        ({"gamma": float("nan")}, "a finite gamma >= 0"),
        ({"target_density": 0}, r"target_density in \(0, 1\], got 0"),
        ({"target_density": 1.5}, r"target_density in \(0, 1\], got 1.5"),
        ({"target_density": 0.5, "budget": "flops"}, "budget to be one of parameters, macs, latency"),
        ({"target_density": 0.5, "importance": "taylor"}, "importance to be one of"),
        ({"target_density": 0.5, "scope": "model"}, "scope to be one of"),
        ({"target_density": 0.5, "budget": "macs"}, "example_inputs to be a tuple"),
        ({"target_density": 0.5, "per_tap": True}, "per_tap=False"),
        ({"gamma": 0.1, "importance": "magnitude"}, 'importance="scales" with gamma'),
        ({"gamma": 0.1, "block_shape": (0, 4)}, "two positive integers"),
        ({"gamma": 0.1, "block_shape": (64, 64)}, "a block no larger than"),
        ({"gamma": 0.1, "include": "nowhere"}, "nowhere"),
    ],
    ids=str,
)
def test_wrong_options_change_nothing(options, message):
    model = small_net()
    with pytest.raises((OptionError, PatternError, LayerError), match=message):
        BlockSparsifier(model, **{"block_shape": (4, 3), **options})
    assert not any(parametrize.is_parametrized(m) for m in model.modules())


@pytest.mark.parametrize("lr", [None, -1.0, float("inf")])
def test_gamma_needs_a_learning_rate(lr):
    _, sparsifier, _ = set_up(gamma=0.1)
    with pytest.raises(OptionError, match=r"sparsifier.step\(lr\)"):
        sparsifier.step(lr)
    assert sparsifier.steps == 0


def test_after_folding_there_is_nothing_to_step():
    model, sparsifier, _ = set_up(target_density=0.5)
    assert sparsifier.fold() is model
    with pytest.raises(LayerError, match="a model that is not folded"):
        sparsifier.step()


def test_two_sparsifiers_do_not_share_a_layer():
    model, _, _ = set_up(target_density=0.5)
    with pytest.raises(LayerError, match="one that has them"):
        BlockSparsifier(model, (4, 3), gamma=0.1)


def _layers() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3), nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize("value", ["0.5", None, float("nan"), float("inf"), -0.1])
def test_numbers_that_are_none_are_option_errors(value):
    for call in (
        lambda: bsc.BlockSparsifier(_layers(), (16, 16), gamma=value),
        lambda: bsc.BlockSparsifier(_layers(), (16, 16), target_density=value),
        lambda: bsc.prune_blocks(_layers(), (16, 16), value),
        lambda: bsc.RandomBlocks((16, 16), value),
        lambda: bsc.proximal_step(_layers(), value),
        lambda: bsc.param_groups(_layers(), value),
        lambda: bsc.BlockSparsifier(_layers(), (16, 16), gamma=0.1).param_groups(value),
    ):
        with pytest.raises(OptionError):
            call()


def test_the_error_is_about_the_largest_layer():
    model = _layers()
    bsc.BlockSparsifier(model, (16, 16), gamma=0.1)
    with pytest.raises(LayerError, match=r"^1: .*block scales.* No other layer of the model"):
        bsc.BlockSparsifier(model, (16, 16), gamma=0.1)
    with pytest.raises(LayerError, match=r"expected a torch\.nn\.Module, got str"):
        bsc.BlockSparsifier("model", (16, 16), gamma=0.1)


@pytest.mark.parametrize("scheme", ["periodic", bsc.PeriodicKernels, None])
def test_what_is_no_scheme_is_an_error(scheme):
    with pytest.raises(OptionError, match="expected a scheme, got"):
        bsc.apply_pattern(_layers(), scheme)


def test_a_model_of_another_block_shape_says_so():
    saved = _layers()
    bsc.BlockSparsifier(saved, (16, 16), gamma=0.1)
    model = _layers()
    bsc.BlockSparsifier(model, (8, 8), gamma=0.1)
    with pytest.raises(
        RuntimeError, match=r"1: expected \[8, 4\] blocks of 8x8 channels, got \[4, 2\]. Build"
    ):
        model.load_state_dict(saved.state_dict())
