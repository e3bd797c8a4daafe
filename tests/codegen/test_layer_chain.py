"""Chains of sparse 1x1 and depthwise convolutions in one kernel, on bands of image rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chain_cases import IDENTITY, ChainCase, ChainModule, depthwise, pointwise
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_cases import compiling, run
from torch import Tensor, nn

from blocksparse_compiler.chain_bands import BandTensor, ChainBands
from blocksparse_compiler.cpu_spmm import HEIGHTS
from blocksparse_compiler.errors import PlanError
from blocksparse_compiler.layer_chain import Chain
from blocksparse_compiler.layouts import Layouts
from blocksparse_compiler.pointwise_depthwise import Activation

HELPERS = Path(__file__).parents[1] / "helpers"
RELU, SWISH, SILU = (Activation(name) for name in ("relu", "hardswish", "silu"))

# An inverted residual, strided, and one that adds its input, as in MobileNet-v2.
RESIDUALS = (
    *(pointwise(72, 4, RELU), depthwise(stride=2), pointwise(24, 4)),
    *(pointwise(100, 4, RELU), depthwise(), pointwise(24, 4, IDENTITY, adds=3)),
    *(pointwise(96, 2, SWISH), depthwise(5, activation=SILU), pointwise(24, 1, RELU, adds=6)),
)
PLAIN = (depthwise(), *3 * (pointwise(40, 4, RELU), depthwise(), pointwise(20, 4)))
LAST = Layouts(False, False)
TRICKY = [
    ChainCase((1, 16, 28, 28), RESIDUALS),
    ChainCase((1, 16, 14, 14), RESIDUALS, layouts=LAST),
    ChainCase((1, 3, 9, 7), (depthwise(), pointwise(37, 1, SWISH), depthwise(3, 2), pointwise(5, 2)), 3),
    ChainCase(
        (1, 24, 7, 7),
        (depthwise(5), depthwise(3, activation=SILU), depthwise(7)),
        layouts=Layouts(True, False),
    ),
    ChainCase(
        (1, 40, 5, 40),
        (pointwise(21, 4, RELU), pointwise(40, 4, adds=0), pointwise(10, 2)),
        4,
        Layouts(False, True),
    ),
    ChainCase(
        (2, 150, 6, 6), (pointwise(13, 4, RELU), depthwise(3, 3, padding=2, dilation=2)), 1, density=1.0
    ),
    ChainCase((5, 8, 12, 10), RESIDUALS[:6]),
    ChainCase((1, 16, 3, 33), RESIDUALS, 8),
    ChainCase((1, 1, 8, 3), (pointwise(8, 4, RELU), depthwise()), 2, LAST),
]


def check(cases: list[ChainCase]) -> None:
    chains = nn.ModuleList(ChainModule(case) for case in cases)
    xs = [torch.randn(case.shape) for case in cases]

    def all_chains(xs: list[Tensor]) -> list[Tensor]:
        return [torch.relu(chain(x)) for chain, x in zip(chains, xs, strict=True)]

    outs, source = run(all_chains, xs, dynamic=False)
    for chain, x, out in zip(chains, xs, outs, strict=True):
        exact = chain.reference(x).relu()
        error, dense = out - exact, chain.reference(x, torch.float32).relu() - exact
        assert out.shape == exact.shape
        assert error.norm() <= 2 * dense.norm() + 2.0**-21 * exact.norm(), chain.case
    assert "blocksparse" not in source.replace("blocksparse_compiler", ""), "an operator was not lowered"


def test_tricky_chains():
    check(TRICKY)


def test_parts_of_channels_last_images():
    """Rows, or pixels, that do not follow each other; `bands` as no plan of ours says it."""
    layers = (pointwise(20, 4, RELU), depthwise())
    chains = nn.ModuleList(ChainModule(ChainCase((2, 24, 9, 7), layers, bands, LAST)) for bands in (2, 0))
    x = torch.randn(2, 24, 12, 18).to(memory_format=torch.channels_last)

    def parts(x: Tensor) -> list[Tensor]:
        return [x[..., 1:10, 2:9], x[:1, :, 3:, :14:2]]

    def on_parts(x: Tensor) -> list[Tensor]:
        return [chain(part) for chain, part in zip(chains, parts(x), strict=True)]

    outs, _ = run(on_parts, x, dynamic=False)
    for chain, part, out in zip(chains, parts(x), outs, strict=True):
        torch.testing.assert_close(out.double(), chain.reference(part), rtol=1e-4, atol=1e-5)


@st.composite
def chains(draw):
    height, width = (draw(st.integers(1, 40)) for _ in "ab")
    channels = draw(st.integers(1, 40))
    layers, sizes = [], [(channels, height, width)]
    for _ in range(draw(st.integers(1, 5))):
        activation = Activation(draw(st.sampled_from(["identity", "relu", "hardswish", "silu"])))
        channels, height, width = sizes[-1]
        if draw(st.booleans()):
            out = draw(st.integers(max(HEIGHTS), 50))
            equal = [i for i, size in enumerate(sizes) if size == (out, height, width)]
            adds = draw(st.sampled_from([None, *equal]))
            layers.append(pointwise(out, draw(st.sampled_from(HEIGHTS)), activation, adds))
            sizes.append((out, height, width))
        else:
            dilation, stride = draw(st.integers(1, 2)), draw(st.integers(1, 3))
            layer = depthwise(draw(st.sampled_from([1, 2, 3, 5, 7])), stride, activation, dilation)
            rows, columns = layer.window.output_size((height, width))
            if rows < 1 or columns < 1 or rows * columns > 2000:
                continue
            layers.append(layer)
            sizes.append((channels, rows, columns))
    layers = layers or [pointwise(4)]
    layouts = Layouts(draw(st.booleans()), draw(st.booleans()))
    shape = (draw(st.integers(1, 3)), *sizes[0])
    return ChainCase(
        shape, tuple(layers), draw(st.integers(1, 5)), layouts, draw(st.sampled_from([0.0, 0.2, 1.0]))
    )


@settings(deadline=None, max_examples=2, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.lists(chains(), min_size=5, max_size=5))
def test_random_chains(drawn):
    check(drawn)


OTHER_ISA = """
from test_layer_chain import TRICKY, check
check(TRICKY[1:4])
"""


def in_subprocess(program: str, **variables: str) -> None:
    path = os.pathsep.join([str(HELPERS), str(Path(__file__).parent)])
    environment = {**os.environ, **variables, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=300)


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_vector_widths(capability):
    in_subprocess(OTHER_ISA, ATEN_CPU_CAPABILITY=capability)


def test_one_compilation_serves_every_batch():
    chain = ChainModule(ChainCase((4, 16, 8, 9), RESIDUALS[:6]))
    with compiling():
        fast = torch.compile(chain, fullgraph=True, dynamic=True)
        for batch in (2, 3, 5):
            x = torch.randn(batch, 16, 8, 9)
            with torch._dynamo.config.patch(error_on_recompile=batch != 2):
                torch.testing.assert_close(fast(x), chain.reference(x).float(), rtol=1e-4, atol=1e-4)


ONE_THREAD = """
import torch
torch.set_num_threads(2)  # what kernels are made for; OpenMP grants one
from test_layer_chain import TRICKY, check
check(TRICKY[:1])
"""


def test_fewer_threads_than_bands():
    in_subprocess(ONE_THREAD, OMP_THREAD_LIMIT="1")


def test_the_operator_is_sound():
    chain = ChainModule(ChainCase((2, 16, 9, 8), RESIDUALS))
    x = torch.randn(chain.case.shape)
    torch.testing.assert_close(chain(x).double(), chain.reference(x), rtol=1e-4, atol=1e-4)
    torch.library.opcheck(
        torch.ops.blocksparse.layer_chain.default,
        (x, *chain.arguments),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_the_text_of_layers():
    chain = ChainModule(TRICKY[0]).chain
    assert Chain.decode(chain.encode()) == chain


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pointwise",
        "pointwise;out=3;height=1;blocks=x;activation=relu",
        "depthwise;geometry=3,3;activation=relu",
        "conv;activation=relu",
    ],
)
def test_text_of_no_layers(text):
    with pytest.raises(PlanError, match="Compile the model anew"):
        Chain.decode(text)


def test_nan_stays_in_its_place():
    chain = ChainModule(
        ChainCase((1, 16, 14, 14), (pointwise(24, 4, RELU), depthwise(), pointwise(16, 4)), density=1.0)
    )
    x = torch.randn(chain.case.shape)
    x[0, 3, 7, 0] = torch.nan
    out, _ = run(chain, x, dynamic=False)
    assert out.isnan()[0, :, 6:9, :2].all() and out.isnan().sum() == 16 * 6


def held(tensor: BandTensor, band: int) -> set[int]:
    return set(range(tensor.first[band], tensor.first[band] + tensor.count))


@pytest.mark.parametrize("bands", [1, 2, 3, 7])
def test_bands_hold_what_they_need(bands):
    """Every row that a step reads is the band's own, or taken from its owner, who still holds it."""
    module = ChainModule(ChainCase((1, 16, 13, 11), RESIDUALS))
    plan = ChainBands(module.chain, (16, 13, 11), bands)
    for step in plan.steps:
        read, written = plan.tensors[step.reads], plan.tensors[step.writes]
        for band in range(bands):
            needed = range(*plan.needed(step, *plan.own(step.writes, band)))
            assert set(needed) <= held(read, band) and set(range(*written.own(band))) <= held(written, band)
            assert bands > 1 or not step.exchanges
    for tensor in (plan.tensors[step.writes] for step in plan.steps):
        assert tensor.offset + tensor.channels * tensor.pitch <= plan.inner
        assert tensor.pitch >= tensor.count * tensor.width


