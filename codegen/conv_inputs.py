"""What the CPU kernels read: inputs in the layout they want, and the geometry of a convolution on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    single = as_int(x.get_size()[1]) == 1  # whose stride means nothing
    if (channel_stride != 1 and not single) or not is_static(pixel_stride):
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
    image, row, pixel = input_strides
    return ConvGeometry(
        input_size=_pair(map(as_int, input_size)),
        output_size=_pair(map(as_int, output_size)),
        input_strides=(image, row, pixel),
        kernel_size=_pair(window.kernel_size),
        stride=_pair(window.stride),
        pad_begin=_pair(before for before, _ in window.borders),
        dilation=_pair(window.dilation),
    )


def _pair(values: Iterable[Any]) -> tuple[Any, Any]:
    first, second = values
    return first, second


def row_of_pixels(pixels: Any, step: int) -> ConvGeometry:
    """A 1x1 convolution whose input pixels lie evenly spaced, whatever their images and rows."""
    return ConvGeometry((1, pixels), (1, pixels), (0, 0, step))


def vectors_of_isa() -> tuple[int, int]:
    """Floats of a vector, and number of registers, of the instructions that Inductor compiles for."""
    isa = pick_vec_isa()
    lanes = isa.nelements() if isa else 4
    return lanes, 32 if lanes == 16 else 16
