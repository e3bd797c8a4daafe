"""The GPU row that copies activations by tensor descriptors (TMA), in boxes of neighbouring pixels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .gpu_variants import DTYPES, GpuVariant
from .kernel_variant import Parameters
from .pattern import BlockPattern
from .plan import Site

ALIGNMENT = 16
"""Bytes: tensor descriptors copy whole ones, from addresses that are multiples."""

LEAST_ROWS = 64
"""Output channels of a block: the rows of a matrix instruction of compute capability 9.0."""

LEAST_WIDTH_BYTES = 32
MOST_SHARED = 0.98
AXES = "dhw"


@dataclass(frozen=True)
class Box(GpuVariant):
    """Copies boxes of images x pixels x channels, and the weights, with one instruction each.

    What a box holds outside the image is zero: padding costs nothing. What it holds outside is computed
    nevertheless, so that `box_n`, `box_d`, `box_h` and `box_w` are chosen to cover images exactly, if need
    be several images with one box. Layers whose pixels lie evenly spaced need no boxes.
    """

    min_arch: int = 90
    hip: bool = False

    def _unsupported_blocks(self, pattern: BlockPattern) -> str | None:
        if pattern.block_shape[0] < LEAST_ROWS:
            return f"for blocks of at least {LEAST_ROWS} output channels"
        return super()._unsupported_blocks(pattern)

    def _unsupported_site(self, site: Site, pattern: BlockPattern) -> str | None:
        item = 4 if site.dtype == "float32" else 2
        if site.in_channels * item % ALIGNMENT:
            return f"pixels of {site.in_channels * item} bytes are no multiple of {ALIGNMENT}"
        for size, kernel, stride, dilation in zip(
            site.input_shape[2:] if site.kernel_size else (),
            site.kernel_size,
            site.stride,
            site.dilation,
            strict=True,
        ):
            if stride > 1 and not isinstance(size, int):
                return "strides need known image sizes"
            if stride > 1 and kernel > 1 and dilation % stride and int(size) % stride:
                return f"{size} pixels are no multiple of the stride {stride}"
            if stride > int(size if isinstance(size, int) else stride):
                return "strides longer than the image"
        if len(site.kernel_size) == 3 and max(site.stride) > 1:
            return "strides in three dimensions need descriptors of too many"
        return None

    def _tiles(self, site: Site, pattern: BlockPattern, device: Any) -> list[Parameters]:
        (bh, bw), item = pattern.block_shape, 4 if site.dtype == "float32" else 2
        found: list[tuple[bool, Parameters]] = []
        for pixels, warps in ((256, 8), (128, 4), (256, 4), (128, 8), (64, 4), (32, 4)):
            accumulators = pixels * bh // (32 * warps)
            stages = min(4, int(MOST_SHARED * device.shared_bytes_per_block) // ((pixels + bh) * bw * item))
            if not 16 <= accumulators <= 128 or stages < 2 or pixels * bh < 64 * 32 * warps:
                continue
            box = {} if _flat(site) else box_sides(_extent(site), pixels)
            programs = len(pattern.kept) * _count(site, box, pixels)
            config: Parameters = {"pixels": pixels, "warps": warps, "stages": stages, **box}
            found.append((programs < 2 * device.multiprocessors, config))
        # Large tiles load less, but only as long as they keep the whole device busy.
        return [config for _, config in sorted(found, key=lambda entry: entry[0])]


def box_sides(extent: Sequence[int], pixels: int) -> Parameters:
    """The box of `pixels` (a power of two) that covers `extent` (images, then image sizes) with least waste.

    Among equals, the one that is widest along the last axis, and then along the one before.

    Returns:
        powers of two `{"box_n": …, "box_h": …, "box_w": …}`; their product is `pixels`.
    """
    bits = pixels.bit_length() - 1
    names = ["box_n", *(f"box_{axis}" for axis in AXES[len(AXES) + 1 - len(extent) :])]
    splits = (s for s in itertools.product(range(bits + 1), repeat=len(extent)) if sum(s) == bits)

    def waste(split: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        covered = math.prod(-(-size >> s) << s for size, s in zip(extent, split, strict=True))
        return covered, tuple(-s for s in reversed(split))

    return {name: 1 << s for name, s in zip(names, min(splits, key=waste), strict=True)}


def _flat(site: Site) -> bool:
    """Whether output pixel p reads input pixel p alone."""
    ones = all(k == s == 1 for k, s in zip(site.kernel_size, site.stride, strict=True))
    return ones and not any(map(any, site.padding))


def _extent(site: Site) -> list[int]:
    """Images and image sizes; for symbolic ones, sizes that are likely multiples of the real ones."""
    images, *spatial = site.input_shape[0], *site.output_spatial
    return [
        images if isinstance(images, int) else 8,
        *(size if isinstance(size, int) else 64 for size in spatial),
    ]


def _count(site: Site, box: Parameters, pixels: int) -> int:
    if not site.kernel_size:
        rows = [size if isinstance(size, int) else 8 for size in site.input_shape[:-1]]
        return -(-math.prod(rows) // pixels)
    extent = _extent(site)
    if not box:
        return -(-math.prod(extent) // pixels)
    return math.prod(-(-size // int(side)) for size, side in zip(extent, box.values(), strict=True))


BOX = Box(name="triton_box", device="cuda", dtypes=DTYPES, ops=("linear", "conv1d", "conv2d", "conv3d"))
