import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from training_cases import layers, small_net

import blocksparse_compiler as bsc
from blocksparse_compiler.errors import LayerError, PatternError
from blocksparse_compiler.layers import BlockSparseConv2d, BlockSparseLinear, KeptTiles
from blocksparse_compiler.layout import canonical_weight
from blocksparse_compiler.pattern import BlockPattern, gather_tiles
from blocksparse_compiler.scales import block_scale_of, block_scales


def folded_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, KeptTiles)]


def pruned_net(density=0.5, block=(4, 4)):
    return bsc.prune_blocks(small_net(), block, density).eval()


def image(n=2):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@settings(deadline=None, max_examples=80)
@given(layers(), st.floats(0, 1))
def test_folded_layers_compute_and_learn_as_before(case, dead):
    layer, x, block = case
    dense = copy.deepcopy(layer)
    model = bsc.insert_block_scales(nn.Sequential(layer), block)
    scale = block_scale_of(layer).scale
    with torch.no_grad():
        scale.copy_(torch.rand_like(scale) + 0.1).masked_fill_(torch.rand_like(scale) < dead, -0.2)
        dense.weight.copy_(layer.weight)
    assert bsc.fold_zero_blocks(model) is model
    assert isinstance(layer, KeptTiles) == bool((scale <= 0).any())
    assert not parametrize.is_parametrized(layer)
    assert torch.equal(layer.weight, dense.weight)
    assert torch.equal(model(x), dense(x))

    model(x).square().sum().backward()
    dense(x).square().sum().backward()
    if isinstance(layer, KeptTiles):
        assert layer.pattern.num_kept == int((scale > 0).sum()) * layer.pattern.num_taps
        expected = gather_tiles(canonical_weight(dense.weight.grad, dense), layer.pattern)
        torch.testing.assert_close(layer.values.grad, expected)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("make", [nn.Conv2d, nn.ConvTranspose2d])
def test_gradcheck_on_kept_tiles(make):
    layer = make(4, 6, 2, groups=2, dtype=torch.float64)
    model = bsc.fold_zero_blocks(bsc.prune_blocks(nn.Sequential(layer), (2, 2), 0.5), (2, 2))
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    assert isinstance(layer, KeptTiles)
    values = layer.values.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: torch.func.functional_call(model, {"0.values": v}, (x,)), values
    )


# ---- what gets folded -----------------------------------------------------------------------------


def test_plain_zero_blocks_are_found_in_their_own_shape():
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 1), nn.Linear(64, 48))
    bsc.prune_blocks(model, (16, 16), 0.5, include="0")
    bsc.prune_blocks(model, (32, 32), 0.5, include="2")
    bsc.fold_zero_blocks(model)
    assert folded_names(model) == ["0", "2"]
    assert model[0].block_shape == (16, 16)
    assert model[0].pattern.density == 0.5
    assert model[2].block_shape == (32, 32)


def test_zero_taps_of_a_kept_block_are_not_stored():
    layer = nn.Conv2d(8, 8, 3)
    with torch.no_grad():
        layer.weight[:, :, 0] = 0
        layer.weight[:4, 4:] = 0
    bsc.fold_zero_blocks(nn.Sequential(layer), (4, 4))
    assert layer.pattern.num_kept == 3 * 6


def test_without_zero_blocks_layers_stay_dense_and_lose_their_scales():
    model, x = small_net().eval(), image()
    bsc.insert_block_scales(model, (2, 2))
    with torch.no_grad():
        for _, scale in block_scales(model):
            scale.scale.fill_(0.5)
    expected = model(x)
    bsc.fold_zero_blocks(model)
    assert folded_names(model) == []
    assert {type(m) for m in model} == {type(m) for m in small_net()}
    assert model.state_dict().keys() == small_net().state_dict().keys()
    assert torch.equal(model(x), expected)


def test_masks_of_torch_prune_are_folded_where_there_are_zero_blocks():
    model, x = small_net().eval(), image()
    prune.ln_structured(model[3], "weight", amount=0.5, n=2, dim=0)
    prune.ln_structured(model[5], "weight", amount=0.25, n=2, dim=1)  # transposed: [C, O, ...]
    prune.l1_unstructured(model[8], "weight", amount=0.1)
    expected = model(x)
    bsc.fold_zero_blocks(model)
    assert folded_names(model) == ["3", "5"]
    assert [prune.is_pruned(model[i]) for i in (3, 5, 8)] == [False, False, True]
    assert (model[3].block_shape, model[3].pattern.density) == ((1, 8), 0.5)
    assert (model[5].block_shape, model[5].pattern.density) == ((1, 24), 0.75)
    assert torch.equal(model(x), expected)


