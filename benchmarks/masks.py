"""Random block masks."""

from __future__ import annotations

import torch
from torch import Tensor

from blocksparse_compiler import BlockPattern


def random_mask(weight: Tensor, block_shape: tuple[int, int], density: float) -> Tensor:
    """Bool mask of a random `density` of the weight's channel blocks (at least one), equal for all taps."""
    full = BlockPattern.full(tuple(weight.shape), block_shape)
    rows, taps, columns = full.grid_shape
    keep = torch.randperm(rows * columns) < max(1, round(density * rows * columns))
    return full.with_kept(keep.reshape(rows, 1, columns).expand(rows, taps, columns)).mask()


def balanced_mask(weight: Tensor, block_shape: tuple[int, int], density: float) -> Tensor:
    """As `random_mask`, with equally many blocks (at least one) in every block row."""
    full = BlockPattern.full(tuple(weight.shape), block_shape)
    rows, taps, columns = full.grid_shape
    order = torch.rand(rows, columns).argsort(1).argsort(1)
    keep = order < max(1, round(density * columns))
    return full.with_kept(keep[:, None, :].expand(rows, taps, columns)).mask()
