"""Differentiable block-sparse layers: `blocksparse::sparse_conv`, `blocksparse::sparse_linear`,
and `blocksparse::kept_tiles`, which takes their tiles out of a dense weight.

All three products of a training step run on kept tiles:

    y  = conv(x, W)                        blocksparse::conv
    dx = conv(dy, flipped, transposed W)   blocksparse::conv, one for each phase of the stride
    dW = dy^T x, on kept tiles alone       blocksparse::weight_grad

Tiles are `[n, bh, bw]` in the order of `BlockPattern.tile_coordinates`, and change from step to step; what
depends on the pattern alone is computed once (`LayerTables`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ops import LIBRARY, memory_format_of
from .pattern import BlockPattern
from .variants import KernelConfig

_GEOMETRY = "int[] kernel_size, int[] stride, int[] padding, int[] dilation"
_TABLES = "Tensor row_ptr, Tensor tile_index, Tensor[] input_tables, str kernel, str[] input_kernels"

LIBRARY.define(
    f"weight_grad(Tensor grad, Tensor x, Tensor tile_index, int[] block_shape, {_GEOMETRY}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    f"sparse_conv(Tensor x, Tensor tiles, Tensor? bias, int out_channels, {_GEOMETRY}, "
    f"bool channels_last, {_TABLES}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "kept_tiles(Tensor weight, Tensor coordinates, Tensor position, int[] block_shape) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    f"sparse_linear(Tensor x, Tensor tiles, Tensor? bias, int out_channels, {_TABLES}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


# ---- gradient of the tiles -------------------------------------------------------------------------


def _weight_grad_reference(
    grad: Tensor,
    x: Tensor,
    tile_index: Tensor,
    block_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    channel_dim = 1 if kernel_size else -1
    shape = (grad.shape[channel_dim], x.shape[channel_dim], *kernel_size)
    if kernel_size:
        pairs = [padding[i : i + 2] for i in range(0, len(padding), 2)]
        x = torch.nn.functional.pad(x, [p for pair in reversed(pairs) for p in pair])
        zeros = [0] * len(pairs)
        dense = torch.ops.aten.convolution_backward(
            grad,
            x,
            grad.new_zeros(shape),
            None,
            stride,
            zeros,
            dilation,
            False,
            zeros,
            1,
            [False, True, False],
        )[1]
    else:
        dense = grad.flatten(0, -2).t() @ x.flatten(0, -2)
    return _tiles_at(dense, tile_index, block_shape)


def _tiles_at(weight: Tensor, tile_index: Tensor, block_shape: Sequence[int]) -> Tensor:
    """The tiles `[n, bh, bw]` of a weight `[O, C, *kernel]`, whose channels the block divides."""
    (bh, bw), (out_channels, in_channels) = block_shape, weight.shape[:2]
    first, tap, row = tile_index.long()
    tiles = weight.reshape(out_channels // bh, bh, in_channels // bw, bw, -1)
    return tiles[row, :, first // bw, :, tap].contiguous()


def _weight_grad_fake(
    grad: Tensor, x: Tensor, tile_index: Tensor, block_shape: Sequence[int], *_: Any
) -> Tensor:
    return grad.new_empty(tile_index.shape[1], *block_shape)


LIBRARY.impl("weight_grad", _weight_grad_reference, "CompositeExplicitAutograd")
torch.library.register_fake("blocksparse::weight_grad", _weight_grad_fake, lib=LIBRARY)


# ---- tiles of a dense weight ------------------------------------------------------------------------


class _KeptTiles(torch.autograd.Function):
    """The kept tiles of a dense weight. Both directions are gathers, which fuse with masks and scales."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, weight: Tensor, coordinates: Tensor, position: Tensor, block_shape: Sequence[int]
    ) -> Tensor:
        ctx.save_for_backward(position)
        ctx.shape = tuple(weight.shape)
        ctx.last = weight.dim() == 4 and weight.stride(1) == 1
        bh, bw = block_shape
        row, tap, column = coordinates
        tiles = weight.reshape(*weight.shape[:2], -1).unflatten(1, (-1, bw)).unflatten(0, (-1, bh))
        return tiles.permute(0, 4, 2, 1, 3)[row, tap, column]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (position,) = ctx.saved_tensors  # [out-blocks, taps, in-blocks]; -1 where no tile is kept
        tiles = torch.where((position >= 0)[..., None, None], grad[position.clamp(min=0)], 0)
        out_channels, in_channels, *kernel = ctx.shape
        weight = tiles.permute(0, 3, 1, 2, 4).reshape(out_channels, *kernel, in_channels).movedim(-1, 1)
        return weight if ctx.last else weight.contiguous(), None, None, None


LIBRARY.impl("kept_tiles", lambda *args: _KeptTiles.apply(*args), "CompositeImplicitAutograd")


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


# ---- layers ----------------------------------------------------------------------------------------