def test_other_parametrizations_are_folded_only_where_there_are_zero_blocks():
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(8, 8)),
        parametrizations.spectral_norm(nn.Linear(8, 8)),
        parametrizations.weight_norm(nn.Linear(8, 8)),
    )
    with torch.no_grad():
        model[0].parametrizations.weight.original1[:4, :4] = 0
        model[1].parametrizations.weight.original[4:, 4:] = 0
    model.eval()
    expected = model(torch.ones(2, 8))
    model.train()
    before = model[1].parametrizations.weight[0]._u.clone()
    spectral = model[1].parametrizations.weight[0]
    bsc.fold_zero_blocks(model)
    assert torch.equal(spectral._u, before)  # looking at the weight is no training step
    assert folded_names(model) == ["0", "1"]
    assert parametrize.is_parametrized(model[2])
    assert torch.equal(model.eval()(torch.ones(2, 8)), expected)


def test_folding_a_copy_leaves_the_original_alone():
    model = bsc.insert_block_scales(small_net(), (4, 3)).eval()
    for _, scale in block_scales(model):
        scale.scale.data[0, 0] = 0
    expected = model(image())
    folded = bsc.fold_zero_blocks(copy.deepcopy(model))
    assert len(folded_names(folded)) == 4
    assert torch.equal(model(image()), expected)
    assert torch.equal(folded(image()), expected)
    assert len(list(block_scales(model))) == 4


def test_folding_twice_changes_nothing():
    model = bsc.fold_zero_blocks(pruned_net())
    before = {k: id(v) for k, v in model.named_parameters()}
    bsc.fold_zero_blocks(model)
    assert {k: id(v) for k, v in model.named_parameters()} == before


def test_the_layer_object_survives_with_its_hooks_and_sharing():
    layer, calls = nn.Linear(8, 8), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    model = nn.Sequential(layer, nn.ReLU(), layer)
    bsc.fold_zero_blocks(bsc.prune_blocks(model, (4, 4), 0.5))
    model(torch.randn(1, 8))
    assert model[0] is layer is model[2]
    assert isinstance(layer, BlockSparseLinear)
    assert len(calls) == 2


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    bsc.insert_block_scales(model, (4, 4))
    block_scale_of(model[0]).scale.data[0, 1] = 0
    x = torch.randn(2, 8)
    expected = model(x)
    bsc.fold_zero_blocks(model)
    assert model[0].values is model[1].values
    assert torch.equal(model(x), expected)


def test_a_weight_tied_to_an_embedding_stays_dense():
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    model[0].weight.data[:4] = 0
    assert folded_names(bsc.fold_zero_blocks(model)) == []
    with pytest.raises(LayerError, match=r"^1: expected a weight of its own"):
        bsc.fold_zero_blocks(model, include="1")


def test_frozen_weights_stay_frozen():
    model = pruned_net()
    model[3].weight.requires_grad_(False)
    bsc.fold_zero_blocks(model)
    assert not model[3].values.requires_grad
    assert model[8].values.requires_grad


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_users_own_layer_class_stays_as_it_is():
    model = nn.Sequential(Doubling(8, 8), nn.Linear(8, 8))
    bsc.prune_blocks(model, (4, 4), 0.5)
    expected = model(torch.ones(1, 8))
    bsc.fold_zero_blocks(model)
    assert folded_names(model) == ["1"]
    assert torch.equal(model(torch.ones(1, 8)), expected)
    with pytest.raises(LayerError, match=r"^0: expected one of Linear, Conv1d"):
        bsc.fold_zero_blocks(model, include="0")


@pytest.mark.parametrize("training", [True, False])
def test_transformer_layers_that_read_the_weight_themselves(training):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True).train(training)
    bsc.prune_blocks(model, (4, 4), 0.5)
    x = torch.randn(2, 3, 16)
    expected = model(x)
    bsc.fold_zero_blocks(model)
    assert folded_names(model) == ["self_attn.out_proj", "linear1", "linear2"]
    torch.testing.assert_close(model(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)


# ---- errors ---------------------------------------------------------------------------------------


def test_nan_is_an_error_and_no_layer_is_changed():
    model = pruned_net()
    with torch.no_grad():
        model[8].weight[0, 0] = torch.inf
    with pytest.raises(LayerError, match=r"^8: expected finite weights"):
        bsc.fold_zero_blocks(model)
    assert folded_names(model) == []


def test_a_block_too_large_for_a_named_layer():
    with pytest.raises(PatternError, match=r"^8: expected a block no larger than .*\(10 x 12\)"):
        bsc.fold_zero_blocks(pruned_net(), (16, 16), include="8")
    with pytest.raises(PatternError, match="two positive integers"):
        bsc.fold_zero_blocks(pruned_net(), (0, 16))


def test_tied_layers_with_different_masks():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    parametrize.register_parametrization(model[1], "weight", nn.Threshold(0.0, 0.0))
    with pytest.raises(LayerError, match=r"^1: expected the same effective weight as 0"):
        bsc.fold_zero_blocks(model)


# ---- life after folding ---------------------------------------------------------------------------


def test_copies_pickles_and_exports_are_equal():
    model = bsc.fold_zero_blocks(pruned_net())
    assert folded_names(model) == ["3", "5", "8"]
    x = image()
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    assert torch.equal(exported.module()(x), expected)
    torch.testing.assert_close(exported.module()(image(5)), model(image(5)))
    assert torch.equal(torch.fx.symbolic_trace(model)(x), expected)


def test_compiles_in_one_graph_and_trains_there():
    model = bsc.fold_zero_blocks(pruned_net())
    x = image()
    expected = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    expected.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled(x).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name])


