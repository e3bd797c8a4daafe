"""`blocksparse::layer_chain` as a C++ kernel: each thread runs all layers on its own rows of the image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..chain_bands import MOST_ROWS, ChainBands, Step
from ..cpu_spmm import SIDE, pixel_tiles
from ..layer_chain import Depthwise, LayerChainArguments, Offsets, Pointwise
from ..layouts import Layouts
from ..pointwise_depthwise import Activation
from ..variants import KernelConfig
from ..window import Window
from .conv_inputs import channels_first_conv, channels_last_conv, vectors_of_isa
from .cpu_depthwise_planes import vector_of
from .cpu_spmm_lowering import LONGEST_ROW
from .cpu_spmm_template import even_vectors
from .inductor_api import ir, lowerings, parallel_num_threads
from .kernel_template import KernelTemplate
from .lowering_errors import Unsupported
from .output_matrix import OutputMatrix
from .tiling import ConvGeometry, Size, all_static, even_segment, is_static
from .views import kernel_inputs, without_offset

_PIXELWISE = Window((1, 1), (1, 1), (0, 0, 0, 0), (1, 1))
"""Of a convolution that reads its input as it is."""


def lower_layer_chain(args: LayerChainArguments) -> Any:
    x, parameters = args.x, KernelConfig.decode(args.kernel).parameters
    if x.get_device().type != "cpu" or x.get_dtype() != torch.float32:
        raise Unsupported(f"no kernel for {x.get_dtype()} on {x.get_device()}")
    layouts = Layouts.of(parameters)
    x, conv = (channels_first_conv if layouts.reads_first else channels_last_conv)(x, _PIXELWISE)
    n, channels = x.get_size()[:2]
    if not all_static((channels, *conv.input_size)):
        raise Unsupported(f"a chain of layers on {channels} channels of images of {conv.input_size}")
    height, width = map(int, conv.input_size)
    size = (int(channels), height, width)
    images_fill_threads = not is_static(n) or int(n) >= parallel_num_threads()
    bands = 1 if images_fill_threads else max(1, int(parameters.get("bands", 1)))
    out_channels, *pixels = args.chain.sizes(*size)[-1]
    shape = [n, out_channels, *pixels] if layouts.writes_first else [n, *pixels, out_channels]
    operands = [args.values, args.row_ptr, args.tile_index, args.filters, args.biases]
    template = LayerChainTemplate(
        kernel_inputs([x, *map(without_offset, operands)]),
        ir.FixedLayout(x.get_device(), x.get_dtype(), shape),
        parallel_num_threads(),
        images=n,
        conv=conv,
        bands=ChainBands(args.chain, size, bands, vectors_of_isa()[0]),
        layouts=layouts,
    )
    out = template.generate().output_node()
    return out if layouts.writes_first else lowerings[torch.ops.aten.permute.default](out, [0, 3, 1, 2])


@dataclass(frozen=True)
class StepText:
    """What the text needs to know of one step.

    Args:
        tiles: template arguments of `PixelRows`; a step that is a depthwise layer alone has none.
        depthwise: those of `ChannelRows`; a step that is a 1x1 convolution alone has none.
        stride, top: rows between the first input rows of two output rows, and padding above the first.
        reach: rows that an output row spans.
        activation: number of the one behind the first layer.
        block_rows: of the 1x1 convolution.
        at, last: where the operands of the first layer and of the last one begin.
    """

    step: Step
    tiles: str
    depthwise: str
    activation: int
    block_rows: int
    at: Offsets
    last: Offsets
    stride: int = 1
    top: int = 0
    reach: int = 1


class LayerChainTemplate(KernelTemplate):
    """A chain of layers.

    Args:
        input_nodes: input; values, row_ptr, tile_index, filters and biases of all layers.
        layout: output, contiguous: `[n, c, oh, ow]`, or `[n, oh, ow, c]`.
        images: number of them; one, or fewer than threads, where `bands` cut them.
        conv: where the input lies, as a 1x1 convolution reads it.
        bands: what each thread computes and holds.
        layouts: what is read and written.
    """

    source = "cpu_f32_layer_chain.cpp.jinja"
    headers = (
        "sparse_rows_f32.h",
        "depthwise_planes_f32.h",
        "activations_f32.h",
        "layer_chain_f32.h",
    )
    operands = ("X", "Values", "RowPtr", "TileIndex", "Filters", "Biases")

    def __init__(
        self,
        input_nodes: Any,
        layout: Any,
        num_threads: int,
        *,
        images: Size,
        conv: ConvGeometry,
        bands: ChainBands,
        layouts: Layouts,
    ) -> None:
        super().__init__("layer_chain", input_nodes, layout, num_threads)
        self.images, self.conv, self.bands, self.layouts = images, conv, bands, layouts
        self.lanes, self.registers = vectors_of_isa()
        self.activations = list(dict.fromkeys(layer.activation for layer in bands.chain.layers))

    def _matrix_size(self, out: Any) -> tuple[Any, Any]:
        if not self.layouts.writes_first:
            return super()._matrix_size(out)
        n, channels, height, width = out.get_size()
        return n * channels, height * width

    def _options(self, output: OutputMatrix) -> dict[str, Any]:
        bands = self.bands
        return {
            "images": self.images,
            "strides": self.conv.input_strides,
            "step": self.conv.input_strides[2] if self.conv.is_flat(1) else 0,
            "bands": bands,
            "tensors": bands.tensors,
            "steps": [self._step(step) for step in bands.steps],
            "activations": [activation.cpp() for activation in self.activations],
            "lanes": self.lanes,
            "layouts": self.layouts,
            "SIDE": SIDE,
            "store": output.store_tile,
        }

    def _step(self, step: Step) -> StepText:
        layers, offsets = self.bands.chain.layers, self.bands.chain.offsets(self.bands.size[0])
        pointwise, depthwise = step.pointwise, step.depthwise
        first, last = step.layers[0], step.layers[-1]
        text = StepText(
            step,
            tiles="" if pointwise is None else self._tiles(step, pointwise),
            depthwise="" if depthwise is None else self._depthwise(step, depthwise),
            activation=self._number(layers[first].activation),
            block_rows=-(-pointwise.out_channels // pointwise.height) if pointwise else 0,
            at=offsets[first],
            last=offsets[last],
        )
        if depthwise is None:
            return text
        return replace(text, stride=depthwise.stride[0], top=depthwise.padding[0], reach=depthwise.reach)

    def _number(self, activation: Activation) -> int:
        return self.activations.index(activation)

    def _tiles(self, step: Step, layer: Pointwise) -> str:
        tensors = self.bands.tensors
        read = tensors[step.reads]
        pixels = (step.inner_rows or read.rows) * read.width
        tile = pixel_tiles(layer.height, self.lanes, self.registers)[-1]
        vectors, last = even_vectors(pixels, tile, 1)
        total = -(-pixels // self.lanes)
        out = step.inner_pitch or tensors[step.writes].pitch
        numbers = (self.lanes, layer.height, vectors, last, total, read.pitch, out, LONGEST_ROW)
        return ", ".join(map(str, numbers))

    def _depthwise(self, step: Step, layer: Depthwise) -> str:
        read, written = self.bands.tensors[step.reads], self.bands.tensors[step.writes]
        sizes = (*layer.kernel_size, read.height, read.width, written.width)
        geometry = (*sizes, *layer.stride, *layer.dilation, layer.padding[0], layer.padding[2])
        lanes = vector_of(self.lanes, written.width)
        rows = even_segment(step.strip, MOST_ROWS)
        activation = f"Activation{self._number(layer.activation)}"
        return f"PlaneGeometry<{', '.join(map(str, geometry))}>, {lanes}, {self.lanes}, {rows}, {activation}"
