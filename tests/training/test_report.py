import json

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from training_cases import small_net

import blocksparse_compiler as bsc
from blocksparse_compiler.scales import block_scales

# small_net: (parameters, multiply-accumulates for one image), counted by hand
LAYERS = {
    "0": (16 * 3 * 9 + 16, 16 * 3 * 9 * 64),
    "3": (24 * 8 * 9 + 24, 24 * 8 * 9 * 64),
    "5": (24 * 12 * 4 + 12, 24 * 12 * 4 * 64),  # transposed: per input pixel
    "8": (12 * 10 + 10, 12 * 10),
}


def test_a_dense_model():
    report = bsc.sparsity_report(small_net(), torch.randn(2, 3, 8, 8))
    assert [row.name for row in report.rows] == list(LAYERS)
    for name, (parameters, macs) in LAYERS.items():
        row = report[name]
        assert (row.parameters, row.dense_parameters) == (parameters, parameters)
        assert (row.macs, row.dense_macs) == (2 * macs, 2 * macs)
        assert row.block_shape is None
    assert report.other_parameters == 32
    assert report.total.parameters == sum(p.numel() for p in small_net().parameters())


def test_without_inputs_there_are_no_macs():
    total = bsc.sparsity_report(small_net()).total
    assert total.macs is None
    assert total.parameters == sum(p.numel() for p in small_net().parameters())


@pytest.mark.parametrize("state", ["scaled", "pruned", "masked", "folded"])
def test_every_kind_of_sparse_model_gives_the_same_figures(state):
    model = small_net()
    if state == "scaled":
        bsc.prune_blocks(bsc.insert_block_scales(model, (4, 4), include="3"), None, 0.5, include="3")
    elif state == "masked":
        pruned = bsc.prune_blocks(small_net(), (4, 4), 0.5, include="3")
        prune.custom_from_mask(model[3], "weight", pruned[3].weight != 0)
    else:
        bsc.prune_blocks(model, (4, 4), 0.5, include="3")
    if state == "folded":
        bsc.fold_zero_blocks(model)
    report = bsc.sparsity_report(model, torch.randn(1, 3, 8, 8))
    row = report["3"]
    assert row.type == ("BlockSparseConv2d" if state == "folded" else "Conv2d")
    assert row.block_shape == (4, 4)
    assert (row.kept_tiles, row.tiles) == (54, 108)
    assert (row.parameters, row.dense_parameters) == (24 * 8 * 9 // 2 + 24, 24 * 8 * 9 + 24)
    assert (row.macs, row.dense_macs) == (LAYERS["3"][1] // 2, LAYERS["3"][1])
    dense = sum(p.numel() for p in small_net().parameters())
    assert report.total.dense_parameters == dense
    assert report.total.parameters == dense - 24 * 8 * 9 // 2


def test_scaled_but_whole_layers_show_their_blocks():
    model = bsc.insert_block_scales(small_net(), (4, 4))
    row = bsc.sparsity_report(model)["3"]
    assert (row.kept_tiles, row.tiles, row.parameters) == (108, 108, row.dense_parameters)


def test_shared_and_tied_layers_count_once_in_parameters_and_per_call_in_macs():
    layer, tied = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
    tied.weight = layer.weight
    report = bsc.sparsity_report(nn.Sequential(layer, layer, tied), torch.randn(5, 8))
    assert report["0"].macs == 2 * 5 * 64
    assert report.total.parameters == 72
    assert report.total.macs == 3 * 5 * 64


def test_the_model_is_left_as_it_was():
    model = small_net().train()
    statistics = model[1].running_mean.clone()
    bsc.sparsity_report(model, torch.randn(2, 3, 8, 8))
    assert all(m.training for m in model.modules())
    assert torch.equal(model[1].running_mean, statistics)
    assert not any(m._forward_hooks for m in model.modules())


def test_prints_and_saves():
    model = bsc.prune_blocks(small_net(), (4, 4), 0.5)
    report = bsc.sparsity_report(model, torch.randn(1, 3, 8, 8))
    text = str(report)
    for expected in ("Conv2d", "4x4", "54 / 108", "55.30 k / 110.59 k", "total"):
        assert expected in text
    assert all(len(line) <= 160 for line in text.splitlines())
    data = json.loads(report.to_json())
    assert data["total"]["macs"] == report.total.macs
    assert [row["name"] for row in data["layers"]] == list(LAYERS)
    with pytest.raises(KeyError):
        report["nowhere"]


def test_resnet50_is_the_textbook_one():
    transformers = pytest.importorskip("transformers")
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
    image = torch.randn(1, 3, 224, 224)
    dense = bsc.sparsity_report(model, image).total
    assert (dense.parameters, dense.macs) == (25_557_032, 4_089_184_256)
    bsc.insert_block_scales(model, (32, 32))
    assert len(list(block_scales(model))) == 53  # all but the first, with 3 input channels
    bsc.prune_blocks(model, None, 0.5)
    half = bsc.sparsity_report(model, pixel_values=image).total
    assert half.dense_parameters == dense.parameters
    assert 0.49 < half.parameters / dense.parameters < 0.51
