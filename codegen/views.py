"""Other shapes of Inductor's tensors, for kernels of any device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..window import Window
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


def images_of_one_row(x: Any) -> Any:
    """`[N, C, L]` as `[N, C, 1, L]`."""
    n, channels, length = x.get_size()
    return reshape(x, [n, channels, 1, length])


def conv1d_as_conv2d(conv2d: Callable[[Any, Window], Any], x: Any, window: Window) -> Any:
    out = conv2d(images_of_one_row(x), window.of_one_row())
    n, channels, _, length = out.get_size()
    return reshape(out, [n, channels, length])