def test_an_optimizer_moves_kept_tiles_and_only_those():
    model = bsc.fold_zero_blocks(pruned_net()).train()
    zero = ~model[3].pattern.mask()
    before = model[3].weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(image()).square().sum().backward()
    optimizer.step()
    assert (model[3].weight[zero] == 0).all()
    assert (model[3].weight != before)[~zero].float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_moves(dtype):
    model = bsc.prune_blocks(small_net(), (4, 4), 0.5).eval()
    dense = copy.deepcopy(model).to(dtype)
    folded = bsc.fold_zero_blocks(model).to(dtype)
    assert folded[3].weight.dtype == dtype
    assert torch.equal(folded(image().to(dtype)), dense(image().to(dtype)))


def test_device_moves():
    model = bsc.fold_zero_blocks(pruned_net()).to("meta")
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    assert model(image().to("meta")).shape == (2, 10)


@pytest.mark.parametrize("of_weight", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("of_input", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kernel", "transposed"), [(1, False), (3, False), (1, True), (2, True)])
def test_strides_are_those_of_the_dense_layer(kernel, transposed, of_weight, of_input):
    make = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = make(16, 8, kernel, groups=2).to(memory_format=of_weight)
    bsc.prune_blocks(nn.Sequential(layer), (4, 4), 0.5)
    dense = copy.deepcopy(layer)
    bsc.fold_zero_blocks(nn.Sequential(layer))
    assert isinstance(layer, KeptTiles)
    assert layer.weight.stride() == dense.weight.stride()
    x = torch.randn(2, 16, 8, 8).to(memory_format=of_input)
    assert layer(x).stride() == dense(x).stride()
    assert torch.equal(layer(x), dense(x))


def test_all_blocks_dead():
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    model[0].weight.data.zero_()
    bsc.fold_zero_blocks(model)
    assert model[0].values.shape == (0, 4, 4)
    out = model(torch.randn(1, 4, 5, 5))
    assert torch.equal(out, model[0].bias[:, None, None].expand(4, 3, 3)[None])
    out.sum().backward()
    assert copy.deepcopy(model).load_state_dict(model.state_dict())


def test_built_directly_and_reset():
    pattern = BlockPattern.full((8, 4, 3, 3), (4, 4))
    kept = pattern.kept.clone()
    kept[1] = False
    layer = BlockSparseConv2d(4, 8, 3, padding=1, pattern=pattern.with_kept(kept))
    assert layer(torch.randn(1, 4, 5, 5)).shape == (1, 8, 5, 5)
    assert (layer.weight[4:] == 0).all()
    before = layer.values.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.values, before)
    assert "block=4x4, kept=9/18" in repr(layer)


def test_assigning_a_weight_is_not_silent():
    layer = bsc.fold_zero_blocks(pruned_net())[8]
    with pytest.raises(LayerError, match="Write to `values`"):
        layer.weight = torch.zeros(10, 12)
    with pytest.raises(KeyError, match="weight"):
        layer.weight = nn.Parameter(torch.zeros(10, 12))


# ---- checkpoints ----------------------------------------------------------------------------------


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_checkpoint_of_the_same_pattern():
    model, other = (bsc.fold_zero_blocks(pruned_net()) for _ in range(2))
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    kept_alive = other[3].values
    other.load_state_dict(through_a_file(model.state_dict()))
    assert torch.equal(other(image()), model(image()))
    assert other[3].values is kept_alive


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("density", "block"), [(0.25, (4, 4)), (0.5, (2, 6))])
def test_a_checkpoint_brings_its_own_pattern(density, block, assign):
    model = bsc.fold_zero_blocks(pruned_net(density, block), block)
    other = bsc.fold_zero_blocks(pruned_net(0.5, (4, 4)), (4, 4))
    loaded = {k: v for k, v in model.state_dict().items() if k.startswith("8.")}
    other.load_state_dict(loaded, strict=False, assign=assign)
    assert other[8].pattern == model[8].pattern
    assert torch.equal(other[8].weight, model[8].weight)
    other(image()).sum().backward()
    assert other[8].values.grad.shape == model[8].values.shape


