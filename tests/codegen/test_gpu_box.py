"""Kernels that copy boxes of pixels by tensor descriptors, against plain torch in float64; their boxes."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from gpu_cases import BFLOAT, FLOAT, HALF, GpuCase, GpuLayer, assert_close_to_float64, check, generate
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from layer_cases import conv_site, linear_site
from torch.torch_version import TorchVersion

from blocksparse_compiler import BlockPattern
from blocksparse_compiler.box_variant import box_sides
from blocksparse_compiler.codegen import gpu_boxes
from blocksparse_compiler.codegen.inductor_api import V, kernels_have_scratch
from blocksparse_compiler.devices import device
from blocksparse_compiler.variants import VARIANTS

pytest.importorskip("triton")

ONE = (1, 1, 1, 1)
DESCRIPTOR = "tl.make_tensor_descriptor(\n        X"


def box(n=1, h=1, w=1, d=1) -> dict[str, int | str]:
    return {"pixels": n * d * h * w, "box_n": n, "box_d": d, "box_h": h, "box_w": w}


def case(shape, out_channels, kernel=(), block=(64, 32), **kwargs) -> GpuCase:
    return GpuCase(shape, out_channels, kernel, block, variant="triton_box", **kwargs)


BOXED = [
    # Image sizes of ResNets, and odd ones; batches that boxes do not divide; pixels outside the image.
    case((3, 64, 7, 7), 128, (3, 3), padding=ONE, parameters=box(2, 8, 8)),
    case((5, 32, 7, 7), 64, (3, 3), padding=ONE, parameters=box(4, 1, 8)),
    case((2, 32, 14, 14), 64, (3, 3), padding=ONE, parameters=box(2, 2, 16)),
    case((3, 64, 9, 5), 64, (3, 3), (64, 64), padding=ONE, parameters=box(1, 4, 16)),
    case((2, 64, 5, 5), 128, (1, 1), (128, 64), parameters={"pixels": 32}),
    # Taps that leave the image by more than one pixel, on one side, or altogether; padded 1x1.
    case((2, 32, 6, 5), 64, (5, 5), padding=(2, 2, 2, 2), parameters=box(2, 4, 4)),
    case((2, 32, 6, 5), 64, (3, 3), padding=(2, 2, 2, 2), dilation=(2, 2), parameters=box(1, 4, 8)),
    case((2, 32, 6, 5), 64, (3, 3), padding=(0, 1, 3, 0), parameters=box(2, 2, 8)),
    case((1, 32, 4, 4), 64, (3, 3), padding=(6, 6, 6, 6), dilation=(6, 6), parameters=box(1, 4, 4)),
    case((2, 32, 9, 4), 64, (3, 1), padding=(1, 1, 0, 0), parameters=box(1, 4, 4)),
    case((2, 32, 5, 5), 64, (1, 1), padding=(1, 0, 2, 1), parameters=box(1, 4, 8)),
    # Strides: of views of one phase, and of all phases.
    case((2, 32, 8, 8), 64, (3, 3), stride=(2, 2), padding=ONE, parameters=box(2, 4, 4)),
    case((2, 32, 8, 6), 64, (5, 3), stride=(2, 3), padding=(4, 0, 1, 2), parameters=box(2, 4, 4)),
    case((2, 32, 9, 9), 64, (1, 1), stride=(2, 2), parameters=box(2, 4, 4)),
    case((2, 32, 9, 7), 64, (1, 1), stride=(3, 2), padding=(1, 1, 1, 0), parameters=box(2, 4, 4)),
    case(
        (2, 32, 7, 9),
        64,
        (3, 3),
        stride=(2, 2),
        padding=(3, 3, 2, 1),
        dilation=(2, 4),
        parameters=box(2, 4, 4),
    ),
    case((2, 32, 7, 6), 64, (3, 3), stride=(1, 2), padding=ONE, parameters=box(1, 8, 4)),
    case((2, 32, 8, 5), 64, (2, 1), stride=(4, 3), padding=(3, 1, 0, 0), parameters=box(1, 4, 4)),
    # Ragged channels, rows without tiles, groups, channels first.
    case((2, 40, 6, 6), 100, (3, 3), padding=ONE, parameters=box(1, 4, 8)),
    case((2, 72, 5, 5), 70, (1, 1), bias=False, parameters={"pixels": 16}),
    case((1, 64, 5, 5), 192, (3, 3), padding=ONE, empty_rows=(0, 2), parameters=box(1, 4, 8)),
    case((2, 64, 5, 5), 128, (3, 3), padding=ONE, groups=2, parameters=box(1, 4, 8)),
    case((2, 32, 5, 5), 64, (3, 3), padding=ONE, channels_last=False, parameters=box(1, 4, 8)),
    # Low blocks are as right, though slow.
    case((2, 32, 5, 5), 48, (3, 3), (16, 16), padding=ONE, parameters=box(1, 4, 8)),
    # Other numbers of dimensions.
    case((3, 32, 30), 64, (5,), padding=(4, 0), parameters=box(2, 1, 16)),
    case((3, 32, 30), 64, (5,), stride=(2,), padding=(2, 2), parameters=box(2, 1, 16)),
    case((1, 32, 4, 5, 6), 64, (3, 3, 3), padding=(1,) * 6, density=0.3, parameters=box(1, 4, 4, 2)),
    case(
        (2, 32, 5, 4, 6),
        64,
        (1, 3, 1),
        stride=(2, 1, 2),
        padding=(0, 0, 1, 0, 0, 0),
        parameters=box(2, 4, 4, 2),
    ),
    case(
        (2, 32, 4, 4, 6),
        64,
        (1, 3, 3),
        stride=(1, 1, 2),
        padding=(0, 0, 1, 1, 1, 1),
        parameters=box(1, 4, 4, 2),
    ),
    case((37, 64), 100, (), (64, 64), parameters={"pixels": 32}),
    case((2, 7, 48), 80, bias=False, parameters={"pixels": 16}),
]


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT], ids=str)
def test_geometries(dtype):
    program = check([replace(c, dtype=dtype, seed=i) for i, c in enumerate(BOXED)])
    through_pointers = [kernel.name for kernel in program.templates if DESCRIPTOR not in kernel.source]
    assert program.templates and not through_pointers


POINTERS = [
    # Pixels that do not start at 16 bytes; strides that divide no image; too many dimensions.
    case((2, 44, 5, 5), 64, (3, 3), padding=ONE, parameters=box(1, 4, 8)),
    case((5, 44), 64, parameters={"pixels": 16}),
    case((2, 32, 7, 7), 64, (3, 3), stride=(2, 2), padding=ONE, parameters=box(1, 4, 4)),
    case((2, 32, 1, 5), 64, (1, 1), stride=(2, 2), parameters=box(1, 4, 4)),
    case((1, 32, 4, 4, 4), 64, (3, 3, 3), stride=(2, 2, 2), padding=(1,) * 6, parameters=box(1, 2, 2, 2)),
    # Boxes that do not hold the pixels that the kernel computes.
    case((2, 32, 5, 5), 64, (3, 3), padding=ONE, parameters={"pixels": 64, "box_n": 2}),
]


def test_everything_else_reads_through_pointers():
    program = check([replace(c, dtype=HALF, seed=i) for i, c in enumerate(POINTERS)])
    assert program.templates
    assert not any(DESCRIPTOR in kernel.source for kernel in program.templates)


def test_misaligned_view_reads_through_pointers():
    layer = GpuLayer(case((2, 32, 5, 5), 64, (3, 3), padding=ONE, dtype=HALF, parameters=box(1, 4, 8)))

    class Sliced(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            x = torch.relu(x)
            return self.layer(x[:, 4:36]), self.layer(x[:, 8:40])

    x = (
        torch.randn(2, 40, 5, 5, generator=torch.Generator().manual_seed(1))
        .half()
        .to(memory_format=torch.channels_last)
    )
    program = generate(Sliced(), x)
    for first, out in zip((4, 8), program.run(x), strict=True):
        assert_close_to_float64(layer, torch.relu(x)[:, first : first + 32], out)
    assert sum(DESCRIPTOR in kernel.source for kernel in program.templates) == 1


def test_without_memory_for_descriptors_reads_through_pointers(monkeypatch):
    layer = GpuLayer(case((2, 32, 5, 5), 64, (3, 3), padding=ONE, dtype=HALF, parameters=box(1, 4, 8)))
    monkeypatch.setattr(gpu_boxes, "kernels_have_scratch", lambda: False)
    x = layer.case.input()
    program = generate(layer, x)
    assert DESCRIPTOR not in program.templates[0].source
    assert_close_to_float64(layer, x, program.run(x))


@pytest.mark.parametrize("version, expected", [("2.11.0+cu130", False), ("2.13.0", True)])
def test_cpp_wrapper_has_scratch_memory_from_2_13_on(monkeypatch, version, expected):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    with V.set_graph_handler(SimpleNamespace(cpp_wrapper=True)):
        assert kernels_have_scratch() is expected
    with V.set_graph_handler(SimpleNamespace(cpp_wrapper=False)):
        assert kernels_have_scratch()


def test_dynamic_batch():
    layer = GpuLayer(case((4, 32, 7, 7), 128, (3, 3), padding=ONE, dtype=HALF, parameters=box(2, 8, 8)))
    x = layer.case.input()
    program = generate(layer, x, dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    assert DESCRIPTOR in program.templates[0].source
    for batch in (2, 3, 7):
        x = layer.case.input(batch)
        assert_close_to_float64(layer, x, program.run(x))


def test_epilogue_is_fused():
    def residual(y, r):
        return torch.relu(y + r)

    layer = GpuLayer(
        case((3, 32, 7, 7), 128, (3, 3), padding=ONE, dtype=HALF, epilogue=residual, parameters=box(2, 8, 8))
    )
    x = layer.case.input()
    r = (
        torch.randn(3, 128, 7, 7, generator=torch.Generator().manual_seed(1))
        .half()
        .to(memory_format=torch.channels_last)
    )
    program = generate(layer, x, r)
    assert len(program.kernels) == 1 and not program.externs
    exact = residual(layer.reference(x), r.double())
    assert torch.allclose(program.run(x, r).double(), exact, atol=1e-2)


@st.composite
def boxed_cases(draw):
    size, small = st.integers(1, 9), st.integers(1, 3)
    kernel = draw(st.tuples(small, small))
    stride = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 2), (3, 1)]))
    dilation = draw(st.tuples(small, small))
    padding = tuple(draw(st.integers(0, 4)) for _ in range(4))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    spatial = [max(draw(size), r - sum(padding[2 * i : 2 * i + 2]), 1) for i, r in enumerate(reach)]
    sides = [draw(st.sampled_from([1, 2, 4, 8])) for _ in range(3)]
    sides[0] *= max(1, 16 // math.prod(sides))
    return case(
        (draw(st.integers(1, 3)), draw(st.sampled_from([32, 40, 48])), *spatial),
        draw(st.sampled_from([64, 70])),
        kernel,
        dtype=HALF,
        stride=stride,
        padding=padding,
        dilation=dilation,
        bias=draw(st.booleans()),
        density=draw(st.sampled_from([0.3, 0.8])),
        seed=draw(st.integers(0, 99)),
        parameters=box(*sides),
    )


@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.lists(boxed_cases(), min_size=4, max_size=4))
def test_any_geometry(cases):
    check(cases)


# ---- which boxes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extent, pixels, expected",
    [
        ((64, 56, 56), 256, (4, 8, 8)),
        ((64, 28, 28), 256, (16, 4, 4)),
        ((64, 14, 14), 128, (32, 2, 2)),
        ((256, 7, 7), 128, (128, 1, 1)),
        ((64, 7, 7), 128, (16, 1, 8)),
        ((1, 56, 56), 128, (1, 2, 64)),
        ((8, 100), 64, (8, 8)),
    ],
)
def test_boxes_cover_images_with_least_waste(extent, pixels, expected):
    assert tuple(box_sides(extent, pixels).values()) == expected


@given(st.lists(st.integers(1, 70), min_size=2, max_size=4), st.sampled_from([32, 64, 128, 256]))
def test_boxes_waste_no_more_than_runs_of_pixels_of_one_row(extent, pixels):
    sides = box_sides(extent, pixels)
    assert math.prod(sides.values()) == pixels
    assert all(side & (side - 1) == 0 for side in sides.values())

    def covered(sides):
        return math.prod(-(-size // side) * side for size, side in zip(extent, sides, strict=True))

    row = [1] * (len(extent) - 1) + [pixels]
    assert math.prod(extent) <= covered(sides.values()) <= covered(row)


GPU = {"device": "cuda", "dtype": "bfloat16"}
BLOCK = (64, 64)


def full(site, block=BLOCK):
    shape = (site.out_channels, site.in_channels // site.groups, *site.kernel_size)
    return BlockPattern.full(shape, block, site.groups)


@pytest.mark.parametrize(
    "site, reason",
    [
        (conv_site(**GPU), None),
        (conv_site(stride=(2, 2), **GPU), None),
        (conv_site(stride=(2, 2), size=15, **GPU), "multiple of the stride"),
        (conv_site(stride=(2, 2), size=15, kernel=1, **GPU), None),
        (conv_site(stride=(2, 2), input_shape=(8, 256, "s0", "s1"), **GPU), "known image sizes"),
        (conv_site(input_shape=("s0", 256, "s1", "s2"), **GPU), None),
        (conv_site(in_channels=100, **GPU), "200 bytes"),
        (replace(linear_site(), device="cuda"), "TF32"),
    ],
)
def test_unsupported(site, reason):
    found = VARIANTS["triton_box"].unsupported(site, full(site))
    assert found is None if reason is None else reason in found


def test_low_blocks_have_no_wgmma():
    site = conv_site(**GPU)
    assert "64 output channels" in VARIANTS["triton_box"].unsupported(site, full(site, (32, 32)))


@pytest.mark.parametrize(
    "site",
    [
        conv_site(**GPU),
        conv_site(batch=1, **GPU),
        conv_site(size=7, batch=64, **GPU),
        conv_site(input_shape=("s0", 256, "s1", "s2"), **GPU),
        conv_site(kernel=1, **GPU),
        replace(linear_site(), **GPU),
    ],
)
@pytest.mark.parametrize("variant", ["triton_box", "triton_pair"])
def test_configurations_fit_the_device(site, variant):
    h200, pattern = device("h200"), full(site)
    configs = VARIANTS[variant].configs(site, pattern, h200)
    assert configs
    blocks = 2 if variant == "triton_pair" else 1
    for config in configs:
        sides = [side for name, side in config.items() if name.startswith("box_")]
        assert math.prod(sides or [config["pixels"]]) == config["pixels"]
        assert config["pixels"] * blocks * BLOCK[0] <= 128 * 32 * config["warps"]
        stage = (config["pixels"] + blocks * BLOCK[0]) * BLOCK[1] * 2
        assert 2 <= config["stages"] <= h200.shared_bytes_per_block // stage
    assert not any(
        "box_n" in c or "box" in c for c in VARIANTS[variant].configs(site, pattern, device("a100"))
    )


# ---- machine code ----------------------------------------------------------------------------------


@pytest.mark.parametrize("warps, columns, registers", [(4, 256, 200), (8, 128, 120)])
def test_machine_code(warps, columns, registers):
    """Copies by TMA into four buffers; products of 64 rows with all pixels of a warp group, none drained."""
    layer = GpuLayer(
        case(
            (64, 128, 14, 14),
            128,
            (3, 3),
            (64, 64),
            padding=ONE,
            epilogue=torch.relu,
            parameters={**box(64, 2, 2), "warps": warps, "stages": 4},
        )
    )
    (kernel,) = generate(layer, layer.case.input()).templates
    compiled = kernel.compile()
    found = compiled.resources
    assert found.spill_bytes == 0 and found.registers <= registers
    assert found.tma_loads == found.async_copies == 8  # x and w, three times ahead and once in the loop
    assert f"wgmma.mma_async.sync.aligned.m64n{columns}k16" in compiled.ptx
    assert "wgmma.wait_group.sync.aligned 1" in compiled.ptx
