"""Single layers on the GPU kernels, run by Triton's interpreter, and their float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import blocksparse_compiler as bsc
from blocksparse_compiler import BlockPattern
from blocksparse_compiler.codegen import offline
from blocksparse_compiler.packing import PackedWeight
from blocksparse_compiler.variants import VARIANTS, KernelConfig

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


def identity(y: Tensor) -> Tensor:
    return y


@dataclass(frozen=True)
class GpuCase:
    """A layer, its input and what follows it. `input_shape` is `[N, C, *spatial]` or `[*rows, C]`.

    Args:
        padding: before and after each dimension, as the operator takes it.
        density: of kept tiles, at random; the out-blocks in `empty_rows` keep none.
        channels_last: memory format of the input (and of the output, as the operator is told).
        parameters: of the kernel.
    """

    input_shape: tuple[int, ...]
    out_channels: int
    kernel_size: tuple[int, ...] = ()
    block: tuple[int, int] = (16, 16)
    dtype: torch.dtype = BFLOAT
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = True
    bias_dtype: torch.dtype | None = None
    density: float = 0.5
    empty_rows: tuple[int, ...] = ()
    seed: int = 0
    channels_last: bool = True
    variant: str = "triton_gather"
    epilogue: Callable[..., Any] = identity
    parameters: dict[str, int | str] = field(default_factory=dict)

    @property
    def in_channels(self) -> int:
        return self.input_shape[1 if self.kernel_size else -1]

    def input(self, batch: int | None = None) -> Tensor:
        shape = (batch or self.input_shape[0], *self.input_shape[1:])
        x = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed)).to(self.dtype)
        if self.channels_last and len(self.kernel_size) > 1:
            return x.to(memory_format=_FORMATS[x.dim()])
        return x


_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
_PARAMETERS: dict[str, int | str] = {"pixels": 32, "warps": 4, "stages": 2}


class GpuLayer(nn.Module):
    """The operator with packed weights as buffers; `reference` is plain torch."""

    def __init__(self, case: GpuCase) -> None:
        super().__init__()
        self.case = case
        random = torch.Generator().manual_seed(case.seed)
        dims = len(case.kernel_size)
        channels = case.in_channels // case.groups
        fan_in = channels * math.prod(case.kernel_size)
        shape = (case.out_channels, channels, *case.kernel_size)
        weight = torch.randn(shape, generator=random) / fan_in**0.5
        pattern = BlockPattern.full(shape, case.block, case.groups)
        kept = torch.rand(pattern.grid_shape, generator=random) < case.density
        kept[list(case.empty_rows)] = False
        self.pattern = pattern = pattern.with_kept(kept)
        self.weight = pattern.apply(weight).to(case.dtype)
        bias = torch.randn(case.out_channels, generator=random).to(case.bias_dtype or case.dtype)
        for name, tensor in self.packed(pattern)._asdict().items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias if case.bias else None)
        self.stride = list(case.stride or (1,) * dims)
        self.padding = list(case.padding or (0,) * (2 * dims))
        self.dilation = list(case.dilation or (1,) * dims)
        precision = {"precision": "ieee"} if case.dtype == FLOAT else {}
        parameters = {**_PARAMETERS, **precision, **case.parameters}
        self.kernel = KernelConfig(case.variant, parameters).encode(pattern)

    def packed(self, pattern: BlockPattern) -> PackedWeight:
        return VARIANTS[self.case.variant].pack(self.weight, pattern)

    def forward(self, x: Tensor, *more: Tensor) -> Any:
        case = self.case
        weight = (self.values, self.row_ptr, self.tile_index, self.bias, case.out_channels)
        if not case.kernel_size:
            return case.epilogue(torch.ops.blocksparse.linear(x, *weight, self.kernel), *more)
        geometry = (list(case.kernel_size), self.stride, self.padding, self.dilation)
        y = torch.ops.blocksparse.conv(x, *weight, *geometry, case.channels_last, self.kernel)
        return case.epilogue(y, *more)

    def reference(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """The layer without its epilogue, by torch's dense operators."""
        weight, bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        x = x.to(dtype)
        if not self.case.kernel_size:
            return nn.functional.linear(x, weight, bias)
        pairs = [self.padding[i : i + 2] for i in range(0, len(self.padding), 2)]
        x = nn.functional.pad(x, [p for pair in reversed(pairs) for p in pair])
        conv = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(pairs) - 1]
        return conv(x, weight, bias, self.stride, 0, self.dilation, self.case.groups)


class GpuLayers(nn.Module):
    """Independent layers side by side: one program for all of them."""

    def __init__(self, cases: list[GpuCase]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GpuLayer(case) for case in cases)

    def forward(self, xs: list[Tensor]) -> list[Any]:
        return [layer(x) for layer, x in zip(self.layers, xs, strict=True)]


def generate(
    module: nn.Module, *inputs: Any, target: str = "sm_90", dynamic_shapes: Any = None
) -> offline.OfflineProgram:
    """The program for the module; fails if an operator was left without a kernel."""
    with torch.no_grad():
        gm = bsc.trace(module, *inputs, dynamic_shapes=dynamic_shapes)
        program = offline.generate(gm, target=target)
    left = [name for name in program.externs if "blocksparse" in name]
    assert not left, f"operators that were not lowered: {left}"
    return program


def check(cases: list[GpuCase], target: str = "sm_90") -> offline.OfflineProgram:
    """Generates one program for all layers, runs it in the interpreter and compares with float64."""
    module = GpuLayers(cases)
    xs = [case.input() for case in cases]
    program = generate(module, xs, target=target)
    for layer, x, out in zip(module.layers, xs, program.run(xs), strict=True):
        assert_close_to_float64(layer, x, out)
    return program


def assert_close_to_float64(layer: GpuLayer, x: Tensor, got: Tensor) -> None:
    """The error is at most 1.5 times that of torch's own dense kernel, plus a rounding of the output.

    The interpreter's products are exact in fp32, so that tf32 kernels pass as well.
    """
    case = layer.case
    exact = layer.reference(x)
    assert got.shape == exact.shape, f"{case}: {got.shape}, expected {exact.shape}"
    assert got.dtype == case.dtype, f"{case}: {got.dtype}"
    fake = layer(x.to("meta"))
    assert got.stride() == fake.stride(), f"{case}: strides {got.stride()}, expected {fake.stride()}"
    error = (got - exact).norm()
    dense = (layer.reference(x, case.dtype) - exact).norm()
    limit = 1.5 * dense + torch.finfo(case.dtype).eps / 2 * exact.norm()
    assert error <= limit, f"{case}: error {error:.3g}, dense {dense:.3g}, limit {limit:.3g}"
