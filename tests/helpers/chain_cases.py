"""Chains of layers with random weights, as an operator and as plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from blocksparse_compiler import BlockPattern
from blocksparse_compiler.cpu_spmm import SPMM
from blocksparse_compiler.kernel_variant import KernelConfig
from blocksparse_compiler.layer_chain import (
    CHAIN,
    Chain,
    Depthwise,
    Layer,
    Pointwise,
    concatenated,
    pack_bias,
    pack_filters,
    pack_pointwise,
)
from blocksparse_compiler.layouts import CHANNELS_FIRST, Layouts
from blocksparse_compiler.pointwise_depthwise import Activation

RELU6, IDENTITY = Activation("clamp", 0.0, 6.0), Activation("identity")


@dataclass(frozen=True)
class ChainCase:
    """Layers on images; blocks of 1x1 convolutions are counted when weights are drawn."""

    shape: tuple[int, int, int, int]
    layers: tuple[Layer, ...]
    bands: int = 2
    layouts: Layouts = CHANNELS_FIRST
    density: float = 0.3


def pointwise(
    out: int, height: int = 1, activation: Activation = IDENTITY, adds: int | None = None
) -> Pointwise:
    return Pointwise(out, height, 0, activation, adds)


def depthwise(
    size: int = 3,
    stride: int = 1,
    activation: Activation = RELU6,
    dilation: int = 1,
    padding: int | None = None,
) -> Depthwise:
    pad = dilation * (size // 2) if padding is None else padding
    return Depthwise((size, size), (stride, stride), (pad,) * 4, (dilation, dilation), activation)


class ChainModule(nn.Module):
    """The operator; `reference` is plain torch."""

    def __init__(self, case: ChainCase) -> None:
        super().__init__()
        self.case = case
        torch.manual_seed(0)
        channels, layers, rows, filters, biases = case.shape[1], [], [], [], []
        self.weights: list[Tensor] = []
        for layer in case.layers:
            if isinstance(layer, Pointwise):
                weight = torch.randn(layer.out_channels, channels, 1, 1)
                pattern = BlockPattern.full(tuple(weight.shape), (layer.height, 1))
                pattern = pattern.with_kept(torch.rand(pattern.grid_shape) < case.density)
                weight = pattern.apply(weight) / max(1.0, case.density * channels) ** 0.5
                packed = SPMM.pack(weight, pattern)
                rows.append(pack_pointwise(*packed))
                layers.append(replace(layer, blocks=packed.values.shape[0]))
                channels = layer.out_channels
            else:
                weight = torch.randn(channels, 1, *layer.kernel_size) / 3
                filters.append(pack_filters(weight.flatten(1).t()))
                layers.append(layer)
            self.weights.append(weight)
            biases.append(pack_bias(torch.randn(channels), channels))
        self.chain = Chain(tuple(layers))
        self.text = self.chain.encode()
        self.kernel = KernelConfig(CHAIN, {"bands": case.bands, **case.layouts.parameters}).encode()
        values, row_ptr, tile_index = zip(*rows, strict=True) if rows else ((), (), ())
        floats, integers = torch.empty(0), torch.empty(0, dtype=torch.int32)
        self.register_buffer("values", concatenated(values, floats))
        self.register_buffer("row_ptr", concatenated(row_ptr, integers))
        self.register_buffer("tile_index", concatenated(tile_index, integers))
        self.register_buffer("filters", concatenated(filters, floats))
        self.register_buffer("biases", concatenated(biases, floats))

    @property
    def arguments(self) -> tuple:
        operands = (self.values, self.row_ptr, self.tile_index, self.filters, self.biases)
        return (*operands, self.text, False, self.kernel)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.blocksparse.layer_chain(x, *self.arguments)

    def reference(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        tensors = [x.to(dtype)]
        for layer, weight, at in zip(
            self.chain.layers, self.weights, self.chain.offsets(x.shape[1]), strict=True
        ):
            bias, weight = self.biases[0, at.biases :][: weight.shape[0]].to(dtype), weight.to(dtype)
            tensors.append(layer.activation(_layer(layer, weight, bias)(tensors)))
        return tensors[-1]


def _layer(layer: Layer, weight: Tensor, bias: Tensor) -> Callable[[list[Tensor]], Tensor]:
    if isinstance(layer, Depthwise):
        top, bottom, left, right = layer.padding
        pad, groups = (left, right, top, bottom), weight.shape[0]
        return lambda tensors: nn.functional.conv2d(
            nn.functional.pad(tensors[-1], pad), weight, bias, layer.stride, 0, layer.dilation, groups
        )
    return lambda tensors: (
        nn.functional.conv2d(tensors[-1], weight, bias) + (0 if layer.adds is None else tensors[layer.adds])
    )
