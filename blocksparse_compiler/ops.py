"""The operators that a compiled graph contains: `blocksparse::conv` and `blocksparse::linear`.

Both take weights packed by `pack_weight`: one group, tiles sorted by (out-block, tap, in-block), each
stored `[bw, bh]` so that a vector runs along output channels. The implementations here are the plain
torch reference (scatter to dense, dense kernel); Inductor replaces them by generated kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import PatternError
from .pattern import BlockPattern, gather_tiles

_CONV = (
    "conv(Tensor x, Tensor values, Tensor row_ptr, Tensor channel_offset, Tensor? bias, "
    "int out_channels, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
    "bool channels_last, str kernel) -> Tensor"
)
_LINEAR = (
    "linear(Tensor x, Tensor values, Tensor row_ptr, Tensor channel_offset, Tensor? bias, "
    "int out_channels, str kernel) -> Tensor"
)

LIBRARY = torch.library.Library("blocksparse", "DEF")
LIBRARY.define(_CONV, tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(_LINEAR, tags=(torch.Tag.pt2_compliant_tag,))


class PackedWeight(NamedTuple):
    """A block-sparse weight as the kernels read it.

    Attributes:
        values: `[n, bw, bh]`, zero-filled where a tile is ragged.
        row_ptr: int32 `[1, out_blocks * taps + 1]`; tiles of (out-block r, tap t) are
            `values[row_ptr[0, r * taps + t] : row_ptr[0, r * taps + t + 1]]`.
        channel_offset: int32 `[1, n]`; first input channel a tile reads. Never reads past the last
            channel: a ragged last tile starts earlier and has zeros for what it re-reads.

    The index tensors are 2-D because Inductor inlines short 1-D constants into a kernel of its own.
    """

    values: Tensor
    row_ptr: Tensor
    channel_offset: Tensor


def pack_weight(weight: Tensor, pattern: BlockPattern) -> PackedWeight:
    """Packs the kept tiles of `weight` `[O, C/groups, *kernel]` for the kernels.

    Grouped patterns become block-diagonal; the block must then divide a group's channels.

    Raises:
        PatternError: if a tile of one group would straddle the next.
    """
    flat = pattern.ungroup()
    (_, bw), channels = flat.block_shape, flat.in_channels
    values = gather_tiles(weight.detach(), pattern)
    coords = flat.tile_coordinates
    values = values.transpose(1, 2).contiguous()
    offset = coords[:, 2] * bw
    overhang = (offset + bw - channels).clamp(min=0)
    if overhang.any():
        shift = int(overhang.max())
        ragged = (overhang > 0).to(values.device)
        values[ragged] = values[ragged].roll(shift, dims=1)
        offset = offset - overhang
    counts = torch.bincount(
        coords[:, 0] * flat.num_taps + coords[:, 1], minlength=math.prod(flat.grid_shape[:2])
    )
    row_ptr = torch.zeros(1, len(counts) + 1, dtype=torch.int32)
    row_ptr[0, 1:] = counts.cumsum(0)
    index = torch.int32
    device = values.device
    return PackedWeight(values, row_ptr.to(device), offset.to(index)[None].to(device))


def unpack_weight(
    values: Tensor,
    row_ptr: Tensor,
    channel_offset: Tensor,
    out_channels: int,
    in_channels: int,
    kernel_size: Sequence[int],
) -> Tensor:
    """Inverse of `pack_weight`: the dense weight `[O, C, *kernel]` (one group)."""
    n, bw, bh = values.shape
    taps = math.prod(kernel_size)
    counts = row_ptr.flatten().diff()
    slot = torch.repeat_interleave(torch.arange(len(counts), device=values.device), counts.long())
    block_rows = len(counts) // taps
    if n != len(slot) or block_rows != -(-out_channels // bh):
        raise PatternError(
            "blocksparse op",
            f"row_ptr for {n} tiles in {-(-out_channels // bh)} block rows x {taps} taps",
            f"{len(slot)} tiles in {block_rows} block rows",
            "Pack values and indices together with pack_weight.",
        )
    dense = values.new_zeros(block_rows, bh, taps, in_channels)
    row, tap = slot // taps, slot % taps
    channel = channel_offset.flatten().long()[:, None] + torch.arange(bw, device=values.device)
    # A ragged tile re-reads channels of its neighbour with zero weights: accumulate, never overwrite.
    out = torch.arange(bh, device=values.device)
    where = (row[:, None, None], out[None, None, :], tap[:, None, None], channel[:, :, None])
    dense.index_put_(where, values, accumulate=True)
    weight = dense.reshape(block_rows * bh, taps, in_channels)[:out_channels]
    return weight.transpose(1, 2).reshape(out_channels, in_channels, *kernel_size)


# ---- reference implementations --------------------------------------------------------------------


def _conv_reference(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    channel_offset: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    kernel: str,
) -> Tensor:
    weight = unpack_weight(values, row_ptr, channel_offset, out_channels, x.shape[1], kernel_size)
    pairs = [padding[i : i + 2] for i in range(0, len(padding), 2)]
    before = [lo for lo, _ in pairs]
    if any(lo != hi for lo, hi in pairs):
        x = torch.nn.functional.pad(x, [p for pair in reversed(pairs) for p in pair])
        before = [0] * len(pairs)
    conv = (torch.conv1d, torch.conv2d, torch.conv3d)[len(kernel_size) - 1]
    out = conv(x, weight, bias, list(stride), before, list(dilation))
    return out.contiguous(memory_format=_memory_format(len(kernel_size), channels_last))


def _conv_fake(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    channel_offset: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    kernel: str,
) -> Tensor:
    spatial = [
        (size + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1
        for i, size in enumerate(x.shape[2:])
    ]
    memory_format = _memory_format(len(kernel_size), channels_last)
    shape = (x.shape[0], out_channels, *spatial)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _memory_format(spatial_dims: int, channels_last: bool) -> torch.memory_format:
    if not channels_last or spatial_dims == 1:
        return torch.contiguous_format
    return torch.channels_last if spatial_dims == 2 else torch.channels_last_3d


def _linear_reference(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    channel_offset: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel: str,
) -> Tensor:
    weight = unpack_weight(values, row_ptr, channel_offset, out_channels, x.shape[-1], ())
    return torch.nn.functional.linear(x, weight, bias).contiguous()


def _linear_fake(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    channel_offset: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_channels)


LIBRARY.impl("conv", _conv_reference, "CompositeExplicitAutograd")
LIBRARY.impl("linear", _linear_reference, "CompositeExplicitAutograd")
torch.library.register_fake("blocksparse::conv", _conv_fake, lib=LIBRARY)
torch.library.register_fake("blocksparse::linear", _linear_fake, lib=LIBRARY)
