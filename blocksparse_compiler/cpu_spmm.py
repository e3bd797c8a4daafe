"""The CPU kernel for scattered weights: vectors along pixels, so that no block needs to fill a vector.

After Elsen, Dukhan, Gale, Simonyan, "Fast Sparse ConvNets" (CVPR 2020), with activations channels-last in
memory and channel-major in the cache.
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
from .packing import PackedWeight, pack_weight
from .pattern import BlockPattern, BlockShape
from .plan import Site

SIDE = 16
"""Pixels and channels of the tiles that are transposed; vectors of pixels fill whole ones."""

HEIGHTS = (1, 2, 4)
"""Output channels that share the loads of a column."""

BLOCK_SHAPES: tuple[BlockShape, ...] = tuple((height, 1) for height in HEIGHTS)


CHANNELS_FIRST = "channels_first"
"""Value of the parameters `reads` and `writes`, for contiguous `[N, C, H, W]`; channels last without them."""


def reads_first(parameters: Mapping[str, int | str]) -> bool:
    return parameters.get("reads") == CHANNELS_FIRST


def writes_first(parameters: Mapping[str, int | str]) -> bool:
    return parameters.get("writes") == CHANNELS_FIRST


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


def pixel_tile(height: int, site: Site, device: DeviceSpec, row_threads: int = 1) -> PixelTile:
    """The tile that costs the busiest thread least, or a smaller one that costs little more; the largest for
    an unknown number of pixels.

    Each nonzero of a tile costs its vectors and about one more, for the weight and its place; and those
    again that the panel of inputs has no room for in L1. Higher blocks fetch less often.
    """
    tiles = pixel_tiles(height, device.vector_lanes, device.vector_registers)
    pixels = output_pixels(site)
    if pixels is None:
        return tiles[-1]
    parts = max(1, device.threads // row_threads)

    def work(tile: PixelTile) -> float:
        turns = -(-max(1, pixels) // tile.pixels)
        missing = max(0.0, 1 - device.l1_bytes_per_thread / (4 * site.in_channels * tile.pixels))
        return -(-turns // parts) * (1.1 + tile.vectors * (1 + missing / height))

    limit = 1.08 * min(map(work, tiles))
    return next(tile for tile in tiles if work(tile) <= limit)


@dataclass(frozen=True)
class SparseRowsVariant(KernelVariant):
    """Blocks of one input channel in pointwise and linear layers."""

    def _unsupported_blocks(self, pattern: BlockPattern) -> str | None:
        height, width = pattern.block_shape
        if width != 1 or height not in HEIGHTS:
            return f"runs blocks of {', '.join(f'{h}x1' for h in HEIGHTS)}, not {height}x{width}"
        return None

    def _unsupported_site(self, site: Site, pattern: BlockPattern) -> str | None:
        if math.prod(site.kernel_size) != 1 or any(s != 1 for s in site.stride):
            return "runs 1x1 convolutions of stride 1 only"
        return "no kernel for padded 1x1 convolutions" if any(map(any, site.padding)) else None

    def configs(self, site: Site, pattern: BlockPattern, device: DeviceSpec) -> list[Parameters]:
        """`row_threads`: threads that share the output channels of the same pixels; `pixels`: of a tile."""
        height = pattern.block_shape[0]
        found: list[Parameters] = []
        for row_threads in dict.fromkeys((split_rows(site, device), device.threads, 1)):
            tile = pixel_tile(height, site, device, row_threads)
            found.append({"pixels": tile.pixels, "row_threads": row_threads})
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


def split_rows(site: Site, device: DeviceSpec) -> int:
    """Threads that share output channels: all of them where too few pixels are left for each otherwise."""
    pixels = output_pixels(site)
    return device.threads if pixels is not None and pixels < 64 * device.threads else 1


SPMM = SparseRowsVariant(
    name="cpu_f32_spmm",
    device="cpu",
    dtypes=("float32",),
    ops=("linear", "conv1d", "conv2d"),
)
