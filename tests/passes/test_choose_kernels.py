"""Which tiles are looked for in a weight, and that those found are run."""

from __future__ import annotations

import importlib

import pytest
import torch
from layer_cases import conv_site, even_pattern
from torch import nn

from blocksparse_compiler import BlockPattern, cost, trace
from blocksparse_compiler.backend import compiled_graphs
from blocksparse_compiler.devices import SPECS
from blocksparse_compiler.passes.choose_kernels import choose_kernels


def pruned(layer: nn.Module, block_shape: tuple[int, int], density: float = 0.2) -> nn.Module:
    """The layer in inference mode, with that share of its blocks, drawn by chance."""
    full = BlockPattern.full(layer.weight.shape, block_shape)
    kept = torch.rand(full.grid_shape, generator=torch.Generator().manual_seed(0)) < density
    layer.weight.data = full.with_kept(kept).apply(layer.weight.data)
    return layer.eval()


@torch.no_grad()
@pytest.mark.parametrize("height", [32, 16])
def test_columns_are_found_and_run(height):
    layer, x = pruned(nn.Conv2d(128, 64, 3, padding=1), (height, 1)), torch.randn(8, 128, 14, 14)
    torch._dynamo.reset()
    fast = torch.compile(layer, backend="blocksparse", fullgraph=True, options={"dense": "never"})
    torch.testing.assert_close(fast(x), layer(x), rtol=1e-4, atol=1e-5)
    (decision,) = compiled_graphs()[-1].plan
    assert decision.pattern.block_shape == (height, 1)
    assert decision.pattern.kept_elements == int(layer.weight.ne(0).sum())


@pytest.mark.parametrize("edge", [32, 16, 8])
def test_columns_that_spare_nothing_are_no_candidates(edge):
    layer = pruned(nn.Conv2d(64, 64, 3), (edge, edge))
    (decision,) = choose_kernels(trace(layer, torch.randn(2, 64, 9, 9)), allow_dense=False)
    assert f"cpu_f32 {edge}x{edge}" in decision.estimates
    assert f"cpu_f32 {edge}x1" not in decision.estimates


def test_columns_asked_for_are_taken():
    layer = pruned(nn.Linear(64, 64), (32, 32))
    gm = trace(layer, torch.randn(2, 64))
    (decision,) = choose_kernels(gm, block_shape=(16, 1), allow_dense=False)
    assert decision.pattern.block_shape == (16, 1)


def test_layers_with_few_input_channels_are_read_in_columns():
    layer = nn.Conv2d(3, 32, 3).eval()
    layer.weight.data[:, 1] = 0
    (decision,) = choose_kernels(trace(layer, torch.randn(1, 3, 9, 9)), allow_dense=False)
    assert decision.pattern.block_shape == (32, 1) and decision.pattern.density == pytest.approx(2 / 3)


def test_the_device_is_looked_at_once_for_all_layers(monkeypatch):
    """It may mean to measure the machine, which on a busy one is tried and given up each time."""
    asked = []

    def device(which):
        asked.append(which)
        return SPECS["avx512-2core"]

    module = importlib.import_module("blocksparse_compiler.passes.choose_kernels")  # not the function
    monkeypatch.setattr(module, "present_device", device)
    model = nn.Sequential(*(pruned(nn.Linear(64, 64), (32, 32)) for _ in range(3))).eval()
    plan = choose_kernels(trace(model, torch.randn(8, 64)))
    assert len(plan) == 3 and asked == ["cpu"]


def test_tiles_of_narrow_rows_wait_for_their_products():
    """Input lines 4 KiB apart leave a tile one row of seven pixels: seven sums, and each takes its time."""
    strided = {"dtype": "bfloat16", "stride": (2, 2)}
    narrow = conv_site(96, 1024, 3, 14, 1, **strided)
    wide = conv_site(96, 1024, 3, 56, 1, **strided)
    spec = SPECS["avx512-2core"]

    def rate(site, block):
        record = cost.sparse_cost(site, block, spec, "cpu_bf16")
        return cost.value(record.flops) / cost.value(record.compute_seconds)

    assert rate(narrow, (16, 16)) < 0.8 * rate(wide, (16, 16))
    assert rate(narrow, (32, 32)) > 0.95 * rate(wide, (32, 32))  # two vectors by seven pixels
    assert cost.choose(narrow, [even_pattern(narrow, 0.9, (16, 16))], spec).is_dense
    assert not cost.choose(narrow, [even_pattern(narrow, 0.5, (16, 16))], spec).is_dense


def test_scattered_weights_pay_for_panels_that_exceed_l1():
    """Half of 320 inputs by 112 pixels stay dense: a panel of 140 KiB comes from L2 while products wait."""
    spec = SPECS["avx512-2core"]
    site = conv_site(768, 320, 1, 14, 1)
    small = conv_site(768, 64, 1, 14, 1)

    def rate(site):
        record = cost.sparse_cost(site, (2, 1), spec, "cpu_f32_spmm", density=0.75)
        return cost.value(record.flops) / cost.value(record.compute_seconds)

    assert rate(site) < 0.75 * rate(small)
    assert cost.choose(
        site, [even_pattern(site, 0.5, (1, 1)), even_pattern(site, 0.75, (2, 1))], spec
    ).is_dense
    assert not cost.choose(site, [even_pattern(site, 0.15, (1, 1))], spec).is_dense
