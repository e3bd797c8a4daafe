"""fold_constants and fold_batch_norm change nothing but cost."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn.utils import parametrize, prune

from blocksparse_compiler.passes import find_sites, fold_batch_norm, fold_constants
from blocksparse_compiler.passes.calls import layer_call, norm_call
from blocksparse_compiler.passes.static_values import StaticValues
from blocksparse_compiler.trace import trace

CONVS = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def randomize(norm: nn.Module) -> nn.Module:
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if norm.affine:
        norm.weight.data.normal_()
        norm.bias.data.normal_()
    return norm


def count_norms(gm):
    return sum(norm_call(n) is not None for n in gm.graph.nodes)


@settings(deadline=None, max_examples=25)
@given(
    dims=st.sampled_from([1, 2, 3]),
    transposed=st.booleans(),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    affine=st.booleans(),
)
def test_batch_norm_folds_exactly(dims, transposed, groups, bias, affine):
    conv_type, norm_type = CONVS[dims]
    conv_type = TRANSPOSED[dims] if transposed else conv_type
    model = nn.Sequential(
        conv_type(4, 6, 3, stride=2, padding=1, groups=groups, bias=bias),
        randomize(norm_type(6, affine=affine)),
        nn.ReLU(),
    )
    model = model.double().eval()
    x = torch.randn(2, 4, *[7] * dims, dtype=torch.float64)
    gm = trace(model, x)
    assert count_norms(gm) == 1
    assert fold_batch_norm(gm) == 1
    assert count_norms(gm) == 0
    torch.testing.assert_close(gm(x), model(x), rtol=1e-11, atol=1e-11)
    assert fold_batch_norm(gm) == 0


def test_batch_norm_after_linear_folds_only_over_channels():
    flat = nn.Sequential(nn.Linear(5, 6), randomize(nn.BatchNorm1d(6))).double().eval()
    x = torch.randn(3, 5, dtype=torch.float64)
    gm = trace(flat, x)
    assert fold_batch_norm(gm) == 1
    torch.testing.assert_close(gm(x), flat(x), rtol=1e-11, atol=1e-11)
    sequence = nn.Sequential(nn.Linear(5, 6), randomize(nn.BatchNorm1d(4))).double().eval()
    assert fold_batch_norm(trace(sequence, torch.randn(3, 4, 5, dtype=torch.float64))) == 0


def test_zero_tiles_stay_zero_and_the_model_is_untouched():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), randomize(nn.BatchNorm2d(6))).eval()
    model[0].weight.data[:, :2] = 0
    before = model[0].weight.detach().clone()
    gm = trace(model, torch.randn(1, 4, 5, 5))
    fold_batch_norm(gm)
    (site,) = find_sites(gm)
    node = next(n for n in gm.graph.nodes if n.name == site.node)
    folded = StaticValues(gm).get(node.args[1])
    assert (folded[:, :2] == 0).all() and folded[:, 2:].abs().min() > 0
    assert torch.equal(model[0].weight, before)


def test_a_convolution_with_other_users_keeps_its_batch_norm():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), randomize(nn.BatchNorm2d(4))

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    x = torch.randn(1, 4, 5, 5)
    assert fold_batch_norm(trace(Net().eval(), x)) == 0


def masked(layer):
    prune.random_unstructured(layer, "weight", amount=0.5)
    return layer


class Half(nn.Module):
    def forward(self, w):
        return w * 0.5


def scaled(layer):
    parametrize.register_parametrization(layer, "weight", Half())
    return layer


@pytest.mark.parametrize("change", [masked, scaled, nn.utils.parametrizations.weight_norm])
def test_computed_weights_become_constants(change):
    model = nn.Sequential(change(nn.Conv2d(4, 8, 3)), nn.ReLU(), change(nn.Linear(6, 5))).eval()
    x = torch.randn(2, 4, 8, 8)
    gm = trace(model, x)
    expected = gm(x)
    assert fold_constants(gm) == 2
    torch.testing.assert_close(gm(x), expected, rtol=0, atol=0)
    layers = [call for n in gm.graph.nodes if (call := layer_call(n))]
    assert [call.weight.op for call in layers] == ["get_attr", "get_attr"]
    assert not any("mul" in n.name or "norm" in n.name for n in gm.graph.nodes), gm.graph


def test_weights_that_depend_on_the_input_are_not_static():
    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return nn.functional.linear(x, self.w * x.mean())

    gm = trace(Hyper(), torch.randn(2, 4))
    assert fold_constants(gm) == 0
    assert len(find_sites(gm)) == 1


def test_random_weights_are_not_static():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return nn.functional.linear(x, torch.nn.functional.dropout(self.w, 0.5, training=True))

    assert fold_constants(trace(Noisy(), torch.randn(2, 4))) == 0
