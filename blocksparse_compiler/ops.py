"""The operators that a compiled graph contains: `blocksparse::conv`, `blocksparse::linear`, and, for what
stands between sparse layers of mobile networks, `blocksparse::depthwise`.

The first two take weights as the kernel that they name packs them (`KernelVariant.pack`): one group, kept
tiles only. The implementations here are the plain torch reference (scatter to dense, dense kernel); Inductor
replaces them by generated kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from .packing import INPUT_MAJOR, unpack_weight
from .variants import VARIANTS
from .window import Window

LIBRARY = torch.library.Library("blocksparse", "DEF")

OPERATORS: dict[str, type[Any]] = {}
"""The arguments of each operator that has lowerings, by its name."""

Operand = Any
"""A tensor, or what stands for one in a lowering."""

_SCHEMA_TYPES = {"Operand": "Tensor", "Operand | None": "Tensor?", "Sequence[int]": "int[]"}

Arguments = TypeVar("Arguments")


def define(
    name: str,
    arguments: type[Arguments],
    reference: Callable[[Arguments], Tensor],
    fake: Callable[[Arguments], Tensor],
) -> None:
    """Adds an operator to the library. Its arguments are the fields of a dataclass, in their order."""
    parameters = [
        f"{_SCHEMA_TYPES.get(str(field.type), field.type)} {field.name}"
        + ("" if field.default is MISSING else f"={field.default}")
        for field in fields(arguments)  # type: ignore[arg-type]
    ]
    LIBRARY.define(f"{name}({', '.join(parameters)}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, lambda *args: reference(arguments(*args)), "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"blocksparse::{name}", lambda *args, **options: fake(arguments(*args, **options)), lib=LIBRARY
    )
    OPERATORS[name] = arguments


# ---- arguments --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearArguments:
    x: Operand
    values: Operand
    row_ptr: Operand
    tile_index: Operand
    bias: Operand | None
    out_channels: int
    kernel: str


class Convolution:
    """Arguments of a convolution."""

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    @property
    def window(self) -> Window:
        return Window(self.kernel_size, self.stride, self.padding, self.dilation)


@dataclass(frozen=True)
class ConvArguments(Convolution):
    x: Operand
    values: Operand
    row_ptr: Operand
    tile_index: Operand
    bias: Operand | None
    out_channels: int
    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    channels_last: bool
    kernel: str


@dataclass(frozen=True)
class DepthwiseArguments(Convolution):
    x: Operand
    weight: Operand
    bias: Operand | None
    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    channels_last: bool
    kernel: str


# ---- reference implementations ----------------------------------------------------------------------


def layout_of(kernel: str) -> str:
    """How the kernel's weights are stored."""
    variant = VARIANTS.get(kernel.partition(";")[0])
    return variant.weight_layout if variant is not None else INPUT_MAJOR


def dense_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    channels_last: bool,
    groups: int = 1,
    fill: float = 0,
) -> Tensor:
    """Torch's convolution; the padding holds `fill`."""
    before = [lo for lo, _ in window.borders]
    if fill or any(lo != hi or lo < 0 for lo, hi in window.borders):
        x, before = window.pad(x, fill), [0] * window.dims
    conv = (torch.conv1d, torch.conv2d, torch.conv3d)[window.dims - 1]
    out = conv(x, weight, bias, list(window.stride), before, list(window.dilation), groups)
    return out.contiguous(memory_format=memory_format_of(window.dims, channels_last))


def conv_output(
    x: Tensor, dtype: torch.dtype, out_channels: int, window: Window, channels_last: bool
) -> Tensor:
    """An empty tensor for the result of `dense_conv`."""
    shape = (x.shape[0], out_channels, *window.output_size(x.shape[2:]))
    memory_format = memory_format_of(window.dims, channels_last)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format)


def memory_format_of(spatial_dims: int, channels_last: bool) -> torch.memory_format:
    if not channels_last or spatial_dims == 1:
        return torch.contiguous_format
    return torch.channels_last if spatial_dims == 2 else torch.channels_last_3d


def _conv_reference(args: ConvArguments) -> Tensor:
    tables = (
        args.values,
        args.row_ptr,
        args.tile_index,
        args.out_channels,
        args.x.shape[1],
        args.kernel_size,
    )
    weight = unpack_weight(*tables, layout_of(args.kernel))
    return dense_conv(args.x, weight, args.bias, args.window, args.channels_last)


def _conv_fake(args: ConvArguments) -> Tensor:
    return conv_output(args.x, args.x.dtype, args.out_channels, args.window, args.channels_last)


def _depthwise_reference(args: DepthwiseArguments) -> Tensor:
    channels = args.x.shape[1]
    filters = args.weight.t().reshape(channels, 1, *args.kernel_size)
    return dense_conv(args.x, filters, args.bias, args.window, args.channels_last, groups=channels)


def _depthwise_fake(args: DepthwiseArguments) -> Tensor:
    return conv_output(args.x, args.x.dtype, args.x.shape[1], args.window, args.channels_last)


def _linear_reference(args: LinearArguments) -> Tensor:
    tables = (args.values, args.row_ptr, args.tile_index, args.out_channels, args.x.shape[-1], ())
    weight = unpack_weight(*tables, layout_of(args.kernel))
    return torch.nn.functional.linear(args.x, weight, args.bias).contiguous()


def _linear_fake(args: LinearArguments) -> Tensor:
    out: Tensor = args.x.new_empty(*args.x.shape[:-1], args.out_channels)
    return out


define("conv", ConvArguments, _conv_reference, _conv_fake)
define("depthwise", DepthwiseArguments, _depthwise_reference, _depthwise_fake)
define("linear", LinearArguments, _linear_reference, _linear_fake)
