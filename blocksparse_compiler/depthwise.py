"""Depthwise convolutions, dense, on a CPU kernel of our own: what stands between sparse 1x1 convolutions.

Once those are fast, the depthwise layers of mobile networks decide, and torch's operator costs more to call
than to compute at their sizes. The kernel is generated into the program, with what follows fused into it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from .devices import DeviceSpec
from .kernel_variant import KernelVariant, Parameters
from .layouts import CHANNELS_LAST, Layouts
from .packing import PackedWeight
from .pattern import BlockPattern
from .plan import Site
from .roofline import Cost, activation_bytes, inside_fraction, memory_seconds, positions

LARGEST_FILTER = 49
"""Taps; larger filters than 7x7 are not depthwise layers that anybody trains for speed."""

LARGEST_STRIDE = 4
"""Of columns, channels first: a mask of 64 bits covers what a vector of 16 passes."""

RATE = 0.55
"""Of peak, with rows of 7 pixels and more; fitted to MobileNets. A device's `efficiency` may know better."""

STRIDED_FUSED = 2.0
"""Time of a vector of every second input over that of one of neighbours, out of the cache."""

STRIDED, IN_PARTS = 4.0, 3.5
"""Time of a channels-first vector of every second input, and of one of several in a row, over that of a
vector that is a whole row of neighbours; measured on Zen 5."""


@dataclass(frozen=True)
class DepthwiseVariant(KernelVariant):
    """Each channel has a filter of its own; all taps of all channels count as kept 1x1 tiles."""

    def _unsupported_blocks(self, pattern: BlockPattern) -> str | None:
        whole = pattern.block_shape == (1, 1) and pattern.num_kept == pattern.kept.numel()
        return None if whole else "runs whole depthwise filters only"

    def _unsupported_site(self, site: Site, pattern: BlockPattern) -> str | None:
        if not site.groups == site.in_channels == site.out_channels:
            return "runs depthwise convolutions with one filter per channel only"
        if not 1 < math.prod(site.kernel_size) <= LARGEST_FILTER:
            return "runs depthwise filters of 2 to 49 taps"
        if not all(isinstance(size, int) for size in site.input_shape[1:]):
            return "no depthwise kernel for images of symbolic size"
        return None

    def configs(self, site: Site, pattern: BlockPattern, device: DeviceSpec) -> list[Parameters]:
        return [{}] if site.in_channels >= device.vector_lanes else []

    def describe(
        self, site: Site, pattern: BlockPattern, device: DeviceSpec, config: Mapping[str, Any]
    ) -> str:
        return f"{device.isa}, {'x'.join(map(str, site.kernel_size))} taps at a time"

    def pack(self, weight: Tensor, pattern: BlockPattern) -> PackedWeight:
        """`[taps, channels]`, without tables."""
        tables = torch.zeros(1, 0, dtype=torch.int32), torch.zeros(3, 0, dtype=torch.int32)
        return PackedWeight(weight.flatten(1).t().contiguous(), *tables)


DEPTHWISE = DepthwiseVariant("cpu_f32_depthwise", "cpu", ("float32",), ("conv2d",))


def depthwise_pattern(site: Site) -> list[BlockPattern]:
    """What `DEPTHWISE` keeps of a layer, namely everything; nothing if it cannot run it."""
    if site.groups == 1 or site.groups != site.in_channels or site.transposed:
        return []
    pattern = BlockPattern.full((site.out_channels, 1, *site.kernel_size), (1, 1), site.groups)
    return [] if DEPTHWISE.unsupported(site, pattern) else [pattern]


def depthwise_cost(
    site: Site, device: DeviceSpec, layouts: Layouts = CHANNELS_LAST, fused: bool = False
) -> Cost:
    """A depthwise layer on `DEPTHWISE`: vectors run along channels, or along rows if those lie first.

    Args:
        fused: with the 1x1 convolution in front, channels first: its input is in the cache.
    """
    taps = math.prod(site.kernel_size)
    flops = 2 * positions(site) * site.out_channels * taps * inside_fraction(site)
    outputs = 4 * positions(site) * site.out_channels
    traffic = (outputs if fused else activation_bytes(site)) + 4 * site.out_channels * taps
    waste = _row_waste(site, device, fused) if layouts.reads_first else _channel_waste(site, device)
    rate = device.efficiency.get(DEPTHWISE.name, RATE)
    return Cost(
        flops,
        traffic,
        flops * waste / (rate * device.peak_flops_per_second()),
        memory_seconds(traffic, device),
        sympy.Float(0.0 if fused else device.sparse_call_seconds),
    )


def _channel_waste(site: Site, device: DeviceSpec) -> float:
    """Lanes computed over lanes filled, along channels."""
    lanes = device.vector_lanes
    return -(-site.in_channels // lanes) * lanes / site.in_channels


def _row_waste(site: Site, device: DeviceSpec, fused: bool) -> float:
    """The same along output rows, half vectors serving the shortest; and what else takes time there."""
    width = int(site.output_spatial[-1])
    lanes = min(device.vector_lanes, 8 if width <= 8 else 16)
    filled = -(-width // lanes) * lanes / width
    slower = 1.0 if fused else IN_PARTS if width > lanes else 1.0
    if site.stride[-1] > 1:
        slower *= STRIDED_FUSED if fused else STRIDED
    return filled * device.vector_lanes / lanes * slower
