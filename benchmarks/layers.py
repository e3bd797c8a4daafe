"""ResNet-50's convolution shapes, and BERT's linear shapes, at several densities and block shapes.

    python -m benchmarks.layers                       # everything: 12 shapes x 2 batches x 3 blocks
    python -m benchmarks.layers --batch 8 --block 32x32 --density 0.5 --shape 3x3

Each case times the layer (with and without a ReLU) compiled by `backend="blocksparse"`, once as the cost
model decides (`auto`) and once with the sparse kernel forced, against the fastest of eager
channels-last, the prepacked oneDNN operator and frozen Inductor with its C++ wrapper. Every call runs the
layer on several inputs (`--copies`), as a network runs one layer after another: a lone layer would mostly
show the fixed cost of a compiled call, which a network pays once. The layer without ReLU is timed for the
first block shape only.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from blocksparse_compiler import BlockPattern

from . import baselines, pictures, report
from .ours import Ours, compile_layer
from .shapes import CONVOLUTIONS, LINEARS, Shape
from .timing import Call, interleave

BLOCKS = {"32x32": (32, 32), "16x16": (16, 16), "8x8": (8, 8)}
DENSITIES = (1.0, 0.75, 0.5, 0.25, 0.1)
EPILOGUES = ("relu", "none")


@dataclass(frozen=True)
class Case:
    """Everything that is timed in one interleaved group shares these."""

    shape: Shape
    batch: int
    block: str
    epilogue: str


def random_mask(weight: Tensor, block_shape: tuple[int, int], density: float) -> Tensor:
    """Bool mask of a random `density` of the weight's channel blocks (at least one), equal for all taps."""
    full = BlockPattern.full(tuple(weight.shape), block_shape)
    rows, taps, columns = full.grid_shape
    keep = torch.randperm(rows * columns) < max(1, round(density * rows * columns))
    return full.with_kept(keep.reshape(rows, 1, columns).expand(rows, taps, columns)).mask()


def sparse_copy(layer: nn.Module, block_shape: tuple[int, int], density: float) -> nn.Module:
    """A layer of the same shape with that share of its blocks kept, the rest exactly zero."""
    sparse = copy.deepcopy(layer)
    sparse.weight.data.mul_(random_mask(sparse.weight, block_shape, density))
    return sparse


def measure(
    case: Case, densities: tuple[float, ...], budget: float, copies: int = 1
) -> Iterator[dict[str, Any]]:
    """One row per density; all densities and all dense candidates take turns."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block_shape = BLOCKS[case.block]
    layer = case.shape.layer().eval().to(memory_format=torch.channels_last)
    inputs = [case.shape.input(case.batch) for _ in range(copies)]
    relu = case.epilogue == "relu"

    calls: dict[str, Call] = _dense_calls(layer, inputs, relu)
    dense_names = [name for name in calls if name != "torch_bsr"]
    ours: dict[float, Ours] = {}
    checks: dict[float, dict[str, float]] = {}
    for density in densities:
        sparse = sparse_copy(layer, block_shape, density)
        ours[density] = compile_layer(sparse, inputs, relu, block_shape)
        checks[density] = check(ours[density], sparse, inputs[0], relu)
        calls |= {f"{density}/{mode}": call for mode, call in ours[density].calls.items()}
        if isinstance(sparse, nn.Linear) and density <= 0.5:  # it is slow: seconds at higher densities
            calls[f"{density}/torch_bsr"] = baselines.torch_bsr_linear(sparse, inputs, block_shape)

    timings = {name: t.to_json(copies) for name, t in interleave(calls, budget=budget).items()}
    dense = {name: timings[name] for name in dense_names}
    for density in densities:
        prefix = f"{density}/"
        mine = {n.removeprefix(prefix): t for n, t in timings.items() if n.startswith(prefix)}
        bsr = mine.pop("torch_bsr", None)
        mine.setdefault("forced", mine["auto"])
        yield {
            "shape": str(case.shape),
            "batch": case.batch,
            "block": case.block,
            "epilogue": case.epilogue,
            "density": density,
            "kept": ours[density].density,
            "kernel": ours[density].kernel,
            "dense": dense,
            "torch_bsr": bsr,
            "ours": mine,
            "best_dense": report.best(dense),
            "speedup": {mode: report.speedup(dense, t) for mode, t in mine.items()},
            **checks[density],
        }


def _dense_calls(layer: nn.Module, inputs: baselines.Inputs, relu: bool) -> dict[str, Call]:
    if isinstance(layer, nn.Conv2d):
        return baselines.dense_convolutions(layer, inputs, relu)
    assert isinstance(layer, nn.Linear)
    return baselines.dense_linears(layer, inputs)


def check(ours: Ours, layer: nn.Module, x: Tensor, relu: bool) -> dict[str, float]:
    """Relative error of ours and of torch's own dense kernel against float64; raises if ours is wrong."""
    reference = copy.deepcopy(layer).double()(x.double())
    dense: Callable[[Tensor], Tensor] = baselines.with_relu(layer) if relu else layer
    reference = torch.relu(reference) if relu else reference
    scale = reference.norm()
    floor = float((dense(x) - reference).norm() / scale)
    worst = max(float((call()[0] - reference).norm() / scale) for call in ours.calls.values())
    if not worst < max(10 * floor, 1e-5):
        raise RuntimeError(f"{layer}: relative error {worst:.1e}, dense {floor:.1e}; nothing was timed")
    return {"error": worst, "dense_error": floor}


