"""Layers on 8-bit integers, kept tiles only, against Inductor's dense layers on integers, fp32 and bf16.

    python -m benchmarks.quantized
    python -m benchmarks.quantized --shape "1x1 256" --batch 1 --density 0.25

Each layer reads quantized activations and is followed by a ReLU and the next layer's quantize, as PyTorch's
PT2E flow leaves them; dense layers in fp32 and bf16 read and write activations of their own type. Several
layers of one shape run in each call, as in `benchmarks.layers`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor, nn

from blocksparse_compiler.codegen import lowerings

from . import baselines, report
from .masks import random_mask
from .ours import newest_plan
from .shapes import CONVOLUTIONS, LinearShape, Shape
from .timing import Call, geometric_mean, interleave, keep_freed_memory

SHAPES: tuple[Shape, ...] = (*CONVOLUTIONS, LinearShape(1024, 1024))
COPIES = 4
SCALE = 0.02


class QuantizedLayer(nn.Module):
    """An int8 weight of one scale per output channel, on uint8 activations; ReLU; quantize."""

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        scales = weight.flatten(1).abs().amax(1).clamp(min=1e-6) / 127
        shape = (-1, *[1] * (weight.dim() - 1))
        self.register_buffer("weight", (weight / scales.view(shape)).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("zero_points", torch.zeros(len(scales), dtype=torch.int64))
        self.register_buffer("bias", torch.randn(len(scales)))
        self.geometry = (layer.stride, layer.padding) if isinstance(layer, nn.Conv2d) else None

    def forward(self, x: Tensor) -> Tensor:
        q = torch.ops.quantized_decomposed
        x = q.dequantize_per_tensor.default(x, SCALE, 0, 0, 255, torch.uint8)
        bounds = (-128, 127, torch.int8)
        weight = q.dequantize_per_channel.default(self.weight, self.scales, self.zero_points, 0, *bounds)
        if self.geometry is None:
            y = nn.functional.linear(x, weight, self.bias)
        else:
            y = nn.functional.conv2d(x, weight, self.bias, *self.geometry)
        return q.quantize_per_tensor.default(torch.relu(y), SCALE, 0, 0, 255, torch.uint8)


def pruned(shape: Shape, density: float, block_shape: tuple[int, int]) -> list[nn.Module]:
    layers = [shape.layer() for _ in range(COPIES)]
    for layer in layers:
        layer.weight.mul_(random_mask(layer.weight, block_shape, density))
    return layers


def check(calls: Sequence[Tensor], layers: Sequence[QuantizedLayer], x: Tensor) -> int:
    """The largest difference to eager torch, in steps of the quantized output."""
    differences = [(y.int() - layer(x).int()).abs().max() for y, layer in zip(calls, layers, strict=True)]
    most = int(max(differences))
    if most > 1:
        raise RuntimeError(f"{most} steps off")
    return most


def measure(
    shape: Shape, batch: int, densities: Sequence[float], block: tuple[int, int], budget: float
) -> dict[str, Any]:
    """Every density and every dense build take turns."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    floats = shape.input(batch)
    x = floats.abs().div(0.02).clamp(max=255).to(torch.uint8)
    calls: dict[str, Call] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        layers = [baselines.with_relu(layer.to(dtype)) for layer in pruned(shape, 1.0, block)]
        calls[name] = _frozen(layers, floats.to(dtype))
    calls["int8"] = _frozen([QuantizedLayer(layer) for layer in pruned(shape, 1.0, block)], x)
    dense, facts = list(calls), {}
    for density in densities:
        ours = [QuantizedLayer(layer) for layer in pruned(shape, density, block)]
        options = {"dense": "never"}
        fast = baselines.compiled(baselines.several(ours), backend="blocksparse", options=options)
        facts[density] = {"steps_off": check(fast(x), ours, x), "kernel": newest_plan().decisions[0].kernel}
        calls[str(density)] = lambda fast=fast: fast(x)
    timings = {
        name: t.to_json(COPIES) for name, t in interleave(calls, budget=budget, rounds=(15, 300)).items()
    }
    builds = {name: timings[name] for name in dense}
    found = {str(density): {**fact, **timings[str(density)]} for density, fact in facts.items()}
    for ours_at in found.values():
        ours_at["speedup"] = report.speedup(builds, ours_at)
    sizes = {"shape": str(shape), "batch": batch, "block": list(block)}
    return {**sizes, "dense": builds, "densities": found}


def _frozen(layers: Sequence[nn.Module], x: Tensor) -> Call:
    """Inductor with frozen weights, compiled."""
    with baselines.frozen_inductor(cpp_wrapper=False):
        fast = baselines.compiled(baselines.several(layers))
        fast(x)
    return lambda: fast(x)


def print_rows(rows: list[dict[str, Any]]) -> None:
    densities = list(rows[0]["densities"])
    table = Table(title="milliseconds of dense layers, and speed-up over the fastest of them, by tiles kept")
    for column in ("shape", "batch", "fp32", "bf16", "int8", *(f"{float(d):.0%}" for d in densities)):
        table.add_column(column, justify="left" if column == "shape" else "right")
    for row in rows:
        dense = (f"{row['dense'][name]['median_ms']:.3f}" for name in ("fp32", "bf16", "int8"))
        gains = (f"{row['densities'][d]['speedup']:.2f}" for d in densities)
        table.add_row(row["shape"], str(row["batch"]), *dense, *gains)
    means = (geometric_mean([row["densities"][d]["speedup"] for row in rows]) for d in densities)
    table.add_row("geometric mean", "", "", "", "", *(f"{mean:.2f}" for mean in means))
    report.console.print(table)


def run(
    shape: Annotated[str, typer.Option(help="Only shapes whose name holds this.")] = "",
    batch: Annotated[list[int], typer.Option(help="Images, or 128 rows of linear layers.")] = [8],  # noqa: B006
    density: Annotated[list[float], typer.Option(help="Tiles kept.")] = [0.5, 0.25, 0.1],  # noqa: B006
    block: Annotated[int, typer.Option(help="Edge of the tiles.")] = 32,
    budget: Annotated[float, typer.Option(help="Seconds of timing per shape and batch.")] = 1.0,
    merge: Annotated[bool, typer.Option(help="Keep the other rows of an existing results file.")] = False,
    name: Annotated[str, typer.Option(help="Results are written as <name>.json.")] = "quantized",
) -> None:
    """Layers on 8-bit integers against the strongest dense baseline."""
    keep_freed_memory()
    lowerings.register()
    rows = []
    with torch.no_grad():
        for size in batch:
            for each in (s for s in SHAPES if shape in str(s)):
                few = 1 if isinstance(each, LinearShape) else size
                rows.append(measure(each, few, density, (block, block), budget))
    print_rows(rows)
    report.publish(name, rows, ("shape", "batch", "block"), merged=merge)


if __name__ == "__main__":
    if report.asks_for_gpu(sys.argv):
        raise SystemExit("This benchmark runs on CPUs.")
    typer.run(run)
