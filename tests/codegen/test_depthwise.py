"""Depthwise convolutions on the kernel of our own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_cases import compiling, run
from layer_cases import FIXED, conv_site
from torch import Tensor, nn

import blocksparse_compiler as bsc
from blocksparse_compiler import BlockPattern, Plan, cost, trace
from blocksparse_compiler.depthwise import DEPTHWISE, depthwise_pattern
from blocksparse_compiler.errors import PlanError
from blocksparse_compiler.kernel_variant import KernelConfig
from blocksparse_compiler.layouts import CHANNELS_FIRST
from blocksparse_compiler.passes.choose_kernels import choose_kernels

HELPERS = Path(__file__).parents[1] / "helpers"


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)  # top, bottom, left, right
    dilation: tuple[int, int] = (1, 1)
    bias: bool = True


FIRST = KernelConfig(DEPTHWISE.name, CHANNELS_FIRST.parameters).encode()


class Layer(nn.Module):
    """The operator; `reference` is plain torch."""

    def __init__(self, case: Case, kernel: str = DEPTHWISE.name) -> None:
        super().__init__()
        self.case, self.kernel = case, kernel
        torch.manual_seed(0)
        self.weight = torch.randn(case.shape[1], 1, *case.kernel)
        self.register_buffer("taps", DEPTHWISE.pack(self.weight, None).values)
        self.register_buffer("bias", torch.randn(case.shape[1]) if case.bias else None)

    def forward(self, x: Tensor) -> Tensor:
        c = self.case
        geometry = (list(c.kernel), list(c.stride), list(c.padding), list(c.dilation))
        return torch.ops.blocksparse.depthwise(
            x, self.taps, self.bias, *geometry, self.kernel == DEPTHWISE.name, self.kernel
        )

    def input(self) -> Tensor:
        x = torch.randn(self.case.shape)
        return x if self.kernel == FIRST else x.to(memory_format=torch.channels_last)

    def reference(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        c = self.case
        top, bottom, left, right = c.padding
        x = nn.functional.pad(x.to(dtype), (left, right, top, bottom))
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.conv2d(x, self.weight.to(dtype), bias, c.stride, 0, c.dilation, c.shape[1])


TRICKY = [
    Case((1, 32, 7, 7)),
    Case((2, 16, 14, 14), bias=False),
    Case((1, 48, 28, 29), stride=(2, 2)),
    Case((1, 40, 15, 17), (5, 5), (2, 1), (2, 2, 2, 2)),
    Case((1, 20, 13, 31), (3, 7), (1, 2), (0, 1, 3, 2), (2, 3)),
    Case((3, 17, 3, 2)),
    Case((1, 24, 9, 24), (1, 3), padding=(0, 0, 9, 12)),  # tiles that lie in the padding alone
    Case((1, 16, 1, 1), (7, 7), padding=(3, 3, 3, 3)),
]


TRICKY_PLANES = [
    *TRICKY,
    Case((1, 3, 112, 50)),
    Case((1, 5, 33, 33), stride=(2, 2)),
    Case((1, 4, 16, 12), (5, 5), (2, 2), (1, 2, 1, 2)),
    Case((1, 2, 13, 49), stride=(3, 3), dilation=(2, 2)),
]


def check(cases: list[Case], kernel: str = DEPTHWISE.name) -> None:
    layers = [Layer(case, kernel) for case in cases]
    xs = [layer.input() for layer in layers]
    module = nn.ModuleList(layers)

    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = module

        def forward(self, xs: list[Tensor]) -> list[Tensor]:
            return [layer(x) for layer, x in zip(self.layers, xs, strict=True)]

    outs, source = run(All(), xs, dynamic=False)
    for layer, x, out in zip(layers, xs, outs, strict=True):
        exact = layer.reference(x)
        error, dense = out - exact, layer.reference(x, torch.float32) - exact
        assert out.shape == exact.shape
        assert error.norm() <= 1.5 * dense.norm() + 2.0**-23 * exact.norm(), layer.case
    assert ("PlaneTile<" if kernel == FIRST else "DepthwiseTile<") in source
    assert "blocksparse" not in source.replace("blocksparse_compiler", ""), "an operator was not lowered"


def test_tricky_geometries():
    check(TRICKY)


def test_tricky_geometries_channels_first():
    check(TRICKY_PLANES, FIRST)


def test_long_strides_channels_first_fall_back_to_the_operator():
    layer = Layer(Case((1, 4, 9, 40), stride=(1, 5)), FIRST)
    x = layer.input()
    out, source = run(layer, x, dynamic=False)
    torch.testing.assert_close(out.double(), layer.reference(x), rtol=1e-4, atol=1e-5)
    assert "PlaneTile<" not in source


@st.composite
def cases(draw):
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = tuple(draw(st.integers(0, 4)) for _ in range(4))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    height, width = (draw(st.integers(max(1, reach[i]), reach[i] + 20)) for i in range(2))
    shape = (draw(st.integers(1, 3)), draw(st.integers(16, 70)), height, width)
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    return Case(shape, kernel, stride, padding, dilation, draw(st.booleans()))


@settings(deadline=None, max_examples=2, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.lists(cases(), min_size=8, max_size=8))
def test_random_geometries(drawn):
    check(drawn)


OTHER_ISA = """
from test_depthwise import TRICKY, check
check(TRICKY[:5])
"""


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_vector_widths(capability):
    path = os.pathsep.join([str(HELPERS), str(Path(__file__).parent)])
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", OTHER_ISA], env=environment, check=True, timeout=300)


def test_one_compilation_serves_every_batch_and_fuses_what_follows():
    layer = Layer(Case((4, 24, 9, 10)))

    def block(x, extra):
        y = layer(x)
        return nn.functional.relu6(y) + extra, y

    with compiling(cpp_wrapper=True) as sources:
        fast = torch.compile(block, fullgraph=True, dynamic=True)
        for batch in (2, 3, 5):
            x, extra = (torch.randn(batch, 24, 9, 10).to(memory_format=torch.channels_last) for _ in "ab")
            with torch._dynamo.config.patch(error_on_recompile=batch != 2):
                out, raw = fast(x, extra)
            want = layer.reference(x)
            torch.testing.assert_close(raw, want.float(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(out, (nn.functional.relu6(want) + extra).float(), rtol=1e-4, atol=1e-5)
    assert "\n".join(sources).count("omp parallel") == 1, "one kernel"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_slice_of_a_larger_tensor(memory_format):
    layer = Layer(Case((2, 16, 8, 9)))
    whole = torch.randn(2, 40, 10, 12).to(memory_format=memory_format)

    def part(x):
        return layer(x[:, 8:24, 1:9, 2:11])

    out, _ = run(part, whole, dynamic=False)
    torch.testing.assert_close(out.double(), layer.reference(whole[:, 8:24, 1:9, 2:11]), rtol=1e-4, atol=1e-5)


# ---- the table and the decision ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({}, None),
        ({"groups": 32}, "one filter per channel"),
        ({"out_channels": 128}, "one filter per channel"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"kernel_size": (1, 1), "padding": ((0, 0), (0, 0))}, "2 to 49 taps"),
        ({"kernel_size": (9, 9)}, "2 to 49 taps"),
        ({"input_shape": (1, 64, "s0", 9)}, "symbolic size"),
        ({"input_shape": ("s0", 64, 9, 9)}, None),
    ],
)
def test_unsupported_says_why(fields, reason):
    site = conv_site(**{"out_channels": 64, "in_channels": 64, "groups": 64, **fields})
    shape = (site.out_channels, site.in_channels // site.groups, *site.kernel_size)
    pattern = BlockPattern.full(shape, (1, 1), site.groups)
    found = DEPTHWISE.unsupported(site, pattern)
    assert found is None if reason is None else reason in found
    assert bool(depthwise_pattern(site)) == (reason is None)


def test_part_of_a_filter_is_refused():
    site = conv_site(64, 64, groups=64)
    (pattern,) = depthwise_pattern(site)
    assert "whole" in DEPTHWISE.unsupported(site, pattern.with_kept(torch.rand(pattern.grid_shape) < 0.5))


def test_the_cheaper_way_is_chosen_and_survives_json(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.ReLU6(), nn.Conv2d(64, 64, 1)).eval()
    x = torch.randn(1, 64, 14, 14)
    first, second = choose_kernels(trace(net, x), FIXED)
    assert first.kernel == DEPTHWISE.name and first.reason.startswith("dense on its own kernel: ")
    assert second.is_dense and "no zero blocks" in second.reason
    plan = choose_kernels(trace(net, x), FIXED)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert [d.kernel for d in choose_kernels(trace(net, x), FIXED, plan=loaded)] == [DEPTHWISE.name, "dense"]


def test_a_plan_cannot_name_it_for_another_layer():
    layer, x = bsc.prune_blocks(nn.Conv2d(64, 64, 1), (1, 1), 0.1).eval(), torch.randn(1, 64, 14, 14)
    plan = choose_kernels(trace(layer, x), FIXED, block_shape=(1, 1))
    wrong = plan.with_kernel(plan.decisions[0].site.name, DEPTHWISE.name)
    with pytest.raises(PlanError, match="whole depthwise filters"):
        choose_kernels(trace(layer, x), FIXED, plan=wrong)


def test_a_dear_kernel_leaves_the_layer_dense():
    slow = FIXED.with_figures("test", sparse_call_seconds=1.0)
    site = conv_site(64, 64, groups=64, batch=1)
    decision = cost.choose(site, depthwise_pattern(site), slow)
    assert decision.is_dense and "torch's depthwise convolution is as fast" in decision.reason


def test_cost_grows_with_the_image_and_the_filter():
    def seconds(size, kernel):
        site = conv_site(64, 64, kernel, size, groups=64)
        (pattern,) = depthwise_pattern(site)
        return cost.sparse_cost(site, pattern, FIXED, DEPTHWISE.name).evaluate()

    assert seconds(7, 3) < seconds(14, 3) < seconds(56, 3) < seconds(56, 5)
