"""What the CPU kernels read: inputs in the layout they want, and the geometry of a convolution on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..window import Window
from .inductor_api import ir, pick_vec_isa
from .lowering_errors import Unsupported
from .tiling import ConvGeometry, all_static, as_int, is_static


def channels_last_conv(x: Any, window: Window) -> tuple[Any, ConvGeometry]:
    """The input in channels-last memory, and the geometry of a convolution on it."""
    # Realized before its strides are asked for: a residual sum would else be copied for this layer, and
    # computed again, from all that went into it, for the next one.
    x.realize()
    x = ir.ExternKernel.require_channels_last(x)
    image_stride, channel_stride, row_stride, pixel_stride = map(as_int, x.get_stride())
    if channel_stride != 1 or not is_static(pixel_stride):
        raise Unsupported(f"strides {x.get_stride()} of the input")
    return x, _geometry(x, (image_stride, row_stride, pixel_stride), window)


def channels_first_conv(x: Any, window: Window) -> tuple[Any, ConvGeometry]:
    """The input in contiguous memory `[N, C, H, W]`, and the geometry of a convolution on it."""
    x.realize()
    x = ir.ExternKernel.require_contiguous(x)
    _, channels, height, width = map(as_int, x.get_size())
    if not all_static((channels, height, width)):
        raise Unsupported(f"channels-first images of {height}x{width}")
    return x, _geometry(x, (channels * height * width, width, 1), window)


def _geometry(x: Any, input_strides: Sequence[Any], window: Window) -> ConvGeometry:
    size = x.get_size()[2:]
    return conv_geometry(size, window.output_size([as_int(s) for s in size]), input_strides, window)


def conv_geometry(
    input_size: Sequence[Any], output_size: Sequence[Any], input_strides: Sequence[Any], window: Window
) -> ConvGeometry:
    height, width = map(as_int, input_size)
    oh, ow = map(as_int, output_size)
    image, row, pixel = input_strides
    (kh, kw), (stride_h, stride_w), (dilation_h, dilation_w) = (
        window.kernel_size,
        window.stride,
        window.dilation,
    )
    (top, _), (left, _) = window.borders
    return ConvGeometry(
        input_size=(height, width),
        output_size=(oh, ow),
        input_strides=(image, row, pixel),
        kernel_size=(kh, kw),
        stride=(stride_h, stride_w),
        pad_begin=(top, left),
        dilation=(dilation_h, dilation_w),
    )


def row_of_pixels(pixels: Any, step: int) -> ConvGeometry:
    """A 1x1 convolution whose input pixels lie evenly spaced, whatever their images and rows."""
    return ConvGeometry((1, pixels), (1, pixels), (0, 0, step))


def vectors_of_isa() -> tuple[int, int]:
    """Floats of a vector, and number of registers, of the instructions that Inductor compiles for."""
    isa = pick_vec_isa()
    lanes = isa.nelements() if isa else 4
    return lanes, 32 if lanes == 16 else 16
