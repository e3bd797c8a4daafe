"""What the CPU kernels read: inputs in the layout they want, and the geometry of a convolution on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .inductor_api import ir, pick_vec_isa
from .lowering_errors import Unsupported
from .tiling import ConvGeometry, all_static, as_int, is_static


def channels_last_conv(
    x: Any, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[Any, ConvGeometry]:
    """The input in channels-last memory, and the geometry of a convolution on it."""
    # Realized before its strides are asked for: a residual sum would else be copied for this layer, and
    # computed again, from all that went into it, for the next one.
    x.realize()
    x = ir.ExternKernel.require_channels_last(x)
    image_stride, channel_stride, row_stride, pixel_stride = map(as_int, x.get_stride())
    if channel_stride != 1 or not is_static(pixel_stride):
        raise Unsupported(f"strides {x.get_stride()} of the input")
    strides = (image_stride, row_stride, pixel_stride)
    return x, _geometry(x, strides, kernel_size, stride, padding, dilation)


def channels_first_conv(
    x: Any, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[Any, ConvGeometry]:
    """The input in contiguous memory `[N, C, H, W]`, and the geometry of a convolution on it."""
    x.realize()
    x = ir.ExternKernel.require_contiguous(x)
    _, channels, height, width = map(as_int, x.get_size())
    if not all_static((channels, height, width)):
        raise Unsupported(f"channels-first images of {height}x{width}")
    strides = (channels * height * width, width, 1)
    return x, _geometry(x, strides, kernel_size, stride, padding, dilation)


def _geometry(
    x: Any,
    input_strides: tuple[Any, Any, int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> ConvGeometry:
    size = [as_int(s) for s in x.get_size()[2:]]
    out_size = [
        (size[i] + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i]
        + 1
        for i in range(2)
    ]
    return ConvGeometry(
        input_size=(size[0], size[1]),
        output_size=(out_size[0], out_size[1]),
        input_strides=input_strides,
        kernel_size=(kernel_size[0], kernel_size[1]),
        stride=(stride[0], stride[1]),
        pad_begin=(padding[0], padding[2]),
        dilation=(dilation[0], dilation[1]),
    )


def row_of_pixels(pixels: Any, step: int) -> ConvGeometry:
    """A 1x1 convolution whose input pixels lie evenly spaced, whatever their images and rows."""
    return ConvGeometry((1, pixels), (1, pixels), (0, 0, step))


def vectors_of_isa() -> tuple[int, int]:
    """Floats of a vector, and number of registers, of the instructions that Inductor compiles for."""
    isa = pick_vec_isa()
    lanes = isa.nelements() if isa else 4
    return lanes, 32 if lanes == 16 else 16
