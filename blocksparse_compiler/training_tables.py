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
from .packing import INPUT_MAJOR, STEP_CHANNELS
from .pattern import BlockPattern, scatter_tiles
from .variants import VARIANTS

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
        tile_index: as in `PackedWeight`, for the tiles in their own order; of channels up to whole blocks.
        groups: int32 `[2, g]`, on GPUs: first tile, and one past the last, of the tiles of one out-block
            whose gradients a program computes together.
        forward: (order, row_ptr, tile_index); `order` says which tile is where, -1 for a tile of zeros. An
            empty order leaves tiles as they are.
        phase_patterns: the transposed weight of each phase, None for a phase without tiles.
        input_tables: the same three tables for each phase with tiles.
    """

    tile_index: Tensor
    groups: Tensor | None
    forward: tuple[Tensor, Tensor, Tensor]
    phase_patterns: tuple[BlockPattern | None, ...]
    input_tables: tuple[Tensor, ...]

    @classmethod
    def of(
        cls,
        pattern: BlockPattern,
        stride: Sequence[int] = (),
        padding: Sequence[int] = (),
        dilation: Sequence[int] = (),
        kernel: str = "cpu_f32",
    ) -> LayerTables:
        """For a pattern whose block divides the channels of each group, if there are several.

        Args:
            kernel: row of the kernel table that multiplies.
        """
        flat = _whole_blocks(pattern.ungroup())
        coordinates = flat.tile_coordinates
        on_cpu = VARIANTS[kernel].weight_layout == INPUT_MAJOR
        patterns: list[BlockPattern | None] = []
        tables: list[Tensor] = []
        for phase in phases(pattern.kernel_size, stride, padding, dilation):
            number, transposed = _transposed(flat, coordinates, phase)
            patterns.append(transposed if len(number) else None)
            if transposed is not None and len(number):
                order, *rest = _packed_tables(transposed, kernel)
                tables += [_chained(number, order), *rest]
        _, tile_index = _tables(flat)
        groups = None if on_cpu else _groups(flat)
        return cls(tile_index, groups, _packed_tables(flat, kernel), tuple(patterns), tuple(tables))

    @property
    def all(self) -> list[Tensor]:
        """Those of the forward pass, then those of the phases."""
        return [*self.forward, *self.input_tables]


def _whole_blocks(flat: BlockPattern) -> BlockPattern:
    """The same tiles of a weight whose channels are filled up to whole blocks."""
    (bh, bw), (rows, _, columns) = flat.block_shape, flat.grid_shape
    return BlockPattern(rows * bh, columns * bw, flat.kernel_size, 1, flat.block_shape, flat.kept)


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


def _packed_tables(flat: BlockPattern, kernel: str) -> tuple[Tensor, Tensor, Tensor]:
    """`order`, `row_ptr` and `tile_index`, as the kernel packs a weight of this pattern."""
    variant = VARIANTS[kernel]
    if variant.weight_layout == INPUT_MAJOR:
        return (torch.empty(0, dtype=torch.int64), *_tables(flat))
    # A weight that holds the number of each tile tells where its tiles go.
    numbers = torch.arange(1, flat.num_kept + 1, dtype=torch.float64)[:, None, None]
    packed = variant.pack(scatter_tiles(numbers.expand(-1, *flat.block_shape).contiguous(), flat), flat)
    return packed.values[:, 0, 0].long() - 1, packed.row_ptr, packed.tile_index


def _chained(number: Tensor, order: Tensor) -> Tensor:
    """The order of tiles that are taken out first (`number`) and ordered then."""
    return torch.where(order >= 0, number[order.clamp(min=0)], -1) if len(order) else number


def _tables(flat: BlockPattern) -> tuple[Tensor, Tensor]:
    """`row_ptr` and `tile_index` of a pattern with one group, as `pack_weight` makes them."""
    row, tap, column = flat.tile_coordinates.unbind(1)
    row_ptr = torch.zeros(1, math.prod(flat.grid_shape[:2]) + 1, dtype=torch.int32)
    slots = torch.bincount(row * flat.num_taps + tap, minlength=row_ptr.shape[1] - 1)
    row_ptr[0, 1:] = slots.cumsum(0)
    return row_ptr, torch.stack([column * flat.block_shape[1], tap, row]).to(torch.int32)


def group_size(block_width: int) -> int:
    """Most tiles of a group: together they are one operand of a matrix instruction."""
    return max(1, STEP_CHANNELS // block_width)


def _groups(flat: BlockPattern) -> Tensor:
    counts = flat.kept.sum((1, 2))
    most, ends = group_size(flat.block_shape[1]), counts.cumsum(0)
    runs = [
        torch.stack([start, (start + most).clamp(max=end)])
        for end, count in zip(ends.tolist(), counts.tolist(), strict=True)
        for start in [torch.arange(end - count, end, most)]
    ]
    return torch.cat(runs, 1).to(torch.int32)


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
