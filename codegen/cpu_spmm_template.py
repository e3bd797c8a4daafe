"""Layers of scattered weights: vectors of pixels, one multiply-add per vector and weight.

The output is a matrix in memory, of pixels by channels or, channels-first, of channels by pixels. Inductor's
epilogue runs on tiles of it: 16x16, or one block row by the pixels of a register tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from ..cpu_spmm import SIDE, PixelTile
from .kernel_template import KernelTemplate
from .output_matrix import OutputMatrix
from .tiling import Size, is_static


@dataclass(frozen=True)
class PixelGrid:
    """Where the pixels of a pointwise layer lie.

    Args:
        images, pixels: images, and pixels of each. Channels-last images may count as one.
        step: floats between two pixels of channels-last input, if they lie evenly spaced.
        strides: otherwise, rows and columns of an output image, and floats between the images, rows and
            pixels that are read.
        plane: floats between two channels of channels-first input.
        reads_first, writes_first: whether input and output are channels-first.
    """

    images: Size
    pixels: Size
    step: Size = 1
    strides: tuple[Size, ...] | None = None
    plane: Size = 0
    reads_first: bool = False
    writes_first: bool = False


@dataclass(frozen=True)
class TileKind:
    """Tiles of one size, as C++.

    Args:
        condition: picks them.
        vectors, pixels: of a tile.
        count: pixels that are there.
        stride, readable: floats between two channels of what a tile multiplies, and floats of each to read.
    """

    name: str
    condition: str
    vectors: int
    pixels: int
    count: int | str
    stride: int
    readable: int


class SparseRowsTemplate(KernelTemplate):
    """One pointwise or linear layer in blocks of one input channel.

    Args:
        layout: output, contiguous: pixels by channels, or `[n, out_channels, oh, ow]`.
        grid: where the pixels lie.
        tile: pixels of a register tile.
        height: of a block.
        panel: whether the pixels of a tile are copied side by side, if they already are channels-first.
        flush: weights of a row after which a sum starts anew; 0 for never.
    """

    source = "cpu_f32_spmm.cpp.jinja"
    headers = ("sparse_rows_f32.h",)
    operands = ("X", "Values", "RowPtr", "TileIndex", "Bias")

    def __init__(
        self,
        input_nodes: Any,
        layout: Any,
        num_threads: int,
        *,
        grid: PixelGrid,
        tile: PixelTile,
        height: int,
        in_channels: int,
        parameters: dict[str, int | str],
        flush: int,
    ) -> None:
        super().__init__("block_sparse", input_nodes, layout, num_threads)
        self.grid, self.pixel_tile, self.in_channels = grid, tile, in_channels
        self.height, self.parameters, self.flush = height, parameters, flush
        self.panel = not grid.reads_first or grid.strides is not None or bool(parameters.get("panel", 0))

    def _matrix_size(self, out: Any) -> tuple[Any, Any]:
        if not self.grid.writes_first:
            return super()._matrix_size(out)
        n, channels, *pixels = out.get_size()
        return n * channels, sympy.prod(pixels)

    def _options(self, output: OutputMatrix) -> dict[str, Any]:
        grid = self.grid
        return {
            "bh": self.height,
            "lanes": self.pixel_tile.lanes,
            "tiles": self._tile_kinds(),
            "panel": self.panel,
            "row_threads": max(1, int(self.parameters.get("row_threads", 1))),
            "flush": self.flush,
            "in_channels": self.in_channels,
            "channels": int(self.layout.size[1 if grid.writes_first else -1]),
            "images": grid.images,
            "image_pixels": grid.pixels,
            "step": grid.step,
            "strides": grid.strides,
            "plane": grid.plane,
            "reads_first": grid.reads_first,
            "writes_first": grid.writes_first,
            "store": output.store_tile,
        }

    def _tile_kinds(self) -> list[TileKind]:
        """Full tiles, and the last one of an image where its size is known and another."""
        pixels = self.grid.pixels
        if not is_static(pixels):
            tile = self.pixel_tile
            return [self._tile_kind("RegisterTile", "", tile.vectors, "std::min(PIXELS, pixels - first)")]
        vectors, last = even_vectors(int(pixels), self.pixel_tile, self._vectors_at_once())
        size = vectors * self.pixel_tile.lanes
        rest = (int(pixels) - 1) % size + 1
        if rest == size or int(pixels) < size:
            return [self._tile_kind("RegisterTile", "", vectors, rest)]
        full = self._tile_kind("RegisterTile", "if (pixels - first >= PIXELS)", vectors, size)
        return [full, self._tile_kind("LastTile", "else", last, rest)]

    def _vectors_at_once(self) -> int:
        """Tiles that are transposed, on one side or the other, hold multiples of this."""
        transposed = not (self.grid.reads_first and self.grid.writes_first)
        return max(1, SIDE // self.pixel_tile.lanes) if transposed else 1

    def _tile_kind(self, name: str, condition: str, vectors: int, count: int | str) -> TileKind:
        pixels = vectors * self.pixel_tile.lanes
        if not self.panel:
            return TileKind(name, condition, vectors, pixels, count, self.grid.pixels, int(count))
        return TileKind(name, condition, vectors, pixels, count, pixels, pixels)


def even_vectors(pixels: int, tile: PixelTile, at_once: int) -> tuple[int, int]:
    """Vectors of a tile, at most those of `tile`, and of the last one, such that they differ little."""
    vectors = -(-pixels // tile.lanes)
    tiles = -(-vectors // tile.vectors)
    even = -(-vectors // (tiles * at_once)) * at_once
    tiles = -(-vectors // even)
    last = vectors - (tiles - 1) * even
    return even, -(-last // at_once) * at_once
