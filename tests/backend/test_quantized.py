"""Quantized models through torch.compile and explain."""

from __future__ import annotations

import pytest
import torch
from quantized_models import U8, ResidualNet
from torch import nn

import blocksparse_compiler as bsc
from blocksparse_compiler import BlockPattern
from blocksparse_compiler.backend import compiled_graphs
from blocksparse_compiler.codegen.inductor_api import capture_sources

OPTIONS = {"dense": "never"}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def steps_apart(out, expected, step):
    """The largest difference in steps of a quantized tensor: sums rounded otherwise may take a neighbour."""
    return float((out - expected).abs().max() / step)


def test_a_network_that_changes_its_weights():
    model = ResidualNet(U8).eval()
    x = torch.randn(2, 3, 14, 14).to(memory_format=torch.channels_last)
    fast = torch.compile(model, backend="blocksparse", options=OPTIONS)
    with torch.no_grad(), capture_sources() as sources:
        assert steps_apart(fast(x), model(x), 0.01) < 2
        text = "\n".join(sources)
        assert text.count("Element = uint8_t;") == text.count("using RegisterTile") == 3
        model.conv1.weight.neg_()
        assert steps_apart(fast(x), model(x), 0.01) < 2
    kernels = {d.site.name: d.kernel for d in compiled_graphs()[-1].plan}
    assert kernels == {"first": "dense", "conv1": "cpu_int8", "conv2": "cpu_int8", "fc": "cpu_int8"}


def test_explain_says_what_runs_in_integers():
    plan = bsc.explain(ResidualNet().eval(), torch.randn(8, 3, 56, 56), device="avx512-2core")
    decision = plan.plan.decisions[1]
    assert decision.kernel == "cpu_int8" and "cpu_int8" in str(plan)
    assert decision.estimates["dense"] < 1.5e-3  # in integers as well: fp32 takes 3.4 ms


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, 64)
        for layer in (self.conv, self.fc):
            full = BlockPattern.full(tuple(layer.weight.shape), (32, 32))
            kept = torch.arange(full.kept.numel()).view(full.grid_shape) % 2 == 0
            with torch.no_grad():
                layer.weight.copy_(full.with_kept(kept).apply(layer.weight))

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.fc(torch.relu(self.norm(self.conv(x)) + x).mean((2, 3)))


def test_the_pt2e_flow():
    """Pruned weights are still exactly zero after PT2E, and run in integers."""
    pytest.importorskip("torchao", reason="PyTorch's quantization flow (pip install torchao)")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 14, 14)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
        for _ in range(3):
            prepared(torch.randn_like(x))
        quantized = convert_pt2e(prepared)
        out = torch.compile(quantized, backend="blocksparse", options=OPTIONS)(x)
        expected = quantized(x)
    plan = {d.site.name: d for d in compiled_graphs()[-1].plan}
    assert plan["conv"].kernel == plan["fc"].kernel == "cpu_int8"
    assert plan["conv"].density == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(out, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
