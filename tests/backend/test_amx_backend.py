"""Plans made for a machine with AMX, on this one: emulated, and as they are."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import blocksparse_compiler as bsc
from blocksparse_compiler.codegen.cpu_amx_template import emulated_amx
from blocksparse_compiler.codegen.inductor_api import capture_sources
from blocksparse_compiler.devices import detect_amx

DEVICE = "sapphire-rapids"


class Network(nn.Module):
    """Batch norms, a residual sum, groups, strides, 1x1 and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(64)
        self.grouped = nn.Conv2d(64, 64, 3, padding=1, groups=2)
        self.widen = nn.Conv2d(64, 128, 1, bias=False)
        self.head = nn.Linear(128, 64)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.grouped(x) + x)
        return self.head(torch.relu(self.widen(x)).mean((2, 3)))


def network() -> nn.Module:
    torch.manual_seed(0)
    model = Network().eval()
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 1.5)
        for layer in model.modules():
            if hasattr(layer, "weight") and layer.weight.dim() > 1:
                full = bsc.BlockPattern.full(layer.weight.shape, (32, 32), getattr(layer, "groups", 1))
                kept = torch.rand(full.grid_shape) < 0.5
                layer.weight.copy_(full.with_kept(kept).apply(layer.weight))
    return model


def relative_error(got, model, x):
    exact = copy.deepcopy(model).double()(x.double())
    return float((got - exact).norm() / exact.norm())


@torch.no_grad()
@pytest.mark.parametrize("emulated", [True, False])
@pytest.mark.skipif(detect_amx(), reason="there is AMX on this machine")
def test_a_network_planned_for_amx(emulated):
    full, x = network(), torch.randn(3, 32, 13, 15).to(memory_format=torch.channels_last)
    low, images = copy.deepcopy(full).bfloat16(), x.bfloat16()
    plan = bsc.plan(bsc.trace(low, images), device=DEVICE, block_shape=(32, 32), allow_dense=False)
    assert {d.kernel for d in plan} <= {"cpu_amx_bf16", "cpu_bf16"}, "by cost"
    plan = replace(plan, decisions=tuple(replace(d, kernel="cpu_amx_bf16", config={}) for d in plan))
    torch._dynamo.reset()
    fast = torch.compile(low, backend="blocksparse", options={"plan": plan}, fullgraph=True)
    with capture_sources() as sources:
        if emulated:
            with emulated_amx():
                got = fast(images)
        else:
            got = fast(images)
    source = "".join(sources)
    assert ("using Products = " in source) == emulated
    assert ("using RegisterTile = " in source) == (not emulated)
    assert relative_error(got, full, x) <= 1.5 * relative_error(low(images), full, x)


def test_explaining_and_recommending_for_amx():
    """Tiles of 32 by 32 channels fill the instruction; half as wide ones waste half of it."""
    model, x = nn.Conv2d(256, 256, 3, padding=1).bfloat16(), torch.randn(8, 256, 14, 14).bfloat16()
    full = bsc.BlockPattern.full(model.weight.shape, (16, 16))
    with torch.no_grad():
        model.weight.copy_(full.with_kept(torch.rand(full.grid_shape) < 0.3).apply(model.weight))
    report = str(bsc.explain(model, x, device=DEVICE))
    assert "cpu_amx_bf16" in report and "16x16" in report
    advice = bsc.recommend_block_shape(model, x, device=DEVICE)
    assert advice.best == (32, 32)