def test_a_gradient_of_the_old_pattern_does_not_outlive_it():
    model = bsc.fold_zero_blocks(pruned_net(0.25))
    other = bsc.fold_zero_blocks(pruned_net(0.5))
    other(image()).sum().backward()
    other.load_state_dict(model.state_dict())
    assert other[3].values.grad is None
    assert other[8].bias.grad is not None
    torch.optim.SGD(other.parameters(), lr=0.1).step()


def test_loading_onto_the_meta_device():
    model = bsc.fold_zero_blocks(pruned_net())
    other = copy.deepcopy(model).to("meta")
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other(image()), model(image()))


@pytest.mark.parametrize("wrong", ["weight_shape", "kept_shape", "count", "dense"])
def test_a_checkpoint_that_does_not_fit_names_the_layer(wrong):
    model = bsc.fold_zero_blocks(pruned_net())
    saved = dict(model.state_dict())
    if wrong == "weight_shape":
        saved["3.weight_shape"] = torch.tensor([24, 8, 5, 5])
    elif wrong == "kept_shape":
        saved["3.kept"] = saved["3.kept"][:-1]
    elif wrong == "count":
        saved["3.values"] = saved["3.values"][1:]
    else:
        saved = small_net().state_dict()
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"3: expected a .*, got "):
        model.load_state_dict(saved)
    assert torch.equal(model[3].weight, before[3].weight)


def test_averages_over_models_leave_the_pattern_whole():
    model = bsc.fold_zero_blocks(pruned_net())
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    for tensor in average.state_dict().values():
        tensor.copy_(0.9 * tensor)  # as some averages do, on every entry
    bsc.load_folded(small_net(), average.module.state_dict())
    assert average.module[3].pattern == model[3].pattern


def test_a_checkpoint_without_its_pattern_is_incomplete():
    model = bsc.fold_zero_blocks(pruned_net())
    saved = model.state_dict()
    del saved["3.kept"]
    with pytest.raises(RuntimeError, match=r"Missing key.*3\.kept"):
        model.load_state_dict(saved)


def test_load_folded_into_a_dense_model():
    model = bsc.fold_zero_blocks(pruned_net())
    dense = small_net().eval()
    assert bsc.load_folded(dense, through_a_file(model.state_dict())) is dense
    assert folded_names(dense) == folded_names(model)
    assert torch.equal(dense(image()), model(image()))


@pytest.mark.parametrize("start", ["scaled", "folded"])
def test_load_folded_into_anything(start):
    model = bsc.fold_zero_blocks(pruned_net())
    other = small_net().eval()
    if start == "scaled":
        bsc.insert_block_scales(other, (2, 2))
        for name in ("0",):  # dense in the checkpoint
            parametrize.remove_parametrizations(other.get_submodule(name), "weight")
    else:
        bsc.fold_zero_blocks(bsc.prune_blocks(other, (2, 2), 0.7, exclude="0"), (2, 2))
    bsc.load_folded(other, model.state_dict())
    assert torch.equal(other(image()), model(image()))


@pytest.mark.parametrize("wrong", ["missing", "unknown", "shape", "weight_shape"])
def test_load_folded_changes_nothing_if_the_checkpoint_does_not_fit(wrong):
    saved = dict(bsc.fold_zero_blocks(pruned_net()).state_dict())
    error, message = LayerError, "load_folded: expected the keys and shapes of this model, got "
    if wrong == "missing":
        del saved["1.running_mean"]
        message += "no 1.running_mean"
    elif wrong == "unknown":
        saved["9.weight"] = torch.zeros(1)
        message += "an unknown 9.weight"
    elif wrong == "shape":
        saved["3.bias"] = torch.zeros(7)
        message += r"3.bias of shape \[7\] instead of \[24\]"
    else:
        saved["3.weight_shape"] = torch.tensor([48, 4, 3, 3])
        error, message = PatternError, "^3: expected a checkpoint for a weight of shape"
    model = small_net().eval()
    expected = model(image())
    with pytest.raises(error, match=message):
        bsc.load_folded(model, saved)
    assert torch.equal(model(image()), expected)
    assert folded_names(model) == []