def all_cases(batches: list[int], blocks: list[str], epilogues: list[str], linear: bool) -> Iterator[Case]:
    """Convolutions in every combination, without ReLU for the first block only; linear layers at the last
    batch, because torch's block-sparse product takes seconds at larger ones."""
    for shape, batch, block, epilogue in itertools.product(CONVOLUTIONS, batches, blocks, epilogues):
        if epilogue == "relu" or block == blocks[0]:
            yield Case(shape, batch, block, epilogue)
    if linear:
        for linear_shape, block in itertools.product(LINEARS, blocks):
            yield Case(linear_shape, batches[-1], block, "none")


def run(
    batch: Annotated[list[int], typer.Option(help="Batch sizes.")] = [8, 1],  # noqa: B006
    block: Annotated[list[str], typer.Option(help="Block shapes.")] = list(BLOCKS),  # noqa: B006
    density: Annotated[list[float], typer.Option(help="Kept fractions.")] = list(DENSITIES),  # noqa: B006
    epilogue: Annotated[list[str], typer.Option(help="relu, none.")] = list(EPILOGUES),  # noqa: B006
    shape: Annotated[str, typer.Option(help="Only shapes whose name contains this.")] = "",
    linear: Annotated[bool, typer.Option(help="Also BERT's linear layers.")] = True,
    copies: Annotated[int, typer.Option(help="Inputs per call, each run through the layer.")] = 4,
    budget: Annotated[float, typer.Option(help="Seconds of timing per group.")] = 0.3,
    name: Annotated[str, typer.Option(help="Results are written as <name>.json and .png.")] = "layers",
) -> None:
    """Layer by layer against the strongest dense baseline."""
    cases = [case for case in all_cases(batch, block, epilogue, linear) if shape in str(case.shape)]
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), report.progress() as bar:
        task = bar.add_task("layers", total=len(cases))
        for case in cases:
            bar.update(task, description=f"{case.shape}, batch {case.batch}, {case.block}")
            rows += measure(case, tuple(density), budget, copies)
            bar.advance(task)
    pictures.print_layers(rows)
    path = report.save(name, rows, copies=copies, summary=pictures.summarize(rows))
    pictures.draw_layers(rows, path.with_suffix(".png"))
    report.console.print(f"wrote {path.name} and {path.with_suffix('.png').name} in {path.parent.name}/")


if __name__ == "__main__":
    typer.run(run)
