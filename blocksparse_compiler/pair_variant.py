"""The GPU row that multiplies two out-blocks at a time, which share loads of activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .box_variant import BOX, box_tiles, item_bytes
from .gpu_variants import DTYPES, GpuVariant, in_l1, most_sums, pipeline_stages
from .kernel_variant import Parameters
from .packing import PackedWeight
from .pair_packing import pack_pairs, pair_rows
from .pattern import BlockPattern
from .plan import Site

MOST_SUMS = 64
"""fp32 sums that a thread can hold next to the pointers to what it loads."""

LEAST_LOAD_BYTES = 8
"""Loads of weights that are narrower, or none at all for some threads, stop the software pipeline."""


@dataclass(frozen=True)
class Pair(GpuVariant):
    """Loads what both out-blocks of a pair need once.

    Parameters: `box`, activations are copied by tensor descriptors, as in `triton_box`; else through
    pointers, in any geometry.
    """

    def _unsupported_blocks(self, pattern: BlockPattern) -> str | None:
        if len(pattern.kept) < 2:
            return "for at least two blocks of output channels"
        return super()._unsupported_blocks(pattern)

    def _tiles(self, site: Site, pattern: BlockPattern, device: Any) -> list[Parameters]:
        bh, bw = pattern.block_shape
        programs = len(pair_rows(pattern))
        found: list[Parameters] = []
        if BOX.runs_on(device) and BOX.unsupported(site, pattern) is None:
            found = [{**box, "box": 1} for box in box_tiles(site, pattern, device, programs, blocks=2)]
        most = min(MOST_SUMS, most_sums(site, device) // 2)
        for pixels, warps in ((128, 8), (64, 4), (64, 8), (256, 8), (32, 4)):
            threads = warps * device.warp_threads
            if not 8 <= 2 * pixels * bh // threads <= most:
                continue
            if bh * bw * item_bytes(site) < LEAST_LOAD_BYTES * threads:
                continue
            stages = min(3, pipeline_stages((pixels + 2 * bh) * bw * item_bytes(site), device))
            if stages >= 2:
                found.append({"pixels": pixels, "warps": warps, "stages": stages})
        if pattern.num_taps > 1 and device.backend != "hip":
            found += [in_l1(config) for config in found if "box" not in config][:1]
        return found

    def pack(self, weight: Tensor, pattern: BlockPattern) -> PackedWeight:
        return pack_pairs(weight, pattern)


PAIR = Pair(name="triton_pair", device="cuda", dtypes=DTYPES, ops=BOX.ops)
