"""`recommend_block_shape`: what it finds, on any device, without running the model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_models
import torch
from torch import nn

import blocksparse_compiler as bsc
from blocksparse_compiler import cost
from blocksparse_compiler.devices import device
from blocksparse_compiler.errors import OptionError, PatternError
from blocksparse_compiler.gpu_devices import SPECS
from blocksparse_compiler.recommend import NEAR, WORTH_IT, merged_density


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def resnet(transformers) -> nn.Module:
    with torch.device("meta"):
        return transformers.ResNetForImageClassification(transformers.ResNetConfig()).eval()


@pytest.fixture(scope="module")
def on_h200(resnet):
    images = torch.empty(256, 3, 224, 224, device="meta")
    return bsc.recommend_block_shape(resnet, images, device="h200", dtype="bfloat16")


def score(found, shape) -> float:
    return float(np.prod([found.speedup(shape, d) for d in found.densities])) ** (1 / len(found.densities))


def test_resnet50_on_a_gpu(on_h200):
    found = on_h200
    assert sum(len(layer.names) for layer in found.layers) == 54
    assert found.best is not None and found.best[0] >= 64
    assert {layer.site.dtype for layer in found.layers} == {"bfloat16"}
    assert {layer.site.device for layer in found.layers} == {"cuda"}
    for shape in found.block_shapes:
        gains = [found.speedup(shape, d) for d in found.densities]
        assert all(gain >= 1 for gain in gains) and gains == sorted(gains)
    assert found.speedup((64, 64), 0.25) > found.speedup((8, 8), 0.25)


def test_the_finest_shape_near_the_fastest_is_recommended(on_h200):
    scores = {shape: score(on_h200, shape) for shape in on_h200.block_shapes}
    best, fastest = on_h200.best, max(scores.values())
    assert scores[best] >= max(WORTH_IT, NEAR * fastest)
    finer = [s for s in scores if s[0] * s[1] < best[0] * best[1]]
    assert all(scores[s] < NEAR * fastest or scores[s] < WORTH_IT for s in finer)
    assert "x".join(map(str, best)) in on_h200.reason


def test_layers_that_never_pay_say_why(on_h200):
    notes = {name: layer.note for layer in on_h200.layers for name in layer.names}
    assert notes["resnet.embedder.embedder.convolution"] == "its weight is smaller than any tile"
    for layer in on_h200.layers:
        assert bool(layer.note) == (not any(layer.break_even.values()))
        assert not layer.note or all(x == 1 for by in layer.speedups.values() for x in by.values())


def test_thin_layers_gain_only_where_dense_ones_run_in_two_kernels():
    images = torch.empty(256, 64, 56, 56, device="meta", dtype=torch.bfloat16)
    bare, followed = (
        nn.Sequential(nn.Conv2d(64, 256, 1, bias=bias, device="meta", dtype=torch.bfloat16), *more)
        for bias, more in ((False, ()), (True, (nn.ReLU(),)))
    )
    (layer,) = bsc.recommend_block_shape(bare, images, device="h200").layers
    assert "reading and writing activations" in layer.note
    (layer,) = bsc.recommend_block_shape(followed, images, device="h200").layers
    assert layer.speedups[64, 64][0.25] > 1.5
    fused = SPECS["h200"].as_compiled({"max_autotune": True})
    (layer,) = bsc.recommend_block_shape(followed, images, device=fused).layers
    assert "reading and writing activations" in layer.note


def test_break_even_agrees_with_the_speedups(on_h200):
    for layer in on_h200.layers:
        for shape, by_density in layer.speedups.items():
            for density, speedup in by_density.items():
                if speedup > 1:
                    assert density <= layer.break_even[shape] + 0.01
                elif layer.break_even[shape]:
                    assert density >= layer.break_even[shape] - 0.01


def test_estimates_are_those_of_the_cost_model():
    linear = nn.Linear(2048, 2048, bias=False, device="meta", dtype=torch.float16)
    x = torch.empty(512, 2048, device="meta", dtype=torch.float16)
    found = bsc.recommend_block_shape(linear, x, device="a100", block_shapes=[(64, 64)], densities=[0.1])
    (layer,) = found.layers
    spec = SPECS["a100"]
    best = min(
        cost.sparse_cost(layer.site, tile, spec, variant, density=0.1).evaluate()
        for tile in ((64, 64), (64, 32), (32, 32))
        for variant in ("triton_gather", "triton_pair")
    )
    assert layer.dense_seconds == cost.dense_cost(layer.site, spec).evaluate()
    assert layer.speedups[64, 64][0.1] == pytest.approx(layer.dense_seconds / best, rel=0.02)


def test_few_rows_of_a_language_model():
    linear = nn.Linear(4096, 14336, bias=False, device="meta", dtype=torch.bfloat16)
    x = torch.empty(1, 4096, device="meta", dtype=torch.bfloat16)
    found = bsc.recommend_block_shape(linear, x, device="h200")
    assert found.speedup(found.best, 0.1) > 4


def test_a_vision_transformer(transformers):
    config = transformers.ViTConfig(num_hidden_layers=2)
    with torch.device("meta"):
        vit = transformers.ViTForImageClassification(config).eval()
        images = torch.empty(64, 3, 224, 224)
    found = bsc.recommend_block_shape(vit, images, device="h100", dtype=torch.bfloat16)
    assert found.best is not None
    equal = next(layer for layer in found.layers if len(layer.names) >= 8)
    assert equal.site.in_channels == equal.site.out_channels == 768


def test_cpus_too():
    found = bsc.recommend_block_shape(
        tiny_models.make(), torch.randn(8, 64, 28, 28), device="avx512-2core", densities=[0.5, 0.1]
    )
    assert found.best is not None and found.speedup(found.best, 0.1) > 1.5
    assert {layer.names[0]: bool(layer.note) for layer in found.layers} == {
        "0": False,
        "3": True,
        "4": False,
        "7": False,
    }
    assert next(layer.note for layer in found.layers if layer.names == ("3",)).startswith("depthwise")


def test_where_nothing_pays():
    small = nn.Linear(64, 64)
    found = bsc.recommend_block_shape(small, torch.randn(1, 64), device="h200")
    assert found.best is None and "No block shape pays on h200" in found.reason
    old = SPECS["a100"].with_figures("test", name="old", arch=75)
    found = bsc.recommend_block_shape(
        nn.Linear(4096, 4096, device="meta"), torch.empty(8, 4096, device="meta"), device=old
    )
    assert found.best is None and "compute capability 8.0" in found.reason


def test_a_dtype_without_kernels():
    found = bsc.recommend_block_shape(
        tiny_models.make(), torch.randn(tiny_models.INPUT), device="avx512-2core", dtype="float64"
    )
    assert found.best is None and "no kernel for float64" in found.reason


def test_the_model_is_left_alone():
    model = tiny_models.make()
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    bsc.recommend_block_shape(model, torch.randn(tiny_models.INPUT), device="h200")
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is before[name][0] and torch.equal(value, before[name][1])


@pytest.mark.parametrize(
    "block, tile, expected",
    [
        ((16, 16), (16, 16), 0.25),
        ((64, 64), (32, 32), 0.25),  # split, not merged
        ((8, 8), (16, 8), 1 - 0.75**2),
        ((8, 8), (16, 16), 1 - 0.75**4),
        ((64, 8), (32, 16), 1 - 0.75**2),
    ],
)
def test_merged_density(block, tile, expected):
    assert merged_density(np.array([0.25]), block, tile)[0] == pytest.approx(expected)


def test_merged_density_matches_a_random_mask():
    site = nn.Linear(512, 512).weight
    full = bsc.BlockPattern.full(site.shape, (8, 8))
    kept = torch.rand(full.grid_shape, generator=torch.Generator().manual_seed(0)) < 0.2
    merged = full.with_kept(kept).retile((32, 16))
    assert merged.density == pytest.approx(merged_density(np.array([0.2]), (8, 8), (32, 16))[0], abs=0.05)


def test_it_prints_and_saves(on_h200):
    text = str(on_h200)
    assert "Train with" in text and "pays below" in text and "and 3 more" in text and "h200" in text
    data = json.loads(json.dumps(on_h200.to_json()))
    assert data["best"] == list(on_h200.best) and data["device"] == "h200"
    assert data["speedups"]["64x64"]["0.25"] == on_h200.speedup((64, 64), 0.25)
    assert len(data["layers"]) == len(on_h200.layers)


def test_the_command(monkeypatch):
    from typer.testing import CliRunner

    from blocksparse_compiler import cli

    arguments = ["recommend", "tiny_models:make", "-i", "64x64x28x28", "--device", "h200", "--json"]
    arguments += ["--dtype", "bfloat16", "--block-shape", "32x32", "--density", "0.1"]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    data = json.loads(result.stdout)
    assert list(data["speedups"]) == ["32x32"] and data["densities"] == [0.1]
    assert "Usage" in CliRunner().invoke(cli.app, ["recommend", "--help"]).stdout


@pytest.mark.parametrize(
    "options, error",
    [
        ({"device": "abacus"}, OptionError),
        ({"dtype": "bfloat17"}, OptionError),
        ({"densities": []}, OptionError),
        ({"densities": [1.5]}, OptionError),
        ({"block_shapes": []}, OptionError),
        ({"block_shapes": [(0, 4)]}, PatternError),
    ],
)
def test_bad_input(options, error):
    with pytest.raises(error):
        bsc.recommend_block_shape(
            nn.Linear(8, 8), torch.randn(1, 8), **{"device": device("avx2-4core"), **options}
        )
