"""What a pattern fixes about training a layer: tables for the kernels, and the phases of the input gradient.

The input gradient of a convolution with stride s is one convolution with stride 1 for each of the s input
pixels that lie between the pixels of two neighbouring outputs, and the results interleave. At stride 1 it
is the well-known convolution with flipped taps and swapped channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernel_variant import KernelConfig
from .pattern import BlockPattern

# ---- phases of the input gradient ------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """The input pixels `offset + i * stride`, whose gradient is one convolution of `dy` with stride 1.

    Args:
        offset: first such pixel, per dimension.
        taps: the taps of the layer that touch these pixels, in the order of this convolution's taps.
        kernel_size, dilation: of this convolution.
        shift: output pixel that its first tap reads for the first of these pixels.
    """

    offset: tuple[int, ...]
    taps: tuple[int, ...]
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    shift: tuple[int, ...]


def phases(
    kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[Phase]:
    """One phase for each input pixel modulo the stride; `prod(stride)` of them, some without taps.

    Input pixel i is touched by tap t of output pixel (i + pad - t * dilation) / stride, where that is whole.
    """
    if not kernel_size:
        return [Phase((), (0,), (), (), ())]
    per_dim = [_phases_1d(*each) for each in zip(kernel_size, stride, padding[::2], dilation, strict=True)]
    found = []
    for parts in itertools.product(*per_dim):
        offset, taps, step, shift = zip(*parts, strict=True)
        flat = [_flatten(each, kernel_size) for each in itertools.product(*taps)]
        sizes = tuple(len(t) for t in taps)
        found.append(Phase(offset, tuple(flat), sizes, step, shift))
    return found


def _phases_1d(
    kernel: int, stride: int, pad: int, dilation: int
) -> list[tuple[int, tuple[int, ...], int, int]]:
    """(offset, taps, dilation, shift) of each phase along one dimension."""
    found = []
    for offset in range(stride):
        # Larger taps read earlier output pixels: in reverse, positions rise.
        taps = [t for t in reversed(range(kernel)) if (offset + pad - t * dilation) % stride == 0]
        reads = [(offset + pad - t * dilation) // stride for t in taps]
        step = reads[1] - reads[0] if len(reads) > 1 else 1
        found.append((offset, tuple(taps), step, reads[0] if reads else 0))
    return found


def _flatten(index: Sequence[int], sizes: Sequence[int]) -> int:
    flat = 0
    for i, size in zip(index, sizes, strict=True):
        flat = flat * size + i
    return flat


def most_surplus(kernel: int, stride: int, before: int, after: int, dilation: int) -> int:
    """How many more pixels than the output a phase of the input can have, along one dimension."""
    reach = dilation * (kernel - 1)
    return max(-(-n // stride) - (n + before + after - reach - 1) // stride - 1 for n in range(stride))


# ---- tables ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerTables:
    """What a pattern fixes: the tables of the forward kernel, and of each phase of the input gradient.

    Args:
        row_ptr, tile_index: as in `PackedWeight`, for the tiles in their own order.
        phase_patterns: the transposed weight of each phase, None for a phase without tiles.
        input_tables: (order, row_ptr, tile_index) of each phase with tiles; `order` says which tile is where.
    """

    row_ptr: Tensor
    tile_index: Tensor
    phase_patterns: tuple[BlockPattern | None, ...]
    input_tables: tuple[Tensor, ...]

    @classmethod
    def of(
        cls,
        pattern: BlockPattern,
        stride: Sequence[int] = (),
        padding: Sequence[int] = (),
        dilation: Sequence[int] = (),
    ) -> LayerTables:
        """For a pattern whose block divides the channels of each group."""
        flat = pattern.ungroup()
        coordinates = flat.tile_coordinates
        patterns: list[BlockPattern | None] = []
        tables: list[Tensor] = []
        for phase in phases(pattern.kernel_size, stride, padding, dilation):
            order, transposed = _transposed(flat, coordinates, phase)
            patterns.append(transposed if len(order) else None)
            if transposed is not None and len(order):
                tables += [order, *_tables(transposed)]
        return cls(*_tables(flat), tuple(patterns), tuple(tables))


def _transposed(flat: BlockPattern, coordinates: Tensor, phase: Phase) -> tuple[Tensor, BlockPattern | None]:
    """Which tiles a phase uses, in its order, and the pattern that they make there."""
    (bh, bw), (rows, taps, columns) = flat.block_shape, flat.grid_shape
    if not phase.taps:
        return torch.empty(0, dtype=torch.int64), None
    number = torch.full((rows, taps, columns), -1)
    number[tuple(coordinates.T)] = torch.arange(len(coordinates))
    number = number[:, list(phase.taps)].permute(2, 1, 0)
    kept = number >= 0
    pattern = BlockPattern(flat.in_channels, flat.out_channels, phase.kernel_size, 1, (bw, bh), kept)
    return number[kept], pattern


def _tables(flat: BlockPattern) -> tuple[Tensor, Tensor]:
    """`row_ptr` and `tile_index` of a pattern with one group, as `pack_weight` makes them."""
    row, tap, column = flat.tile_coordinates.unbind(1)
    row_ptr = torch.zeros(1, math.prod(flat.grid_shape[:2]) + 1, dtype=torch.int32)
    slots = torch.bincount(row * flat.num_taps + tap, minlength=row_ptr.shape[1] - 1)
    row_ptr[0, 1:] = slots.cumsum(0)
    return row_ptr, torch.stack([column * flat.block_shape[1], tap, row]).to(torch.int32)


def gather_indices(pattern: BlockPattern) -> tuple[Tensor, Tensor]:
    """`coordinates` `[3, n]` and `position` `[out-blocks, taps, in-blocks]` of `blocksparse::kept_tiles`."""
    position = torch.full(pattern.grid_shape, -1)
    position[pattern.kept] = torch.arange(pattern.num_kept)
    return pattern.tile_coordinates.T.contiguous(), position


def kernel_texts(tables: LayerTables, kernels: Sequence[KernelConfig]) -> list[str]:
    """The kernel of each phase as the operator's argument; empty for a phase without tiles."""
    return [
        "" if pattern is None else kernel.encode(pattern)
        for pattern, kernel in zip(tables.phase_patterns, kernels, strict=True)
    ]
