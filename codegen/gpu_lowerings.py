"""`blocksparse::conv` and `blocksparse::linear` as Triton kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch

from ..ops import ConvArguments, LinearArguments
from ..packing import STEP_CHANNELS
from ..variants import VARIANTS, KernelConfig
from ..window import Window
from .gpu_boxes import box_sides, pixels_through_pointers
from .gpu_template import Axis, KernelText, size_of, stride_of, template
from .inductor_api import V, ir, lowerings, ops
from .lowering_errors import Unsupported
from .tiling import is_static
from .views import conv1d_as_conv2d, reshape

_AXES = {1: ("w",), 2: ("h", "w"), 3: ("d", "h", "w")}


def lower_linear(args: LinearArguments) -> Any:
    weight, x = _Weight(args), args.x
    *rows, channels = x.get_size()
    if not is_static(channels):
        raise Unsupported("symbolic channels")
    x = reshape(x, [math.prod(rows), channels])
    x = ir.ExternKernel.require_contiguous(x)
    out = weight.multiply(x, (), [math.prod(rows), args.out_channels], flat=True)
    return reshape(out, [*rows, args.out_channels])


def lower_conv(args: ConvArguments) -> Any:
    conv = functools.partial(_lower_conv, _Weight(args))
    return conv1d_as_conv2d(conv, args.x, args.window) if args.window.dims == 1 else conv(args.x, args.window)


def _lower_conv(weight: _Weight, x: Any, window: Window) -> Any:
    dims = window.dims
    # Realized before its strides are asked for: a residual sum would else be copied for this layer, and
    # computed again, from all that went into it, for the next one.
    x.realize()
    order = ir.NHWC_STRIDE_ORDER if dims == 2 else ir.NHWDC_STRIDE_ORDER
    x = ir.ExternKernel.require_stride_order(x, order)
    n, channels, *size = x.get_size()
    if not is_static(channels) or x.get_stride()[1] != 1:
        raise Unsupported(f"input of size {x.get_size()}, strides {x.get_stride()}")
    out_size = window.output_size(size)
    outputs = [size_of(None, 1 + i) for i in range(dims)]
    axes, masked = layer_axes(size, out_size, outputs, window)
    flat = reads_pixel_by_pixel(x, window)
    out = weight.multiply(x, axes, [n, *out_size, weight.out_channels], flat=flat, masked=masked)
    return lowerings[torch.ops.aten.permute.default](out, [0, dims + 1, *range(1, dims + 1)])


def layer_axes(
    size: Sequence[Any], out_size: Sequence[Any], outputs: Sequence[str], window: Window
) -> tuple[tuple[Axis, ...], bool]:
    """The spatial dimensions of a layer, whose output sizes a kernel calls `outputs`; and whether some tap of
    some pixel falls outside the image."""
    axes, masked = [], False
    for i, (name, (before, after)) in enumerate(zip(_AXES[window.dims], window.borders, strict=True)):
        kernel_size, stride, dilation = window.kernel_size[i], window.stride[i], window.dilation[i]
        last = (out_size[i] - 1) * stride - before + dilation * (kernel_size - 1)
        # By its size, no output reaches past the padding.
        masked |= before > 0 or (after > 0 and not V.graph.sizevars.statically_known_lt(last, size[i]))
        steps = kernel_size, stride, before, dilation
        axes.append(Axis(name, size_of("X", 2 + i), outputs[i], stride_of("X", 2 + i), *steps))
    return tuple(axes), masked


def reads_pixel_by_pixel(x: Any, window: Window) -> bool:
    """Whether output pixel p reads input pixel p alone, and these lie evenly spaced in memory."""
    return all(n == 1 for n in (*window.kernel_size, *window.stride)) and (
        not any(window.padding) and evenly_spaced(x)
    )


def evenly_spaced(x: Any) -> bool:
    """Whether the pixels of all images lie at one distance from each other."""
    n, _, *size = x.get_size()
    strides = [x.get_stride()[0], *x.get_stride()[2:]]
    expected = strides[-1]
    for length, stride in zip(reversed([n, *size]), reversed(strides), strict=True):
        if not V.graph.sizevars.statically_known_equals(stride, expected):
            return False
        expected = expected * length
    return True


class _Weight:
    """A packed weight with its bias, and the kernel to run it."""

    def __init__(self, args: ConvArguments | LinearArguments) -> None:
        values = ir.ExternKernel.require_contiguous(args.values)  # tiles may be computed
        self.operands = [values, args.row_ptr, args.tile_index]
        self.bias = None if args.bias is None else ir.ExternKernel.require_contiguous(args.bias)
        self.out_channels = args.out_channels
        self.num_tiles, self.bh, self.bw = (int(size) for size in args.values.get_size())
        self.config = KernelConfig.decode(args.kernel)
        variant = VARIANTS.get(self.config.variant)
        if variant is None or variant.device != "cuda":
            raise Unsupported(f"{self.config.variant!r} is no GPU kernel")

    def multiply(
        self, x: Any, axes: tuple[Axis, ...], shape: list[Any], *, flat: bool, masked: bool = False
    ) -> Any:
        """The output node of the kernel, contiguous `shape`."""
        if x.get_dtype() != self.operands[0].get_dtype():
            raise Unsupported(f"{x.get_dtype()} input with {self.operands[0].get_dtype()} weights")
        if self.num_tiles == 0:
            return self._bias_alone(x, shape)
        parameters = self.config.parameters
        inputs = [ir.ExternKernel.realize_input(t) for t in (x, *self.operands)]
        variant, constants, split = self.config.variant, {}, 1
        boxes, pixels = None, int(parameters["pixels"])
        if variant == "triton_box" or parameters.get("box", 0):
            boxes = box_sides(inputs[0], axes, parameters, flat=flat)
            constants = boxes or {}
            if boxes is None:
                pixels = min(pixels, pixels_through_pointers(parameters, self.bh))
                variant = "triton_gather" if variant == "triton_box" else variant
        if variant == "triton_decode":
            if axes or not is_static(shape[0]) or shape[0] > parameters["pixels"]:
                raise Unsupported(f"output of shape {shape}: for at most {parameters['pixels']} rows")
            split = int(parameters.get("split", 1))
            constants = {"SPLIT": split}
        l1 = bool(parameters.get("l1", 0))
        text = KernelText(
            variant=variant,
            axes=axes,
            flat=flat,
            masked=masked,
            bias=self.bias is not None and split == 1,
            split=split,
            precision=str(parameters.get("precision", "")),
            swapped=variant == "triton_gather" and bool(parameters.get("swapped", 0)),
            boxed=boxes is not None,
            l1=l1,
        )
        step = int(parameters.get("step", 1))
        if step * self.bw > max(self.bw, STEP_CHANNELS):
            raise Unsupported(f"{step} tiles of {self.bw} channels at a time")
        if self.bias is not None and text.bias:
            inputs.append(ir.ExternKernel.realize_input(self.bias))
        choices: list[Any] = []
        error = template(text).maybe_append_choice(
            choices,
            input_nodes=tuple(inputs),
            layout=ir.FixedLayout(x.get_device(), x.get_dtype(), shape)
            if split == 1
            else ir.FixedLayout(x.get_device(), torch.float32, [split, *shape]),
            num_stages=int(parameters["stages"]),
            num_warps=int(parameters["warps"]),
            PIXELS=pixels,
            BH=self.bh,
            BW=self.bw,
            STEP=step,
            ROWS=int(self.operands[1].get_size()[0]),
            TILES=self.num_tiles,
            ALIGN=math.gcd(_aligned(x, l1), self.bw, int(x.get_size()[1 if axes else -1])),
            **constants,
        )
        if error is not None:
            raise Unsupported(str(error))
        out = choices[0].output_node()
        return out if split == 1 else self._sum_up(out, x.get_dtype())

    def _sum_up(self, parts: Any, dtype: torch.dtype) -> Any:
        """The sum of `parts` `[split, rows, O]`, and the bias; pointwise, so that it fuses."""
        split, *shape = parts.get_size()
        load = parts.make_loader()
        load_bias = None if self.bias is None else self.bias.make_loader()

        def inner(index: Sequence[Any]) -> Any:
            terms = [load([sympy.Integer(part), *index]) for part in range(int(split))]
            if load_bias is not None:
                terms.append(ops.to_dtype(load_bias([index[-1]]), torch.float32))
            while len(terms) > 1:
                pairs = [ops.add(*terms[i : i + 2]) for i in range(0, len(terms) - 1, 2)]
                terms = pairs + terms[len(terms) // 2 * 2 :]
            return ops.to_dtype(terms[0], dtype)

        return ir.Pointwise.create(device=parts.get_device(), dtype=dtype, inner_fn=inner, ranges=shape)

    def _bias_alone(self, x: Any, shape: list[Any]) -> Any:
        """What a weight without any kept tile gives."""
        if self.bias is None:
            return lowerings[torch.ops.aten.full.default](
                shape, 0, dtype=x.get_dtype(), device=x.get_device()
            )
        load, dtype = self.bias.make_loader(), x.get_dtype()
        return ir.Pointwise.create(
            device=x.get_device(),
            dtype=dtype,
            inner_fn=lambda index: ops.to_dtype(load([index[-1]]), dtype),
            ranges=shape,
        )


def _aligned(x: Any, l1: bool) -> int:
    """Most channels to load at once. Triton 3.6 has copies of 16 bytes bypass L1, whatever it is told."""
    import triton

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    return 8 // x.get_dtype().itemsize if l1 and version < (3, 9) else 8
