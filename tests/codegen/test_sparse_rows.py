"""Scattered weights in pointwise and linear layers: the kernel with vectors along pixels."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_cases import Case, Layer, Layers, assert_close_to_float64, compiling, count_kernels, run
from layer_cases import FIXED, conv_site, linear_site
from torch import Tensor, nn
from torch.nn import functional

import blocksparse_compiler as bsc
from blocksparse_compiler import BlockPattern, cost, trace
from blocksparse_compiler.backend import compiled_graphs
from blocksparse_compiler.cpu_spmm import HEIGHTS, SPMM, pixel_tile, pixel_tiles
from blocksparse_compiler.depthwise import DEPTHWISE
from blocksparse_compiler.layouts import CHANNELS_FIRST, FIRST, Layouts
from blocksparse_compiler.packing import unpack_weight
from blocksparse_compiler.passes.choose_kernels import choose_kernels
from blocksparse_compiler.spmm_roofline import sparse_rows_cost

HELPERS = Path(__file__).parents[1] / "helpers"


LAYOUTS = [(), ("reads",), ("writes",), ("reads", "writes")]
"""Sides of a layer that are channels-first."""


def rows(shape, out_channels, height=1, first=(), parameters=None, **kwargs) -> Case:
    kernel_size = (1,) * (len(shape) - 2)
    fields = {"density": 0.2, "kernel_size": kernel_size, "block": (height, 1), **kwargs}
    parameters = {**(parameters or {}), **dict.fromkeys(first, FIRST)}
    last = "writes" not in first
    return Case(shape, out_channels, variant=SPMM.name, parameters=parameters, channels_last=last, **fields)


def input_of(case: Case) -> Tensor:
    """In the layout that the kernel reads."""
    return case.input().contiguous() if "reads" in case.parameters else as_read(case.input())


def as_read(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


TRICKY = [
    *(rows((1, 48, 7, 7), 64, h, parameters={"row_threads": 2}) for h in HEIGHTS),
    *(rows((2, 64, 14, 14), 96, h, bias=False) for h in HEIGHTS),
    # Channels and pixels that fill no tile of 16, fewer than one, no weight left, sums in several parts.
    rows((2, 29, 14, 13), 50),
    rows((1, 5, 3, 3), 7, 2, density=0.9),
    rows((1, 16, 4, 4), 16, density=0.0),
    rows((5, 700), 50, 2, density=0.9),
    rows((1, 11), 7, density=0.9),
    rows((2, 9, 33), 40, 4, parameters={"pixels": 16, "row_threads": 3}),
    # Channels first: full tiles, a smaller last one, one pixel, one row of pixels, rows that fill no block.
    rows((3, 29, 8, 16), 50, 4, LAYOUTS[3], parameters={"pixels": 64}),
    rows((1, 160, 14, 14), 41, 1, LAYOUTS[3], density=0.9),
    rows((3, 37, 7, 7), 41, 2, LAYOUTS[3], {"row_threads": 2, "panel": 1}),
    rows((2, 37, 14, 14), 24, 4, LAYOUTS[1], {"panel": 1}),
    rows((2, 37, 7, 7), 50, 1, LAYOUTS[1]),
    rows((3, 37, 14, 14), 30, 4, LAYOUTS[2]),
    rows((3, 20, 1, 1), 9, 1, LAYOUTS[3]),
    rows((2, 9, 33), 40, 4, LAYOUTS[3]),
    rows((1, 16, 4, 4), 16, 1, LAYOUTS[3], density=0.0),
    # Strided: rows of several tiles and of a part of one, images that share a tile.
    *(rows((3, 37, 9, 13), 30, 2, first, stride=(2, 2)) for first in LAYOUTS),
    rows((2, 37, 5, 70), 20, 4, LAYOUTS[0], stride=(3, 1), parameters={"row_threads": 2}),
    rows((2, 20, 33), 18, 1, LAYOUTS[3], stride=(2,)),
]


class Followed(Layers):
    """Layers with a residual sum and an activation behind those for which a residual is given."""

    def forward(self, xs, residuals):
        outs = super().forward(xs)
        return [y if r is None else functional.hardswish(y + r) for y, r in zip(outs, residuals, strict=True)]


def check(cases: list[Case], followed: Sequence[bool] = ()) -> str:
    """Compares all with float64, those `followed` by a residual and an activation too; the generated text."""
    module = Followed(cases)
    xs = [input_of(case) for case in cases]
    residuals = [
        torch.rand_like(layer.reference(x), dtype=torch.float32) if follow else None
        for layer, x, follow in zip(module.layers, xs, followed or [False] * len(xs), strict=True)
    ]
    residuals = [
        r if r is None or not case.channels_last else as_read(r)
        for r, case in zip(residuals, cases, strict=True)
    ]
    outs, source = run(module, xs, residuals, dynamic=False)
    for layer, x, residual, out in zip(module.layers, xs, residuals, outs, strict=True):
        if residual is None:
            assert_close_to_float64(layer, x, out)
        else:
            want = functional.hardswish(layer.reference(x) + residual)
            torch.testing.assert_close(out, want.float(), rtol=1e-4, atol=1e-4, msg=str(layer.case))
    assert "SparseRows<" in source
    assert "blocksparse" not in source.replace("blocksparse_compiler", ""), "an operator was not lowered"
    return source


def test_tricky_shapes():
    check(TRICKY)


@st.composite
def cases(draw):
    channels, size = st.integers(1, 70), st.integers(1, 14)
    in_channels, out_channels = draw(channels), draw(channels)
    image = (draw(size), draw(size)) if draw(st.integers(0, 3)) else ()
    shape = (draw(st.integers(1, 3)), in_channels, *image)
    first = draw(st.sampled_from(LAYOUTS)) if image else ()
    parameters = {"row_threads": draw(st.integers(1, 3)), "panel": draw(st.integers(0, 1))}
    if draw(st.booleans()):
        parameters["pixels"] = draw(st.sampled_from([16, 48, 96]))
    return rows(
        shape,
        max(out_channels, 8),
        draw(st.sampled_from(HEIGHTS)),
        first,
        parameters,
        stride=tuple(draw(st.integers(1, 2)) for _ in image),
        bias=draw(st.booleans()),
        density=draw(st.sampled_from([0.05, 0.3, 1.0])),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(deadline=None, max_examples=2, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.lists(st.tuples(cases(), st.booleans()), min_size=10, max_size=10))
def test_random_shapes(drawn):
    check([case for case, _ in drawn], [followed for _, followed in drawn])


@pytest.mark.parametrize("first", [LAYOUTS[0], LAYOUTS[3]])
def test_one_compilation_serves_every_batch(first):
    layer = Layer(rows((4, 32, 7, 9), 32, first=first))
    with compiling():
        fast = torch.compile(layer, fullgraph=True)
        for batch in (2, 3, 8):
            x = torch.randn(batch, 32, 7, 9)
            x = x if first else x.to(memory_format=torch.channels_last)
            torch._dynamo.mark_dynamic(x, 0)
            with torch._dynamo.config.patch(error_on_recompile=batch != 2):
                assert_close_to_float64(layer, x, fast(x))


def test_channels_first_images_of_unknown_size_fall_back(caplog):
    layer = Layer(rows((2, 32, 7, 9), 32, first=LAYOUTS[3]))
    x = layer.case.input()
    torch._dynamo.mark_dynamic(x, 2)
    with compiling(), caplog.at_level(logging.WARNING):
        assert_close_to_float64(layer, x, torch.compile(layer, fullgraph=True)(x))
    assert "channels-first images of" in caplog.text


@pytest.mark.parametrize("first", LAYOUTS)
def test_epilogue_is_fused(first):
    layer = Layer(rows((2, 40, 7, 9), 36, 2, first))

    def block(x, extra):
        y = layer(x)
        return functional.relu6(y * 2 + extra), y

    x, extra = input_of(layer.case), torch.randn(2, 36, 7, 9)
    extra = as_read(extra) if layer.case.channels_last else extra
    (out, raw), source = run(block, x, extra, dynamic=False)
    want = layer.reference(x)
    torch.testing.assert_close(raw, want.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out, functional.relu6(want * 2 + extra).float(), rtol=1e-4, atol=1e-4)
    assert count_kernels(source) == {"block_sparse": 1, "all": 1}


def test_a_channels_first_chain_copies_nothing():
    """Two layers and a residual, all channels-first: one kernel each."""
    layers = Layers([rows((1, 40, 7, 9), 40, h, LAYOUTS[3]) for h in (1, 4)])

    def block(x):
        y = functional.hardswish(layers.layers[0](x))
        return functional.relu6(layers.layers[1](y) + x)

    x = torch.randn(1, 40, 7, 9)
    out, source = run(block, x, dynamic=False)
    y = functional.hardswish(layers.layers[0].reference(x))
    want = functional.relu6(layers.layers[1].reference(y) + x)
    torch.testing.assert_close(out, want.float(), rtol=1e-4, atol=1e-4)
    assert count_kernels(source) == {"block_sparse": 2, "all": 2}


OTHER_ISA = """
from test_sparse_rows import TRICKY, check
check(TRICKY)
"""


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_vector_widths(capability):
    path = os.pathsep.join([str(HELPERS), str(Path(__file__).parent)])
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", OTHER_ISA], env=environment, check=True, timeout=300)


# ---- the table ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("height", HEIGHTS)
def test_packing_round_trip(height):
    weight = torch.randn(41, 29, 1, 1)
    pattern = BlockPattern.full(tuple(weight.shape), (height, 1))
    pattern = pattern.with_kept(torch.rand(pattern.grid_shape) < 0.3)
    packed = SPMM.pack(weight, pattern)
    assert torch.equal(unpack_weight(*packed, 41, 29, (1, 1)), pattern.apply(weight))
    assert (packed.row_ptr.shape[1] - 1) * height == 48 and int(packed.row_ptr[0, -1]) == pattern.num_kept


@pytest.mark.parametrize("lanes, registers", [(16, 32), (8, 16), (4, 16)])
def test_tiles_fit_registers_and_whole_transposes(lanes, registers):
    for height in HEIGHTS:
        tiles = pixel_tiles(height, lanes, registers)
        assert tiles and all(tile.pixels % 16 == 0 for tile in tiles)
        fitting = [t for t in tiles if height * t.vectors + height + 1 <= registers]
        assert tiles == fitting or (height, lanes) == (4, 4)


def test_few_pixels_fill_one_tile():
    few, many = (conv_site(64, 64, kernel=1, size=size, batch=1) for size in (7, 28))
    assert pixel_tile(1, few, FIXED, row_threads=2).pixels == 64
    assert pixel_tile(1, many, FIXED).pixels == 80
    config = SPMM.configs(few, _full((64, 64, 1, 1)), FIXED)[0]
    assert config == {"pixels": 64, "row_threads": 2}


def test_single_weights_of_many_channels_keep_their_panel_in_l1():
    wide = conv_site(512, 512, kernel=1, size=14, batch=1)
    assert 4 * 512 * pixel_tile(1, wide, FIXED).pixels <= 1.5 * FIXED.l1_bytes_per_thread
    assert pixel_tile(4, wide, FIXED).pixels > pixel_tile(1, wide, FIXED).pixels


def test_threads_share_no_line_of_channels_first_output():
    def row_threads(size, batch=1, layouts=CHANNELS_FIRST):
        site = conv_site(384, 64, kernel=1, size=size, batch=batch)
        return SPMM.configs(site, _full((384, 64, 1, 1)), FIXED, layouts)[0]["row_threads"]

    assert row_threads(14) == FIXED.threads > 1
    assert row_threads(28) == row_threads(14, batch=8) == row_threads(14, layouts=Layouts(True, False)) == 1


def test_rows_that_many_weights_read_are_copied_side_by_side():
    def panel(size, in_channels, out_channels, density):
        torch.manual_seed(0)
        pattern = _full((out_channels, in_channels, 1, 1))
        pattern = pattern.with_kept(torch.rand(pattern.grid_shape) < density)
        site = conv_site(out_channels, in_channels, kernel=1, size=size, batch=1)
        return SPMM.configs(site, pattern, FIXED, CHANNELS_FIRST)[0].get("panel", 0)

    assert panel(14, 64, 384, 0.15) == 1 and panel(14, 384, 96, 0.15) == 0
    assert panel(28, 64, 384, 0.15) == 0, "aligned rows are read where they lie"
    assert panel(7, 384, 96, 0.15) == 1, "a whole image is one run of memory"


@pytest.mark.parametrize(
    "site, block, reason",
    [
        (conv_site(kernel=1), (1, 1), None),
        (linear_site(), (4, 1), None),
        (conv_site(kernel=1), (3, 1), "blocks of 1x1"),
        (conv_site(kernel=1), (4, 4), "blocks of 1x1"),
        (conv_site(kernel=3), (1, 1), "1x1 convolutions"),
        (conv_site(kernel=1, stride=(2, 2)), (1, 1), None),
        (conv_site(kernel=1, padding=((1, 1), (0, 0))), (1, 1), "padded"),
    ],
)
def test_unsupported_says_why(site, block, reason):
    shape = (site.out_channels, site.in_channels, *site.kernel_size)
    found = SPMM.unsupported(site, _full(shape, block))
    assert found is None if reason is None else reason in found


def _full(shape, block=(1, 1)):
    return BlockPattern.full(shape, block)


# ---- the decision ------------------------------------------------------------------------------------


def test_more_zeros_never_cost_more_and_high_blocks_cost_less():
    for size in (7, 14, 56):
        site = conv_site(kernel=1, size=size, batch=1)
        for height in HEIGHTS:
            seconds = [
                cost.sparse_cost(site, (height, 1), FIXED, SPMM.name, density=d).evaluate()
                for d in (0.05, 0.1, 0.3, 1.0)
            ]
            assert seconds == sorted(seconds)
        low, high = (
            cost.break_even_density(site, (height, 1), FIXED, variant=SPMM.name) for height in (1, 4)
        )
        assert 0.05 < low <= high < 1


def test_strided_layers_rather_read_channels_last():
    device = dataclasses.replace(FIXED, threads=1)  # which takes nothing from other cores

    def seconds(layouts, stride):
        site = conv_site(256, 64, kernel=1, size=56, batch=1, stride=(stride, stride))
        return sparse_rows_cost(site, (1, 1), device, layouts, density=0.1).evaluate()

    first, last = Layouts(True, True), Layouts(False, True)
    assert seconds(first, 1) < seconds(last, 1) and seconds(first, 2) > seconds(last, 2)
    assert 2 * seconds(last, 2) < seconds(last, 1), "a quarter of the pixels"


def test_threads_that_share_one_image_wait_for_each_others_channels(monkeypatch):
    def seconds(layouts, threads, batch):
        device = dataclasses.replace(FIXED, threads=threads)
        site = conv_site(64, 128, kernel=1, size=16, batch=batch)
        return sparse_rows_cost(site, (1, 1), device, layouts, density=0.1).evaluate()

    first = Layouts(True, True)
    cases = [(first, 2, 1), (first, 1, 1), (first, 2, 2), (Layouts(False, True), 2, 1)]
    counted = [seconds(*case) for case in cases]
    monkeypatch.setattr("blocksparse_compiler.spmm_roofline.OTHER_CORE_BYTES_PER_SECOND", 1e30)
    waits = [before - seconds(*case) for before, case in zip(counted, cases, strict=True)]
    half_of_the_input = 4 * 128 * 16 * 16 / 2
    assert waits == pytest.approx([half_of_the_input / 10e9, 0, 0, 0], abs=1e-12)


def test_single_weights_are_candidates_only_where_they_may_pay():
    def estimates(layer, x):
        (decision,) = choose_kernels(trace(layer.eval(), x), FIXED)
        return decision.estimates

    x = torch.randn(1, 256, 14, 14)
    layer = nn.Conv2d(256, 256, 1)
    bsc.prune_blocks(layer, (1, 1), 0.1)
    assert "cpu_f32_spmm 1x1" in estimates(layer, x)
    bsc.prune_blocks(layer := nn.Conv2d(256, 256, 1), (1, 1), 0.8)
    assert "cpu_f32_spmm 1x1" not in estimates(layer, x)
    bsc.prune_blocks(layer := nn.Conv2d(256, 256, 1), (4, 1), 0.1)
    found = estimates(layer, x)
    assert "cpu_f32_spmm 4x1" in found and "cpu_f32_spmm 1x1" not in found
    bsc.prune_blocks(layer := nn.Conv2d(256, 256, 3, padding=1), (1, 1), 0.1)
    assert "cpu_f32_spmm 1x1" not in estimates(layer, x)


@pytest.mark.parametrize("block", [(1, 8), (2, 16), (1, 32)])
def test_low_wide_blocks_run_as_columns(block):
    layer = bsc.prune_blocks(nn.Conv2d(256, 256, 1), block, 0.1).eval()
    (decision,) = choose_kernels(trace(layer, torch.randn(1, 256, 14, 14)), FIXED, block_shape=block)
    assert decision.kernel == SPMM.name and decision.pattern.block_shape == (block[0], 1)
    assert f"of {block[0]}x1 tiles kept" in decision.reason
    (free,) = choose_kernels(trace(layer, torch.randn(1, 256, 14, 14)), FIXED)
    assert free.kernel == SPMM.name and free.estimates[SPMM.name] <= decision.estimates[SPMM.name]


def test_mobile_network():
    """Pointwise layers run on single weights, and the depthwise layer on its own kernel."""

    def point(inputs, outputs):
        layer = nn.Conv2d(inputs, outputs, 1, bias=False)
        return bsc.prune_blocks(layer, (1, 1), 0.1)

    torch.manual_seed(0)
    depthwise = nn.Conv2d(128, 128, 3, padding=1, groups=128)
    net = nn.Sequential(
        point(64, 128), nn.BatchNorm2d(128), nn.ReLU6(), depthwise, nn.ReLU6(), point(128, 64)
    ).eval()
    x = torch.randn(1, 64, 14, 14).to(memory_format=torch.channels_last)
    plan = choose_kernels(trace(net, x), dataclasses.replace(FIXED), allow_dense=False)
    torch._dynamo.reset()
    with torch.no_grad():
        fast = torch.compile(net, backend="blocksparse", fullgraph=True, options={"dense": "never"})
        torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
    for decisions in (plan, compiled_graphs()[-1].plan):
        assert [d.kernel for d in decisions] == [SPMM.name, DEPTHWISE.name, SPMM.name]
