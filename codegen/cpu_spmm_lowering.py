"""Pointwise and linear layers of scattered weights as a C++ kernel, channels last or first on either side."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ..cpu_spmm import PixelTile, pixel_tiles
from ..layouts import Layouts
from ..window import Window
from .conv_inputs import channels_first_conv, channels_last_conv, vectors_of_isa
from .cpu_spmm_template import PixelGrid, SparseRowsTemplate
from .inductor_api import ir, lowerings, parallel_num_threads
from .lowering_errors import Unsupported
from .tiling import ConvGeometry, Size, all_static, as_int
from .views import kernel_inputs

if TYPE_CHECKING:
    from .cpu_lowerings import Weight

LONGEST_ROW = 64
"""Products summed up in one go: parts cost little here, and sums are not in blocks otherwise."""


def lower_scattered_conv2d(weight: Weight, x: Any, window: Window) -> Any:
    layouts = Layouts.of(weight.config.parameters)
    reads, writes = layouts.reads_first, layouts.writes_first
    x, conv = (channels_first_conv if reads else channels_last_conv)(x, window)
    n, (h, w) = as_int(x.get_size()[0]), conv.output_size
    if conv.kernel_size != (1, 1) or any(window.padding):
        raise Unsupported("taps or borders in a kernel for 1x1 convolutions")
    if (reads or writes) and not all_static((h, w)):
        raise Unsupported(f"channels-first images of {h}x{w}")
    # Rows of channels-last images follow each other as one.
    images, pixels = (n, h * w) if reads or writes else (1, n * h * w)
    grid = PixelGrid(
        images,
        pixels,
        step=conv.input_strides[2],
        strides=None if conv.is_flat(1 if reads else n) else _strides(conv),
        plane=math.prod(conv.input_size) if reads else 0,
        reads_first=reads,
        writes_first=writes,
    )
    if writes:
        return multiply_rows(weight, x, grid, [n, weight.out_channels, h, w])
    out = multiply_rows(weight, x, grid, [n, h, w, weight.out_channels])
    return lowerings[torch.ops.aten.permute.default](out, [0, 3, 1, 2])


def _strides(conv: ConvGeometry) -> tuple[Size, ...]:
    image, row, pixel = conv.input_strides
    return (*conv.output_size, image, row * conv.stride[0], pixel * conv.stride[1])


def multiply_rows(weight: Weight, x: Any, grid: PixelGrid, shape: list[Any]) -> Any:
    """The output node of the kernel, contiguous `shape`."""
    template = SparseRowsTemplate(
        kernel_inputs([x, *weight.operands]),
        ir.FixedLayout(x.get_device(), x.get_dtype(), shape),
        parallel_num_threads(),
        grid=grid,
        tile=_pixel_tile(weight),
        height=weight.block_shape[0],
        in_channels=weight.in_channels,
        parameters=dict(weight.config.parameters),
        flush=LONGEST_ROW,
    )
    return template.generate().output_node()


def _pixel_tile(weight: Weight) -> PixelTile:
    lanes, registers = vectors_of_isa()
    wanted = weight.config.parameters.get("pixels")
    tiles = pixel_tiles(weight.block_shape[0], lanes, registers)
    return max(
        (t for t in tiles if wanted is None or t.pixels <= int(wanted)),
        key=lambda t: t.pixels,
        default=tiles[0],
    )
