"""`blocksparse::layer_chain`: sparse 1x1 convolutions and depthwise ones in a row, in one kernel.

Sparse mobile networks compute so little that what one core writes and another reads decides. A chain cuts the
image into bands of rows, and each thread runs all layers on its own: only the rows at a border change hands
(codegen/cpu_layer_chain).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cpu_spmm import SIDE
from .errors import PlanError
from .kernel_variant import KernelConfig
from .ops import LIBRARY, memory_format_of
from .pointwise_depthwise import Activation

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

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        top, bottom, left, right = self.padding
        padded = (height + top + bottom, width + left + right)
        reach = [d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        rows, columns = ((padded[i] - reach[i]) // self.stride[i] + 1 for i in range(2))
        return rows, columns

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
                found.append((found[-1][0], *layer.output_size(*found[-1][1:])))
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
                taps = layer.kernel_size[0] * layer.kernel_size[1]
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
            numbers = (int(known[key]) for key in ("out", "height", "blocks"))
            return Pointwise(*numbers, activation, None if adds is None else int(adds))
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
    padded = torch.zeros(_whole(channels))
    if bias is not None:
        padded[:channels] = bias
    return padded


# ---- the operator ---------------------------------------------------------------------------------

_SCHEMA = (
    "layer_chain(Tensor x, Tensor values, Tensor row_ptr, Tensor tile_index, Tensor filters, Tensor biases, "
    "str layers, bool channels_last, str kernel) -> Tensor"
)
LIBRARY.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


def _reference(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    tile_index: Tensor,
    filters: Tensor,
    biases: Tensor,
    layers: str,
    channels_last: bool,
    kernel: str,
) -> Tensor:
    tensors = [x]
    chain = Chain.decode(layers)
    weights = _weights(chain, x.shape[1], values, row_ptr, tile_index, filters)
    for layer, weight, at in zip(chain.layers, weights, chain.offsets(x.shape[1]), strict=True):
        bias = biases.flatten()[at.biases :][: weight.shape[0]]
        out = _run(layer, tensors[-1], weight, bias)
        if isinstance(layer, Pointwise) and layer.adds is not None:
            out = out + tensors[layer.adds]
        tensors.append(layer.activation(out))
    return tensors[-1].contiguous(memory_format=memory_format_of(2, channels_last))


def _run(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if isinstance(layer, Pointwise):
        return torch.conv2d(x, weight, bias)
    top, bottom, left, right = layer.padding
    x = torch.nn.functional.pad(x, (left, right, top, bottom))
    return torch.conv2d(x, weight, bias, layer.stride, 0, layer.dilation, weight.shape[0])


def _weights(
    chain: Chain, channels: int, values: Tensor, row_ptr: Tensor, tile_index: Tensor, filters: Tensor
) -> Iterator[Tensor]:
    """Dense ones, as torch's convolution takes them."""
    for layer, at in zip(chain.layers, chain.offsets(channels), strict=True):
        if isinstance(layer, Pointwise):
            ends = row_ptr.flatten()[at.row_ptr :][: layer.rows + 1].long()
            rows = torch.repeat_interleave(torch.arange(layer.rows, device=ends.device), ends.diff())
            blocks = values.flatten()[at.values :][: layer.blocks * layer.height].view(-1, layer.height)
            dense = values.new_zeros(layer.rows, channels, layer.height)
            dense[rows, tile_index.flatten()[at.tile_index :][: layer.blocks].long()] = blocks
            channels = layer.out_channels
            yield dense.transpose(1, 2).flatten(0, 1)[:channels, :, None, None]
        else:
            taps = layer.kernel_size[0] * layer.kernel_size[1]
            yield filters.flatten()[at.filters :][: channels * taps].view(channels, 1, *layer.kernel_size)


def _fake(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    tile_index: Tensor,
    filters: Tensor,
    biases: Tensor,
    layers: str,
    channels_last: bool,
    kernel: str,
) -> Tensor:
    shape = (x.shape[0], *Chain.decode(layers).sizes(*x.shape[1:])[-1])
    return torch.empty(
        shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(2, channels_last)
    )


LIBRARY.impl("layer_chain", _reference, "CompositeExplicitAutograd")
torch.library.register_fake("blocksparse::layer_chain", _fake, lib=LIBRARY)


def concatenated(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """`[1, n]`: Inductor inlines short constants of one dimension into a kernel of their own."""
    return torch.cat([like.flatten()[:0], *parts]).unsqueeze(0).contiguous()
