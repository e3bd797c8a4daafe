"""`blocksparse::layer_chain`: sparse 1x1 convolutions and depthwise ones in a row, in one kernel.

Sparse mobile networks compute so little that what one core writes and another reads decides. A chain cuts the
image into bands of rows, and each thread runs all layers on its own: only the rows at a border change hands
(codegen/cpu_layer_chain).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cpu_spmm import SIDE
from .errors import PlanError
from .kernel_variant import KernelConfig
from .ops import Operand, define, memory_format_of
from .pointwise_depthwise import Activation
from .window import Window

CHAIN = "cpu_f32_chain"
"""Name of the kernel; its parameters: `bands` of an image, and the layouts that it reads and writes."""

MEMBER = "chain"
"""A parameter of the kernels of layers that run as one: the number of their chain."""


def chain_of(config: Mapping[str, int | str]) -> int | None:
    """The number of the chain that a layer with this kernel runs in."""
    number = config.get(MEMBER)
    return number if isinstance(number, int) else None


@dataclass(frozen=True)
class Pointwise:
    """A 1x1 convolution in blocks of one input channel: `activation(W x + bias + tensor adds)`.

    Args:
        out_channels: of the layer.
        height: output channels of a block.
        blocks: that are not zero.
        adds: number of the tensor that is added: 0 is the chain's input, i what its i-th layer returns.
    """

    out_channels: int
    height: int
    blocks: int
    activation: Activation
    adds: int | None = None

    @property
    def rows(self) -> int:
        """Block rows of the packed weight, which fill groups of `SIDE` output channels."""
        return _whole(self.out_channels) // self.height

    def encode(self) -> str:
        numbers = {"out": self.out_channels, "height": self.height, "blocks": self.blocks}
        added = {} if self.adds is None else {"adds": self.adds}
        return KernelConfig("pointwise", {**numbers, **added, "activation": str(self.activation)}).encode()


@dataclass(frozen=True)
class Depthwise:
    """A depthwise convolution, one filter for each channel. `padding`: top, bottom, left, right."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    activation: Activation

    @property
    def window(self) -> Window:
        return Window(self.kernel_size, self.stride, self.padding, self.dilation)

    @property
    def reach(self) -> int:
        """Rows from the first one that an output row reads to the last."""
        return self.dilation[0] * (self.kernel_size[0] - 1) + 1

    def encode(self) -> str:
        geometry = (*self.kernel_size, *self.stride, *self.padding, *self.dilation)
        numbers = ",".join(map(str, geometry))
        return f"depthwise;geometry={numbers};activation={self.activation}"


Layer = Pointwise | Depthwise


@dataclass(frozen=True)
class Chain:
    """The layers of one kernel, in order; each reads what the one before it returns."""

    layers: tuple[Layer, ...]

    def encode(self) -> str:
        return "|".join(layer.encode() for layer in self.layers)

    @classmethod
    def decode(cls, text: str) -> Chain:
        """Inverse of `encode`. Raises `PlanError` on other text."""
        return cls(tuple(_decode_layer(part) for part in text.split("|")))

    def sizes(self, channels: int, height: int, width: int) -> list[tuple[int, int, int]]:
        """Channels, rows and columns of every tensor: the input, and what each layer returns."""
        found = [(channels, height, width)]
        for layer in self.layers:
            if isinstance(layer, Depthwise):
                found.append((found[-1][0], *layer.window.output_size(found[-1][1:])))
            else:
                found.append((layer.out_channels, *found[-1][1:]))
        return found

    def offsets(self, channels: int) -> list[Offsets]:
        """Where the operands of each layer begin in those of the chain."""
        found, at = [], Offsets()
        for layer in self.layers:
            found.append(at)
            if isinstance(layer, Pointwise):
                channels = layer.out_channels
                at = Offsets(
                    at.values + layer.blocks * layer.height,
                    at.row_ptr + layer.rows + 1,
                    at.tile_index + layer.blocks,
                    at.filters,
                    at.biases + _whole(channels),
                )
            else:
                taps = math.prod(layer.kernel_size)
                filters, biases = at.filters + channels * taps, at.biases + _whole(channels)
                at = Offsets(at.values, at.row_ptr, at.tile_index, filters, biases)
        return found


@dataclass(frozen=True)
class Offsets:
    """Elements in front of a layer's own in each operand of the operator."""

    values: int = 0
    row_ptr: int = 0
    tile_index: int = 0
    filters: int = 0
    biases: int = 0


