"""What the CPU kernel for scattered weights costs (`cpu_spmm`): nonzeros, and transposing in and out.

A nonzero block costs the dearer of its multiply-adds and its instructions that load, and, where the panel of
inputs exceeds L1, the bytes that it takes from L2, which hide about half of either. Higher blocks share the
loads and the bytes. A side of the layer that lies channels first is not transposed; its pixel tiles then end
with each image.
"""

from __future__ import annotations

import sympy

from . import cpu_spmm
from .devices import DeviceSpec
from .layouts import CHANNELS_LAST, Layouts
from .pattern import BlockPattern, BlockShape
from .plan import Site
from .roofline import OVERLAP, Cost, activation_bytes, memory_seconds, positions, symbolic, weight_elements

MULTIPLY_RATE = 0.7
"""Of peak, with everything in registers and L1; a device's `efficiency` may know better."""

_COPY = 0.5
"""Of a transpose: to copy rows of pixels that start anywhere side by side, or to read them as they lie."""

_GATHER = 4.0
"""Of a transpose: to collect every other pixel of channels-first rows, one by one."""

OTHER_CORE_BYTES_PER_SECOND = 10e9
"""At which a thread takes what lies in the cache of another core; seen in MobileNet-v2 on Zen 5."""

_BYTES, _INDEX_BYTES = 4, 4


def sparse_rows_cost(
    site: Site,
    pattern: BlockPattern | BlockShape,
    device: DeviceSpec,
    layouts: Layouts = CHANNELS_LAST,
    *,
    density: float = 1.0,
    fused: bool = False,
) -> Cost:
    """A pointwise or linear layer on `cpu_f32_spmm`; other arguments as those of `roofline.sparse_cost`.

    Args:
        fused: with the depthwise layer behind, in a kernel whose threads share output channels.
    """
    if isinstance(pattern, BlockPattern):
        height, blocks = pattern.block_shape[0], float(pattern.num_kept)
    else:
        height, blocks = pattern[0], density * weight_elements(site) / pattern[0]
    row_threads = cpu_spmm.split_rows(site, device, layouts)
    if fused:
        row_threads = device.threads if site.input_shape[0] == 1 else 1
    tile = cpu_spmm.pixel_tile(height, site, device, row_threads, layouts)
    images = symbolic(site.input_shape[0]) if layouts != CHANNELS_LAST else sympy.Integer(1)
    panels = images * sympy.ceiling(positions(site) / images / tile.pixels)
    turns = sympy.ceiling(panels / max(1, device.threads // row_threads))
    rows = site.in_channels * float(not layouts.reads_first)
    rows += site.in_channels * _COPY * cpu_spmm.straddles(site, device, layouts)
    rows += site.in_channels * _GATHER * (layouts.reads_first and any(s != 1 for s in site.stride))
    rows += site.out_channels / row_threads * (not layouts.writes_first)
    transposes = rows * tile.pixels / device.vector_lanes * device.transpose_seconds_per_vector
    panel = blocks / row_threads * _block_seconds(site, height, tile, device)
    traffic = activation_bytes(site) + blocks * (_BYTES * height + _INDEX_BYTES)
    return Cost(
        2 * positions(site) * blocks * height,
        traffic,
        turns * panel,
        memory_seconds(traffic, device),
        # transposes wait for what they read
        device.sparse_call_seconds + turns * transposes + _exchange_seconds(site, device, layouts),
    )


def _exchange_seconds(site: Site, device: DeviceSpec, layouts: Layouts) -> sympy.Expr:
    """To take channels-first input from the caches of other cores.

    Threads share the channels of an image there, so that each has written but its share of what it reads.
    Those that share images, or pixels channels last, read what they have written.
    """
    images = symbolic(site.input_shape[0])
    if not layouts.reads_first or device.threads == 1 or (images.is_number and images >= device.threads):
        return sympy.S.Zero
    others = _BYTES * sympy.Mul(*map(symbolic, site.input_shape)) * (1 - 1 / device.threads)
    return others / OTHER_CORE_BYTES_PER_SECOND


def _block_seconds(site: Site, height: int, tile: cpu_spmm.PixelTile, device: DeviceSpec) -> float:
    """One nonzero block on one thread's tile."""
    vector = 2 * tile.lanes / device.peak_fp32_flops_per_second_per_thread
    rate = device.efficiency.get(cpu_spmm.SPMM.name, MULTIPLY_RATE)
    multiply = height * tile.vectors * vector / rate
    load = (tile.vectors + height + 2) * vector
    panel_bytes = _BYTES * site.in_channels * tile.pixels
    missing = max(0.0, 1 - 0.75 * device.l1_bytes_per_thread / panel_bytes)
    read_rate = device.l2_read_over_copy * device.l2_bytes_per_second_per_thread
    fetch = missing * _BYTES * tile.pixels / read_rate
    small, large = sorted((max(multiply, load), fetch))
    return large + (1 - OVERLAP) * small
