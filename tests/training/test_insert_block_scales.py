import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from training_cases import block_of_each_weight, layers, small_net

import blocksparse_compiler as bsc
from blocksparse_compiler.errors import LayerError, PatternError
from blocksparse_compiler.scales import block_scale_of, block_scales


def scaled_names(model):
    return [name for name, _ in block_scales(model)]


@settings(deadline=None, max_examples=60)
@given(layers())
def test_scales_multiply_their_blocks_and_learn_straight_through_the_clamp(case):
    layer, x, block = case
    plain, model = copy.deepcopy(layer), nn.Sequential(layer)
    where = block_of_each_weight(layer, block)
    expected = plain(x)
    assert bsc.insert_block_scales(model, block) is model
    assert torch.equal(model(x), expected)

    scale = block_scale_of(layer).scale
    assert tuple(scale.shape) == tuple((where.flatten(0, -2).amax(0) + 1).tolist())
    with torch.no_grad():
        scale.copy_(torch.randn_like(scale) * 1.5)  # below 0, inside, above 1
    effective = plain.weight.detach() * scale.detach().clamp(0, 1)[where[..., 0], where[..., 1]]
    assert torch.equal(layer.weight, effective)

    model(x).square().sum().backward()
    reference = effective.clone().requires_grad_()
    with torch.no_grad():
        plain.weight.copy_(reference)
    torch.func.functional_call(plain, {"weight": reference}, (x,)).square().sum().backward()
    data_gradient = reference.grad * layer.parametrizations.weight.original.detach()
    expected_grad = torch.zeros_like(scale)
    expected_grad.index_put_((where[..., 0], where[..., 1]), data_gradient, accumulate=True)
    torch.testing.assert_close(scale.grad, expected_grad)
    dead = (scale.detach() <= 0)[where[..., 0], where[..., 1]]
    assert (layer.parametrizations.weight.original.grad[dead] == 0).all()


def test_gradcheck_inside_the_clamp():
    layer = nn.Conv2d(3, 4, 2, dtype=torch.float64)
    x = torch.randn(1, 3, 3, 3, dtype=torch.float64)
    bsc.insert_block_scales(nn.Sequential(layer), (3, 2))
    scale, weight = block_scale_of(layer).scale, layer.parametrizations.weight.original
    with torch.no_grad():
        scale.copy_(torch.rand_like(scale) * 0.8 + 0.1)

    def forward(scale, weight):
        values = {"parametrizations.weight.0.scale": scale, "parametrizations.weight.original": weight}
        return torch.func.functional_call(layer, values, (x,))

    assert torch.autograd.gradcheck(forward, (scale, weight))


def test_layers_too_small_stay_and_the_reason_is_logged(caplog):
    model = small_net()
    with caplog.at_level(logging.INFO, "blocksparse_compiler"):
        bsc.insert_block_scales(model, (8, 8))
    assert scaled_names(model) == ["3", "5", "8"]
    assert "leaves 0 as it is: 0: expected a block no larger than a group's weight (16 x 3)" in caplog.text
    bsc.insert_block_scales(model, (8, 3))  # the layers left over
    assert scaled_names(model) == ["0", "3", "5", "8"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, ["0", "3", "5", "8"]),
        ("3", None, ["3"]),
        (["0", nn.Linear], None, ["0", "8"]),
        (nn.Conv2d, None, ["0", "3"]),
        (None, [nn.Conv2d, "8"], ["5"]),
        ("[05]", "5", ["0"]),
    ],
)
def test_include_and_exclude(include, exclude, expected):
    model = bsc.insert_block_scales(small_net(), (2, 2), include=include, exclude=exclude)
    assert scaled_names(model) == expected


def test_a_name_stands_for_what_is_below_it():
    model = nn.ModuleDict({"body": small_net(), "head": nn.Linear(10, 4)})
    model.forward = lambda x: model["head"](model["body"](x))
    bsc.insert_block_scales(model, (2, 2), include="body", exclude="*.8")
    assert scaled_names(model) == ["body.0", "body.3", "body.5"]


