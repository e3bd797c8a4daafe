"""The CPU row of the kernel table for AMX: instructions that multiply tiles (Sapphire Rapids and later)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .amx_tiling import SIDE
from .cpu_variants import split_block_rows
from .devices import DeviceSpec
from .kernel_variant import KernelVariant, Parameters, output_pixels
from .packing import INPUT_PAIRS
from .pattern import BlockPattern, BlockShape
from .plan import Site

DEPTH = 32
"""Input channels of one tile product."""

PANEL_PAIRS = 8
"""Pairs of pixel tiles that 3x3 layers compute together, and that a panel holds."""


def product_width(block_shape: BlockShape) -> int:
    """Output channels that are multiplied together: two tiles of weights, or one."""
    return 2 * SIDE if block_shape[0] % (2 * SIDE) == 0 else SIDE


def unsupported_blocks(block_shape: BlockShape) -> str | None:
    """Why tiles cannot hold such blocks, as a phrase; None if they can."""
    height, width = block_shape
    if height % SIDE:
        return f"block height {height} is no multiple of {SIDE}, the width of an AMX tile"
    if width % 2 or (width > DEPTH and width % DEPTH):
        return f"block width {width} is neither even and up to {DEPTH} nor a multiple of {DEPTH}"
    return None


@dataclass(frozen=True)
class AmxVariant(KernelVariant):
    """bf16 on AMX tiles."""

    def _unsupported_blocks(self, pattern: BlockPattern) -> str | None:
        return unsupported_blocks(pattern.block_shape)

    def configs(self, site: Site, pattern: BlockPattern, device: DeviceSpec) -> list[Parameters]:
        """Candidate parameters, best guess first; none where the device has no AMX.

        `chunk`: pairs of pixel tiles that pass through all block rows together. `row_threads`: threads that
        share the block rows of the same pixels. `panel`: whether a strip of the input is copied first; by
        default, where that saves enough tiles.
        """
        if not device.has_amx:
            return []
        pointwise = math.prod(pattern.kernel_size) == 1
        row_threads = split_block_rows(site, pattern, device, 2 * SIDE)
        best: Parameters = {"chunk": 1 if pointwise else PANEL_PAIRS, "row_threads": row_threads}
        others: list[Parameters] = [{"chunk": 8 if pointwise else 2}, {"chunk": 32}]
        if not pointwise:
            others += [{"panel": 0}, {"panel": 1}]
        if device.threads > 1 and output_pixels(site):
            others.append({"row_threads": device.threads if row_threads == 1 else 1})
        return [best, *({**best, **other} for other in others)]

    def describe(
        self, site: Site, pattern: BlockPattern, device: DeviceSpec, config: Mapping[str, Any]
    ) -> str:
        what = "pixels" if site.kernel_size else "rows"
        shared = "block rows" if int(config.get("row_threads", 1)) > 1 else what
        width = product_width(pattern.block_shape)
        return f"AMX, {2 * SIDE} {what} by {width} outputs at a time, threads share {shared}"


AMX = AmxVariant(
    name="cpu_amx_bf16",
    device="cpu",
    dtypes=("bfloat16",),
    ops=("linear", "conv1d", "conv2d"),
    weight_layout=INPUT_PAIRS,
    stand_in="cpu_bf16",
)
