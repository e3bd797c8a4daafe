"""Differentiable block-sparse layers: `blocksparse::sparse_conv`, `blocksparse::sparse_linear`,
`blocksparse::kept_tiles`, which takes their tiles out of a dense weight, and `blocksparse::with_zero_grad`.

All three products of a training step run on kept tiles:

    y  = conv(x, W)                        blocksparse::conv
    dx = conv(dy, flipped, transposed W)   blocksparse::conv, one for each phase of the stride
    dW = dy^T x, on kept tiles alone       blocksparse::weight_grad

Tiles are `[n, bh, bw]` in the order of `BlockPattern.tile_coordinates`, and change from step to step; what
depends on the pattern alone is computed once (`training_tables`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ops import LIBRARY, Convolution, Operand, define, layout_of, memory_format_of
from .packing import INPUT_MAJOR
from .training_tables import most_surplus, phases

_GEOMETRY = "int[] kernel_size, int[] stride, int[] padding, int[] dilation"
_TABLES = "Tensor tile_index, Tensor? groups, Tensor[] tables, str kernel, str[] input_kernels"

LIBRARY.define(
    f"sparse_conv(Tensor x, Tensor tiles, Tensor? bias, int out_channels, {_GEOMETRY}, "
    f"bool channels_last, {_TABLES}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "kept_tiles(Tensor weight, Tensor coordinates, Tensor position, int[] block_shape) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define("with_zero_grad(Tensor x, Tensor[] unused) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(
    f"sparse_linear(Tensor x, Tensor tiles, Tensor? bias, int out_channels, {_TABLES}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


# ---- gradient of the tiles -------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightGradArguments(Convolution):
    grad: Operand
    x: Operand
    tile_index: Operand
    block_shape: Sequence[int]
    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: Operand | None = None


def _weight_grad_reference(args: WeightGradArguments) -> Tensor:
    if not args.kernel_size:
        dense = args.grad.flatten(0, -2).t() @ args.x.flatten(0, -2)
    else:
        shape = (args.grad.shape[1], args.x.shape[1], *args.kernel_size)
        zeros = [0] * args.window.dims
        dense = torch.ops.aten.convolution_backward(
            args.grad,
            args.window.pad(args.x),
            args.grad.new_zeros(shape),
            None,
            args.stride,
            zeros,
            args.dilation,
            False,
            zeros,
            1,
            [False, True, False],
        )[1]
    return _tiles_at(dense, args.tile_index, args.block_shape)


def _tiles_at(weight: Tensor, tile_index: Tensor, block_shape: Sequence[int]) -> Tensor:
    """The tiles `[n, bh, bw]` of a weight `[O, C, *kernel]`, whose channels the block divides."""
    (bh, bw), (out_channels, in_channels) = block_shape, weight.shape[:2]
    first, tap, row = tile_index.long()
    tiles = weight.reshape(out_channels // bh, bh, in_channels // bw, bw, -1)
    return tiles[row, :, first // bw, :, tap].contiguous()


def _weight_grad_fake(args: WeightGradArguments) -> Tensor:
    out: Tensor = args.grad.new_empty(args.tile_index.shape[1], *args.block_shape)
    return out


define("weight_grad", WeightGradArguments, _weight_grad_reference, _weight_grad_fake)


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
        filled = _filled(_filled(weight.reshape(*weight.shape[:2], -1), 0, bh), 1, bw)
        tiles = filled.unflatten(1, (-1, bw)).unflatten(0, (-1, bh))
        return tiles.permute(0, 4, 2, 1, 3)[row, tap, column]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (position,) = ctx.saved_tensors  # [out-blocks, taps, in-blocks]; -1 where no tile is kept
        tiles = torch.where((position >= 0)[..., None, None], grad[position.clamp(min=0)], 0)
        out_channels, in_channels, *kernel = ctx.shape
        weight = tiles.permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1)[:out_channels, :, :in_channels]
        weight = weight.unflatten(1, kernel or [1]).movedim(-1, 1).reshape(ctx.shape)
        return weight if ctx.last else weight.contiguous(), None, None, None


LIBRARY.impl("kept_tiles", lambda *args: _KeptTiles.apply(*args), "CompositeImplicitAutograd")


class _WithZeroGrad(torch.autograd.Function):
    """`x` as it is. The other tensors get zeros as gradients: they do not matter, and are waited for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *unused: Tensor) -> Tensor:  # type: ignore[override]
        ctx.like = [(t.shape, t.dtype, t.device) for t in unused]
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad, *(grad.new_zeros(s, dtype=d, device=v) for s, d, v in ctx.like)


LIBRARY.impl("with_zero_grad", lambda x, unused: _WithZeroGrad.apply(x, *unused), "CompositeImplicitAutograd")


# ---- layers ----------------------------------------------------------------------------------------


def _filled(t: Tensor, dim: int, multiple: int) -> Tensor:
    """`t` with zeros behind it along `dim`, up to whole blocks."""
    missing = -t.shape[dim] % multiple
    if not missing:
        return t
    behind = t.dim() - 1 - dim % t.dim()
    return torch.nn.functional.pad(t, [0, 0] * behind + [0, missing])