ERRORS = {
    "not_a_block": ({"block_shape": (0, 4)}, PatternError, "two positive integers"),
    "negative": ({"block_shape": (4, -4)}, PatternError, "two positive integers"),
    "one_number": ({"block_shape": 8}, PatternError, "two positive integers"),
    "too_large": (
        {"block_shape": (32, 32), "include": "3"},
        PatternError,
        r"^3: .*\(12 x 8\), got block_shape=\(32",
    ),
    "too_large_for_all": (
        {"block_shape": (64, 64)},
        PatternError,
        r"block_shape=\(64, 64\).* No other layer",
    ),
    "no_such_layer": ({"block_shape": (4, 4), "include": "3x"}, LayerError, "'3x'. Did you mean 3"),
    "no_such_exclude": ({"block_shape": (4, 4), "exclude": ["head.*"]}, LayerError, r"'head\.\*'"),
    "no_such_type": ({"block_shape": (4, 4), "include": nn.Conv3d}, LayerError, "Check include"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_layer_and_change_nothing(case):
    arguments, error, message = ERRORS[case]
    model = small_net()
    before = list(model.state_dict())
    with pytest.raises(error, match=message):
        bsc.insert_block_scales(model, **arguments)
    assert list(model.state_dict()) == before


def test_nan_weights_are_an_error_and_no_layer_is_changed():
    model = small_net()
    with torch.no_grad():
        model[5].weight[0, 0, 0, 0] = torch.nan
    before = list(model.state_dict())
    with pytest.raises(LayerError, match=r"^5: expected finite weights, got 1 "):
        bsc.insert_block_scales(model, (2, 2))
    assert list(model.state_dict()) == before


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("spoil", ["scaled", "folded", "pruned", "weight_norm_hook", "lazy"])
def test_a_named_layer_that_cannot_be_scaled_says_why(spoil):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if spoil == "scaled":
        bsc.insert_block_scales(model, (2, 2), include="0")
    elif spoil == "folded":
        bsc.fold_zero_blocks(bsc.prune_blocks(model, (2, 2), 0.5, include="0"), (2, 2), include="0")
    elif spoil == "pruned":
        prune.l1_unstructured(model[0], "weight", 0.5)
    elif spoil == "lazy":
        model[0] = nn.LazyLinear(4)
    else:
        torch.nn.utils.weight_norm(model[0])
    with pytest.raises(LayerError, match=r"^0: "):
        bsc.insert_block_scales(model, (2, 2), include="0")
    bsc.insert_block_scales(model, (2, 2), include=nn.Linear)  # not named: left as it is
    assert scaled_names(model)[-1] == "1"


def test_on_top_of_another_parametrization():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6)))
    x = torch.randn(2, 4)
    expected = model(x)
    bsc.insert_block_scales(model, (2, 2))
    assert torch.equal(model(x), expected)


class Branches(nn.Module):
    """Calls one layer, reads the weight of another, never uses the third."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.unused = (nn.Linear(4, 4) for _ in range(3))
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, x):
        return self.encoder(F.linear(self.called(x), self.read.weight))


class Untraceable(Branches):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def test_only_layers_that_forward_uses():
    model = bsc.insert_block_scales(Branches(), (2, 2))
    used = ["called", "read", "encoder.self_attn.out_proj", "encoder.linear1", "encoder.linear2"]
    assert scaled_names(model) == used
    assert scaled_names(bsc.insert_block_scales(Branches(), (2, 2), include="unused")) == ["unused"]


def test_a_model_that_fx_cannot_trace_is_walked_and_says_so_once(caplog):
    model = bsc.insert_block_scales(Untraceable(), (2, 2))
    assert "unused" in scaled_names(model)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "torch.fx cannot trace Untraceable" in warnings[0]


def test_looking_for_layers_leaves_no_traces_in_the_model():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Linear(4, 4), 0

        def forward(self, x):
            self.calls += 1
            self.features = self.layer(x)
            return self.features

    model = bsc.insert_block_scales(Remembers(), (2, 2))
    assert model.calls == 0
    assert not hasattr(model, "features")


def test_a_layer_used_twice_is_scaled_once():
    shared = nn.Linear(4, 4)
    model = bsc.insert_block_scales(nn.Sequential(shared, nn.ReLU(), shared), (2, 2))
    assert len(shared.parametrizations.weight) == 1
    assert scaled_names(model) == ["0"]


def test_tied_weights_share_their_scales():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    bsc.insert_block_scales(model, (2, 2))
    assert scaled_names(model) == ["0"]
    assert block_scale_of(model[0]) is block_scale_of(model[1])


def test_a_weight_tied_to_something_else_is_left_alone():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6))
    model[2].weight = model[0].weight
    assert scaled_names(bsc.insert_block_scales(model, (2, 2))) == ["1"]
    with pytest.raises(
        LayerError, match=r"^2: expected a weight of its own, got one shared with another Embedding"
    ):
        bsc.insert_block_scales(model, (2, 2), include="2")


def test_an_autoencoder_that_shares_its_weight_both_ways_is_left_alone():
    model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.ConvTranspose2d(4, 8, 3), nn.Conv2d(8, 8, 1))
    model[1].weight = model[0].weight
    assert scaled_names(bsc.insert_block_scales(model, (2, 2))) == ["2"]


def test_a_single_layer_as_the_model():
    layer = bsc.insert_block_scales(nn.Conv2d(4, 4, 3), (2, 2))
    assert block_scale_of(layer).scale.shape == (2, 2)


def test_parameters_keep_their_identity():
    model = small_net()
    before = [id(p) for p in model.parameters()]
    bsc.insert_block_scales(model, (2, 2))
    assert set(before) <= {id(p) for p in model.parameters()}


def test_state_dict_and_deepcopy():
    model = bsc.insert_block_scales(small_net(), (2, 2)).eval()
    with torch.no_grad():
        for _, scale in block_scales(model):
            scale.scale.uniform_(-1, 1)
    x = torch.randn(2, 3, 8, 8)
    other = bsc.insert_block_scales(small_net(), (2, 2)).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_moves(dtype):
    model = bsc.insert_block_scales(small_net(), (2, 2)).to(dtype)
    out = model(torch.randn(2, 3, 8, 8, dtype=dtype))
    (out.sum() + bsc.scale_penalty(model)).backward()
    assert all(s.scale.grad.dtype == dtype for _, s in block_scales(model))


def test_scaled_models_export_and_compile_in_one_graph():
    model = bsc.insert_block_scales(small_net(), (5, 3)).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert all(s.scale.grad is not None for _, s in block_scales(model))


def test_nothing_is_left_behind_in_torch():
    model = bsc.insert_block_scales(small_net(), (2, 2))
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Conv2d
