"""The operators that a compiled graph contains: `blocksparse::conv`, `blocksparse::linear`, and, for what
stands between sparse layers of mobile networks, `blocksparse::depthwise`.

The first two take weights as the kernel that they name packs them (`KernelVariant.pack`): one group, kept
tiles only. The implementations here are the plain torch reference (scatter to dense, dense kernel); Inductor
replaces them by generated kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .packing import INPUT_MAJOR, unpack_weight
from .variants import VARIANTS

_CONV = (
    "conv(Tensor x, Tensor values, Tensor row_ptr, Tensor tile_index, Tensor? bias, "
    "int out_channels, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
    "bool channels_last, str kernel) -> Tensor"
)
_LINEAR = (
    "linear(Tensor x, Tensor values, Tensor row_ptr, Tensor tile_index, Tensor? bias, "
    "int out_channels, str kernel) -> Tensor"
)
_DEPTHWISE = (
    "depthwise(Tensor x, Tensor weight, Tensor? bias, int[] kernel_size, int[] stride, int[] padding, "
    "int[] dilation, bool channels_last, str kernel) -> Tensor"
)

LIBRARY = torch.library.Library("blocksparse", "DEF")
LIBRARY.define(_CONV, tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(_DEPTHWISE, tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(_LINEAR, tags=(torch.Tag.pt2_compliant_tag,))


# ---- reference implementations --------------------------------------------------------------------


def layout_of(kernel: str) -> str:
    """How the kernel's weights are stored."""
    variant = VARIANTS.get(kernel.partition(";")[0])
    return variant.weight_layout if variant is not None else INPUT_MAJOR


def _conv_reference(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    tile_index: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    kernel: str,
) -> Tensor:
    weight = unpack_weight(
        values, row_ptr, tile_index, out_channels, x.shape[1], kernel_size, layout_of(kernel)
    )
    return dense_conv(x, weight, bias, stride, padding, dilation, channels_last)


def dense_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    groups: int = 1,
    fill: float = 0,
) -> Tensor:
    """Torch's convolution; `padding` is `(before, after)` of each dimension in turn, and holds `fill`."""
    pairs = [padding[i : i + 2] for i in range(0, len(padding), 2)]
    before = [lo for lo, _ in pairs]
    if fill or any(lo != hi or lo < 0 for lo, hi in pairs):
        x = torch.nn.functional.pad(x, [p for pair in reversed(pairs) for p in pair], value=fill)
        before = [0] * len(pairs)
    conv = (torch.conv1d, torch.conv2d, torch.conv3d)[len(pairs) - 1]
    out = conv(x, weight, bias, list(stride), before, list(dilation), groups)
    return out.contiguous(memory_format=memory_format_of(len(pairs), channels_last))


def _conv_fake(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    tile_index: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    kernel: str,
) -> Tensor:
    return conv_output(x, x.dtype, out_channels, kernel_size, stride, padding, dilation, channels_last)


def conv_output(
    x: Tensor,
    dtype: torch.dtype,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
) -> Tensor:
    """An empty tensor for the result of `dense_conv`."""
    spatial = [
        (size + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1
        for i, size in enumerate(x.shape[2:])
    ]
    memory_format = memory_format_of(len(kernel_size), channels_last)
    shape = (x.shape[0], out_channels, *spatial)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format)


def _depthwise_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    kernel: str,
) -> Tensor:
    filters = weight.t().reshape(x.shape[1], 1, *kernel_size)
    return dense_conv(x, filters, bias, stride, padding, dilation, channels_last, groups=x.shape[1])


def _depthwise_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    kernel: str,
) -> Tensor:
    return conv_output(x, x.dtype, x.shape[1], kernel_size, stride, padding, dilation, channels_last)


def memory_format_of(spatial_dims: int, channels_last: bool) -> torch.memory_format:
    if not channels_last or spatial_dims == 1:
        return torch.contiguous_format
    return torch.channels_last if spatial_dims == 2 else torch.channels_last_3d


def _linear_reference(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    tile_index: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel: str,
) -> Tensor:
    weight = unpack_weight(values, row_ptr, tile_index, out_channels, x.shape[-1], (), layout_of(kernel))
    return torch.nn.functional.linear(x, weight, bias).contiguous()


def _linear_fake(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    tile_index: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_channels)


LIBRARY.impl("conv", _conv_reference, "CompositeExplicitAutograd")
LIBRARY.impl("depthwise", _depthwise_reference, "CompositeExplicitAutograd")
LIBRARY.impl("linear", _linear_reference, "CompositeExplicitAutograd")
torch.library.register_fake("blocksparse::conv", _conv_fake, lib=LIBRARY)
torch.library.register_fake("blocksparse::depthwise", _depthwise_fake, lib=LIBRARY)
torch.library.register_fake("blocksparse::linear", _linear_fake, lib=LIBRARY)
