"""The kernel on AMX tiles against plain torch in float64: emulated and, where there is AMX, for real."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
import torch
from case_lists import convolutions
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_cases import Case, Layer, Layers, assert_close_to_float64, compiling, count_kernels, run
from torch.nn import functional as F

from blocksparse_compiler.codegen.cpu_amx_template import emulated_amx
from blocksparse_compiler.devices import detect_amx

PAD = (1, 1, 1, 1)
PANEL, DIRECT = {"panel": 1}, {"panel": 0}


here = pytest.mark.skipif(not detect_amx(), reason="no AMX on this machine")
on_tiles = pytest.mark.parametrize("tiles", ["emulated", pytest.param("real", marks=here)])


def compiled_for(tiles: str) -> AbstractContextManager[None]:
    return emulated_amx() if tiles == "emulated" else nullcontext()


def amx(input_shape, out_channels, kernel_size=(), block=(32, 32), **named) -> Case:
    return Case(input_shape, out_channels, kernel_size, block, variant="cpu_amx_bf16", **named)


TRICKY = [
    # Rows of pixels: one tile, a tile that is not full, pairs, a last tile or pair that moves left.
    amx((3, 64), 96, bias=False),
    amx((16, 64), 96),
    amx((5, 9, 64), 96, parameters={"chunk": 1}),
    amx((2, 32, 7, 7), 64, (1, 1)),
    amx((2, 64, 14, 14), 128, (1, 1), (64, 64), parameters={"chunk": 3, "row_threads": 2}),
    # Regions: 16 columns and the rest, columns as runs, edges, corners; taps that no image holds.
    amx((1, 32, 28, 28), 32, (3, 3), padding=PAD, parameters=DIRECT),
    amx((2, 32, 14, 21), 64, (3, 3), padding=PAD, parameters={**DIRECT, "row_threads": 2}),
    amx((2, 32, 40, 3), 32, (3, 3), stride=(2, 1), padding=(2, 0, 1, 2), parameters=DIRECT),
    amx((1, 32, 9, 20), 32, (5, 3), padding=(4, 2, 0, 3), dilation=(2, 1), parameters=DIRECT),
    amx((1, 32, 4, 4), 32, (3, 3), padding=(6, 6, 6, 6), dilation=(6, 6), parameters=DIRECT),
    amx((2, 32, 17, 17), 32, (1, 1), stride=(2, 2), parameters=DIRECT),
    # Panels: strips of one image, images side by side and some missing, phases of strides.
    amx((1, 64, 14, 14), 64, (3, 3), padding=PAD, parameters={**PANEL, "chunk": 2}),
    amx((5, 64, 7, 7), 64, (3, 3), padding=PAD, parameters={**PANEL, "chunk": 8}),
    amx((3, 32, 2, 2), 32, (3, 3), padding=PAD, parameters={**PANEL, "row_threads": 2}),
    amx((2, 32, 13, 13), 32, (3, 3), stride=(2, 2), padding=PAD, parameters=PANEL),
    amx((3, 32, 9, 10), 32, (3, 2), stride=(3, 2), padding=(0, 2, 3, 1), dilation=(1, 3), parameters=PANEL),
    amx((2, 32, 14, 14), 32, (1, 1), stride=(2, 2), parameters=PANEL),
    amx((1, 32, 4, 4), 32, (3, 3), padding=(6, 6, 6, 6), dilation=(6, 6), parameters=PANEL),
    # Ragged channels, other blocks, nothing kept.
    amx((2, 40, 7, 7), 50, (3, 3), padding=PAD),
    amx((2, 41, 7, 9), 50, (1, 1)),
    amx((1, 43, 20, 20), 40, (3, 3), (16, 16), padding=PAD),
    amx((9, 48), 48, (), (16, 16)),
    amx((9, 48), 48, (), (48, 2)),
    amx((2, 40, 6, 6), 48, (3, 3), (32, 8), padding=PAD),
    amx((2, 128, 6, 6), 50, (3, 3), (16, 64), padding=PAD),
    amx((2, 32, 6, 6), 32, (3, 3), padding=PAD, density=0.0),
    # 1-D convolutions.
    amx((2, 32, 50), 32, (5,), padding=(4, 0)),
]


def check(cases: list[Case], tiles: str) -> None:
    module = Layers(cases)
    xs = [case.input() for case in cases]
    with compiled_for(tiles):
        outs, source = run(module, xs, dynamic=False)
    for layer, x, out in zip(module.layers, xs, outs, strict=True):
        assert_close_to_float64(layer, x, out)
    assert source.count("using Products = ") >= 1 and "using RegisterTile" not in source


@on_tiles
def test_tricky_shapes(tiles):
    check(TRICKY, tiles)


@st.composite
def cases(draw):
    size, small = st.integers(1, 24), st.integers(1, 3)
    block = draw(st.sampled_from([(32, 32), (16, 16), (32, 32), (16, 32), (32, 6), (64, 32)]))
    channels = draw(st.integers(block[1], 70)), draw(st.integers(block[0], 70))
    parameters = {"chunk": draw(st.integers(1, 8)), "row_threads": draw(small)}
    if draw(st.booleans()):
        parameters["panel"] = draw(st.integers(0, 1))
    common = {
        "out_channels": channels[1],
        "block": block,
        "bias": draw(st.booleans()),
        "density": draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])),
        "seed": draw(st.integers(0, 2**16)),
        "parameters": parameters,
    }
    if draw(st.integers(0, 3)) == 0:
        return amx((draw(size), draw(size), channels[0]), **common)
    return amx(**draw(convolutions(channels[0], size)), **common)


@on_tiles
@settings(deadline=None, max_examples=2, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(drawn=st.lists(cases(), min_size=12, max_size=12))
def test_random_shapes(tiles, drawn):
    check(drawn, tiles)


def affine(y, extra):
    """A batch norm that was not folded, a residual, ReLU."""
    scale, shift = extra.flatten()[:50], extra.flatten()[-50:]
    shape = (-1, 1, 1) if y.dim() == 4 else (-1,)
    return torch.relu((y - shift.view(shape)) * scale.view(shape) + 1 + extra)


def several(y, extra):
    z = y * 2 + extra
    return y, F.gelu(z), z.float()


def gate(y, extra):
    return y * extra[..., :1, :1] if y.dim() == 4 else y * extra[:, :1]


EPILOGUES = [affine, several, gate]


@on_tiles
def test_epilogues_run_inside(tiles):
    shapes = [
        amx((3, 40, 7, 7), 50, (3, 3), padding=PAD),
        amx((2, 32, 20, 20), 50, (3, 3), padding=PAD, parameters=DIRECT),
        amx((37, 64), 50),
    ]
    module = Layers([shape for shape in shapes for _ in EPILOGUES])
    epilogues = EPILOGUES * len(shapes)

    def net(xs, extras):
        return [e(y, extra) for e, y, extra in zip(epilogues, module(xs), extras, strict=True)]

    torch.manual_seed(0)
    xs = [layer.case.input() for layer in module.layers]
    extras = [output_like(layer) for layer in module.layers]
    with compiled_for(tiles):
        outs, source = run(net, xs, extras, dynamic=False)
    assert source.count("using Products = ") == count_kernels(source)["all"] == len(xs)
    wants = [
        e(layer.reference(x), extra.double())
        for e, layer, x, extra in zip(epilogues, module.layers, xs, extras, strict=True)
    ]
    for out, want in zip(outs, wants, strict=True):
        for a, b in zip(*[(o if isinstance(o, tuple) else (o,)) for o in (out, want)], strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=2e-2, atol=2e-2)


def output_like(layer: Layer) -> torch.Tensor:
    extra = torch.randn_like(layer.reference(layer.case.input())).bfloat16()
    return extra.to(memory_format=torch.channels_last) if extra.dim() == 4 else extra


@on_tiles
def test_one_compilation_serves_every_batch(tiles):
    module = Layers(
        [
            amx((4, 32, 7, 9), 32, (3, 3), padding=PAD),
            amx((4, 32, 7, 9), 32, (3, 3), padding=PAD, parameters=DIRECT),
            amx((4, 32, 7, 9), 32, (1, 1)),
        ]
    )
    with compiling() as sources, compiled_for(tiles):
        fast = torch.compile(module, fullgraph=True)
        for batch in (2, 3, 8, 5):
            x = torch.randn(batch, 32, 7, 9).bfloat16().to(memory_format=torch.channels_last)
            torch._dynamo.mark_dynamic(x, 0)
            with torch._dynamo.config.patch(error_on_recompile=batch != 2):
                outs = fast([x] * 3)
            for layer, out in zip(module.layers, outs, strict=True):
                assert_close_to_float64(layer, x, out)
    assert "".join(sources).count("using Products = ") == 3


@on_tiles
def test_views_of_the_input(tiles):
    """Channels, pixels and images that a larger tensor holds, from an odd offset on."""
    conv, flat = amx((2, 33, 8, 9), 32, (3, 3), padding=PAD), amx((6, 33), 32)
    module = Layers([conv, replace(conv, parameters=DIRECT), flat])

    class Views(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, x, rows):
            part = x[1:, 3:36, 1:, :9]
            return self.module([part, part, rows[1:, 5:]])

    x = torch.randn(3, 40, 9, 11).bfloat16().to(memory_format=torch.channels_last)
    rows = torch.randn(7, 38).bfloat16()
    with compiled_for(tiles):
        outs, source = run(Views(), x, rows, dynamic=False)
    for layer, part, out in zip(module.layers, [x[1:, 3:36, 1:, :9]] * 2 + [rows[1:, 5:]], outs, strict=True):
        assert_close_to_float64(layer, part, out)
    assert source.count("using Products = ") == 3


@pytest.mark.skipif(detect_amx(), reason="there is AMX on this machine")
@pytest.mark.parametrize("emulated", [False, True])
def test_without_amx_the_same_weights_run_on_vectors(emulated):
    """And so do images of symbolic size, everywhere."""
    case = amx((2, 32, 7, 9), 32, (3, 3), padding=PAD)
    layer, x = Layer(case), case.input()
    if emulated:
        with compiling() as sources, emulated_amx():
            torch._dynamo.mark_dynamic(x, 2)
            out = torch.compile(layer, fullgraph=True)(x)
        source = "".join(sources)
    else:
        out, source = run(layer, x)
    assert_close_to_float64(layer, x, out)
    assert "using RegisterTile" in source and "using Products" not in source
