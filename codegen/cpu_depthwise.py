"""`blocksparse::depthwise` as a C++ kernel; its output is a matrix `[pixels, channels]`."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..layouts import Layouts
from ..ops import DepthwiseArguments
from ..variants import KernelConfig
from ..window import Window
from .conv_inputs import channels_first_conv, channels_last_conv, vectors_of_isa
from .cpu_depthwise_planes import DepthwisePlanesTemplate
from .inductor_api import ir, lowerings, parallel_num_threads
from .kernel_template import KernelTemplate
from .lowering_errors import Unsupported
from .output_matrix import OutputMatrix
from .tiling import ConvGeometry, Size, all_static, even_segment
from .views import kernel_inputs, without_offset

MOST_PIXELS = 8
"""Of a register tile: as many sums as hide the latency of a multiply-add on two units."""


def lower_depthwise(args: DepthwiseArguments) -> Any:
    x, operands = args.x, [args.weight] if args.bias is None else [args.weight, without_offset(args.bias)]
    if x.get_device().type != "cpu" or any(t.get_dtype() != torch.float32 for t in (x, *operands)):
        raise Unsupported(f"no kernel for {x.get_dtype()} on {x.get_device()}")
    if is_channels_first(args.kernel):
        return _lower_planes(x, operands, args.window)
    x, conv = channels_last_conv(x, args.window)
    n, channels = x.get_size()[0], int(x.get_size()[1])
    lanes = min(16, vectors_of_isa()[0])
    if channels < lanes or not all_static((*conv.input_size, *conv.input_strides[1:])):
        raise Unsupported(f"{channels} channels of images {conv.input_size}")
    nodes = kernel_inputs([x, *operands])
    layout = ir.FixedLayout(x.get_device(), x.get_dtype(), [n, *conv.output_size, channels])
    template = DepthwiseTemplate(nodes, layout, parallel_num_threads(), images=n, conv=conv, lanes=lanes)
    out = template.generate().output_node()
    return lowerings[torch.ops.aten.permute.default](out, [0, 3, 1, 2])


def is_channels_first(kernel: str) -> bool:
    """Whether the kernel reads and writes channels first; it cannot change from one to the other."""
    layouts = Layouts.of(KernelConfig.decode(kernel).parameters)
    if layouts.reads_first != layouts.writes_first:
        raise Unsupported("a depthwise kernel that changes the layout")
    return layouts.reads_first


def _lower_planes(x: Any, operands: list[Any], window: Window) -> Any:
    x, conv = channels_first_conv(x, window)
    n, channels = x.get_size()[:2]
    nodes = kernel_inputs([x, *operands])
    layout = ir.FixedLayout(x.get_device(), x.get_dtype(), [n, channels, *conv.output_size])
    lanes = min(16, vectors_of_isa()[0])
    template = DepthwisePlanesTemplate(
        nodes, layout, parallel_num_threads(), images=n, conv=conv, lanes=lanes
    )
    return template.generate().output_node()


class DepthwiseTemplate(KernelTemplate):
    """One depthwise convolution.

    Args:
        input_nodes: input, weight `[taps, channels]` and, optionally, bias.
        layout: output, `[n, oh, ow, channels]`, contiguous.
        images: number of images that `conv` speaks of.
        lanes: channels of a vector.
    """

    source = "cpu_f32_depthwise.cpp.jinja"
    headers = ("geometry.h", "depthwise_f32.h")
    operands = ("X", "Weight", "Bias")

    def __init__(
        self, input_nodes: Any, layout: Any, num_threads: int, *, images: Size, conv: ConvGeometry, lanes: int
    ) -> None:
        super().__init__("depthwise", input_nodes, layout, num_threads)
        self.images, self.conv, self.lanes = images, conv, lanes
        self.segment = even_segment(int(conv.output_size[1]), MOST_PIXELS)

    def _options(self, output: OutputMatrix) -> dict[str, Any]:
        g = self.conv
        image_stride, row_stride, pitch = g.input_strides
        (kh, kw), (oh, ow) = g.kernel_size, g.output_size
        reach = (kw - 1) * g.dilation[1] - g.pad_begin[1]
        last = (-(-ow // self.segment) - 1) * self.segment  # first pixel behind the tiles in the middle
        return {
            "channels": int(output.columns),
            "lanes": self.lanes,
            "segment": self.segment,
            "kh": kh,
            "kw": kw,
            "images": self.images,
            "oh": oh,
            "ow": ow,
            "image_stride": image_stride,
            "pitch": pitch,
            "stride_h": g.stride[0],
            "stride_w": g.stride[1],
            "pad_top": g.pad_begin[0],
            "pad_left": g.pad_begin[1],
            "dilation_w": g.dilation[1],
            "geometry": (*g.input_size, row_stride, pitch, *g.stride, *g.pad_begin, *g.dilation),
            "inside": self.segment * g.stride[1] >= g.pad_begin[1]
            and (last - 1) * g.stride[1] + reach < g.input_size[1],
            "store": functools.partial(output.store_tile, self.segment, self.lanes),
        }
