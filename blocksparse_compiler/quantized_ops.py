"""Block-sparse layers on quantized inputs: `blocksparse::quantized_conv` and `quantized_linear`.

    out = bias + scale * (sum of x * w - zero_point * sum of w)

x is uint8 or int8 and stands for `s * (x - zero_point)`; weights are int8, packed as the kernel that is named
reads them; `scale` is s times the weights' own, one per output channel. Sums are exact integers, the result
is fp32. Pixels beyond the image are real zeros: they read as the zero point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .ops import Convolution, Operand, conv_output, define, dense_conv, layout_of
from .packing import unpack_weight


@dataclass(frozen=True)
class QuantizedLinearArguments:
    x: Operand
    values: Operand
    row_ptr: Operand
    tile_index: Operand
    bias: Operand | None
    scale: Operand
    weight_sums: Operand
    zero_point: int
    out_channels: int
    kernel: str


@dataclass(frozen=True)
class QuantizedConvArguments(Convolution):
    x: Operand
    values: Operand
    row_ptr: Operand
    tile_index: Operand
    bias: Operand | None
    scale: Operand
    weight_sums: Operand
    zero_point: int
    out_channels: int
    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    channels_last: bool
    kernel: str


def weight_sums(weight: Tensor) -> Tensor:
    """int32 `[O]`: the sum of the weights `[O, …]` of each output channel."""
    return weight.flatten(1).sum(1, dtype=torch.int32)


def _conv_reference(args: QuantizedConvArguments) -> Tensor:
    tables = (
        args.values,
        args.row_ptr,
        args.tile_index,
        args.out_channels,
        args.x.shape[1],
        args.kernel_size,
    )
    weight = unpack_weight(*tables, layout_of(args.kernel)).double()
    # In double: exact up to 2**53, and int32 sums are what the kernels allow.
    offset = -args.zero_point * args.weight_sums.double()
    sums = dense_conv(args.x.double(), weight, offset, args.window, args.channels_last, fill=args.zero_point)
    shape = (-1, *[1] * args.window.dims)
    out = sums * args.scale.double().view(shape)
    return (out if args.bias is None else out + args.bias.double().view(shape)).float()


def _conv_fake(args: QuantizedConvArguments) -> Tensor:
    return conv_output(args.x, torch.float32, args.out_channels, args.window, args.channels_last)


def _linear_reference(args: QuantizedLinearArguments) -> Tensor:
    tables = (args.values, args.row_ptr, args.tile_index, args.out_channels, args.x.shape[-1], ())
    weight = unpack_weight(*tables, layout_of(args.kernel)).double()
    sums = torch.nn.functional.linear(args.x.double(), weight, -args.zero_point * args.weight_sums.double())
    out = sums * args.scale.double()
    return (out if args.bias is None else out + args.bias.double()).float().contiguous()


def _linear_fake(args: QuantizedLinearArguments) -> Tensor:
    out: Tensor = args.x.new_empty(*args.x.shape[:-1], args.out_channels, dtype=torch.float32)
    return out


define("quantized_conv", QuantizedConvArguments, _conv_reference, _conv_fake)
define("quantized_linear", QuantizedLinearArguments, _linear_reference, _linear_fake)
