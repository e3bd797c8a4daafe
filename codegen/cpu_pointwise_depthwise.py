"""`blocksparse::pointwise_depthwise` as a C++ kernel: what lies between the two layers stays in the cache.

A depthwise layer reads one channel at a time. So each block row of the pointwise layer is computed for a
whole image, into planes of the thread's own, and the depthwise layer of these channels runs on them at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..cpu_spmm import PixelTile, pixel_tiles
from ..pointwise_depthwise import Activation, PointwiseDepthwiseArguments
from .conv_inputs import channels_first_conv, vectors_of_isa
from .cpu_depthwise_planes import DepthwisePlanesTemplate
from .cpu_spmm_lowering import LONGEST_ROW
from .cpu_spmm_template import even_vectors
from .inductor_api import ir, parallel_num_threads
from .lowering_errors import Unsupported
from .output_matrix import OutputMatrix
from .tiling import ConvGeometry, Size
from .views import kernel_inputs, without_offset

LARGEST_PANEL = 1 << 18
"""Bytes of a copy of the input that each thread makes where rows of pixels would straddle cache lines."""

PLANE_COST = 24
"""Of the depthwise layer and its epilogue, in halves of a nonzero: what balances threads."""


def lower_pointwise_depthwise(args: PointwiseDepthwiseArguments) -> Any:
    x, bias = args.x, without_offset(args.bias)
    operands = [args.values, args.row_ptr, args.tile_index, without_offset(args.row_bias), args.weight, bias]
    if x.get_device().type != "cpu" or x.get_dtype() != torch.float32:
        raise Unsupported(f"no kernel for {x.get_dtype()} on {x.get_device()}")
    x, conv = channels_first_conv(x, args.window)
    n, in_channels = x.get_size()[:2]
    hidden = int(args.row_bias.get_size()[0])
    layout = ir.FixedLayout(x.get_device(), x.get_dtype(), [n, hidden, *conv.output_size])
    template = PointwiseDepthwiseTemplate(
        kernel_inputs([x, *operands]),
        layout,
        parallel_num_threads(),
        images=n,
        conv=conv,
        in_channels=int(in_channels),
        height=int(args.values.get_size()[2]),
        activation=args.activation,
    )
    return template.generate().output_node()


@dataclass(frozen=True)
class PixelTiles:
    """Tiles of one size, as C++: pixels `begin` to `end` of an image.

    Args:
        vectors, pixels: of a tile.
        stride, readable: floats between two channels of what a tile multiplies, and floats of each to read.
    """

    name: str
    begin: int
    end: int
    vectors: int
    pixels: int
    stride: int
    readable: int


class PointwiseDepthwiseTemplate(DepthwisePlanesTemplate):
    """A pointwise layer in blocks of one input channel, an activation, and a depthwise layer; channels first.

    Args:
        input_nodes: input; values, row_ptr, tile_index and bias of the pointwise layer; weight `[taps, c]`
            and bias of the depthwise layer.
        height: of a block.
        activation: see `pointwise_depthwise.Activation`.
        Others as `DepthwisePlanesTemplate`.
    """

    source = "cpu_f32_pointwise_depthwise.cpp.jinja"
    headers = ("sparse_rows_f32.h", "depthwise_planes_f32.h", "activations_f32.h")
    operands = ("X", "Values", "RowPtr", "TileIndex", "RowBias", "Weight", "Bias")

    def __init__(
        self,
        input_nodes: Any,
        layout: Any,
        num_threads: int,
        *,
        images: Size,
        conv: ConvGeometry,
        in_channels: int,
        height: int,
        activation: str,
    ) -> None:
        lanes, registers = vectors_of_isa()
        super().__init__(input_nodes, layout, num_threads, images=images, conv=conv, lanes=lanes)
        self.in_channels, self.height, self.activation = in_channels, height, activation
        self.pixel_tile = pixel_tiles(height, lanes, registers)[-1]
        self.image_pixels = int(conv.input_size[0]) * int(conv.input_size[1])
        self.panel = self.image_pixels % lanes != 0 and 4 * in_channels * self.image_pixels <= LARGEST_PANEL

    def _options(self, output: OutputMatrix) -> dict[str, Any]:
        tile = self.pixel_tile
        return {
            **super()._options(output),
            "bh": self.height,
            "tile_lanes": tile.lanes,
            "tiles": self._pixel_tiles(tile),
            "pitch": self._pitch(tile),
            "panel": self.panel,
            "in_channels": self.in_channels,
            "flush": LONGEST_ROW,
            "row_cost": PLANE_COST * self.height,
            "activation": Activation.parse(self.activation).cpp(),
        }

    def _pitch(self, tile: PixelTile) -> int:
        return -(-self.image_pixels // tile.lanes) * tile.lanes

    def _pixel_tiles(self, tile: PixelTile) -> list[PixelTiles]:
        """Tiles of even size, and the last one of an image."""
        pixels, pitch = self.image_pixels, self._pitch(tile)
        vectors, last = even_vectors(pixels, tile, 1)
        end = pitch - last * tile.lanes
        kinds = [("RegisterTile", 0, end, vectors), ("LastTile", end, pitch, last)]

        def tiles(name: str, begin: int, stop: int, vectors: int) -> PixelTiles:
            size = vectors * tile.lanes
            stride, readable = (pitch, size) if self.panel else (pixels, min(size, pixels - begin))
            return PixelTiles(name, begin, stop, vectors, size, stride, readable)

        return [tiles(*kind) for kind in kinds if kind[1] < kind[2]]