def _packed(tiles: Tensor, order: Tensor, kernel: str, *, transposed: bool = False) -> Tensor:
    """Tiles as the kernel reads them: of the layer's weight, or of its transpose."""
    input_major = layout_of(kernel) == INPUT_MAJOR
    if order.shape[0] and input_major:
        tiles = tiles.index_select(0, order)
    elif order.shape[0]:
        tiles = torch.where((order >= 0)[:, None, None], tiles[order.clamp(min=0)], 0)
    return tiles if input_major == transposed else tiles.transpose(1, 2).contiguous()


class _SparseConv(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, tiles: Tensor, bias: Tensor | None, *rest: Any
    ) -> Tensor:
        out_channels, *geometry, last, tile_index, groups, tables, kernel, kernels = rest
        ctx.geometry, ctx.last, ctx.kernels, ctx.in_channels = geometry, last, kernels, x.shape[1]
        x = _filled(x, 1, tiles.shape[2])
        order, row_ptr, packed_index, *tables = tables
        ctx.save_for_backward(x, tiles, tile_index, groups, *tables)
        packed = _packed(tiles, order, kernel)
        return torch.ops.blocksparse.conv(
            x, packed, row_ptr, packed_index, bias, out_channels, *geometry, last, kernel
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, tiles, tile_index, groups, *tables = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[2]:
            db = grad.sum([0, *range(2, grad.dim())])
        grad = _filled(grad, 1, tiles.shape[1])
        if ctx.needs_input_grad[0]:
            dx = _input_grad(grad, x, tiles, tables, ctx)
        if ctx.needs_input_grad[1]:
            shape = list(tiles.shape[1:])
            dw = torch.ops.blocksparse.weight_grad(grad, x, tile_index, shape, *ctx.geometry, groups)
        return dx, dw, db, *[None] * 11


def _input_grad(grad: Tensor, x: Tensor, tiles: Tensor, tables: list[Tensor], ctx: Any) -> Tensor:
    kernel_size, stride, padding, dilation = ctx.geometry
    dims = range(len(stride))
    surplus = [
        most_surplus(*each)
        for each in zip(kernel_size, stride, padding[::2], padding[1::2], dilation, strict=True)
    ]
    counts = [grad.shape[2 + d] + surplus[d] for d in dims]
    parts, used = [], 0
    for phase, kernel in zip(phases(*ctx.geometry), ctx.kernels, strict=True):
        if not kernel:
            parts.append(grad.new_zeros(grad.shape[0], ctx.in_channels, *counts))
            continue
        order, row_ptr, tile_index = tables[used : used + 3]
        used += 3
        # Pixel i reads dy[i + shift] and on; negative padding cuts.
        after = [surplus[d] + phase.shift[d] + phase.dilation[d] * (phase.kernel_size[d] - 1) for d in dims]
        pads = [p for d in dims for p in (-phase.shift[d], after[d])]
        packed = _packed(tiles, order, kernel, transposed=True)
        geometry = (list(phase.kernel_size), [1] * len(stride), pads, list(phase.dilation))
        operands = (packed, row_ptr, tile_index, None, ctx.in_channels)
        parts.append(torch.ops.blocksparse.conv(grad, *operands, *geometry, ctx.last, kernel))
    if len(parts) == 1:
        return parts[0]
    return _interleave(parts, stride, x.shape[2:]).contiguous(
        memory_format=memory_format_of(len(stride), ctx.last)
    )


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
        out_channels, tile_index, groups, tables, kernel, kernels = rest
        ctx.kernels, ctx.in_channels = kernels, x.shape[-1]
        x = _filled(x, -1, tiles.shape[2])
        order, row_ptr, packed_index, *tables = tables
        ctx.save_for_backward(x, tiles, tile_index, groups, *tables)
        packed = _packed(tiles, order, kernel)
        return torch.ops.blocksparse.linear(x, packed, row_ptr, packed_index, bias, out_channels, kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, tiles, tile_index, groups, *tables = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[2]:
            db = grad.flatten(0, -2).sum(0)
        grad = _filled(grad, -1, tiles.shape[1])
        if ctx.needs_input_grad[0] and not tables:
            dx = x.new_zeros(*x.shape[:-1], ctx.in_channels)
        elif ctx.needs_input_grad[0]:
            order, *indices = tables
            packed = _packed(tiles, order, ctx.kernels[0], transposed=True)
            operands = (packed, *indices, None, ctx.in_channels, ctx.kernels[0])
            dx = torch.ops.blocksparse.linear(grad, *operands)
        if ctx.needs_input_grad[1]:
            shape = list(tiles.shape[1:])
            dw = torch.ops.blocksparse.weight_grad(grad, x, tile_index, shape, [], [], [], [], groups)
        return dx, dw, db, *[None] * 6


LIBRARY.impl("sparse_conv", lambda *args: _SparseConv.apply(*args), "CompositeImplicitAutograd")
LIBRARY.impl("sparse_linear", lambda *args: _SparseLinear.apply(*args), "CompositeImplicitAutograd")
