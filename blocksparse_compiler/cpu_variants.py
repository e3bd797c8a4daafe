"""The CPU rows of the kernel table: register tiles, threads and caches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from . import cpu_spmm
from .devices import DeviceSpec
from .kernel_variant import KernelVariant, Parameters, output_pixels
from .pattern import BlockPattern, BlockShape
from .plan import Site

BLOCK_SHAPES: tuple[BlockShape, ...] = ((32, 32), (16, 16), (8, 8), (32, 1), (16, 1), *cpu_spmm.BLOCK_SHAPES)
"""Tiles to look for in a weight: squares, and columns, which run about as fast: only height fills vectors.
Low columns have a kernel of their own, with vectors along pixels."""


@dataclass(frozen=True)
class RegisterTile:
    """What one pass of the inner loop keeps in registers.

    Args:
        pixels, vectors: accumulators, each a vector.
        lanes: floats of a vector.
        split: neighbouring input channels that a vector handles at once; blocks lower than a vector fill
            it so, each output channel taking `split` lanes.
    """

    pixels: int
    vectors: int
    lanes: int
    split: int = 1

    @property
    def width(self) -> int:
        """Output channels of the tile."""
        return self.vectors * self.lanes // self.split


def register_tile(block_shape: BlockShape, lanes: int, registers: int) -> RegisterTile | None:
    """The register tile for blocks `(bh, bw)` on vectors of `lanes` floats; None if there is none.

    One register holds each accumulator and each vector of weights, two are left for the inputs. Blocks
    that are no multiple of a vector take the widest narrower vector that divides them, if they cannot
    be split.
    """
    bh, bw = block_shape
    split = lanes // bh
    if lanes >= 8 and 4 <= bh < lanes and lanes % bh == 0 and bw % split == 0:
        return RegisterTile(min(28, registers - 4), 1, lanes, split)
    while lanes >= 4 and bh % lanes:
        lanes //= 2
    if lanes < 4:
        return None
    blocks = bh // lanes
    limit = 2 if lanes >= 8 else 4
    vectors = max(v for v in range(1, limit + 1) if blocks % v == 0)
    return RegisterTile(min(28, (registers - vectors - 2) // vectors), vectors, lanes)


@dataclass(frozen=True)
class CpuVariant(KernelVariant):
    """A C++ kernel.

    Args:
        block_multiple: the block height must be a multiple of this.
    """

    block_multiple: int = 1

    def _unsupported_blocks(self, pattern: BlockPattern) -> str | None:
        height = pattern.block_shape[0]
        if height % self.block_multiple:
            return f"block height {height} is no multiple of {self.block_multiple}"
        return None

    def configs(self, site: Site, pattern: BlockPattern, device: DeviceSpec) -> list[Parameters]:
        return cpu_configs(site, pattern, device)


def cpu_configs(site: Site, pattern: BlockPattern, device: DeviceSpec) -> list[Parameters]:
    """Candidate parameters of the CPU kernels, best guess first.

    `chunk`: pixel tiles that pass through all block rows together. `row_threads`: threads that share the
    block rows of the same pixels; the others share the pixels. `pixels`: most pixels of a register tile.
    """
    tile = register_tile(pattern.block_shape, device.vector_lanes, device.vector_registers)
    if tile is None:
        return []
    pointwise = math.prod(pattern.kernel_size) == 1
    best: Parameters = {"chunk": 1 if pointwise else 4}
    most = cache_friendly_pixels(site, device)
    if most < tile.pixels:
        best["pixels"] = most
    best["row_threads"] = row_threads = _row_threads(site, pattern, device, tile)
    split = {"row_threads": device.threads if row_threads == 1 else 1}
    others = ({"chunk": 4 if pointwise else 1}, {"chunk": 16}, split if device.threads > 1 else {})
    return [best, *({**best, **other} for other in others if other)]


def cache_friendly_pixels(site: Site, device: DeviceSpec) -> int:
    """How many pixels can keep their current cache line in L1 at once.

    Pixels that lie a large power of two apart share few sets of the cache; two ways are left for the
    weights that stream through.
    """
    line_bytes, sets = 64, 64  # of every L1 whose index fits a 4 KiB page
    ways = max(4, device.l1_bytes_per_thread // (line_bytes * sets))
    step_bytes = 4 * pixel_step(site)
    if step_bytes % line_bytes:
        return sets * ways
    return (sets // math.gcd(sets, step_bytes // line_bytes)) * (ways - 2)


def pixel_step(site: Site) -> int:
    """Floats between the input pixels of two neighbouring output pixels, channels last."""
    return site.in_channels * (site.stride[-1] if site.stride else 1)


def _row_threads(site: Site, pattern: BlockPattern, device: DeviceSpec, tile: RegisterTile) -> int:
    """How many threads share block rows: minimises the work of the busiest thread.

    Splitting pixels balances best and is the rule. Splitting block rows serves layers with few pixels,
    which would leave threads idle, and layers with large weights, which one thread then reads instead of all.
    """
    pixels = output_pixels(site)
    if not pixels:
        return 1
    tiles = -(-pixels // tile.pixels)
    cost = pattern.kept.sum((1, 2)).double() + 0.5
    weight_bytes = 4 * pattern.num_kept * math.prod(pattern.block_shape)
    input_bytes = 4 * pixels * pixel_step(site)

    def crowding(size: float) -> float:
        return math.log2(1 + size / device.l2_bytes_per_thread)

    def busiest(row_threads: int) -> float:
        pixel_threads = device.threads // row_threads
        owner = ((cost.cumsum(0) - cost / 2) / cost.sum() * row_threads).floor()
        rows = max(float(cost[owner == part].sum()) for part in range(row_threads))
        # The factor is fitted: 512 channels at 7x7 gain up to a quarter from two row threads.
        streaming = crowding(weight_bytes / row_threads) + crowding(input_bytes / pixel_threads)
        return -(-tiles // pixel_threads) * rows * (1 + 0.2 * streaming)

    divisors = [n for n in range(1, device.threads + 1) if device.threads % n == 0]
    best = min(divisors, key=busiest)
    return best if busiest(best) < 0.95 * busiest(1) else 1


CPU_VARIANTS = (
    CpuVariant(
        name="cpu_f32",
        device="cpu",
        dtypes=("float32",),
        ops=("linear", "conv1d", "conv2d"),
        block_multiple=4,
    ),
)
