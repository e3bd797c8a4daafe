"""Whole layers on few rows, dense, on block-sparse kernels: gates of mobile networks, classifiers at batch 1.

torch's operators cost 15 to 30 µs to call, ten times what such a layer computes. A kernel with all tiles
kept is generated into the program, and what follows is fused into it.
"""

from __future__ import annotations

import math

from .cpu_variants import PACK
from .kernel_variant import output_pixels
from .pattern import BlockPattern
from .plan import Site
from .roofline import FEW_ROWS

HEIGHTS = (32, 16, 8, 4, 2, 1)


def runs_whole(site: Site) -> bool:
    """Whether a layer without zeros may pay on a kernel for kept tiles, by its estimate."""
    rows = output_pixels(site)
    return (
        site.device.startswith("cpu")
        and site.dtype in ("float32", "bfloat16")
        and site.groups == 1
        and not site.transposed
        and math.prod(site.kernel_size) == 1
        and rows is not None
        and 0 < rows <= FEW_ROWS
    )


def whole_patterns(site: Site) -> list[BlockPattern]:
    """Everything, in the highest columns that the weight has room for; nothing if `runs_whole` says no."""
    width = PACK.get(site.dtype, 1)
    if not runs_whole(site) or site.in_channels < width:
        return []
    height = next(h for h in HEIGHTS if h <= site.out_channels)
    return [BlockPattern.full((site.out_channels, site.in_channels, *site.kernel_size), (height, width))]
