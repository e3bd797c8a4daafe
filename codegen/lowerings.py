"""Inductor lowerings of `blocksparse::conv` and `blocksparse::linear`.

What the kernels do not cover (a device, a dtype, a geometry) falls back to the operator itself.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch

from .. import ops as _ops  # noqa: F401  registers the operators
from ..variants import VARIANTS, KernelConfig, RegisterTile, register_tile
from .cpu_template import BlockSparseTemplate, ConvGeometry, flat_tiling, row_tiling
from .inductor_api import (
    fallback_handler,
    ir,
    lowerings,
    parallel_num_threads,
    pick_vec_isa,
    register_lowering,
)

log = logging.getLogger(__name__)


class Unsupported(Exception):
    """Why a layer runs as the opaque operator."""


@functools.cache
def register() -> None:
    """Registers the lowerings with Inductor, once."""
    conv, linear = torch.ops.blocksparse.conv.default, torch.ops.blocksparse.linear.default
    for op, lower in ((conv, lower_conv), (linear, lower_linear)):
        register_lowering(op, type_promotion_kind=None)(_or_fallback(op, lower))


def _or_fallback(op: Any, lower: Callable[..., Any]) -> Callable[..., Any]:
    fallback = fallback_handler(op, add_to_fallback_set=False)

    @functools.wraps(lower)
    def lowering(*args: Any) -> Any:
        try:
            return lower(*args)
        except Unsupported as reason:
            log.warning("%s runs without a generated kernel: %s", op, reason)
            return fallback(*args)

    return lowering


def lower_linear(
    x: Any, values: Any, row_ptr: Any, channel_offset: Any, bias: Any, out_channels: int, kernel: str
) -> Any:
    config, tile = _config(x, values, kernel)
    *rows, channels = x.get_size()
    pixels = sympy.prod(rows)
    tiling = flat_tiling(pixels, tile.pixels)
    if tiling is None:
        raise Unsupported(f"{pixels} rows may be fewer than a register tile")
    x = ir.ExternKernel.require_contiguous(lowerings[torch.ops.aten.reshape.default](x, [pixels, channels]))
    out = _call(x, values, row_ptr, channel_offset, bias, [pixels, out_channels], config, tile, tiling, None)
    return lowerings[torch.ops.aten.reshape.default](out, [*rows, out_channels])


def lower_conv(
    x: Any,
    values: Any,
    row_ptr: Any,
    channel_offset: Any,
    bias: Any,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    kernel: str,
) -> Any:
    config, tile = _config(x, values, kernel)
    if len(kernel_size) != 2:
        raise Unsupported(f"{len(kernel_size)} spatial dimensions")
    x = ir.ExternKernel.require_channels_last(x)
    x.realize()
    n, _, *size = x.get_size()
    size = _static(size, "image size")
    stride_n, stride_c, *spatial_strides = _static(x.get_stride(), "stride")
    if stride_c != 1 and x.get_size()[1] != 1:
        raise Unsupported("input channels are not contiguous")
    before, after = padding[::2], padding[1::2]
    out_size = [
        (s + b + a - d * (k - 1) - 1) // st + 1
        for s, b, a, k, st, d in zip(size, before, after, kernel_size, stride, dilation, strict=True)
    ]
    conv = ConvGeometry(
        tuple(size),
        tuple(out_size),
        (stride_n, *spatial_strides),
        tuple(kernel_size),
        tuple(stride),
        tuple(before),
        tuple(dilation),
    )
    flat = _is_flat(conv, n)
    if flat:
        tiling = flat_tiling(n * out_size[0] * out_size[1], tile.pixels)
        if tiling is None:
            raise Unsupported("the image may be smaller than a register tile")
    else:
        tiling = row_tiling(n, conv.output_size, tile.pixels)
        if max(conv.overhang) > 1:
            raise Unsupported("a tap leaves the image by more than one pixel")
    shape = [n, *out_size, out_channels]
    out = _call(x, values, row_ptr, channel_offset, bias, shape, config, tile, tiling, None if flat else conv)
    return lowerings[torch.ops.aten.permute.default](out, [0, 3, 1, 2])


def _is_flat(conv: ConvGeometry, images: Any) -> bool:
    """Whether output pixel p reads input pixel p alone, all pixels evenly spaced in memory."""
    (h, w), (image, row, pixel) = conv.input_size, conv.input_strides
    dense = (row == w * pixel or h == 1) and (image == h * w * pixel or images == 1)
    plain = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.output_size == conv.input_size
    return plain and conv.pad_begin == (0, 0) and dense


def _config(x: Any, values: Any, kernel: str) -> tuple[KernelConfig, RegisterTile]:
    config = KernelConfig.decode(kernel)
    if config.variant not in VARIANTS:
        raise Unsupported(f"no kernel variant {config.variant!r}")
    if x.get_device().type != "cpu" or x.get_dtype() != torch.float32:
        raise Unsupported(f"no kernel for {x.get_dtype()} on {x.get_device()}")
    isa = pick_vec_isa()
    lanes = isa.nelements() if isa else 4
    tile = register_tile(int(values.get_size()[2]), lanes, 32 if lanes == 16 else 16)
    if tile is None:
        raise Unsupported(f"block height {values.get_size()[2]}")
    return config, tile


def _call(
    x: Any,
    values: Any,
    row_ptr: Any,
    channel_offset: Any,
    bias: Any,
    shape: list[Any],
    config: KernelConfig,
    tile: RegisterTile,
    tiling: Any,
    conv: ConvGeometry | None,
) -> Any:
    operands = [t for t in (x, values, row_ptr, channel_offset, bias) if t is not None]
    nodes = [ir.InputsKernel.unwrap_storage_for_input(ir.ExternKernel.realize_input(t)) for t in operands]
    for node in nodes:
        node.freeze_layout()
    step = (
        conv.input_strides[2]
        if conv
        else _static([nodes[0].get_stride()[0 if len(shape) == 2 else 3]], "")[0]
    )
    layout = ir.FixedLayout(x.get_device(), x.get_dtype(), shape)
    _, bw, bh = _static(values.get_size(), "block")
    template = BlockSparseTemplate(
        nodes,
        layout,
        parallel_num_threads(),
        tile,
        tiling,
        dict(config.parameters),
        (bh, bw),
        step,
        conv,
    )
    return template.generate().output_node()


def _static(sizes: Sequence[Any], what: str) -> list[int]:
    if any(not isinstance(s, int) and not getattr(s, "is_Integer", False) for s in sizes):
        raise Unsupported(f"symbolic {what} {list(sizes)}")
    return [int(s) for s in sizes]
