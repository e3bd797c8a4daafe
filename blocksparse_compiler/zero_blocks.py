"""Finds the zero blocks of a dense weight, and the block shape that shows them best."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .pattern import BlockPattern, BlockShape

CANDIDATES: tuple[BlockShape, ...] = ((32, 32), (16, 16), (8, 8), (4, 4))
SLACK = 1.05


def find_zero_blocks(
    weight: Tensor, groups: int = 1, candidates: Sequence[BlockShape] = CANDIDATES
) -> BlockPattern | None:
    """The pattern of `weight` `[O, C/groups, *kernel]` in the best block shape; `None` without zero blocks.

    The best is the largest that stores at most 5 % more than the one that stores least: a mask of 16x16
    blocks has a few 32x32 zero blocks by chance, and has all its zeros again in 8x8 blocks.

    Args:
        candidates: block shapes from large to small; those larger than a group's weight are left out.
    """
    if weight.ne(0).all():
        return None
    out_channels, in_channels = weight.shape[0] // groups, weight.shape[1]
    fitting = [(bh, bw) for bh, bw in candidates if bh <= out_channels and bw <= in_channels]
    patterns = [BlockPattern.from_weight(weight, block_shape, groups) for block_shape in fitting]
    if not patterns:
        return None
    least = min(pattern.kept_elements for pattern in patterns)
    best = next(pattern for pattern in patterns if pattern.kept_elements <= SLACK * least)
    return best if best.num_kept < best.kept.numel() else None
