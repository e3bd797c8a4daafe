"""The generated Triton kernels, run by Triton's interpreter, against plain torch in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
from gpu_cases import BFLOAT, FLOAT, HALF, GpuCase, check
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from blocksparse_compiler.variants import VARIANTS

pytest.importorskip("triton")

ONE = (1, 1, 1, 1)
GEOMETRIES = [
    # ResNet shapes: padding, strides, pointwise; more pixels than one program, and less.
    GpuCase((2, 64, 7, 7), 64, (3, 3), (32, 32), padding=ONE),
    GpuCase((2, 32, 9, 11), 32, (3, 3), stride=(2, 2), padding=ONE, bias=False),
    GpuCase((2, 64, 5, 5), 128, (1, 1), (64, 64)),
    GpuCase((2, 64, 9, 9), 64, (1, 1), (64, 32), stride=(2, 2)),
    GpuCase((1, 32, 1, 1), 32, (3, 3), padding=ONE),
    # Taps that leave the image by more than one pixel, on one side, or altogether; 1x1 with padding.
    GpuCase((1, 16, 6, 11), 16, (5, 5), padding=(2, 2, 2, 2)),
    GpuCase((1, 16, 6, 11), 16, (3, 3), padding=(2, 2, 2, 2), dilation=(2, 2)),
    GpuCase((1, 16, 6, 5), 16, (3, 3), padding=(0, 1, 3, 0)),
    GpuCase((1, 16, 4, 4), 16, (3, 3), padding=(6, 6, 6, 6), dilation=(6, 6)),
    GpuCase((1, 16, 5, 9), 16, (1, 3), padding=(0, 0, 2, 0)),
    GpuCase((2, 16, 9, 3), 16, (3, 1), padding=(1, 1, 0, 0)),
    GpuCase((1, 16, 4, 5), 16, (1, 1), padding=(1, 0, 2, 1), density=1.0),
    GpuCase((1, 16, 9, 9), 16, (7, 7), padding=(3, 3, 3, 3), density=0.2),
    GpuCase((1, 16, 9, 9), 16, (3, 2), stride=(3, 2), dilation=(1, 3)),
    # Ragged channels: not a multiple of the block, of 16 bytes, or of two.
    GpuCase((2, 40, 6, 6), 50, (3, 3), padding=ONE),
    GpuCase((2, 37, 5, 5), 21, (1, 1)),
    GpuCase((2, 70, 4, 4), 35, (3, 3), (32, 32), padding=ONE),
    # Rows without tiles, no tile at all, every tile.
    GpuCase((1, 64, 5, 5), 64, (3, 3), padding=ONE, empty_rows=(0, 2)),
    GpuCase((1, 32, 5, 5), 48, (3, 3), padding=ONE, density=0.0),
    GpuCase((1, 32, 5, 5), 48, (1, 1), density=0.0, bias=False),
    GpuCase((2, 32, 7), 48, (1,), density=0.0),
    GpuCase((2, 32, 5, 5), 48, (1, 1), density=1.0),
    # Groups are block-diagonal.
    GpuCase((1, 64, 5, 5), 64, (3, 3), (16, 16), padding=ONE, groups=4),
    GpuCase((2, 64, 5, 5), 128, (1, 1), (32, 32), groups=2, density=0.8),
    # Input with channels first: one copy before the kernel.
    GpuCase((2, 32, 5, 5), 32, (3, 3), padding=ONE, channels_last=False),
    # Other numbers of dimensions.
    GpuCase((2, 16, 30), 32, (5,), padding=(4, 0)),
    GpuCase((2, 32, 17), 16, (1,)),
    GpuCase((1, 16, 4, 5, 6), 32, (3, 3, 3), padding=(1, 1, 1, 1, 1, 1), density=0.2),
    GpuCase((1, 16, 5, 4, 6), 16, (1, 3, 1), stride=(2, 1, 2), padding=(0, 0, 1, 0, 0, 0)),
    GpuCase((1, 16, 3, 4, 5), 16, (1, 1, 1)),
    GpuCase((5, 64), 96, (), (32, 32)),
    GpuCase((2, 7, 48), 80, bias=False),
    GpuCase((2, 3, 4, 40), 24),
    GpuCase((1, 1, 64), 64, (), (64, 64), density=0.0),
]
CONFIGURATIONS = [
    # One tile at a time, several; weights as rows; one program for all pixels; large tiles.
    GpuCase((1, 64, 6, 6), 64, (3, 3), padding=ONE, parameters={"step": 1}),
    GpuCase((1, 64, 6, 6), 64, (3, 3), padding=ONE, parameters={"step": 4}),
    GpuCase((1, 64, 6, 6), 64, (3, 3), (64, 32), padding=ONE, parameters={"step": 2, "swapped": 1}),
    GpuCase((1, 64, 6, 6), 64, (1, 1), (64, 64), parameters={"swapped": 1, "pixels": 256, "warps": 8}),
    GpuCase((3, 128), 128, (), (128, 64), parameters={"swapped": 1, "pixels": 16}),
    GpuCase((1, 128, 5, 5), 256, (3, 3), (128, 64), padding=ONE, density=0.3, parameters={"pixels": 16}),
    GpuCase((1, 128, 5, 5), 16, (1, 1), (16, 128)),
    GpuCase((1, 64, 6, 6), 64, (3, 3), (32, 32), padding=ONE, parameters={"step": 2, "l1": 1}),
    # More taps than a mask has bits.
    GpuCase((1, 16, 7, 7), 16, (7, 5), padding=(3, 3, 2, 2), density=0.4, parameters={"step": 4}),
    GpuCase((1, 16, 40), 16, (33,), padding=(16, 16), parameters={"step": 2, "swapped": 1}),
]


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT], ids=str)
def test_geometries(dtype):
    check([replace(case, dtype=dtype, seed=i) for i, case in enumerate(GEOMETRIES)])


def test_configurations():
    check(CONFIGURATIONS)


DECODE = [
    GpuCase((1, 64), 64, (), (32, 32), variant="triton_decode"),
    GpuCase((3, 128), 96, (), (32, 32), variant="triton_decode", parameters={"split": 3, "step": 2}),
    GpuCase((2, 5, 64), 80, (), (16, 16), variant="triton_decode", parameters={"split": 2, "step": 4}),
    GpuCase((16, 100), 50, (), (16, 16), bias=False, variant="triton_decode", parameters={"split": 8}),
    GpuCase((4, 256), 128, (), (64, 64), empty_rows=(1,), variant="triton_decode", parameters={"split": 4}),
    GpuCase((4, 64), 128, (), (128, 64), density=0.0, variant="triton_decode", parameters={"split": 4}),
]


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT], ids=str)
def test_decode(dtype):
    few = {"pixels": 16}
    check([replace(case, dtype=dtype, parameters={**few, **case.parameters}) for case in DECODE])


@st.composite
def cases(draw):
    size, small = st.integers(1, 9), st.integers(1, 3)
    block = draw(st.sampled_from([(16, 16), (32, 16), (32, 32), (16, 32)]))
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    if groups == 1:
        channels = draw(st.integers(block[1], 70)), draw(st.integers(block[0], 70))
    else:
        channels = groups * block[1] * draw(st.integers(1, 2)), groups * block[0]
    common = {
        "out_channels": channels[1],
        "block": block,
        "groups": groups,
        "dtype": draw(st.sampled_from([HALF, BFLOAT, FLOAT])),
        "bias": draw(st.booleans()),
        "density": draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])),
        "seed": draw(st.integers(0, 2**16)),
        "parameters": {
            "pixels": draw(st.sampled_from([16, 32, 64])),
            "step": draw(st.sampled_from([1, 2, 64 // block[1]])),
            "swapped": draw(st.integers(0, 1)),
        },
    }
    dims = draw(st.sampled_from([0, 1, 2, 2, 2, 3]))
    if dims == 0:
        rows = tuple(draw(st.lists(size, min_size=1, max_size=2)))
        common["groups"], common["out_channels"] = 1, max(block[0], channels[1])
        if draw(st.booleans()) and rows[0] * rows[-1] <= 16:
            split = draw(small)
            common |= {"variant": "triton_decode", "parameters": {"pixels": 16, "split": split}}
        return GpuCase((*rows, channels[0]), **common)
    kernel = tuple(draw(st.sampled_from([1, 1, 2, 3])) for _ in range(dims))
    dilation = tuple(draw(small) for _ in range(dims))
    padding = tuple(draw(st.integers(0, 2)) for _ in range(2 * dims))
    image = tuple(
        max(draw(size), dilation[i] * (kernel[i] - 1) + 1 - padding[2 * i] - padding[2 * i + 1])
        for i in range(dims)
    )
    return GpuCase(
        (draw(small), channels[0], *image),
        kernel_size=kernel,
        stride=tuple(draw(small) for _ in range(dims)),
        padding=padding,
        dilation=dilation,
        channels_last=draw(st.integers(0, 4)) > 0,
        **common,
    )


@settings(deadline=None, max_examples=3, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.lists(cases(), min_size=10, max_size=10))
def test_random_shapes(drawn):
    check(drawn)


def test_every_variant_of_the_table_is_tested():
    """Here; in `test_gpu_box.py`; in `test_gpu_pair.py`."""
    names = {name for name, variant in VARIANTS.items() if variant.device == "cuda"}
    assert names == {"triton_gather", "triton_decode", "triton_box", "triton_pair"}
