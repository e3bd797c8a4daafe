"""Weights as kernels read them: kept tiles, a table of where each belongs, and a schedule.

CPU kernels read tiles `[bw, bh]`, so that a vector runs along output channels; those for bf16 read pairs of
input channels, `[bw / 2, bh, 2]`, those for 8-bit integers four, `[bw / 4, bh, 4]`, as the instructions do
that multiply these (VNNI order). GPU kernels read `[bh, bw]`, so that both operands of a matrix instruction
run along input channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import PatternError
from .pattern import BlockPattern, gather_tiles

INPUT_MAJOR, INPUT_PAIRS, INPUT_QUADS = "input_major", "input_pairs", "input_quads"
OUTPUT_MAJOR = "output_major"
_TOGETHER = {INPUT_PAIRS: 2, INPUT_QUADS: 4}
"""Neighbouring input channels that lie together."""

STEP_CHANNELS = 64
"""Kernels may multiply several narrow tiles at a time, of this many channels together."""


class PackedWeight(NamedTuple):
    """A block-sparse weight as the kernels read it.

    Attributes:
        values: `[n, bw, bh]` (input-major), `[n, bw / 2, bh, 2]` (pairs), `[n, bw / 4, bh, 4]` (quads) or
            `[n, bh, bw]` (output-major), zero-filled where a tile is ragged.
        row_ptr: int32, 2-D: which tiles each program of the kernel multiplies. Its form belongs to the
            kernel family; see the functions that make it.
        tile_index: int32 `[3, n]`: first input channel, tap and out-block of each tile. No tile reads
            past the last channel: a ragged last tile starts earlier and has zeros for what it re-reads.

    The index tensors are 2-D because Inductor inlines short 1-D constants into a kernel of its own.
    """

    values: Tensor
    row_ptr: Tensor
    tile_index: Tensor


def pack_weight(weight: Tensor, pattern: BlockPattern, layout: str = INPUT_MAJOR) -> PackedWeight:
    """Packs the kept tiles of `weight` `[O, C/groups, *kernel]`, sorted by (out-block, tap, in-block).

    Grouped patterns become block-diagonal; the block must then divide a group's channels. `row_ptr` is
    `[1, out_blocks * taps + 1]`: tiles of (out-block r, tap t) are
    `values[row_ptr[0, r * taps + t] : row_ptr[0, r * taps + t + 1]]`.

    Raises:
        PatternError: if a tile of one group would straddle the next.
    """
    flat = pattern.ungroup()
    values, tile_index = _tiles(weight, pattern, flat)
    slot = tile_index[2].long() * flat.num_taps + tile_index[1]
    row_ptr = torch.zeros(1, math.prod(flat.grid_shape[:2]) + 1, dtype=torch.int32)
    row_ptr[0, 1:] = torch.bincount(slot, minlength=row_ptr.shape[1] - 1).cumsum(0)
    if layout == INPUT_MAJOR:
        values = values.transpose(1, 2)
    elif layout in _TOGETHER:
        values = values.unflatten(2, (-1, _TOGETHER[layout])).transpose(1, 2)
    device = weight.device
    return PackedWeight(values.contiguous(), row_ptr.to(device), tile_index.to(device))


def pack_rows(weight: Tensor, pattern: BlockPattern, multiple: int = 1) -> PackedWeight:
    """Packs output-major tiles for kernels with a program per out-block.

    `row_ptr` is `[out_blocks, 3]`: out-block, its first tile, and one past its last; the out-blocks with
    most tiles come first, so that the longest programs start earliest.

    Args:
        multiple: of tiles in each row; zero tiles fill it up, at the place of the row's last tile.
    """
    packed = pack_weight(weight, pattern, OUTPUT_MAJOR)
    ends = packed.row_ptr[0, :: pattern.num_taps].cpu()
    slots = tile_slots(pattern.ungroup())
    packed = select_tiles(packed, slots[slots >= 0])
    if multiple > 1 and packed.values.shape[0]:
        packed, ends = _fill_rows(packed, ends, multiple)
    order = ends.diff().argsort(descending=True, stable=True)
    rows = torch.stack([order, ends[:-1][order], ends[1:][order]], 1).to(torch.int32)
    return packed._replace(row_ptr=rows.contiguous().to(weight.device))


def tile_slots(flat: BlockPattern) -> Tensor:
    """int64 `[out_blocks, taps * in_blocks]`: number of the tile there, as `pack_weight` counts, or -1.

    The taps of one step of input channels follow each other: they read nearly the same activations, which a
    cache may still hold.
    """
    _, taps, in_blocks = flat.kept.shape
    slots = torch.full(flat.kept.shape, -1)
    slots[flat.kept] = torch.arange(flat.num_kept)
    step = torch.arange(in_blocks) * flat.block_shape[1] // STEP_CHANNELS
    place = (step * taps + torch.arange(taps)[:, None]) * in_blocks + torch.arange(in_blocks)
    return slots.flatten(1)[:, place.flatten().argsort()]


def select_tiles(packed: PackedWeight, tiles: Tensor) -> PackedWeight:
    """These tiles, in this order; `row_ptr` stays."""
    tiles = tiles.to(packed.values.device)
    return packed._replace(values=packed.values[tiles], tile_index=packed.tile_index[:, tiles].contiguous())


def _fill_rows(packed: PackedWeight, ends: Tensor, multiple: int) -> tuple[PackedWeight, Tensor]:
    """Appends zero tiles to each row of tiles `ends[i] : ends[i + 1]`; also returns the new ends."""
    counts = ends.diff()
    filled = -(-counts // multiple) * multiple
    new_ends = torch.nn.functional.pad(filled.cumsum(0), (1, 0))
    row = torch.repeat_interleave(torch.arange(len(counts)), filled)
    position = torch.arange(int(new_ends[-1])) - new_ends[row]
    is_fill = (position >= counts[row]).to(packed.values.device)
    source = (ends[row] + torch.minimum(position, counts[row] - 1)).to(packed.values.device)
    values = packed.values[source].masked_fill(is_fill[:, None, None], 0)
    return packed._replace(values=values, tile_index=packed.tile_index[:, source].contiguous()), new_ends


def _tiles(weight: Tensor, pattern: BlockPattern, flat: BlockPattern) -> tuple[Tensor, Tensor]:
    """Kept tiles `[n, bh, bw]` and their `tile_index` `[3, n]` on the CPU."""
    (_, bw), channels = flat.block_shape, flat.in_channels
    values = gather_tiles(weight.detach(), pattern)
    row, tap, column = flat.tile_coordinates.unbind(1)
    offset = column * bw
    overhang = (offset + bw - channels).clamp(min=0)
    if overhang.any():
        shift = int(overhang.max())
        ragged = (overhang > 0).to(values.device)
        values[ragged] = values[ragged].roll(shift, dims=2)
        offset = offset - overhang
    return values, torch.stack([offset, tap, row]).to(torch.int32)


def unpack_weight(
    values: Tensor,
    row_ptr: Tensor,
    tile_index: Tensor,
    out_channels: int,
    in_channels: int,
    kernel_size: Sequence[int],
    layout: str = INPUT_MAJOR,
) -> Tensor:
    """Inverse of packing, in any order of tiles: the dense weight `[O, C, *kernel]` (one group).

    Raises:
        PatternError: if the table of tiles does not belong to these values.
    """
    if layout == INPUT_MAJOR:
        values = values.transpose(1, 2)
    elif layout in _TOGETHER:
        values = values.transpose(1, 2).flatten(2)
    n, bh, bw = values.shape
    taps, block_rows = math.prod(kernel_size), -(-out_channels // bh)
    if tuple(tile_index.shape) != (3, n):
        raise PatternError(
            "blocksparse op",
            f"a table of {n} tiles, [3, {n}]",
            f"shape {list(tile_index.shape)}",
            "Pack values and indices together with pack_weight.",
        )
    first, tap, row = tile_index.long()
    dense = values.new_zeros(block_rows, bh, taps, in_channels)
    # A ragged tile re-reads channels of its neighbour with zero weights: accumulate, never overwrite.
    channel = (first[:, None] + torch.arange(bw, device=values.device))[:, None, :]
    out = torch.arange(bh, device=values.device)[None, :, None]
    dense.index_put_((row[:, None, None], out, tap[:, None, None], channel), values, accumulate=True)
    weight = dense.reshape(block_rows * bh, taps, in_channels)[:out_channels]
    return weight.transpose(1, 2).reshape(out_channels, in_channels, *kernel_size)
