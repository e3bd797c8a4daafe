"""Block-sparse layers on quantized inputs: `blocksparse::quantized_conv` and `quantized_linear`.

    out = bias + scale * (sum of x * w - zero_point * sum of w)

x is uint8 or int8 and stands for `s * (x - zero_point)`; weights are int8, packed as the kernel that is named
reads them; `scale` is s times the weights' own, one per output channel. Sums are exact integers, the result
is fp32. Pixels beyond the image are real zeros: they read as the zero point.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .ops import LIBRARY, conv_output, dense_conv, layout_of
from .packing import unpack_weight

_WEIGHT = (
    "Tensor x, Tensor values, Tensor row_ptr, Tensor tile_index, Tensor? bias, Tensor scale, "
    "Tensor weight_sums, int zero_point, int out_channels"
)
_GEOMETRY = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool channels_last"

LIBRARY.define(
    f"quantized_conv({_WEIGHT}, {_GEOMETRY}, str kernel) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
LIBRARY.define(f"quantized_linear({_WEIGHT}, str kernel) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def weight_sums(weight: Tensor) -> Tensor:
    """int32 `[O]`: the sum of the weights `[O, …]` of each output channel."""
    return weight.flatten(1).sum(1, dtype=torch.int32)


def _conv_reference(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    tile_index: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    weight_sums: Tensor,
    zero_point: int,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    kernel: str,
) -> Tensor:
    tables = (values, row_ptr, tile_index, out_channels, x.shape[1], kernel_size)
    weight = unpack_weight(*tables, layout_of(kernel)).double()
    # In double: exact up to 2**53, and int32 sums are what the kernels allow.
    offset = -zero_point * weight_sums.double()
    sums = dense_conv(x.double(), weight, offset, stride, padding, dilation, channels_last, fill=zero_point)
    shape = (-1, *[1] * len(kernel_size))
    out = sums * scale.double().view(shape)
    return (out if bias is None else out + bias.double().view(shape)).float()


def _conv_fake(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    tile_index: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    weight_sums: Tensor,
    zero_point: int,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    kernel: str,
) -> Tensor:
    geometry = (kernel_size, stride, padding, dilation, channels_last)
    return conv_output(x, torch.float32, out_channels, *geometry)


def _linear_reference(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    tile_index: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    weight_sums: Tensor,
    zero_point: int,
    out_channels: int,
    kernel: str,
) -> Tensor:
    tables = (values, row_ptr, tile_index, out_channels, x.shape[-1], ())
    weight = unpack_weight(*tables, layout_of(kernel)).double()
    sums = torch.nn.functional.linear(x.double(), weight, -zero_point * weight_sums.double())
    out = sums * scale.double()
    return (out if bias is None else out + bias.double()).float().contiguous()


def _linear_fake(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    tile_index: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    weight_sums: Tensor,
    zero_point: int,
    out_channels: int,
    kernel: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_channels, dtype=torch.float32)


LIBRARY.impl("quantized_conv", _conv_reference, "CompositeExplicitAutograd")
LIBRARY.impl("quantized_linear", _linear_reference, "CompositeExplicitAutograd")
torch.library.register_fake("blocksparse::quantized_conv", _conv_fake, lib=LIBRARY)
torch.library.register_fake("blocksparse::quantized_linear", _linear_fake, lib=LIBRARY)
