"""The GPU rows of the kernel table: Triton kernels, one program per tile of pixels and out-block(s)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import tuned_table
from .kernel_variant import KernelVariant, Parameters, output_pixels
from .packing import OUTPUT_MAJOR, STEP_CHANNELS, PackedWeight, pack_rows
from .pattern import BlockPattern, BlockShape
from .plan import Site

BLOCK_SHAPES: tuple[BlockShape, ...] = ((128, 64), (64, 64), (64, 32), (32, 32), (16, 16))
"""Tiles to look for in a weight. Finer zeros are merged into these: a tile is kept if any part of it is."""

SMALLEST, LARGEST = 16, 128
"""Sides of a tile: matrix instructions need 16, registers hold no more than 128."""

IN_FLIGHT_BYTES = 64 * 1024
"""Loads that a program has in flight where the memory's rate is the limit: rate times latency, with a margin
for an H200 with one program on each multiprocessor."""

LOAD_BYTES = 16
"""The widest load of a thread."""

STEP_BYTES = 128
"""Channels of one pixel that a kernel loads at a time: a whole line of the L1 cache."""

DTYPES = ("float16", "bfloat16", "float32")
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
DECODE_ROWS = 16
"""Most rows of a linear layer that still count as decoding: bound by the bytes of the weight."""


def merged(block_shape: BlockShape) -> BlockShape:
    """The tile of a GPU kernel for zero blocks of this shape.

    Small sides merge into the smallest tile there is. Others are divided by the power of two in them, so that
    edges of blocks are edges of tiles: 96 into 32, 40 into 16 (as nearly as that goes).
    """
    bh, bw = (min(LARGEST, max(SMALLEST, side & -side)) for side in block_shape)
    return bh, bw


@dataclass(frozen=True)
class GpuVariant(KernelVariant):
    """A Triton kernel.

    Args:
        min_arch: least compute capability, as `90` for 9.0, on NVIDIA; None if AMD only.
        hip: whether it runs on AMD.
    """

    weight_layout: str = OUTPUT_MAJOR
    min_arch: int = 80
    hip: bool = True

    def _unsupported_blocks(self, pattern: BlockPattern) -> str | None:
        for side in pattern.block_shape:
            if side & (side - 1) or not SMALLEST <= side <= LARGEST:
                shape = "x".join(map(str, pattern.block_shape))
                return f"GPU kernels need tile sides of 16, 32, 64 or 128, not {shape}"
        return None

    def runs_on(self, device: Any) -> bool:
        """Whether this device (a `GpuSpec`) has what the kernel needs."""
        if device.backend == "hip":
            return self.hip
        return int(device.arch) >= self.min_arch

    def configs(self, site: Site, pattern: BlockPattern, device: Any) -> list[Parameters]:
        if not self.runs_on(device):
            return []
        guesses = self._tiles(site, pattern, device)
        configs = tuned_table.prefer(self.name, site, pattern, device.name, guesses)
        return [{**config, **precision(site)} for config in configs]

    def _tiles(self, site: Site, pattern: BlockPattern, device: Any) -> list[Parameters]:
        raise NotImplementedError

    def pack(self, weight: Tensor, pattern: BlockPattern) -> PackedWeight:
        return pack_rows(weight, pattern)


@dataclass(frozen=True)
class Gather(GpuVariant):
    """Loads activations through pointers: any geometry, any GPU.

    Parameters: `step` tiles of one row are multiplied at a time; `swapped`, the weights are the rows of the
    product, so that one instruction of compute capability 9.0 covers up to 256 pixels; `l1`, activations
    are cached there.
    """

    def _tiles(self, site: Site, pattern: BlockPattern, device: Any) -> list[Parameters]:
        bh, bw = pattern.block_shape
        most = _enough_pixels(site, 256)
        step = _step(site, bw)
        found: list[Parameters] = []
        tiles = ((128, 4, 0), (256, 8, 1), (256, 4, 1), (256, 8, 0), (64, 4, 0), (128, 8, 0))
        for pixels, warps, swapped in tiles:
            pixels = min(pixels, most)
            threads = warps * device.warp_threads
            if not 4 <= pixels * bh // threads <= most_sums(site, device):
                continue
            if bh * bw * step * _item_bytes(site) < LOAD_BYTES * threads:
                continue
            if swapped and (device.backend == "hip" or int(device.arch) < 90 or bh < 64):
                continue
            stages = pipeline_stages((pixels + bh) * bw * step * _item_bytes(site), device)
            if stages < 2:
                continue
            config: Parameters = {"pixels": pixels, "warps": warps, "stages": stages, "step": step}
            if swapped:
                config["swapped"] = 1
            if config not in found:
                found.append(config)
        if not found:
            pixels = min(64, most)
            stages = pipeline_stages((pixels + bh) * bw * step * _item_bytes(site), device)
            found = [
                {"pixels": pixels, "warps": 2 if pixels * bh <= 1024 else 4, "stages": stages, "step": step}
            ]
        if pattern.num_taps > 1 and device.backend != "hip":
            found += [in_l1(config) for config in found[:2]]
        return found

    def pack(self, weight: Tensor, pattern: BlockPattern) -> PackedWeight:
        return pack_rows(weight, pattern, max(1, STEP_CHANNELS // pattern.block_shape[1]))


@dataclass(frozen=True)
class Decode(Gather):
    """Linear layers on few rows, bound by the weight's bytes.

    Parameters: `split` programs share each sum; from two on, a second kernel adds up their parts.
    """

    def _unsupported_site(self, site: Site, pattern: BlockPattern) -> str | None:
        rows = output_pixels(site)
        if rows is None or rows > DECODE_ROWS:
            return f"for at most {DECODE_ROWS} rows"
        return None

    def _tiles(self, site: Site, pattern: BlockPattern, device: Any) -> list[Parameters]:
        bh, bw = pattern.block_shape
        step = _step(site, bw)
        stage_bytes = (bh + DECODE_ROWS) * bw * step * _item_bytes(site)
        most = device.shared_bytes_per_block // stage_bytes
        config: Parameters = {
            "pixels": DECODE_ROWS,
            "warps": 4 if bh >= 64 else 2,
            "stages": 2
            if device.backend == "hip"
            else min(max(4, min(10, IN_FLIGHT_BYTES // stage_bytes)), most),
            "step": step,
        }
        rows = len(pattern.kept)
        wanted = 4 * device.multiprocessors // max(1, rows)
        tiles = int(pattern.kept.sum((1, 2)).max())
        best = max(1, min(wanted, tiles // 4, 16))
        splits = dict.fromkeys(s for s in (best, 2 * best, max(1, best // 2), 1) if s <= max(1, tiles))
        return [{**config, "split": split} for split in splits]


def in_l1(config: Parameters) -> Parameters:
    """Neighbouring taps find most of their activations in L1, if shared memory leaves room for it."""
    return {**config, "stages": min(3, int(config["stages"])), "l1": 1}


def precision(site: Site) -> Parameters:
    """`{"precision": "tf32" | "ieee"}` for fp32 layers, as torch's settings say; else nothing."""
    if site.dtype != "float32":
        return {}
    return {"precision": "tf32" if tf32_allowed(bool(site.kernel_size)) else "ieee"}


