"""Sparse 1x1 convolutions that share a kernel with the depthwise convolutions behind them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from chain_models import no_chains  # noqa: F401
from kernel_cases import compiling, count_kernels
from layer_cases import FIXED
from torch import Tensor, nn

import blocksparse_compiler as bsc
from blocksparse_compiler import Plan, trace
from blocksparse_compiler.backend import compiled_graphs
from blocksparse_compiler.passes.pipeline import PassContext, run_pipeline
from blocksparse_compiler.planning import copy_graph
from blocksparse_compiler.pointwise_depthwise import is_fused

pytestmark = pytest.mark.usefixtures("no_chains")  # which take in such pairs, too

ONE_THREAD = dataclasses.replace(FIXED, threads=1)
OP = torch.ops.blocksparse.pointwise_depthwise.default


class Residual(nn.Module):
    """Two inverted residuals, as in MobileNet-v2."""

    def __init__(self, activation: nn.Module, channels: int = 32, hidden: int = 128) -> None:
        super().__init__()

        def block() -> nn.Module:
            depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
            point = [nn.Conv2d(channels, hidden, 1, bias=False), nn.Conv2d(hidden, channels, 1)]
            bsc.prune_blocks(nn.ModuleList(point), (4, 1), 0.15)
            return nn.Sequential(point[0], activation, depthwise, activation, point[1])

        torch.manual_seed(0)
        self.blocks = nn.ModuleList(block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def lowered(model: nn.Module, x: Tensor) -> tuple[torch.fx.GraphModule, Plan]:
    gm = copy_graph(trace(model.eval(), x))
    plan = run_pipeline(gm, PassContext(device=ONE_THREAD))
    return gm, plan


def pairs(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return gm.graph.find_nodes(op="call_function", target=OP)


@pytest.mark.parametrize(
    "activation, name",
    [
        (nn.ReLU6(), "clamp:0.0:6.0"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.Hardswish(), "hardswish"),
        (nn.SiLU(), "silu"),
        (nn.Hardtanh(-2.0, 1.5), "clamp:-2.0:1.5"),
        (nn.Identity(), "identity"),
    ],
)
def test_every_activation_in_its_place(activation, name):
    model, x = Residual(activation), torch.randn(1, 32, 28, 28)
    gm, plan = lowered(model, x)
    assert [node.args[5] for node in pairs(gm)] == [name, name]
    assert sum(is_fused(d.config) for d in plan) == 4
    assert all("in one kernel with blocks." in d.reason for d in plan if is_fused(d.config))
    out, want = gm(x), model.double()(x.double())
    torch.testing.assert_close(
        (out[0] if isinstance(out, tuple) else out).double(), want, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("activation", [nn.GELU(), nn.Sigmoid(), nn.Hardtanh(0.0, float("inf"))])
def test_other_activations_keep_two_kernels(activation):
    gm, plan = lowered(Residual(activation), torch.randn(1, 32, 28, 28))
    assert not pairs(gm) and not any(is_fused(d.config) for d in plan)


def test_what_others_read_is_kept():
    class Shared(Residual):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            first, *rest = self.blocks[0]
            wide = first(x)
            return nn.Sequential(*rest)(wide), wide

    model, x = Shared(nn.ReLU6()), torch.randn(1, 32, 28, 28)
    gm, plan = lowered(model, x)
    assert not pairs(gm) and not any(is_fused(d.config) for d in plan)
    for out, want in zip(gm(x), model(x), strict=True):
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)


def test_a_strided_convolution_keeps_its_kernel():
    torch.manual_seed(0)
    first = bsc.prune_blocks(nn.Conv2d(32, 128, 1, stride=2), (4, 1), 0.15)
    model, x = nn.Sequential(first, nn.Conv2d(128, 128, 3, groups=128)), torch.randn(1, 32, 56, 56)
    gm, plan = lowered(model, x)
    assert not pairs(gm) and not any(is_fused(d.config) for d in plan)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_compiled_network_runs_pairs_and_no_copies():
    model = Residual(nn.ReLU6()).eval()
    x = torch.randn(2, 32, 28, 28)
    plan = Plan.from_json(bsc.plan(trace(model, x), ONE_THREAD).to_json())
    with compiling(cpp_wrapper=True) as sources:
        fast = torch.compile(model, backend="blocksparse", options={"plan": plan}, fullgraph=True)
        out = fast(x)
        assert sum(is_fused(d.config) for d in compiled_graphs()[-1].plan) == 4
    want = model.double()(x.double())
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4)
    assert out.stride() == x.stride()
    source = "\n".join(sources)
    assert source.count("PlaneTile<Geometry") >= 1 and "SparseRows<" in source
    assert count_kernels(source)["all"] == 2, (
        "one for both pairs, one for both 1x1 convolutions with their sums"
    )


def test_two_threads_do_not_take_each_others_channels_of_one_image():
    """Cores that exchange channels wait for each other; images, or one thread, need no exchange."""
    model = Residual(nn.ReLU6()).eval()

    def fused(batch: int, threads: int) -> int:
        x = torch.randn(batch, 32, 28, 28)
        plan = bsc.plan(trace(model, x), dataclasses.replace(FIXED, threads=threads))
        return sum(is_fused(d.config) for d in plan)

    assert fused(1, 1) == fused(2, 2) == fused(8, 2) == 4
