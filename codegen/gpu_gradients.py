"""`blocksparse::weight_grad` as a Triton kernel."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..gpu_variants import tf32_allowed
from ..training_ops import WeightGradArguments
from ..training_tables import group_size
from .gpu_lowerings import evenly_spaced, layer_axes, reads_pixel_by_pixel
from .gpu_template import WEIGHT_GRAD, KernelText, size_of, template
from .inductor_api import V, ir, lowerings
from .lowering_errors import Unsupported
from .tiling import is_static
from .views import images_of_one_row, reshape

PIXELS = 64
"""Summed up by one matrix product."""
FEWEST_STEPS = 8
"""Products of a program: with fewer, the sum over its parts would cost as much as they do."""
MOST_PARTS = 64
PROGRAMS_PER_MULTIPROCESSOR = 4


def lower_weight_grad(args: WeightGradArguments) -> Any:
    grad, x, window = args.grad, args.x, args.window
    if args.groups is None:
        raise Unsupported("tiles in no groups")
    if window.dims == 1:
        grad, x, window = images_of_one_row(grad), images_of_one_row(x), window.of_one_row()
    dims = window.dims
    grad, x = (_channels_inside(t, dims) for t in (grad, x))
    if x.get_dtype() != grad.get_dtype() or x.get_dtype() not in _DTYPES:
        raise Unsupported(f"no kernel for gradients of {x.get_dtype()} by {grad.get_dtype()}")
    if not evenly_spaced(grad):
        grad = ir.ExternKernel.copy_input(grad)
    outputs = [size_of("GRAD", 2 + i) for i in range(dims)]
    (images, *_), size, out_size = grad.get_size(), x.get_size()[2:], grad.get_size()[2:]
    axes, masked = layer_axes(size, out_size, outputs, window) if dims else ((), False)
    bh, bw = args.block_shape
    tiles, number = int(args.tile_index.get_size()[1]), int(args.groups.get_size()[1])
    shape = [tiles, bh, bw]
    if not tiles:
        return lowerings[torch.ops.aten.full.default](shape, 0, dtype=x.get_dtype(), device=x.get_device())
    split = parts(math.prod([images, *out_size]), number, x.get_device())
    text = KernelText(
        variant=WEIGHT_GRAD,
        axes=axes,
        flat=not dims or reads_pixel_by_pixel(x, window),
        masked=masked,
        precision=_precision(x.get_dtype(), bool(dims)),
        split=split,
    )
    step = group_size(bw)
    channels = (int(t.get_size()[1]) for t in (grad, x))
    choices: list[Any] = []
    error = template(text).maybe_append_choice(
        choices,
        input_nodes=tuple(ir.ExternKernel.realize_input(t) for t in (grad, x, args.tile_index, args.groups)),
        layout=ir.FixedLayout(x.get_device(), x.get_dtype(), shape)
        if split == 1
        else ir.FixedLayout(x.get_device(), torch.float32, [split, *shape]),
        num_stages=3,
        num_warps=8 if bh * step * bw > 64 * 64 else 4,
        PIXELS=PIXELS,
        BH=bh,
        BW=bw,
        STEP=step,
        ROWS=number,
        TILES=tiles,
        SPLIT=split,
        ALIGN=math.gcd(8, bw, *channels),
    )
    if error is not None:
        raise Unsupported(str(error))
    out = choices[0].output_node()
    if split == 1:
        return out
    return lowerings[torch.ops.aten.sum.dim_IntList](out, [0], dtype=x.get_dtype())


_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def parts(pixels: Any, groups: int, device: torch.device) -> int:
    """Programs that share the pixels of a group, so that all multiprocessors have work."""
    programs = PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    fewest = PIXELS * FEWEST_STEPS
    enough = V.graph.sizevars.optimization_hint(pixels, fallback=fewest) // fewest
    return max(1, min(-(-programs // groups), enough, MOST_PARTS))


def _channels_inside(t: Any, dims: int) -> Any:
    """Channels-last; a linear layer's rows one below the other."""
    if not dims:
        *rows, channels = t.get_size()
        return ir.ExternKernel.require_contiguous(reshape(t, [math.prod(rows), channels]))
    t.realize()
    t = ir.ExternKernel.require_stride_order(t, ir.NHWC_STRIDE_ORDER if dims == 2 else ir.NHWDC_STRIDE_ORDER)
    if not is_static(t.get_size()[1]) or t.get_stride()[1] != 1:
        raise Unsupported(f"a tensor of size {t.get_size()}, strides {t.get_stride()}")
    return t


def _precision(dtype: torch.dtype, convolution: bool) -> str:
    if dtype != torch.float32:
        return ""
    return "tf32" if tf32_allowed(convolution) else "ieee"
