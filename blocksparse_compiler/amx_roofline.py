"""What the CPU kernel on AMX tiles costs (`amx_variant`): tile products, and a fixed part per output tile.

A product of tiles takes 16 cycles however little of them is filled: blocks of 16 input channels run at half
the rate, and pixels that a tile computes for nothing cost as much as others. The sums of a tile are stored,
converted and passed through the epilogue beside the products of the next one; what of it shows is
`DeviceSpec.amx_tile_seconds`.
"""

from __future__ import annotations

import math

import sympy

from . import roofline
from .amx_tiling import SIDE, Axis, panel, panel_tiles, regions, wants_panel
from .amx_variant import DEPTH, PANEL_PAIRS, product_width
from .devices import DeviceSpec
from .pattern import BlockPattern, BlockShape
from .plan import Site
from .roofline import Cost

PRODUCT_FLOPS = 2 * SIDE * SIDE * DEPTH


def amx_cost(
    site: Site, pattern: BlockPattern | BlockShape, device: DeviceSpec, variant: str, *, density: float = 1.0
) -> Cost:
    """The layer on AMX tiles; arguments as those of `roofline.sparse_cost`.

    Images of symbolic size run on vectors, and cost what they cost there.
    """
    spatial = all(isinstance(size, int) for size in site.input_shape[1:])
    if site.kernel_size and not spatial:
        return roofline.sparse_cost(site, pattern, device, "cpu_bf16", density=density)
    usual = roofline.sparse_cost(site, pattern, device, variant, density=density)
    if isinstance(pattern, BlockPattern):
        block, blocks = pattern.block_shape, float(pattern.num_kept)
        skew = roofline.row_skew(pattern, device)
    else:
        block, skew = pattern, 1.0
        blocks = density * roofline.weight_elements(site) / math.prod(block)
    tiles, filling = _pixel_tiles(site, device)
    square = product_width(block)
    fraction = device.efficiency.get(f"{variant}/{square}x{square}/{roofline.kind(site)}", 1.0)
    rate = device.peak_amx_flops_per_second_per_thread * fraction
    products = blocks * -(-block[0] // SIDE) * -(-block[1] // DEPTH)
    fixed = -(-site.out_channels // SIDE) * device.amx_tile_seconds / 4
    turns = sympy.ceiling(tiles / 2 / device.threads) * 2 * device.threads / tiles
    busiest = sympy.Min(turns, skew) / device.threads
    compute = tiles * (products * PRODUCT_FLOPS / rate + fixed) * busiest + filling / device.threads
    return Cost(usual.flops, usual.bytes, compute, usual.memory_seconds, usual.overhead_seconds)


def _pixel_tiles(site: Site, device: DeviceSpec) -> tuple[sympy.Expr, sympy.Expr]:
    """Tiles of 16 pixels, and the seconds that filling panels takes, in one thread."""
    if not site.kernel_size or _plain(site):
        return sympy.ceiling(roofline.positions(site) / SIDE), sympy.S.Zero
    axes = [
        Axis(
            int(site.input_shape[2 + i]),
            int(site.output_spatial[i]),
            site.kernel_size[i],
            site.stride[i],
            site.padding[i][0],
            site.dilation[i],
        )
        for i in range(len(site.kernel_size))
    ]
    rows, columns = axes if len(axes) == 2 else (Axis(1, 1), axes[0])
    images = roofline.symbolic(site.input_shape[0])
    share = int(-(-images // device.threads)) if images.is_number else PANEL_PAIRS
    if wants_panel(rows, columns, share, PANEL_PAIRS):
        strip = panel(rows, columns, share, PANEL_PAIRS)
        strips = -(-rows.out // strip.rows) / strip.images
        filled = 2 * strips * strip.places * site.in_channels * 2  # read and written, two bytes each
        tiles = panel_tiles(rows, columns, share, PANEL_PAIRS)
        return images * tiles, images * filled / device.l2_bytes_per_second_per_thread
    taps = math.prod(site.kernel_size)
    inside = [
        2
        * region.pairs
        * (region.row_taps[1] - region.row_taps[0])
        * (region.column_taps[1] - region.column_taps[0])
        / taps
        for region in regions(rows, columns)
    ]
    return images * sum(inside), sympy.S.Zero


def _plain(site: Site) -> bool:
    """Whether output pixel p reads input pixel p alone."""
    strided = any(stride != 1 for stride in site.stride)
    return math.prod(site.kernel_size) == 1 and not strided and not any(map(any, site.padding))