def _whole(channels: int) -> int:
    return -(-channels // SIDE) * SIDE


def _decode_layer(text: str) -> Layer:
    try:
        config = KernelConfig.decode(text)
        known = config.parameters
        activation = Activation.parse(str(known["activation"]))
        if config.variant == "pointwise":
            adds = known.get("adds")
            out, height, blocks = (int(known[key]) for key in ("out", "height", "blocks"))
            return Pointwise(out, height, blocks, activation, None if adds is None else int(adds))
        if config.variant == "depthwise":
            g = [int(number) for number in str(known["geometry"]).split(",")]
            return Depthwise((g[0], g[1]), (g[2], g[3]), (g[4], g[5], g[6], g[7]), (g[8], g[9]), activation)
    except (KeyError, IndexError, ValueError, PlanError):
        pass
    raise PlanError(
        "layer chain", "layers as Chain.encode() writes them", repr(text), "Compile the model anew."
    )


# ---- operands -------------------------------------------------------------------------------------


def pack_pointwise(values: Tensor, row_ptr: Tensor, tile_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One layer's part of `values`, `row_ptr` and `tile_index`, from those of `cpu_spmm.SPMM.pack`."""
    return values.flatten(), row_ptr.flatten(), tile_index[0].flatten()


def pack_filters(weight: Tensor) -> Tensor:
    """One layer's part of `filters`, `[channels, taps]`, from `[taps, channels]` of `depthwise.DEPTHWISE`."""
    return weight.t().flatten()


def pack_bias(bias: Tensor | None, channels: int) -> Tensor:
    """One layer's part of `biases`: zeros up to a multiple of `SIDE`."""
    padded = torch.zeros(_whole(channels), dtype=torch.float32)
    if bias is not None:
        padded[:channels] = bias
    return padded


# ---- the operator ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerChainArguments:
    """The operands of all layers, one behind the other; `layers` is the text of the `Chain`."""

    x: Operand
    values: Operand
    row_ptr: Operand
    tile_index: Operand
    filters: Operand
    biases: Operand
    layers: str
    channels_last: bool
    kernel: str

    @property
    def chain(self) -> Chain:
        return Chain.decode(self.layers)


def _reference(args: LayerChainArguments) -> Tensor:
    x, chain = args.x, args.chain
    tensors = [x]
    for layer, weight, at in zip(chain.layers, _weights(args), chain.offsets(x.shape[1]), strict=True):
        bias = args.biases.flatten()[at.biases :][: weight.shape[0]]
        out = _run(layer, tensors[-1], weight, bias)
        if isinstance(layer, Pointwise) and layer.adds is not None:
            out = out + tensors[layer.adds]
        tensors.append(layer.activation(out))
    return tensors[-1].contiguous(memory_format=memory_format_of(2, args.channels_last))


def _run(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if isinstance(layer, Pointwise):
        return torch.conv2d(x, weight, bias)
    return torch.conv2d(layer.window.pad(x), weight, bias, layer.stride, 0, layer.dilation, weight.shape[0])


def _weights(args: LayerChainArguments) -> Iterator[Tensor]:
    """Dense ones, as torch's convolution takes them."""
    channels = args.x.shape[1]
    for layer, at in zip(args.chain.layers, args.chain.offsets(channels), strict=True):
        if isinstance(layer, Pointwise):
            ends = args.row_ptr.flatten()[at.row_ptr :][: layer.rows + 1].long()
            rows = torch.repeat_interleave(torch.arange(layer.rows, device=ends.device), ends.diff())
            blocks = args.values.flatten()[at.values :][: layer.blocks * layer.height].view(-1, layer.height)
            dense = args.values.new_zeros(layer.rows, channels, layer.height)
            dense[rows, args.tile_index.flatten()[at.tile_index :][: layer.blocks].long()] = blocks
            channels = layer.out_channels
            yield dense.transpose(1, 2).flatten(0, 1)[:channels, :, None, None]
        else:
            filters = args.filters.flatten()[at.filters :][: channels * math.prod(layer.kernel_size)]
            yield filters.view(channels, 1, *layer.kernel_size)


def _fake(args: LayerChainArguments) -> Tensor:
    x = args.x
    shape, layout = args.chain.sizes(*x.shape[1:])[-1], memory_format_of(2, args.channels_last)
    return torch.empty((x.shape[0], *shape), dtype=x.dtype, device=x.device, memory_format=layout)


define("layer_chain", LayerChainArguments, _reference, _fake)


def concatenated(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """`[1, n]`: Inductor inlines short constants of one dimension into a kernel of their own."""
    return torch.cat([like.flatten()[:0], *parts]).unsqueeze(0).contiguous()
