"""Geometries that have gone wrong or may, and random ones, for the kernels of any dtype."""

from __future__ import annotations

from hypothesis import strategies as st
from kernel_cases import Case

TRICKY = [
    # ResNet shapes: 3x3 with padding, rows of one, two and several tiles, strides, pointwise.
    Case((2, 32, 14, 14), 64, (3, 3), (32, 32), padding=(1, 1, 1, 1)),
    Case((1, 16, 8, 56), 32, (3, 3), padding=(1, 1, 1, 1), bias=False, parameters={"prefetch": "output"}),
    Case((2, 16, 9, 15), 16, (3, 3), stride=(2, 2), padding=(1, 1, 1, 1)),
    Case((2, 32, 14, 14), 64, (1, 1), (32, 32), parameters={"chunk": 1, "prefetch": "output"}),
    Case((2, 32, 9, 9), 32, (1, 1), stride=(2, 2)),
    # Narrow images: the same row of several images share a tile, then rows of the image left over.
    Case((2, 32, 7, 7), 32, (3, 3), (32, 32), padding=(1, 1, 1, 1)),
    Case((3, 32, 7, 7), 32, (3, 3), (32, 32), padding=(1, 1, 1, 1), parameters={"prefetch": "output"}),
    Case((1, 32, 7, 7), 32, (3, 3), (32, 32), padding=(1, 1, 1, 1), parameters={"pixels": 7}),
    Case((1, 32, 7, 7), 32, (3, 3), (32, 32), padding=(1, 1, 1, 1), stride=(2, 2)),
    Case((5, 16, 3, 2), 16, (3, 3), padding=(1, 1, 1, 1)),
    Case((2, 16, 1, 1), 16, (3, 3), padding=(1, 1, 1, 1)),
    # Taps that leave the image by more than one pixel, on one side, or altogether.
    Case((2, 16, 6, 11), 16, (5, 5), padding=(2, 2, 2, 2)),
    Case((2, 16, 6, 11), 16, (3, 3), padding=(2, 2, 2, 2), dilation=(2, 2)),
    Case((1, 16, 6, 5), 16, (3, 3), padding=(0, 1, 3, 0)),
    Case((1, 16, 4, 4), 16, (3, 3), padding=(6, 6, 6, 6), dilation=(6, 6)),
    Case((1, 16, 5, 20), 16, (1, 5), padding=(0, 0, 4, 0)),
    Case((2, 16, 12, 3), 16, (3, 1), padding=(1, 1, 0, 0)),
    # Ragged channels, blocks wider than a register tile, low and narrow blocks, no tile kept.
    Case((2, 40, 6, 6), 50, (3, 3), padding=(1, 1, 1, 1)),
    Case((2, 40, 5, 5), 50, (1, 1), (8, 8)),
    Case((2, 24, 5, 5), 20, (1, 1), (4, 3)),
    Case((2, 24, 7, 5), 22, (3, 3), (4, 4), padding=(1, 1, 1, 1)),
    Case((2, 256, 5, 5), 20, (1, 1), (8, 8), density=0.9),
    Case((2, 29, 5, 20), 24, (3, 3), (24, 7), padding=(1, 1, 1, 1)),
    Case((2, 64, 14, 14), 128, (1, 1), (64, 64)),
    Case((2, 64, 5, 5), 100, (3, 3), (64, 32), padding=(1, 1, 1, 1)),
    Case((2, 48, 6, 6), 48, (3, 3), (48, 24), padding=(1, 1, 1, 1)),
    Case((2, 16, 6, 6), 16, (1, 1), density=0.0),
    # Linear layers and 1-D convolutions.
    Case((2, 29, 48), 80, bias=False),
    Case((3, 64), 96, (), (32, 32)),
    Case((1, 1, 1, 32), 16),
    Case((2, 16, 50), 32, (5,), padding=(4, 0), dilation=(1,)),
    # Threads share block rows; fewer block rows than threads.
    Case((2, 64, 7, 7), 64, (3, 3), padding=(1, 1, 1, 1), parameters={"row_threads": 2}),
    Case((1, 64, 7, 7), 128, (1, 1), (32, 32), density=0.1, parameters={"row_threads": 2, "chunk": 3}),
    Case((1, 64, 7, 7), 16, (1, 1), parameters={"row_threads": 3, "pixels": 5}),
]


@st.composite
def cases(draw):
    size = st.integers(1, 20)
    small = st.integers(1, 3)
    variant = draw(st.sampled_from(["cpu_f32", "cpu_bf16", "cpu_f16"]))
    odd = [(32, 5)] if variant == "cpu_f32" else [(32, 2), (16, 6)]
    block = draw(st.sampled_from([(16, 16), (32, 32), (8, 8), (4, 4), (16, 8), *odd]))
    channels = draw(st.integers(block[1], 70)), draw(st.integers(block[0], 70))
    common = {
        "out_channels": channels[1],
        "block": block,
        "bias": draw(st.booleans()),
        "density": draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])),
        "seed": draw(st.integers(0, 2**16)),
        "parameters": {
            "chunk": draw(small),
            "row_threads": draw(small),
            "prefetch": draw(st.sampled_from(["none", "output"])),
        },
        "variant": variant,
    }
    if draw(st.integers(0, 3)) == 0:
        return Case((draw(size), draw(size), channels[0]), **common)
    return Case(**draw(convolutions(channels[0], size)), **common)


@st.composite
def convolutions(draw, in_channels: int, size):
    """Shape of the input, and geometry, of a 2-D convolution with an output, as arguments of `Case`."""
    small = st.integers(1, 3)
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (3, 3), (1, 3), (5, 2)]))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 3)]))
    padding = tuple(draw(st.integers(0, 2)) for _ in range(4))
    image = tuple(
        max(draw(size), dilation[i] * (kernel[i] - 1) + 1 - padding[2 * i] - padding[2 * i + 1])
        for i in range(2)
    )
    return {
        "input_shape": (draw(st.integers(1, 4)), in_channels, *image),
        "kernel_size": kernel,
        "stride": (draw(small), draw(small)),
        "padding": padding,
        "dilation": dilation,
    }
