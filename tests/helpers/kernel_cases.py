"""Single layers on the kernels: operator calls with random patterns, and their float64 reference."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from blocksparse_compiler import BlockPattern
from blocksparse_compiler.codegen import lowerings
from blocksparse_compiler.codegen.inductor_api import capture_sources
from blocksparse_compiler.variants import VARIANTS, KernelConfig


def identity(y: Tensor) -> Tensor:
    return y


@dataclass(frozen=True)
class Case:
    """A layer, its input and what follows it. `input_shape` is `[N, C, *spatial]` or `[*rows, C]`."""

    input_shape: tuple[int, ...]
    out_channels: int
    kernel_size: tuple[int, ...] = ()
    block: tuple[int, int] = (16, 16)
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    bias: bool = True
    density: float = 0.5
    seed: int = 0
    epilogue: Callable[..., Any] = identity
    parameters: dict[str, int | str] = field(default_factory=dict)
    variant: str = "cpu_f32"
    channels_last: bool = True
    """What eager torch would return for images; how the input lies in memory as well."""

    @property
    def in_channels(self) -> int:
        return self.input_shape[1 if self.kernel_size else -1]

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, VARIANTS[self.variant].dtypes[0])

    def input(self) -> Tensor:
        x = torch.randn(self.input_shape, generator=torch.Generator().manual_seed(self.seed)).to(self.dtype)
        last = self.channels_last and x.dim() == 4 and self.kernel_size
        return x.to(memory_format=torch.channels_last) if last else x


class Layer(nn.Module):
    """The operator with packed weights as buffers; `reference` is plain torch in float64."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        random = torch.Generator().manual_seed(case.seed)
        dims = len(case.kernel_size)
        weight = torch.randn(case.out_channels, case.in_channels, *case.kernel_size, generator=random)
        pattern = BlockPattern.full(tuple(weight.shape), case.block)
        pattern = pattern.with_kept(torch.rand(pattern.grid_shape, generator=random) < case.density)
        self.weight = pattern.apply(weight).to(case.dtype)
        for name, tensor in VARIANTS[case.variant].pack(self.weight, pattern)._asdict().items():
            self.register_buffer(name, tensor)
        bias = torch.randn(case.out_channels, generator=random).to(case.dtype) if case.bias else None
        self.register_buffer("bias", bias)
        self.stride = list(case.stride or (1,) * dims)
        self.padding = list(case.padding or (0,) * (2 * dims))
        self.dilation = list(case.dilation or (1,) * dims)
        self.kernel = KernelConfig(case.variant, case.parameters).encode(pattern)

    def forward(self, x: Tensor) -> Any:
        case = self.case
        weight = (self.values, self.row_ptr, self.tile_index, self.bias, case.out_channels)
        if not case.kernel_size:
            return case.epilogue(torch.ops.blocksparse.linear(x, *weight, self.kernel))
        geometry = (list(case.kernel_size), self.stride, self.padding, self.dilation)
        return case.epilogue(
            torch.ops.blocksparse.conv(x, *weight, *geometry, case.channels_last, self.kernel)
        )

    def reference(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """The layer without its epilogue."""
        return self._dense(
            x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        )

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.case.kernel_size:
            return nn.functional.linear(x, weight, bias)
        pairs = [self.padding[i : i + 2] for i in range(0, len(self.padding), 2)]
        x = nn.functional.pad(x, [p for pair in reversed(pairs) for p in pair])
        conv = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(pairs) - 1]
        return conv(x, weight, bias, self.stride, 0, self.dilation)

    def rounding_bound(self, x: Tensor) -> Tensor:
        """The largest error of each output, if its products are summed up in fp32, in any order.

        N. J. Higham, "Accuracy and Stability of Numerical Algorithms" (2002), section 3.1.
        """
        double = [None if t is None else t.double().abs() for t in (x, self.weight, self.bias)]
        magnitude = self._dense(*double)
        terms = self.weight[0].numel() + 2
        return terms * 2.0**-24 * magnitude + torch.finfo(x.dtype).eps / 2 * self.reference(x).abs() + 1e-30


class Layers(nn.Module):
    """Independent layers side by side: one compilation for all of them."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(case) for case in cases)

    def forward(self, xs: list[Tensor]) -> list[Any]:
        return [layer(x) for layer, x in zip(self.layers, xs, strict=True)]


@contextmanager
def compiling(**options: Any) -> Iterator[list[str]]:
    """Compiles afresh inside: Inductor's graph caches do not see our sources. Yields the generated text."""
    torch._dynamo.reset()
    lowerings.register()
    with (
        torch.no_grad(),
        capture_sources() as sources,
        torch._inductor.config.patch({"fx_graph_cache": False, **options}),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield sources


def run(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, str]:
    """Compiles with plain Inductor and calls; also returns the text that was generated.

    With the C++ wrapper all kernels of a graph are one file: the headers are compiled once.
    """
    with compiling(cpp_wrapper=True) as sources:
        out = torch.compile(module, fullgraph=True, **kwargs)(*args)
    return out, "\n".join(sources)


def count_kernels(source: str) -> dict[str, int]:
    """Number of block-sparse kernels, and of all kernels, in the text of one graph with the C++ wrapper."""
    return {
        "block_sparse": source.count("using RegisterTile = "),
        "all": len(re.findall(r"void\s+cpp_\w+\([^;{]*\)\s*\{", source)),
    }


def assert_close_to_float64(layer: Layer, x: Tensor, got: Tensor) -> None:
    """The error is at most 1.5 times that of torch's own dense kernel, plus a rounding of the output.

    Few rounding errors scatter, and so does the ratio of their norms: small layers are given room for that.

    On low-precision numbers, every output is as near as fp32 sums and one rounding allow.
    """
    exact = layer.reference(x)
    assert got.shape == exact.shape and got.dtype == x.dtype
    if x.dtype in (torch.bfloat16, torch.float16):
        excess = (got - exact).abs() - layer.rounding_bound(x)
        assert excess.max() <= 0, (
            f"{layer.case}: {int((excess > 0).sum())} outputs of {excess.numel()} are off"
        )
        return
    error, dense = got - exact, layer.reference(x, torch.float32) - exact
    times = 1.5 + 6 / math.sqrt(max(1, int(dense.count_nonzero())))
    limit = times * dense.norm() + 2.0**-24 * exact.norm()
    assert error.norm() <= limit, f"{layer.case}: error {error.norm()}, dense {dense.norm()}"
