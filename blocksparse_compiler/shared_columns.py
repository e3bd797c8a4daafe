"""Neighbouring rows of single weights that share their columns: a group of four, or two, runs as a block.

After Elsen, Dukhan, Gale, Simonyan, "Fast Sparse ConvNets" (CVPR 2020): a layer may hold groups of either
size and single rows side by side. The few zeros that a group lacks are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .pattern import BlockPattern

ENOUGH = {4: 3.6, 2: 1.8}
"""Mean nonzeros in a column of so many rows from which on they pay as a block."""

FEWEST = 0.1
"""Part of a layer's columns that groups hold, from which on the kernel looks for them."""


@dataclass(frozen=True)
class SharedColumns:
    """How a pattern of 1x1 blocks is stored.

    Args:
        pattern: with the zeros that groups lack.
        columns: stored columns of groups by the number of rows; single rows are groups of one.
    """

    pattern: BlockPattern
    columns: Mapping[int, int]


def share_columns(pattern: BlockPattern) -> SharedColumns | None:
    """The groups of a pattern; None where there are too few to matter, or blocks are no single weights."""
    if pattern.block_shape != (1, 1) or pattern.groups != 1:
        return None
    kept = pattern.kept.flatten(1).clone()
    single, columns = kept.any(1), {}
    for rows, enough in ENOUGH.items():
        whole = len(kept) // rows * rows
        group = kept[:whole].unflatten(0, (-1, rows))
        union = group.any(1)
        shared = group.sum((1, 2)) >= enough * union.sum(1)
        shared &= single[:whole].unflatten(0, (-1, rows)).all(1)
        group[shared] = union[shared][:, None].expand(-1, rows, -1)
        single[:whole] &= ~shared.repeat_interleave(rows)
        columns[rows] = int(union[shared].sum())
    columns[1] = int(kept[single].sum())
    if columns[4] + columns[2] < FEWEST * sum(columns.values()):
        return None
    return SharedColumns(pattern.with_kept(kept.view_as(pattern.kept)), columns)


def blocks_by_height(pattern: BlockPattern) -> Mapping[int, int]:
    """Nonzero blocks of one column, by their height, as the kernel runs them."""
    shared = share_columns(pattern)
    return shared.columns if shared else {pattern.block_shape[0]: pattern.num_kept}
