"""Other shapes of Inductor's tensors, for kernels of any device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .inductor_api import ir, lowerings


def reshape(x: Any, sizes: Sequence[Any]) -> Any:
    return lowerings[torch.ops.aten.reshape.default](x, list(sizes))


def kernel_inputs(operands: Iterable[Any]) -> list[Any]:
    """The buffers that a template reads: in memory, under a name, in the layout that they have now."""
    nodes = [ir.InputsKernel.unwrap_storage_for_input(ir.ExternKernel.realize_input(t)) for t in operands]
    for node in nodes:
        node.freeze_layout()
    return nodes


def without_offset(bias: Any) -> Any:
    """Contiguous, and a storage of its own if it is a view: kernels get the storage."""
    bias = ir.ExternKernel.require_contiguous(bias)
    return ir.ExternKernel.copy_input(bias) if bias.get_layout().offset != 0 else bias


def conv1d_as_conv2d(
    conv2d: Callable[..., Any],
    x: Any,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Any:
    """A 1-D convolution as a 2-D one, on images of one row.

    Args:
        conv2d: takes `[N, C, 1, L]` and a geometry of two dimensions.
    """
    n, channels, length = x.get_size()
    geometry = ([1, *kernel_size], [1, *stride], [0, 0, *padding], [1, *dilation])
    out = conv2d(reshape(x, [n, channels, 1, length]), *geometry)
    _, out_channels, _, out_length = out.get_size()
    return reshape(out, [n, out_channels, out_length])
