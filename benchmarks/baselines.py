"""The strongest dense implementations of a layer or a model that torch offers on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .timing import Call, fresh_code


@contextmanager
def frozen_inductor(cpp_wrapper: bool) -> Iterator[None]:
    """Inductor with constant folding and weight prepacking, set globally because Dynamo reads it too."""
    with torch._inductor.config.patch(freezing=True, cpp_wrapper=cpp_wrapper):
        yield


def compiled(function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    """`torch.compile` of a private copy of the function (see `fresh_code`)."""

    def call(*args: Any) -> Any:
        return function(*args)

    return torch.compile(fresh_code(call), dynamic=False, **kwargs)


def dense_convolutions(layer: nn.Conv2d, x: Tensor, relu: bool) -> dict[str, Call]:
    """Eager channels-last, the prepacked oneDNN operator, and frozen Inductor, as calls without arguments.

    `x` is `[N, C, H, W]` in channels-last; the layer's weight must be channels-last already.
    """
    geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
    packed = torch.ops.mkldnn._reorder_convolution_weight(layer.weight, *geometry, list(x.shape))
    after = "relu" if relu else "none"

    def eager() -> Tensor:
        y = nn.functional.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)
        return torch.relu_(y) if relu else y

    def prepacked() -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, packed, layer.bias, *geometry, after, [], "")

    with frozen_inductor(cpp_wrapper=True):
        fast = compiled(with_relu(layer) if relu else layer)
        fast(x)
    return {"eager": eager, "onednn": prepacked, "inductor": lambda: fast(x)}


def dense_linears(layer: nn.Linear, x: Tensor) -> dict[str, Call]:
    """Eager and frozen Inductor; `x` is `[rows, C]`."""
    with frozen_inductor(cpp_wrapper=True):
        fast = compiled(layer)
        fast(x)
    return {"eager": lambda: layer(x), "inductor": lambda: fast(x)}


def torch_bsr_linear(layer: nn.Linear, x: Tensor, block_shape: tuple[int, int]) -> Call:
    """torch's own block-sparse matrix product."""
    weight = layer.weight.detach().to_sparse_bsr(block_shape)
    return lambda: nn.functional.linear(x, weight, layer.bias)


def with_relu(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return torch.relu(layer(x))

    return forward
