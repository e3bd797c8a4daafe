"""The strongest dense implementations of a layer or a model that torch offers on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from blocksparse_compiler.codegen import inductor_api

from .timing import Call, fresh_code

Layer = Callable[[Tensor], Tensor]
Layers = Callable[[Tensor], list[Tensor]]


@contextmanager
def frozen_inductor(cpp_wrapper: bool, best_linear: bool = False) -> Iterator[None]:
    """Inductor with constant folding and weight prepacking, set globally because Dynamo reads it too.

    `best_linear` has it take oneDNN for linear layers where MKL, its choice in fp32, is slow: on CPUs that
    are not Intel's. No option of torch does that, but our backend does, so dense builds may, too.
    """
    library = inductor_api.best_linear_library() if best_linear else nullcontext()
    # The cache of graphs does not see the library.
    options = {"freezing": True, "cpp_wrapper": cpp_wrapper, "fx_graph_cache": not best_linear}
    with torch._inductor.config.patch(options), library:
        yield


def compiled(function: Callable[..., Any], dynamic: bool = False, **kwargs: Any) -> Callable[..., Any]:
    """`torch.compile` of a private copy of the function (see `fresh_code`)."""

    def call(*args: Any) -> Any:
        return function(*args)

    return torch.compile(fresh_code(call), dynamic=dynamic, **kwargs)


def several(layers: Sequence[Layer]) -> Layers:
    """Layers of one shape on the same input, in one call.

    As in a network, the input is still in the cache, the weights are not, and the fixed cost of a call is
    paid once for all layers.
    """

    def forward(x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in layers]

    return forward


def dense_convolutions(layers: Sequence[nn.Conv2d], x: Tensor, relu: bool) -> dict[str, Call]:
    """Eager channels-last, the prepacked oneDNN operator, and frozen Inductor, as calls without arguments.

    `x` is `[N, C, H, W]` in channels-last; the layers' weights must be channels-last already.
    """

    def eager(layer: nn.Conv2d) -> Layer:
        return with_relu(layer, torch.relu_) if relu else layer

    def prepacked(layer: nn.Conv2d) -> Layer:
        geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
        packed = torch.ops.mkldnn._reorder_convolution_weight(layer.weight, *geometry, list(x.shape))
        after = ("relu" if relu else "none", [], "")
        return lambda x: torch.ops.mkldnn._convolution_pointwise(x, packed, layer.bias, *geometry, *after)

    builds = several([eager(n) for n in layers]), several([prepacked(n) for n in layers])
    return _dense_calls(*builds, several([with_relu(n) if relu else n for n in layers]), x)


def dense_linears(layers: Sequence[nn.Linear], x: Tensor) -> dict[str, Call]:
    """The same three for linear layers; `x` is `[rows, C]`."""

    def prepacked(layer: nn.Linear) -> Layer:
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight, len(x))
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, layer.bias, "none", [], "")

    return _dense_calls(several(layers), several([prepacked(n) for n in layers]), several(layers), x)


def _dense_calls(eager: Layers, prepacked: Layers, layers: Layers, x: Tensor) -> dict[str, Call]:
    with frozen_inductor(cpp_wrapper=True):
        fast = compiled(layers)
        fast(x)
    return {"eager": lambda: eager(x), "onednn": lambda: prepacked(x), "inductor": lambda: fast(x)}


def torch_bsr_linear(layers: Sequence[nn.Linear], x: Tensor, block_shape: tuple[int, int]) -> Call:
    """torch's own block-sparse matrix product."""

    def product(layer: nn.Linear) -> Layer:
        weight = layer.weight.detach().to_sparse_bsr(block_shape)
        return lambda x: nn.functional.linear(x, weight, layer.bias)

    products = several([product(n) for n in layers])
    return lambda: products(x)


def with_relu(layer: Layer, relu: Layer = torch.relu) -> Layer:
    def forward(x: Tensor) -> Tensor:
        return relu(layer(x))

    return forward
