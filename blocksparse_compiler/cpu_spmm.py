"""The CPU kernel for scattered weights: vectors along pixels, so that no block needs to fill a vector.

After Elsen, Dukhan, Gale, Simonyan, "Fast Sparse ConvNets" (CVPR 2020), on activations in either layout: what
is channels-last in memory is channel-major in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .devices import DeviceSpec
from .kernel_variant import KernelVariant, Parameters, output_pixels
from .layouts import CHANNELS_LAST, Layouts
from .packing import PackedWeight, pack_weight
from .pattern import BlockPattern, BlockShape
from .plan import Site

SIDE = 16
"""Pixels and channels of the tiles that are transposed; vectors of pixels fill whole ones."""

HEIGHTS = (1, 2, 4)
"""Output channels that share the loads of a column."""

BLOCK_SHAPES: tuple[BlockShape, ...] = tuple((height, 1) for height in HEIGHTS)


@dataclass(frozen=True)
class PixelTile:
    """`vectors` of `lanes` pixels for each output channel of a block row."""

    vectors: int
    lanes: int

    @property
    def pixels(self) -> int:
        return self.vectors * self.lanes


def pixel_tiles(height: int, lanes: int, registers: int) -> list[PixelTile]:
    """The tiles that fit registers, smallest first: accumulators, a vector of inputs, and the weights.

    At least one: where even that is too large, the C++ compiler spills.
    """
    unit = max(1, SIDE // lanes)
    most = (registers - 1 - height) // height
    return [PixelTile(vectors, lanes) for vectors in range(unit, max(unit, min(most, 8 * unit)) + 1, unit)]


def pixel_grid(site: Site, layouts: Layouts) -> tuple[int, int] | None:
    """Images, and pixels of each; channels-last images follow each other as one. None for symbolic sizes."""
    pixels = output_pixels(site)
    if pixels is None or layouts == CHANNELS_LAST:
        return None if pixels is None else (1, pixels)
    images = int(site.input_shape[0])
    return images, pixels // max(1, images)


def pixel_tile(
    height: int, site: Site, device: DeviceSpec, row_threads: int = 1, layouts: Layouts = CHANNELS_LAST
) -> PixelTile:
    """The tile that costs the busiest thread least, or a smaller one that costs little more; the largest for
    an unknown number of pixels.

    Each nonzero of a tile costs its vectors and about one more, for the weight and its place; and those
    again that the panel of inputs has no room for in L1. Higher blocks fetch less often.
    """
    tiles = pixel_tiles(height, device.vector_lanes, device.vector_registers)
    grid = pixel_grid(site, layouts)
    if grid is None:
        return tiles[-1]
    images, pixels = grid
    parts = max(1, device.threads // row_threads)

    def work(tile: PixelTile) -> float:
        turns = images * -(-max(1, pixels) // tile.pixels)
        missing = max(0.0, 1 - device.l1_bytes_per_thread / (4 * site.in_channels * tile.pixels))
        return -(-turns // parts) * (1.1 + tile.vectors * (1 + missing / height))

    limit = 1.08 * min(map(work, tiles))
    return next(tile for tile in tiles if work(tile) <= limit)


def split_rows(site: Site, device: DeviceSpec, layouts: Layouts = CHANNELS_LAST) -> int:
    """Threads that share output channels.

    All of them where too few pixels are left for each otherwise, or where the rows of pixels that they write
    would share cache lines: two threads that write one line in turn wait for it.
    """
    grid = pixel_grid(site, layouts)
    if grid is None:
        return 1
    images, pixels = grid
    shared = layouts.writes_first and pixels % device.vector_lanes > 0 and images < device.threads
    return device.threads if shared or images * pixels < 64 * device.threads else 1


def straddles(site: Site, device: DeviceSpec, layouts: Layouts) -> bool:
    """Whether the kernel reads rows of pixels that start anywhere, so that vectors straddle cache lines.

    Strided convolutions read single pixels.
    """
    grid = None if any(s != 1 for s in site.stride) else pixel_grid(site, layouts)
    return grid is not None and layouts.reads_first and grid[1] % device.vector_lanes > 0


def wants_panel(site: Site, blocks: float, device: DeviceSpec, row_threads: int, layouts: Layouts) -> bool:
    """Whether to copy the rows of a channels-first tile side by side first: if they straddle cache
    lines and enough of the nonzero `blocks` read each of them.

    To copy a row costs as much as about 8 such reads, or 2 of a small image, where rows lie side by side.
    """
    if not straddles(site, device, layouts):
        return False
    pixels = math.prod(int(size) for size in site.output_spatial)
    return blocks / row_threads / site.in_channels >= (2 if pixels < 64 else 8)


@dataclass(frozen=True)
class SparseRowsVariant(KernelVariant):
    """Blocks of one input channel in pointwise and linear layers."""

    def _unsupported_blocks(self, pattern: BlockPattern) -> str | None:
        height, width = pattern.block_shape
        if width != 1 or height not in HEIGHTS:
            return f"runs blocks of {', '.join(f'{h}x1' for h in HEIGHTS)}, not {height}x{width}"
        return None

    def _unsupported_site(self, site: Site, pattern: BlockPattern) -> str | None:
        if math.prod(site.kernel_size) != 1:
            return "runs 1x1 convolutions only"
        return "no kernel for padded 1x1 convolutions" if any(map(any, site.padding)) else None

    def configs(
        self, site: Site, pattern: BlockPattern, device: DeviceSpec, layouts: Layouts = CHANNELS_LAST
    ) -> list[Parameters]:
        """`row_threads`: threads that share the output channels of the same pixels; `pixels`: of a tile;
        `panel`: whether channels-first rows of a tile are copied side by side."""
        height = pattern.block_shape[0]
        found: list[Parameters] = []
        for row_threads in dict.fromkeys((split_rows(site, device, layouts), device.threads, 1)):
            tile = pixel_tile(height, site, device, row_threads, layouts)
            config: Parameters = {"pixels": tile.pixels, "row_threads": row_threads, **layouts.parameters}
            if wants_panel(site, pattern.num_kept, device, row_threads, layouts):
                config["panel"] = 1
            elif straddles(site, device, layouts):  # the fewer vectors in a row, the more lines for each
                config["pixels"] = pixel_tiles(height, device.vector_lanes, device.vector_registers)[
                    -1
                ].pixels
            found.append(config)
        return found

    def describe(
        self, site: Site, pattern: BlockPattern, device: DeviceSpec, config: Mapping[str, Any]
    ) -> str:
        height = pattern.block_shape[0]
        return f"{device.isa}, vectors along pixels, {height} output{'s' * (height > 1)} at a time"

    def pack(self, weight: Tensor, pattern: BlockPattern) -> PackedWeight:
        """As `pack_weight`, with empty block rows up to a multiple of 16 output channels."""
        packed = pack_weight(weight, pattern, self.weight_layout)
        rows = packed.row_ptr.shape[1] - 1
        per_group = SIDE // pattern.block_shape[0]
        end = packed.row_ptr[:, -1:].expand(1, -rows % per_group)
        return packed._replace(row_ptr=torch.cat([packed.row_ptr, end], 1).contiguous())


SPMM = SparseRowsVariant(
    name="cpu_f32_spmm",
    device="cpu",
    dtypes=("float32",),
    ops=("linear", "conv1d", "conv2d"),
)
