"""Finds the zero blocks of a dense weight, and the block shape that shows them best."""

from __future__ import annotations

from torch import Tensor

from .pattern import BlockPattern, BlockShape

SQUARES: tuple[BlockShape, ...] = ((32, 32), (16, 16), (8, 8), (4, 4))
SLACK = 1.05


def find_zero_blocks(weight: Tensor, groups: int = 1) -> BlockPattern | None:
    """The pattern of `weight` `[O, C/groups, *kernel]` in the best block shape; None without zero blocks.

    Looks for square blocks, whole filters `(1, C/groups)` and whole input channels `(O/groups, 1)`. The
    best is the first in this order that stores at most 5 % more than the one that stores least: a mask of
    16x16 blocks has a few 32x32 zero blocks by chance, and has all its zeros again in 8x8 blocks.
    """
    if weight.ne(0).all():
        return None
    out_channels, in_channels = weight.shape[0] // groups, weight.shape[1]
    squares = [(bh, bw) for bh, bw in SQUARES if bh <= out_channels and bw <= in_channels]
    shapes = [*squares, (1, in_channels), (out_channels, 1)]
    patterns = [BlockPattern.from_weight(weight, block_shape, groups) for block_shape in shapes]
    least = min(pattern.kept_elements for pattern in patterns)
    best = next(pattern for pattern in patterns if pattern.kept_elements <= SLACK * least)
    return best if best.num_kept < best.kept.numel() else None
