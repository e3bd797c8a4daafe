"""Finds the zero blocks of a dense weight, and the block shape that shows them best."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    out_channels, in_channels = weight.shape[0] // groups, weight.shape[1]
    shapes = (*SQUARES, (1, in_channels), (out_channels, 1))
    patterns = zero_block_patterns(weight, groups, shapes)
    if not patterns:
        return None
    least = min(pattern.kept_elements for pattern in patterns)
    return next(pattern for pattern in patterns if pattern.kept_elements <= SLACK * least)


def zero_block_patterns(weight: Tensor, groups: int, shapes: Sequence[BlockShape]) -> list[BlockPattern]:
    """The patterns of `weight` `[O, C/groups, *kernel]` in those of `shapes` that show zero blocks.

    Shapes larger than a group's weight are left out.
    """
    out_channels, in_channels = weight.shape[0] // groups, weight.shape[1]
    fitting = [(bh, bw) for bh, bw in shapes if bh <= out_channels and bw <= in_channels]
    if not fitting:
        return []
    # The weight is read once, in tiles of which all the others are made.
    finest = math.gcd(*(bh for bh, _ in fitting)), math.gcd(*(bw for _, bw in fitting))
    fine = BlockPattern.from_weight(weight, finest, groups)
    patterns = [fine.retile(shape) for shape in fitting] if not fine.kept.all() else []
    return [pattern for pattern in patterns if not pattern.kept.all()]