@pytest.mark.parametrize("bands", [1, 2, 5])
@pytest.mark.parametrize("layers", [RESIDUALS, PLAIN, TRICKY[2].layers, TRICKY[3].layers])
def test_nothing_is_overwritten_that_is_still_read(layers, bands):
    """Not by the band itself, nor while others, who may be a step behind since all met, copy rows from it."""
    plan = ChainBands(Chain(layers), (20, 12, 10), bands)
    meetings = [i for i, step in enumerate(plan.steps) if step.exchanges] + [len(plan.steps)]
    last = dict.fromkeys(range(len(plan.tensors)), -1)  # step in which a tensor is read last
    for i, step in enumerate(plan.steps):
        if step.pointwise is not None and step.pointwise.adds is not None:
            last[step.pointwise.adds] = i
        until = min(m for m in meetings if m > i) - 1 if step.exchanges else i
        last[step.reads] = max(last[step.reads], until)
    last[len(plan.tensors) - 1] = len(plan.steps)
    for i, step in enumerate(plan.steps):
        written = memory(plan.tensors[step.writes])
        live = (t for t in {0, *(s.writes for s in plan.steps[:i])} if last[t] >= i)
        assert all(written.isdisjoint(memory(plan.tensors[t])) for t in live), step


def memory(tensor: BandTensor) -> set[int]:
    return set(range(tensor.offset, tensor.offset + tensor.channels * tensor.pitch))
