"""The generated kernels alone, called without a wrapper, against the prepacked oneDNN operator (ReLU fused).

    python -m benchmarks.kernels --block 32x32 --batch 8 --config chunk=4 --config chunk=8

For tuning: every `--config` (parameters of the kernel variant) takes turns with the others and with the dense
operator; without one, the candidates of the variant table run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from blocksparse_compiler import BlockPattern, Site
from blocksparse_compiler.codegen import lowerings
from blocksparse_compiler.devices import DeviceSpec
from blocksparse_compiler.variants import VARIANTS, KernelConfig

from . import report
from .baselines import fresh_code
from .layers import BLOCKS
from .masks import random_mask
from .shapes import CONVOLUTIONS, ConvShape
from .timing import geometric_mean, interleave

VARIANT_OF = {"float32": "cpu_f32", "bfloat16": "cpu_bf16"}
Parameters = dict[str, "int | str"]


class SparseLayer(nn.Module):
    """The operator with its packed weight, and a ReLU to fuse."""

    def __init__(
        self, layer: nn.Conv2d, block_shape: tuple[int, int], variant: str, parameters: Parameters
    ) -> None:
        super().__init__()
        self.layer = layer
        pattern = BlockPattern.from_weight(layer.weight, block_shape)
        packed = VARIANTS[variant].pack(layer.weight, pattern)
        for name, tensor in packed._asdict().items():
            self.register_buffer(name, tensor)
        self.kernel = KernelConfig(variant, parameters).encode()

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        padding = [p for p in layer.padding for _ in range(2)]
        weight = (self.values, self.row_ptr, self.tile_index, layer.bias, layer.out_channels)
        geometry = (list(layer.kernel_size), list(layer.stride), padding, list(layer.dilation))
        return torch.relu(torch.ops.blocksparse.conv(x, *weight, *geometry, True, self.kernel))


def raw_kernel(module: SparseLayer, x: Tensor) -> Callable[[], Tensor]:
    """The compiled kernel, bound to the layer's tensors and an output of its own. Checked once."""
    torch._dynamo.reset()
    forward = torch.compile(fresh_code(SparseLayer.forward), dynamic=False)
    with torch.no_grad(), uncached():
        y, (code,) = run_and_get_code(forward, module, x)
        expected = torch.relu(module.layer(x))
    namespace: dict[str, Any] = {"__name__": "generated"}
    exec(compile(code, "generated", "exec"), namespace)
    (kernel,) = (value for name, value in namespace.items() if name.startswith("cpp_fused"))
    arguments = [x, module.values, module.row_ptr, module.tile_index]
    out = torch.full_like(y, math.nan)
    kernel(*arguments, out)
    tolerance = 1e-4 if x.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out, expected, rtol=10 * tolerance, atol=tolerance)

    def call() -> Tensor:
        kernel(*arguments, out)
        return out

    return call


@contextmanager
def uncached() -> Iterator[None]:
    """Graph caches do not see our sources without the backend."""
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


def site_of(shape: ConvShape, batch: int, dtype: str) -> Site:
    pad = shape.kernel // 2
    return Site(
        name=str(shape),
        node="",
        op="conv2d",
        out_channels=shape.out_channels,
        in_channels=shape.in_channels,
        kernel_size=(shape.kernel,) * 2,
        stride=(shape.stride,) * 2,
        padding=((pad, pad),) * 2,
        dilation=(1, 1),
        input_shape=(batch, shape.in_channels, shape.size, shape.size),
        dtype=dtype,
    )


def measure(
    shape: ConvShape,
    batch: int,
    block: str,
    dtype: str,
    densities: list[float],
    configs: list[Parameters],
    budget: float,
) -> dict[float, list[float]]:
    """Speed-ups over dense, per density and config."""
    torch.manual_seed(0)
    form = {"dtype": report.dtype_of(dtype), "memory_format": torch.channels_last}
    layer = shape.layer().eval().to(**form)
    x = shape.input(batch).to(form["dtype"])
    geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
    packed = torch.ops.mkldnn._reorder_convolution_weight(layer.weight, *geometry, list(x.shape))
    calls: dict[str, Callable[[], Any]] = {
        "dense": lambda: torch.ops.mkldnn._convolution_pointwise(x, packed, None, *geometry, "relu", [], "")
    }
    for density in densities:
        sparse = shape.layer().eval().to(**form)
        sparse.weight.data.mul_(random_mask(sparse.weight, BLOCKS[block], density))
        for i, config in enumerate(configs):
            calls[f"{density}/{i}"] = raw_kernel(
                SparseLayer(sparse, BLOCKS[block], VARIANT_OF[dtype], config), x
            )
    if not budget:
        return {}
    with torch.no_grad():
        timings = interleave(calls, budget=budget, rounds=(10, 200))
    dense = timings["dense"].minimum
    return {d: [dense / timings[f"{d}/{i}"].minimum for i in range(len(configs))] for d in densities}


def candidates(shape: ConvShape, batch: int, block: str, dtype: str) -> list[Parameters]:
    layer = shape.layer()
    pattern = BlockPattern.full(tuple(layer.weight.shape), BLOCKS[block])
    return VARIANTS[VARIANT_OF[dtype]].configs(site_of(shape, batch, dtype), pattern, DeviceSpec.host())


def parse(config: str) -> Parameters:
    return dict(KernelConfig.decode(f"any;{config.replace(',', ';')}").parameters)


def main(
    batch: Annotated[list[int], typer.Option()] = [8, 1],  # noqa: B006
    block: Annotated[list[str], typer.Option()] = ["32x32"],  # noqa: B006
    density: Annotated[list[float], typer.Option()] = [1.0, 0.5, 0.25],  # noqa: B006
    config: Annotated[list[str], typer.Option(help="parameters, as in chunk=4,row_threads=1")] = [],  # noqa: B006
    shape: Annotated[str, typer.Option(help="only shapes whose name contains this")] = "",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16")] = "float32",
    budget: Annotated[float, typer.Option(help="seconds per shape; 0 compiles only")] = 1.0,
) -> None:
    lowerings.register()
    for b in block:
        for n in batch:
            best: dict[float, list[float]] = {d: [] for d in density}
            first: dict[float, list[float]] = {d: [] for d in density}
            for s in (s for s in CONVOLUTIONS if shape in str(s)):
                configs = [parse(c) for c in config] or candidates(s, n, b, dtype)
                for d, speedups in measure(s, n, b, dtype, density, configs, budget).items():
                    best[d].append(max(speedups))
                    first[d].append(speedups[0])
                    text = " ".join(f"{v:.2f}" for v in speedups)
                    print(f"{b} n{n} {s!s:24} {d:4} {text}", flush=True)
            for d in density:
                print(
                    f"{b} n{n} GEO {d}: best {geometric_mean(best[d]):.3f} "
                    f"first {geometric_mean(first[d]):.3f}"
                )


if __name__ == "__main__":
    typer.run(main)
