"""`blocksparse::conv`, `blocksparse::linear` and their quantized counterparts as C++ kernels."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import sympy
import torch

from ..amx_variant import AMX, unsupported_blocks
from ..cpu_spmm import SPMM
from ..cpu_variants import RegisterTile, dtype_tile
from ..ops import ConvArguments, LinearArguments
from ..quantized_ops import QuantizedConvArguments, QuantizedLinearArguments
from ..variants import VARIANTS, KernelConfig
from ..window import Window
from .conv_inputs import channels_last_conv, row_of_pixels, vectors_of_isa
from .cpu_amx_template import AmxTemplate, runs_amx, tiles_of
from .cpu_int8_template import IntegerTemplate
from .cpu_spmm_lowering import lower_scattered_conv2d, multiply_rows
from .cpu_spmm_template import PixelGrid
from .cpu_template import BlockSparseTemplate
from .inductor_api import ir, lowerings, parallel_num_threads
from .lowering_errors import Unsupported
from .tiling import ConvGeometry, all_static, as_int, flat_tiling, is_static, row_tiling
from .views import conv1d_as_conv2d, kernel_inputs, reshape, without_offset

LONGEST_SUM = 192
"""Products summed up in one go. Dense kernels sum in blocks, which rounds less than one long sum; at this
length our error stays below 1.5 times theirs, and the speed does not suffer."""

SHORT_SUM = 48
"""A sum of so few products, on average, starts from the bias: adding it at the end would cost over 2 %."""


def lower_linear(args: LinearArguments) -> Any:
    return _lower_linear(Weight(args), args.x)


def lower_quantized_linear(args: QuantizedLinearArguments) -> Any:
    return _lower_linear(_QuantizedWeight(args), args.x)


def _lower_linear(weight: Weight, x: Any) -> Any:
    weight.check(x, -1)
    *rows, channels = x.get_size()
    pixels = as_int(sympy.prod(rows))
    x = reshape(x, [pixels, channels])
    x = ir.ExternKernel.require_contiguous(x)
    out = weight.multiply(x, 1, row_of_pixels(pixels, int(channels)), [pixels, weight.out_channels])
    return reshape(out, [*rows, weight.out_channels])


def lower_conv(args: ConvArguments) -> Any:
    return _lower_conv(Weight(args), args.x, args.window)


def lower_quantized_conv(args: QuantizedConvArguments) -> Any:
    return _lower_conv(_QuantizedWeight(args), args.x, args.window)


def _lower_conv(weight: Weight, x: Any, window: Window) -> Any:
    weight.check(x, 1)
    if window.dims == 1:
        return conv1d_as_conv2d(functools.partial(_lower_conv2d, weight), x, window)
    if window.dims != 2:
        raise Unsupported(f"{window.dims} spatial dimensions")
    return _lower_conv2d(weight, x, window)


def _lower_conv2d(weight: Weight, x: Any, window: Window) -> Any:
    if weight.config.variant == SPMM.name:
        return lower_scattered_conv2d(weight, x, window)
    x, conv = channels_last_conv(x, window)
    n, (h, w), pixel_stride = as_int(x.get_size()[0]), conv.input_size, conv.input_strides[2]
    shape = [n, *conv.output_size, weight.out_channels]
    if conv.is_flat(n):
        out = weight.multiply(x, 1, row_of_pixels(n * h * w, pixel_stride), shape)
    else:
        out = weight.multiply(x, n, conv, shape)
    return lowerings[torch.ops.aten.permute.default](out, [0, 3, 1, 2])


_Quantized = QuantizedConvArguments | QuantizedLinearArguments
_LayerArguments = ConvArguments | LinearArguments | _Quantized


class Weight:
    """A packed weight with its bias, and the kernel to run it."""

    def __init__(self, args: _LayerArguments) -> None:
        values = ir.ExternKernel.require_contiguous(args.values)  # in training, tiles are computed
        self.operands = [values, args.row_ptr, args.tile_index]
        if args.bias is not None:
            self.operands.append(without_offset(args.bias))
        self.out_channels = args.out_channels
        _, steps, bh, *packed = values.get_size()
        self.pack = int(packed[0]) if packed else 1
        self.block_shape = (int(bh), int(steps) * self.pack)
        self.config = KernelConfig.decode(args.kernel)

    def check(self, x: Any, channel_dim: int) -> None:
        if self.config.variant not in VARIANTS:
            raise Unsupported(f"no kernel variant {self.config.variant!r}")
        dtype = str(x.get_dtype()).removeprefix("torch.")
        if dtype not in VARIANTS[self.config.variant].dtypes or x.get_device().type != "cpu":
            raise Unsupported(f"{self.config.variant} is no kernel for {x.get_dtype()} on {x.get_device()}")
        self._check_dtypes(x)
        if not is_static(x.get_size()[channel_dim]):
            raise Unsupported("symbolic channels")
        self.in_channels = int(x.get_size()[channel_dim])

    def _check_dtypes(self, x: Any) -> None:
        others = {t.get_dtype() for t in (self.operands[0], *self.operands[3:])} - {x.get_dtype()}
        if others:
            raise Unsupported(
                f"weights and bias of {', '.join(map(str, others))} on inputs of {x.get_dtype()}"
            )
        self.dtype = str(x.get_dtype()).removeprefix("torch.")

    def tile(self) -> RegisterTile:
        packed = self._multiplies_packed()
        tile = dtype_tile(self.dtype, self.block_shape, *vectors_of_isa(), packed)
        if tile is None:
            raise Unsupported(f"block height {self.block_shape[0]}")
        return replace(tile, pixels=min(tile.pixels, int(self.config.parameters.get("pixels", tile.pixels))))

    def _multiplies_packed(self) -> bool:
        """Whether the instructions multiply pairs of bf16 numbers (AVX512-BF16)."""
        return vectors_of_isa()[0] == 16 and torch.cpu._is_avx512_bf16_supported()

    def mean_products(self) -> float:
        """Kept weights of an output channel, averaged over the channels."""
        size = self.operands[0].get_size()
        return math.prod(map(int, size)) / self.out_channels if all_static(size) else math.inf

    def multiply(self, x: Any, images: Any, conv: ConvGeometry, shape: list[Any]) -> Any:
        """The output node of the kernel, contiguous `shape`."""
        if self.config.variant == SPMM.name:
            return multiply_rows(self, x, PixelGrid(1, *conv.output_size[1:], *conv.input_strides[2:]), shape)
        nodes = kernel_inputs([x, *self.operands])
        layout = ir.FixedLayout(x.get_device(), self.output_dtype(x), shape)
        if self.config.variant == AMX.name and (out := self._amx(nodes, layout, images, conv)):
            return out
        tile = self.tile()
        flat = flat_tiling(conv.output_size[1], tile.pixels) if conv.is_flat(images) else None
        template = self.template(
            nodes,
            layout,
            parallel_num_threads(),
            images=images,
            conv=conv,
            tile=tile,
            tiling=flat or row_tiling(images, conv, tile.pixels),
            block_shape=self.block_shape,
            parameters=dict(self.config.parameters),
            **self.arithmetic(tile),
        )
        return template.generate().output_node()

    template: type[BlockSparseTemplate] = BlockSparseTemplate

    def output_dtype(self, x: Any) -> torch.dtype:
        return x.get_dtype()

    def arithmetic(self, tile: RegisterTile) -> dict[str, Any]:
        """What the template needs to know about numbers."""
        is_fp32 = self.dtype == "float32"
        return {
            # Rounding a low-precision output loses more than any order of its fp32 sum.
            "flush": -(-LONGEST_SUM // self.block_shape[1]) if is_fp32 else 0,
            "bias_first": tile.split == 1 and (not is_fp32 or self.mean_products() <= SHORT_SUM),
        }

    def _amx(self, nodes: list[Any], layout: Any, images: Any, conv: ConvGeometry) -> Any | None:
        """None where it cannot run: the kernel for vectors reads the same weights."""
        if not runs_amx() or unsupported_blocks(self.block_shape):
            return None
        parameters = dict(self.config.parameters)
        chunk, wanted = int(parameters.get("chunk", 4)), parameters.get("panel")
        tiles = tiles_of(conv, images, chunk, parallel_num_threads(), None if wanted is None else int(wanted))
        if tiles is None:
            return None
        template = AmxTemplate(
            nodes,
            layout,
            parallel_num_threads(),
            images=images,
            conv=conv,
            tiles=tiles,
            in_channels=self.in_channels,
            block_shape=self.block_shape,
            parameters=parameters,
        )
        return template.generate().output_node()


class _QuantizedWeight(Weight):
    """A packed int8 weight, and what makes outputs of its sums."""

    template = IntegerTemplate

    def __init__(self, args: _Quantized) -> None:
        super().__init__(args)
        self.operands[3:3] = [without_offset(args.scale), without_offset(args.weight_sums)]
        self.zero_point = args.zero_point

    def _check_dtypes(self, x: Any) -> None:
        values, _, _, *tables = (t.get_dtype() for t in self.operands)
        if (
            values != torch.int8
            or tables[:2] != [torch.float32, torch.int32]
            or tables[2:] not in ([], [torch.float32])
        ):
            raise Unsupported(
                f"weights of {values} with scale, sums and bias of {', '.join(map(str, tables))}"
            )
        self.dtype = str(x.get_dtype()).removeprefix("torch.")

    def _multiplies_packed(self) -> bool:
        """Whether the instructions multiply bytes (VNNI)."""
        isa = vectors_of_isa()[0]
        return torch.cpu._is_vnni_supported() if isa == 16 else False

    def output_dtype(self, x: Any) -> torch.dtype:
        return torch.float32

    def arithmetic(self, tile: RegisterTile) -> dict[str, Any]:
        return {"zero_point": self.zero_point, "signed": self.dtype == "int8"}
