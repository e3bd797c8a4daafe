"""The GPU row that copies activations by tensor descriptors (TMA), in boxes of neighbouring pixels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .gpu_variants import CONVOLUTIONS, DTYPES, GpuVariant, precision
from .kernel_variant import Parameters
from .pattern import BlockPattern
from .plan import Site

ALIGNMENT = 16
"""Bytes: tensor descriptors copy whole ones, from addresses that are multiples."""

LEAST_ROWS = 64
"""Output channels of a block: the rows of a matrix instruction of compute capability 9.0."""

AXES = "dhw"
LEAST_SUMS, MOST_SUMS = 16, 128
"""Of a thread, out of 255 registers; the rest holds addresses, and the epilogue's operands."""

MOST_CANDIDATES = 4
LIKELY_IMAGES, LIKELY_SIZE = 8, 64
"""Divide into what a symbolic batch or image size is likely to be."""


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
        pixel_bytes = site.in_channels * item_bytes(site)
        if pixel_bytes % ALIGNMENT:
            return f"pixels of {pixel_bytes} bytes are no multiple of {ALIGNMENT}"
        if precision(site).get("precision") == "ieee":
            return "fp32 products need TF32 (torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32)"
        if len(site.kernel_size) == 3 and max(site.stride) > 1:
            return "strides in three dimensions need descriptors of too many"
        steps = zip(site.input_shape[2:], site.kernel_size, site.stride, site.dilation, strict=False)
        for size, kernel, stride, dilation in steps:
            if stride == 1:
                continue
            if not isinstance(size, int):
                return f"stride {stride} needs known image sizes"
            if size < stride or (kernel > 1 and dilation % stride and size % stride):
                return f"{size} pixels are no multiple of the stride {stride}"
        return None

    def _tiles(self, site: Site, pattern: BlockPattern, device: Any) -> list[Parameters]:
        return box_tiles(site, pattern, device, len(pattern.kept))


def box_tiles(
    site: Site, pattern: BlockPattern, device: Any, programs: int, blocks: int = 1
) -> list[Parameters]:
    """Candidate parameters for kernels that copy boxes.

    Args:
        programs: for each box.
        blocks: out-blocks that each of them multiplies.
    """
    rows, stage_bytes = blocks * pattern.block_shape[0], pattern.block_shape[1] * item_bytes(site)
    found: list[tuple[float, Parameters]] = []
    for pixels, warps in ((256, 8), (128, 4), (256, 4), (128, 8), (64, 4), (32, 4)):
        stages = _stages((pixels + rows) * stage_bytes, device)
        sums = pixels * rows // (32 * warps)  # fp32, of a thread
        if stages < 2 or not LEAST_SUMS * blocks <= sums <= MOST_SUMS:
            continue
        box = {} if _flat(site) else box_sides(_extent(site), pixels)
        config: Parameters = {"pixels": pixels, "warps": warps, "stages": stages, **box}
        # Large tiles load less, if there are enough of them to keep the whole device busy.
        rounds = math.ceil(programs * _count(site, box, pixels) / device.multiprocessors)
        found.append((rounds * (pixels + rows), config))
    return [config for _, config in sorted(found, key=lambda entry: entry[0])[:MOST_CANDIDATES]]


def _stages(stage_bytes: int, device: Any) -> int:
    """Copies in flight: up to four, three if that lets two programs share a multiprocessor."""
    shared = device.shared_bytes_per_multiprocessor // 2 // stage_bytes
    return min(4, shared if shared >= 3 else device.shared_bytes_per_block // stage_bytes)


def box_sides(extent: Sequence[int], pixels: int) -> Parameters:
    """The box of `pixels` (a power of two) that covers `extent` (images, then image sizes) with least waste.

    Among equals, the one that is widest along the last axis, and then along the one before.

    Returns:
        powers of two `{"box_n": …, "box_h": …, "box_w": …}`; their product is `pixels`.
    """
    bits = pixels.bit_length() - 1
    names = ["box_n", *(f"box_{axis}" for axis in AXES[len(AXES) + 1 - len(extent) :])]
    splits: list[tuple[int, ...]] = list(itertools.product(range(bits + 1), repeat=len(extent)))
    splits = [split for split in splits if sum(split) == bits]

    def waste(split: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        covered = math.prod(-(-size >> s) << s for size, s in zip(extent, split, strict=True))
        return covered, tuple(-s for s in reversed(split))

    best = min(splits, key=waste)
    return {name: 1 << s for name, s in zip(names, best, strict=True)}


def item_bytes(site: Site) -> int:
    return int(getattr(torch, site.dtype).itemsize)


def _flat(site: Site) -> bool:
    """Whether output pixel p reads input pixel p alone."""
    ones = all(k == s == 1 for k, s in zip(site.kernel_size, site.stride, strict=True))
    return ones and not any(map(any, site.padding))


def _extent(site: Site) -> list[int]:
    """Images and image sizes; for symbolic ones, sizes that are likely multiples of the real ones."""
    images, *spatial = site.input_shape[0], *site.output_spatial
    return [
        images if isinstance(images, int) else LIKELY_IMAGES,
        *(size if isinstance(size, int) else LIKELY_SIZE for size in spatial),
    ]


def _count(site: Site, box: Parameters, pixels: int) -> int:
    """Boxes that cover the output."""
    if not site.kernel_size:
        rows = [size if isinstance(size, int) else LIKELY_IMAGES for size in site.input_shape[:-1]]
        return -(-math.prod(rows) // pixels)
    extent = _extent(site)
    if not box:
        return -(-math.prod(extent) // pixels)
    return math.prod(-(-size // int(side)) for size, side in zip(extent, box.values(), strict=True))


BOX = Box(name="triton_box", device="cuda", dtypes=DTYPES, ops=("linear", *CONVOLUTIONS))
