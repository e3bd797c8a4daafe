"""The gradient of kept weight tiles as an Inductor C++ template.

The output is a matrix `[tiles * bh, bw]` in memory; Inductor's fused epilogue runs on one tile at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .kernel_template import KernelTemplate
from .output_matrix import OutputMatrix
from .tiling import ConvGeometry, Size


@dataclass(frozen=True)
class GradientTile:
    """What the inner loop keeps in registers: `vectors` of `lanes` input channels, `rows` output channels."""

    lanes: int
    vectors: int
    rows: int


class TileGradientTemplate(KernelTemplate):
    """One gradient `[n, bh, bw]`.

    Args:
        input_nodes: gradient of the output, input, tile_index.
        layout: output, contiguous.
        images: number of images that `conv` speaks of.
        conv: geometry of the layer; a linear layer, or a 1x1 convolution that reads pixel after pixel, is one
            image, one pixel wide.
        channels: (output, input).
        tile: register tile.
        chunk: output rows that are packed at once.
        tile_threads: threads that share the tiles of the same pixels; the others share the pixels.
    """

    source = "cpu_f32_gradient.cpp.jinja"
    headers = ("tile_gradient_f32.h",)
    operands = ("Grad", "X", "TileIndex")

    def __init__(
        self,
        input_nodes: Sequence[Any],
        layout: Any,
        num_threads: int,
        *,
        images: Size,
        conv: ConvGeometry,
        channels: tuple[int, int],
        tile: GradientTile,
        chunk: int,
        tile_threads: int,
    ) -> None:
        super().__init__("tile_gradient", input_nodes, layout, num_threads)
        self.images, self.conv, self.channels, self.tile = images, conv, channels, tile
        self.chunk, self.tile_threads = chunk, tile_threads

    def _options(self, output: OutputMatrix) -> dict[str, Any]:
        tiles, bh, bw = map(int, self.layout.size)
        conv, (out_channels, in_channels) = self.conv, self.channels
        image_stride, row_stride, pixel_stride = conv.input_strides
        pointwise = conv.kernel_size == (1, 1)
        native = self.tile.lanes
        return {
            "tiles": tiles,
            "bh": bh,
            "bw": bw,
            "images": self.images,
            "oh": conv.output_size[0],
            "ow": conv.output_size[1],
            "h": conv.input_size[0],
            "w": conv.input_size[1],
            "image_stride": image_stride,
            "row_stride": row_stride,
            "pixel_stride": pixel_stride,
            "kh": conv.kernel_size[0],
            "kw": conv.kernel_size[1],
            "stride": conv.stride,
            # A single tap reads every stride-th pixel: the others are not packed.
            "step": conv.stride if pointwise else (1, 1),
            "pointwise": pointwise,
            "pad": conv.pad_begin,
            "dilation": conv.dilation,
            "out_blocks": out_channels // bh,
            "in_blocks": in_channels // bw,
            "grad_step": out_channels,
            "lanes": native,
            "vectors": self.tile.vectors,
            "rows": self.tile.rows,
            "x_lanes": native,
            "dy_lanes": max(n for n in (16, 8, 4) if n <= max(native, 4) and bh % n == 0),
            "chunk": self.chunk,
            "tile_threads": self.tile_threads,
            "store": functools.partial(output.store, ("m_start", f"m_start + {bh}"), ("0", str(bw))),
        }
