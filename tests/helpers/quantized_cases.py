"""Layers on quantized inputs: operator calls with random patterns, and their exact reference.

Scales are powers of two and biases multiples of them, so that fp32 holds every output exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from kernel_cases import Case, Layer, Layers, count_kernels, run
from torch import Tensor, nn

from blocksparse_compiler import BlockPattern
from blocksparse_compiler.quantized_ops import weight_sums
from blocksparse_compiler.variants import VARIANTS, KernelConfig

Q: Any = torch.ops.quantized_decomposed
BOUNDS = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


@dataclass(frozen=True)
class QuantizedCase(Case):
    """`extreme`: all inputs and weights are of the largest magnitude."""

    variant: str = "cpu_int8"
    dtype: torch.dtype = torch.uint8
    zero_point: int = 0
    extreme: bool = False

    def input(self) -> Tensor:
        low, high = BOUNDS[self.dtype]
        random = torch.Generator().manual_seed(self.seed)
        x = torch.randint(high if self.extreme else low, high + 1, self.input_shape, generator=random)
        x = x.to(self.dtype)
        return x.to(memory_format=torch.channels_last) if x.dim() == 4 and self.kernel_size else x


class QuantizedLayer(Layer):
    """The operator with packed weights as buffers; `reference` is plain torch in float64."""

    def __init__(self, case: QuantizedCase) -> None:
        nn.Module.__init__(self)
        self.case = case
        random = torch.Generator().manual_seed(case.seed)
        shape = (case.out_channels, case.in_channels, *case.kernel_size)
        weight = torch.randint(-128, -127 if case.extreme else 128, shape, generator=random)
        pattern = BlockPattern.full(shape, case.block)
        pattern = pattern.with_kept(torch.rand(pattern.grid_shape, generator=random) < case.density)
        self.weight = pattern.apply(weight).to(torch.int8)
        for name, tensor in VARIANTS[case.variant].pack(self.weight, pattern)._asdict().items():
            self.register_buffer(name, tensor)
        exponent = torch.randint(-12, -6, (case.out_channels,), generator=random)
        self.register_buffer("scale", 2.0**exponent)
        bias = torch.randint(-999, 999, (case.out_channels,), generator=random) * self.scale
        self.register_buffer("bias", bias if case.bias else None)
        self.register_buffer("weight_sums", weight_sums(self.weight))
        dims = len(case.kernel_size)
        self.stride = list(case.stride or (1,) * dims)
        self.padding = list(case.padding or (0,) * (2 * dims))
        self.dilation = list(case.dilation or (1,) * dims)
        self.kernel = KernelConfig(case.variant, case.parameters).encode(pattern)

    @property
    def operator(self) -> Any:
        ops = torch.ops.blocksparse
        return ops.quantized_conv.default if self.case.kernel_size else ops.quantized_linear.default

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        case = self.case
        tables = (self.values, self.row_ptr, self.tile_index, self.bias, self.scale, self.weight_sums)
        weight = (*tables, case.zero_point, case.out_channels)
        if not case.kernel_size:
            return (x, *weight, self.kernel)
        return (
            x,
            *weight,
            list(case.kernel_size),
            self.stride,
            self.padding,
            self.dilation,
            True,
            self.kernel,
        )

    def forward(self, x: Tensor) -> Any:
        return self.case.epilogue(self.operator(*self.arguments(x)))

    def reference(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """The layer without its epilogue: integers in double, up to the scale."""
        sums = self._dense(x.to(dtype) - self.case.zero_point, self.weight.to(dtype), None)
        assert not sums.numel() or sums.abs().max() < 2**24, "fp32 may round such sums"
        shape = (-1, *[1] * len(self.case.kernel_size))
        out = sums * self.scale.view(shape)
        return out if self.bias is None else out + self.bias.view(shape)


def requantize(dtype: torch.dtype, zero_point: int, scale: float = 2.0**-3) -> Callable[[Tensor], Tensor]:
    """A ReLU and the quantizing of the next layer's input."""
    return lambda y: Q.quantize_per_tensor.default(torch.relu(y), scale, zero_point, *BOUNDS[dtype], dtype)


class QuantizedLayers(Layers):
    def __init__(self, cases: list[QuantizedCase]) -> None:
        nn.Module.__init__(self)
        self.layers = nn.ModuleList(QuantizedLayer(case) for case in cases)


def assert_exact(layer: QuantizedLayer, x: Tensor, got: Any) -> None:
    torch.testing.assert_close(got, layer.case.epilogue(layer.reference(x).float()), rtol=0, atol=0)


def check(cases: list[QuantizedCase]) -> None:
    """Compiles the layers together and compares bit for bit."""
    module = QuantizedLayers(cases)
    xs = [case.input() for case in cases]
    outs, source = run(module, xs, dynamic=False)
    for layer, x, out in zip(module.layers, xs, outs, strict=True):
        assert_exact(layer, x, out)
    assert count_kernels(source)["block_sparse"] >= 1
    assert "blocksparse" not in source.replace("blocksparse_compiler", ""), "an operator was not lowered"