def tf32_allowed(convolution: bool) -> bool:
    """What torch's settings say about fp32 products."""
    backend = torch.backends.cudnn if convolution else torch.backends.cuda.matmul
    try:
        return bool(backend.allow_tf32)
    except RuntimeError:  # set through the newer interface
        return getattr(backend, "fp32_precision", "ieee") == "tf32"


def _enough_pixels(site: Site, most: int) -> int:
    """The least power of two, from 16 to `most`, that holds all pixels."""
    pixels = output_pixels(site)
    size = 16
    while size < most and (pixels is None or size < pixels):
        size *= 2
    return size


def _step(site: Site, bw: int) -> int:
    """Tiles of one row to multiply at a time."""
    return max(1, STEP_BYTES // (bw * _item_bytes(site)))


def _item_bytes(site: Site) -> int:
    return 4 if site.dtype == "float32" else 2


def most_sums(site: Site, device: Any) -> int:
    """fp32 sums that a thread can hold without spilling its other registers."""
    if site.dtype == "float32":
        return 32 if precision(site)["precision"] == "tf32" else 16
    # Where matrix instructions read registers, these hold the operands, too.
    return 128 if device.backend == "cuda" and int(device.arch) >= 90 else 64


def pipeline_stages(stage_bytes: int, device: Any) -> int:
    """Loads in flight: what lets two programs share a multiprocessor, up to four. Below two: too large."""
    # Compute capability 9.0 multiplies out of shared memory, and so needs a buffer more than others.
    extra = 0 if device.backend == "cuda" and int(device.arch) == 90 else 1
    most = device.shared_bytes_per_block // stage_bytes + extra
    if device.backend == "hip":
        return min(2, most)
    shared = device.shared_bytes_per_multiprocessor // 2 // stage_bytes + extra
    return min(4, max(3, shared), most)


GPU_VARIANTS = (
    Gather(name="triton_gather", device="cuda", dtypes=DTYPES, ops=("linear", *CONVOLUTIONS)),
    Decode(name="triton_decode", device="cuda", dtypes=DTYPES, ops=("linear",)),
)
