"""A sparse 1x1 convolution, an activation and a depthwise convolution in one kernel."""

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
from torch import Tensor, nn

from blocksparse_compiler import BlockPattern
from blocksparse_compiler.cpu_spmm import HEIGHTS, SPMM
from blocksparse_compiler.depthwise import DEPTHWISE
from blocksparse_compiler.errors import PlanError
from blocksparse_compiler.kernel_variant import KernelConfig
from blocksparse_compiler.layouts import CHANNELS_FIRST
from blocksparse_compiler.pointwise_depthwise import Activation

HELPERS = Path(__file__).parents[1] / "helpers"
KERNEL = KernelConfig(SPMM.name, CHANNELS_FIRST.parameters).encode()
NAMES = ["identity", "relu", "hardswish", "silu", "clamp:0.0:6.0", "clamp:-1.5:0.5"]


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    hidden: int
    height: int = 1
    activation: str = "clamp:0.0:6.0"
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)  # top, bottom, left, right
    dilation: tuple[int, int] = (1, 1)
    density: float = 0.3


class Pair(nn.Module):
    """The operator; `reference` is plain torch."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        torch.manual_seed(0)
        weight = torch.randn(case.hidden, case.shape[1], 1, 1)
        pattern = BlockPattern.full(tuple(weight.shape), (case.height, 1))
        pattern = pattern.with_kept(torch.rand(pattern.grid_shape) < case.density)
        self.pointwise = pattern.apply(weight)
        for name, tensor in SPMM.pack(self.pointwise, pattern)._asdict().items():
            self.register_buffer(name, tensor)
        self.depthwise = torch.randn(case.hidden, 1, *case.kernel)
        self.register_buffer("taps", DEPTHWISE.pack(self.depthwise, None).values)
        self.register_buffer("row_bias", torch.randn(case.hidden))
        self.register_buffer("bias", torch.randn(case.hidden))

    def forward(self, x: Tensor) -> Tensor:
        c = self.case
        rows = (self.values, self.row_ptr, self.tile_index, self.row_bias)
        geometry = (list(c.kernel), list(c.stride), list(c.padding), list(c.dilation))
        op = torch.ops.blocksparse.pointwise_depthwise
        return op(x, *rows, c.activation, self.taps, self.bias, *geometry, False, KERNEL)

    def reference(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        c = self.case
        inner = nn.functional.conv2d(x.to(dtype), self.pointwise.to(dtype), self.row_bias.to(dtype))
        top, bottom, left, right = c.padding
        inner = nn.functional.pad(Activation.parse(c.activation)(inner), (left, right, top, bottom))
        filters, bias = self.depthwise.to(dtype), self.bias.to(dtype)
        return nn.functional.conv2d(inner, filters, bias, c.stride, 0, c.dilation, c.hidden)


TRICKY = [
    *(Case((1, 24, 14, 14), 37, h, NAMES[i]) for i, h in enumerate(HEIGHTS)),
    *(Case((2, 16, 7, 7), 16, h, NAMES[3 + i], (5, 5), padding=(2, 2, 2, 2)) for i, h in enumerate(HEIGHTS)),
    Case((1, 16, 32, 33), 10, 4, stride=(2, 2)),
    Case((1, 150, 9, 16), 6, 2, density=1.0, padding=(0, 1, 3, 2), kernel=(3, 7), dilation=(2, 1)),
    Case((1, 3, 1, 1), 5, 4, density=0.0),
]


def check(cases: list[Case]) -> None:
    pairs = nn.ModuleList(Pair(case) for case in cases)
    xs = [torch.randn(case.shape) for case in cases]

    def all_pairs(xs: list[Tensor]) -> list[Tensor]:
        return [torch.relu(pair(x)) for pair, x in zip(pairs, xs, strict=True)]

    outs, source = run(all_pairs, xs, dynamic=False)
    for pair, x, out in zip(pairs, xs, outs, strict=True):
        exact = pair.reference(x).relu()
        error, dense = out - exact, pair.reference(x, torch.float32).relu() - exact
        assert out.shape == exact.shape
        assert error.norm() <= 1.5 * dense.norm() + 2.0**-22 * exact.norm(), pair.case
    assert source.count("omp parallel") <= len(cases), (
        "at most one kernel for each, the last activation fused"
    )
    assert "blocksparse" not in source.replace("blocksparse_compiler", ""), "an operator was not lowered"


def test_tricky_geometries():
    check(TRICKY)


@st.composite
def cases(draw):
    kernel, stride = (draw(st.tuples(st.integers(1, 5), st.integers(1, 5))) for _ in "ab")
    padding = tuple(draw(st.integers(0, 3)) for _ in range(4))
    height, width = (draw(st.integers(kernel[i], kernel[i] + 20)) for i in range(2))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 40)), height, width)
    stride = tuple(min(s, 3) for s in stride)
    return Case(
        shape,
        draw(st.integers(4, 40)),
        draw(st.sampled_from(HEIGHTS)),
        draw(st.sampled_from(NAMES)),
        kernel,
        stride,
        padding,
        density=draw(st.sampled_from([0.0, 0.2, 1.0])),
    )


@settings(deadline=None, max_examples=2, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.lists(cases(), min_size=6, max_size=6))
def test_random_geometries(drawn):
    check(drawn)


OTHER_ISA = """
from test_pointwise_depthwise import TRICKY, check
check(TRICKY[:7])
"""


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_vector_widths(capability):
    path = os.pathsep.join([str(HELPERS), str(Path(__file__).parent)])
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", OTHER_ISA], env=environment, check=True, timeout=300)


def test_one_compilation_serves_every_batch():
    pair = Pair(Case((4, 24, 9, 10), 20, 2))
    with compiling():
        fast = torch.compile(pair, fullgraph=True, dynamic=True)
        for batch in (2, 3, 5):
            x = torch.randn(batch, 24, 9, 10)
            with torch._dynamo.config.patch(error_on_recompile=batch != 2):
                torch.testing.assert_close(fast(x), pair.reference(x).float(), rtol=1e-4, atol=1e-4)


def test_the_operator_is_sound():
    pair = Pair(Case((2, 8, 5, 6), 12, 4, "hardswish"))
    x = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(pair(x).double(), pair.reference(x), rtol=1e-4, atol=1e-4)
    c = pair.case
    rows = (pair.values, pair.row_ptr, pair.tile_index, pair.row_bias)
    geometry = (list(c.kernel), list(c.stride), list(c.padding), list(c.dilation))
    arguments = (x, *rows, c.activation, pair.taps, pair.bias, *geometry, False, KERNEL)
    torch.library.opcheck(
        torch.ops.blocksparse.pointwise_depthwise.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("name", ["gelu", "clamp", "clamp:0", "clamp:a:b", "relu6:0:6"])
def test_unknown_activations(name):
    with pytest.raises(PlanError, match="clamp:<low>:<high>"):
        Activation.parse(name)


def test_nan_passes_through():
    pair = Pair(Case((1, 16, 7, 7), 16, 4, density=1.0))
    x = torch.randn(1, 16, 7, 7)
    x[0, 3, 0, 0] = torch.nan
    out, _ = run(pair, x, dynamic=False)
    assert out.isnan()[0, :, :2, :2].all() and not out.isnan()[0, :, 2:, 2:].any()
