"""The strongest dense implementations of a layer or a model that torch offers on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .timing import Call, fresh_code

Layer = Callable[[Tensor], Tensor]
Inputs = Sequence[Tensor]


@contextmanager
def frozen_inductor(cpp_wrapper: bool) -> Iterator[None]:
    """Inductor with constant folding and weight prepacking, set globally because Dynamo reads it too."""
    with torch._inductor.config.patch(freezing=True, cpp_wrapper=cpp_wrapper):
        yield


def compiled(function: Callable[..., Any], dynamic: bool = False, **kwargs: Any) -> Callable[..., Any]:
    """`torch.compile` of a private copy of the function (see `fresh_code`)."""

    def call(*args: Any) -> Any:
        return function(*args)

    return torch.compile(fresh_code(call), dynamic=dynamic, **kwargs)


def repeated(layer: Layer) -> Callable[..., Any]:
    """The layer on each of several inputs, in one call, as a network calls one layer after another."""

    def forward(*inputs: Tensor) -> list[Tensor]:
        return [layer(x) for x in inputs]

    return forward


def dense_convolutions(layer: nn.Conv2d, inputs: Inputs, relu: bool) -> dict[str, Call]:
    """Eager channels-last, the prepacked oneDNN operator, and frozen Inductor, as calls without arguments.

    `inputs` are `[N, C, H, W]` in channels-last; the layer's weight must be channels-last already.
    """
    geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
    packed = torch.ops.mkldnn._reorder_convolution_weight(layer.weight, *geometry, list(inputs[0].shape))
    after = "relu" if relu else "none"

    def eager(x: Tensor) -> Tensor:
        y = nn.functional.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)
        return torch.relu_(y) if relu else y

    def prepacked(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, packed, layer.bias, *geometry, after, [], "")

    return _dense_calls(eager, prepacked, with_relu(layer) if relu else layer, inputs)


def dense_linears(layer: nn.Linear, inputs: Inputs) -> dict[str, Call]:
    """The same three for a linear layer; `inputs` are `[rows, C]`."""
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight, len(inputs[0]))

    def prepacked(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, packed, layer.bias, "none", [], "")

    return _dense_calls(layer, prepacked, layer, inputs)


def _dense_calls(eager: Layer, prepacked: Layer, layer: Layer, inputs: Inputs) -> dict[str, Call]:
    several = repeated(layer)
    with frozen_inductor(cpp_wrapper=True):
        fast = compiled(several)
        fast(*inputs)
    return {
        "eager": lambda: repeated(eager)(*inputs),
        "onednn": lambda: repeated(prepacked)(*inputs),
        "inductor": lambda: fast(*inputs),
    }


def torch_bsr_linear(layer: nn.Linear, inputs: Inputs, block_shape: tuple[int, int]) -> Call:
    """torch's own block-sparse matrix product."""
    weight = layer.weight.detach().to_sparse_bsr(block_shape)
    product = repeated(lambda x: nn.functional.linear(x, weight, layer.bias))
    return lambda: product(*inputs)


def with_relu(layer: Layer) -> Layer:
    def forward(x: Tensor) -> Tensor:
        return torch.relu(layer(x))

    return forward