class _SparseConv(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, tiles: Tensor, bias: Tensor | None, *rest: Any
    ) -> Tensor:
        (
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            last,
            row_ptr,
            tile_index,
            tables,
            kernel,
            kernels,
        ) = rest
        ctx.save_for_backward(x, tiles, tile_index, *tables)
        ctx.geometry = (kernel_size, stride, padding, dilation)
        ctx.last, ctx.kernels = last, kernels
        packed = tiles.transpose(1, 2).contiguous()
        return torch.ops.blocksparse.conv(
            x, packed, row_ptr, tile_index, bias, out_channels, *ctx.geometry, last, kernel
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, tiles, tile_index, *tables = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = _input_grad(grad, x, tiles, tables, ctx)
        if ctx.needs_input_grad[1]:
            shape = list(tiles.shape[1:])
            dw = torch.ops.blocksparse.weight_grad(grad, x, tile_index, shape, *ctx.geometry)
        if ctx.needs_input_grad[2]:
            db = grad.sum([0, *range(2, grad.dim())])
        return dx, dw, db, *[None] * 11


def _input_grad(grad: Tensor, x: Tensor, tiles: Tensor, tables: list[Tensor], ctx: Any) -> Tensor:
    kernel_size, stride, padding, dilation = ctx.geometry
    dims = range(len(stride))
    surplus = [
        _surplus(*each)
        for each in zip(kernel_size, stride, padding[::2], padding[1::2], dilation, strict=True)
    ]
    counts = [grad.shape[2 + d] + surplus[d] for d in dims]
    parts, used = [], 0
    for phase, kernel in zip(phases(*ctx.geometry), ctx.kernels, strict=True):
        if not kernel:
            parts.append(grad.new_zeros(grad.shape[0], x.shape[1], *counts))
            continue
        order, row_ptr, tile_index = tables[used : used + 3]
        used += 3
        # Pixel i reads dy[i + shift] and on; negative padding cuts.
        after = [surplus[d] + phase.shift[d] + phase.dilation[d] * (phase.kernel_size[d] - 1) for d in dims]
        pads = [p for d in dims for p in (-phase.shift[d], after[d])]
        operands = (tiles.index_select(0, order), row_ptr, tile_index, None, x.shape[1])
        geometry = (list(phase.kernel_size), [1] * len(stride), pads, list(phase.dilation))
        parts.append(torch.ops.blocksparse.conv(grad, *operands, *geometry, ctx.last, kernel))
    if len(parts) == 1:
        return parts[0]
    return _interleave(parts, stride, x.shape[2:]).contiguous(
        memory_format=memory_format_of(len(stride), ctx.last)
    )


def _surplus(kernel: int, stride: int, before: int, after: int, dilation: int) -> int:
    """How many more pixels than the output a phase of the input can have, along one dimension."""
    reach = dilation * (kernel - 1)
    return max(-(-n // stride) - (n + before + after - reach - 1) // stride - 1 for n in range(stride))


def _interleave(parts: list[Tensor], stride: Sequence[int], size: Sequence[int]) -> Tensor:
    """Pixels `offset + i * stride` from the part with that offset."""
    dims = len(stride)
    stacked = torch.stack(parts, -1).unflatten(-1, list(stride))  # [N, C, *counts, *stride]
    order = [axis for d in range(dims) for axis in (2 + d, 2 + dims + d)]
    mixed = stacked.permute(0, 1, *order)
    for d in range(dims):
        mixed = mixed.flatten(2 + d, 3 + d).narrow(2 + d, 0, size[d])
    return mixed


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, tiles: Tensor, bias: Tensor | None, *rest: Any
    ) -> Tensor:
        out_channels, row_ptr, tile_index, tables, kernel, kernels = rest
        ctx.save_for_backward(x, tiles, tile_index, *tables)
        ctx.kernels = kernels
        packed = tiles.transpose(1, 2).contiguous()
        return torch.ops.blocksparse.linear(x, packed, row_ptr, tile_index, bias, out_channels, kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, tiles, tile_index, order, row_ptr, t_index = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            operands = (tiles.index_select(0, order), row_ptr, t_index, None, x.shape[-1], ctx.kernels[0])
            dx = torch.ops.blocksparse.linear(grad, *operands)
        if ctx.needs_input_grad[1]:
            shape = list(tiles.shape[1:])
            dw = torch.ops.blocksparse.weight_grad(grad, x, tile_index, shape, [], [], [], [])
        if ctx.needs_input_grad[2]:
            db = grad.flatten(0, -2).sum(0)
        return dx, dw, db, *[None] * 6


LIBRARY.impl("sparse_conv", lambda *args: _SparseConv.apply(*args), "CompositeImplicitAutograd")
LIBRARY.impl("sparse_linear", lambda *args: _SparseLinear.apply(*args), "CompositeImplicitAutograd")


def kernel_texts(tables: LayerTables, kernels: Sequence[KernelConfig]) -> list[str]:
    """The kernel of each phase as the operator's argument; empty for a phase without tiles."""
    return [
        "" if pattern is None else kernel.encode(pattern)
        for pattern, kernel in zip(tables.phase_patterns, kernels, strict=True)
    ]


__all__ = ["LayerTables", "Phase", "gather_indices", "kernel_texts", "phases"]
