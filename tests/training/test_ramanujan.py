import math

import pytest
import torch
from torch import nn

import blocksparse_compiler as bsc
from blocksparse_compiler import RamanujanBlocks
from blocksparse_compiler.errors import OptionError, PatternError
from blocksparse_compiler.ramanujan import ramanujan_bound, ramanujan_graph, second_singular_value


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("rows", "cols", "degree"), [(8, 8, 3), (16, 16, 4), (32, 16, 8), (12, 18, 6), (64, 64, 16), (16, 32, 4)]
)
def test_graphs_are_biregular_and_ramanujan(rows, cols, degree, seed):
    graph = ramanujan_graph(rows, cols, degree, seed)
    assert set(graph.sum(1).tolist()) == {degree}
    assert set(graph.sum(0).tolist()) == {rows * degree // cols}
    assert second_singular_value(graph) <= ramanujan_bound(degree, rows * degree // cols) + 1e-6
    first = torch.linalg.svdvals(graph.double())[0]
    assert float(first) == pytest.approx(math.sqrt(degree * rows * degree / cols))
    assert torch.equal(graph, ramanujan_graph(rows, cols, degree, seed))
    assert not torch.equal(graph, ramanujan_graph(rows, cols, degree, seed + 1000))


def test_a_product_has_the_products_of_singular_values_and_equal_rows():
    pattern = RamanujanBlocks((2, 2), (0.5, 0.5)).pattern("conv", (64, 32, 3, 3), 1)
    kept = pattern.kept[:, 0]
    assert pattern.density == 0.25
    assert set(kept.sum(1).tolist()) == {4}
    assert set(kept.sum(0).tolist()) == {8}
    outer = kept.reshape(8, 4, 4, 4).any(3).any(1)
    inner = next(kept.reshape(8, 4, 4, 4)[r, :, c] for r, c in outer.nonzero().tolist())
    assert torch.equal(kept.int(), torch.kron(outer.int(), inner.int()))
    products = torch.outer(torch.linalg.svdvals(outer.double()), torch.linalg.svdvals(inner.double()))
    torch.testing.assert_close(
        torch.linalg.svdvals(kept.double())[:8],
        products.flatten().sort(descending=True).values[:8],
        atol=1e-6,
        rtol=1e-6,
    )


def test_masks_of_a_model_with_groups_train_and_fold():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 64, 3, groups=2), nn.ReLU(), nn.Conv2d(64, 16, 1))
    bsc.apply_pattern(model, RamanujanBlocks((4, 4), 0.5, seed=3))
    masks = [m.weight != 0 for m in (model[0], model[2])]
    assert [int(m.sum()) * 2 for m in masks] == [m.numel() for m in masks]
    assert not torch.equal(masks[0][:32], masks[0][32:])  # each group has a graph of its own
    x = torch.randn(2, 32, 6, 6)
    before = model(x)
    bsc.fold_zero_blocks(model)
    torch.testing.assert_close(model(x), before)
    assert model[0].pattern.density == model[2].pattern.density == 0.5


@pytest.mark.parametrize(
    ("scheme", "shape", "message"),
    [
        (RamanujanBlocks((1, 1), 0.5), (5, 3), "near a multiple of 1/1"),
        (RamanujanBlocks((1, 1), 0.3), (2, 8), "near a multiple of 1/2"),
        (RamanujanBlocks((1, 1), (0.5, 0.5)), (6, 8), "divides by 4"),
        (RamanujanBlocks((8, 8), 0.5), (4, 8), "no larger than"),
    ],
)
def test_grids_that_do_not_fit(scheme, shape, message):
    with pytest.raises(PatternError, match=message):
        scheme.pattern("layer", shape, 1)


@pytest.mark.parametrize("wrong", [{"density": 0}, {"density": (0.5, 2)}, {"density": ()}, {"inner_size": 1}])
def test_wrong_options(wrong):
    with pytest.raises(OptionError, match="RamanujanBlocks"):
        RamanujanBlocks((4, 4), **{"density": 0.5, **wrong})
