"""The CPU rows of the kernel table: register tiles, threads and caches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import cpu_spmm
from .devices import DeviceSpec
from .kernel_variant import KernelVariant, Parameters, output_pixels
from .packing import INPUT_PAIRS, INPUT_QUADS
from .pattern import BlockPattern, BlockShape
from .plan import Site

BLOCK_SHAPES: tuple[BlockShape, ...] = ((32, 32), (16, 16), (8, 8), (32, 1), (16, 1), *cpu_spmm.BLOCK_SHAPES)
"""Tiles to look for in a weight: squares, and columns, which run about as fast: only height fills vectors.
Low columns have a kernel of their own, with vectors along pixels."""


PACK = {"bfloat16": 2, "uint8": 4, "int8": 4}
"""Neighbouring input channels in a lane of 32 bits, which are multiplied together; elsewhere there is one."""


def merged(block_shape: BlockShape, dtype: str) -> BlockShape:
    """The tile of a kernel for zero blocks of this shape.

    Where input channels are multiplied together, some blocks of an odd width make one tile. In fp32, low and
    wide blocks split into columns: vectors along pixels need no width.
    """
    height, width = block_shape
    if dtype == "float32" and height in (1, 2):
        return height, 1
    return height, math.lcm(width, PACK.get(dtype, 1))


def block_shapes(dtype: str) -> tuple[BlockShape, ...]:
    """Tiles to look for in the weights of layers of this dtype."""
    if dtype == "float32":
        return BLOCK_SHAPES
    shapes = (merged(shape, dtype) for shape in BLOCK_SHAPES if shape not in cpu_spmm.BLOCK_SHAPES)
    return tuple(dict.fromkeys(shapes))


MOST_PRODUCTS = (2**31 - 1) // (255 * 128)
"""Products of an unsigned and a signed byte whose sum fits 32 bits, whatever they are."""


@dataclass(frozen=True)
class RegisterTile:
    """What one pass of the inner loop keeps in registers.

    Args:
        pixels, vectors: accumulators, each a vector.
        lanes: floats of a vector.
        split: neighbouring lanes that each output channel takes, with inputs of their own; blocks lower
            than a vector fill it so.
        pack: neighbouring input channels that a lane of weights holds.
    """

    pixels: int
    vectors: int
    lanes: int
    split: int = 1
    pack: int = 1

    @property
    def width(self) -> int:
        """Output channels of the tile."""
        return self.vectors * self.lanes // self.split


def register_tile(
    block_shape: BlockShape,
    lanes: int,
    registers: int,
    pack: int = 1,
    unpacked: bool = False,
    splits: bool = True,
) -> RegisterTile | None:
    """The register tile for blocks `(bh, bw)` on vectors of `lanes` floats; None if there is none.

    One register holds each accumulator and each vector of weights, two are left for the inputs. Blocks
    that are no multiple of a vector take the widest narrower vector that divides them, if they cannot
    be split.

    Args:
        pack: input channels in a lane of weights; `bw` must be a multiple.
        unpacked: no instruction multiplies packed lanes: they are taken apart into two registers.
        splits: whether low blocks may share a vector between input channels.
    """
    bh, bw = block_shape
    if bw % pack:
        return None
    parts = 2 if unpacked and pack > 1 else 1
    split = lanes // bh
    if splits and lanes >= 8 and 4 <= bh < lanes and lanes % bh == 0 and bw % (split * pack) == 0:
        return RegisterTile(min(28, registers - 2 - 2 * parts), 1, lanes, split, pack)
    while lanes >= 4 and bh % lanes:
        lanes //= 2
    if lanes < 4:
        return None
    blocks = bh // lanes
    limit = 2 if lanes >= 8 else 4
    vectors = max(v for v in range(1, limit + 1) if blocks % v == 0)
    pixels = (registers - vectors * parts - 1 - parts) // vectors
    return RegisterTile(min(28, pixels), vectors, lanes, pack=pack)


def dtype_tile(
    dtype: str, block_shape: BlockShape, lanes: int, registers: int, multiplies_packed: bool
) -> RegisterTile | None:
    """The register tile for weights and activations of this dtype."""
    pack = PACK.get(dtype, 1)
    return register_tile(
        block_shape,
        lanes,
        registers,
        pack=pack,
        unpacked=pack > 1 and not multiplies_packed,
        splits=dtype not in ("float16", "uint8", "int8"),
    )


def device_tile(dtype: str, block_shape: BlockShape, device: DeviceSpec) -> RegisterTile | None:
    """The same on this device."""
    machine = (device.vector_lanes, device.vector_registers, device.multiplies(dtype))
    return dtype_tile(dtype, block_shape, *machine)


def item_bytes(site: Site) -> int:
    """Of a weight or an activation."""
    return int(getattr(torch, site.dtype).itemsize)


@dataclass(frozen=True)
class CpuVariant(KernelVariant):
    """A C++ kernel.

    Args:
        block_multiple: the block height must be a multiple of this.
    """

    block_multiple: int = 1

    @property
    def width_multiple(self) -> int:
        """Input channels that are multiplied together; block widths must be a multiple."""
        return PACK.get(self.dtypes[0], 1)

    def _unsupported_blocks(self, pattern: BlockPattern) -> str | None:
        height, width = pattern.block_shape
        if height % self.block_multiple:
            return f"block height {height} is no multiple of {self.block_multiple}"
        if width % self.width_multiple:
            why = f"{self.dtypes[0]} is multiplied {self.width_multiple} input channels at a time"
            return f"block width {width} is no multiple of {self.width_multiple}: {why}"
        return None

    def configs(self, site: Site, pattern: BlockPattern, device: DeviceSpec) -> list[Parameters]:
        return cpu_configs(site, pattern, device)

    def describe(
        self, site: Site, pattern: BlockPattern, device: DeviceSpec, config: Mapping[str, Any]
    ) -> str:
        tile = device_tile(site.dtype, pattern.block_shape, device)
        if tile is None:
            return ""
        pixels = int(config.get("pixels", tile.pixels))
        what = "pixels" if site.kernel_size else "rows"
        crowded = pixels < tile.pixels and pixels == cache_friendly_pixels(site, device)
        why = (
            f" (more would crowd L1, {_bytes(item_bytes(site) * pixel_step(site))} apart)" if crowded else ""
        )
        shared = "block rows" if int(config.get("row_threads", 1)) > 1 else what
        return f"{device.isa}, {pixels} {what} by {tile.width} outputs at a time{why}, threads share {shared}"


def _bytes(size: int) -> str:
    return f"{size // 1024} KiB" if size % 1024 == 0 else f"{size} bytes"


FEW_TILES = 8
"""So many register tiles, or fewer, pass through a block row together: they read its weights once."""


def cpu_configs(site: Site, pattern: BlockPattern, device: DeviceSpec) -> list[Parameters]:
    """Candidate parameters of the CPU kernels, best guess first.

    `chunk`: pixel tiles that pass through all block rows together. `row_threads`: threads that share the
    block rows of the same pixels; the others share the pixels. `pixels`: most pixels of a register tile.
    `prefetch`: `"output"` asks for lines of the output some tiles before they are stored to; where threads
    share block rows, those may be another thread's.
    """
    full = device_tile(site.dtype, pattern.block_shape, device)
    if full is None:
        return []
    pointwise = math.prod(pattern.kernel_size) == 1
    tile = replace(full, pixels=min(cache_friendly_pixels(site, device), _row_pixels(site, full)))
    count = -(-(output_pixels(site) or 0) // tile.pixels)
    few = 0 < count <= FEW_TILES
    best: Parameters = {"chunk": count if few else 1 if pointwise else 4}
    if tile.pixels < full.pixels:
        best["pixels"] = tile.pixels
    best["row_threads"] = row_threads = split_block_rows(site, pattern, device, tile.pixels)
    prefetch: Parameters = {"prefetch": "output"} if row_threads == 1 else {}
    if _output_leaves_cache(site, device, tile):
        best |= prefetch
    split = {"row_threads": device.threads if row_threads == 1 else 1} if device.threads > 1 else {}
    alternatives = (split, {"chunk": 4 if best["chunk"] == 1 else 1}, prefetch, {"chunk": 16})
    configs = [best]
    for other in alternatives:
        config = {**best, **other}
        if config not in configs:
            configs.append(config)
    return configs


def cache_friendly_pixels(site: Site, device: DeviceSpec) -> int:
    """How many pixels can keep their current cache line of the input in L1 at once."""
    return _lines_in_l1(item_bytes(site) * pixel_step(site), device)


def _lines_in_l1(step_bytes: int, device: DeviceSpec) -> int:
    """How many lines, this far apart, L1 holds at once.

    A large power of two leaves few sets of the cache to share; two ways are left for the weights that
    stream through.
    """
    line_bytes, sets = 64, 64  # of every L1 whose index fits a 4 KiB page
    ways = max(4, device.l1_bytes_per_thread // (line_bytes * sets))
    if step_bytes % line_bytes:
        return sets * ways
    return (sets // math.gcd(sets, step_bytes // line_bytes)) * (ways - 2)


def _row_pixels(site: Site, tile: RegisterTile) -> int:
    """Most pixels of a tile, by the rows of the output.

    Rows of several images fill a tile without waste, but those of a single image read different rows, and
    all of them whatever row lies outside. Tiles of one row each skip it; two vectors keep them fast enough.
    """
    sizes = (site.input_shape[0], *site.output_spatial)
    if len(site.kernel_size) != 2 or tile.vectors == 1 or any(isinstance(size, str) for size in sizes):
        return tile.pixels
    images, height, width = map(int, sizes)
    rows = min(tile.pixels // width if width else 0, height)
    taps = site.kernel_size[0]
    if images > 1 or rows < 2 or taps == 1:
        return tile.pixels
    useful = height * taps - sum(site.padding[0])
    return width if useful < 0.85 * -(-height // rows) * rows * taps else tile.pixels


def _output_leaves_cache(site: Site, device: DeviceSpec, tile: RegisterTile) -> bool:
    """Whether stores of the output miss L2, and asking for its lines early does not push others out of L1."""
    row_bytes = item_bytes(site) * site.out_channels
    output_bytes = (output_pixels(site) or 0) * row_bytes
    large = output_bytes > 2 * device.threads * device.l2_bytes_per_thread
    return large and _lines_in_l1(row_bytes, device) >= tile.pixels


def pixel_step(site: Site) -> int:
    """Elements between the input pixels of two neighbouring output pixels, channels last."""
    return site.in_channels * (site.stride[-1] if site.stride else 1)


def split_block_rows(site: Site, pattern: BlockPattern, device: DeviceSpec, tile_pixels: int) -> int:
    """How many threads share block rows: minimises the work of the busiest thread.

    Splitting pixels balances best and is the rule. Splitting block rows serves layers with few pixels,
    which would leave threads idle, and layers with large weights, which one thread then reads instead of all.
    """
    pixels = output_pixels(site)
    if not pixels:
        return 1
    tiles = -(-pixels // tile_pixels)
    cost = pattern.kept.sum((1, 2)).double() + 0.5
    weight_bytes = item_bytes(site) * pattern.num_kept * math.prod(pattern.block_shape)
    input_bytes = item_bytes(site) * pixels * pixel_step(site)

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
    return best if busiest(best) < 0.97 * busiest(1) else 1


@dataclass(frozen=True)
class IntegerVariant(CpuVariant):
    """A C++ kernel on quantized inputs, for int8 weights."""

    def _unsupported_site(self, site: Site, pattern: BlockPattern) -> str | None:
        products = int(pattern.kept.sum((1, 2)).max()) * pattern.block_shape[1]
        if products > MOST_PRODUCTS:
            return (
                f"sums of {products} products of 8-bit integers may exceed 32 bits ({MOST_PRODUCTS} never do)"
            )
        return None


CPU_VARIANTS = (
    CpuVariant(
        name="cpu_f32",
        device="cpu",
        dtypes=("float32",),
        ops=("linear", "conv1d", "conv2d"),
        block_multiple=4,
    ),
    CpuVariant(
        name="cpu_bf16",
        device="cpu",
        dtypes=("bfloat16",),
        ops=("linear", "conv1d", "conv2d"),
        weight_layout=INPUT_PAIRS,
        block_multiple=4,
    ),
    IntegerVariant(
        name="cpu_int8",
        device="cpu",
        dtypes=("uint8", "int8"),
        ops=("linear", "conv1d", "conv2d"),
        weight_layout=INPUT_QUADS,
        block_multiple=4,
    ),
    CpuVariant(
        name="cpu_f16",
        device="cpu",
        dtypes=("float16",),
        ops=("linear", "conv1d", "conv2d"),
        block_multiple=4,
    ),
)
