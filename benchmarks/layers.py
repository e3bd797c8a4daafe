"""ResNet-50's convolution shapes, and BERT's linear shapes, at several densities and block shapes.

    python -m benchmarks.layers                       # everything: 12 shapes x 2 batches x 3 blocks
    python -m benchmarks.layers --batch 8 --block 32x32 --density 0.5 --shape 3x3
    python -m benchmarks.layers --dtype bfloat16
    python -m benchmarks.layers --device cuda         # on a GPU, with options of its own: see gpu_layers

Each case times the layer (with and without a ReLU) compiled by `backend="blocksparse"`, once as the cost
model decides (`auto`) and once with the sparse kernel forced, against the fastest of eager
channels-last, the prepacked oneDNN operator and frozen Inductor with its C++ wrapper. Every call runs
several layers of one shape on one input (`--copies`), as a network runs one layer after another: a lone
layer would mostly show the fixed cost of a compiled call, which a network pays once, and would find its
weights in the cache, which a network does not. Times are per layer. ONNX Runtime and OpenVINO run the dense
layers too, where they are installed; not in turn with the others, as their threads spin between calls.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from . import baselines, pictures, report
from .engines import Several, engine_calls
from .masks import random_mask
from .ours import Ours, compile_layers
from .shapes import CONVOLUTIONS, LINEARS, LinearShape, Shape
from .timing import Call, interleave, keep_freed_memory

SQUARES = {"32x32": (32, 32), "16x16": (16, 16), "8x8": (8, 8)}
BLOCKS = {**SQUARES, "32x1": (32, 1), "16x1": (16, 1)}
DENSITIES = (1.0, 0.75, 0.5, 0.25, 0.1)
EPILOGUES = ("relu", "none")


@dataclass(frozen=True)
class Case:
    """Everything that is timed in one interleaved group shares these."""

    shape: Shape
    batch: int
    block: str
    epilogue: str
    dtype: str = "float32"


def sparse_copy(layer: nn.Module, block_shape: tuple[int, int], density: float) -> nn.Module:
    """A layer of the same shape with that share of its blocks kept, the rest exactly zero."""
    sparse = copy.deepcopy(layer)
    sparse.weight.data.mul_(random_mask(sparse.weight, block_shape, density))
    return sparse


def measure(
    case: Case, densities: tuple[float, ...], budget: float, copies: int = 1, engines: bool = False
) -> Iterator[dict[str, Any]]:
    """One row per density; all densities and all dense candidates take turns."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block_shape = BLOCKS[case.block]
    dtype = report.dtype_of(case.dtype)
    layers = [
        case.shape.layer().eval().to(dtype=dtype, memory_format=torch.channels_last) for _ in range(copies)
    ]
    x = case.shape.input(case.batch).to(dtype)
    relu = case.epilogue == "relu"

    calls = _dense_calls(layers, x, relu)
    dense_names = list(calls)
    ours: dict[float, Ours] = {}
    checks: dict[float, dict[str, float]] = {}
    for density in densities:
        sparse = [sparse_copy(layer, block_shape, density) for layer in layers]
        ours[density] = compile_layers(sparse, x, relu, block_shape)
        checks[density] = check(ours[density], sparse, x, relu)
        calls |= {f"{density}/{mode}": call for mode, call in ours[density].calls.items()}
        runs_in_torch = block_shape[0] == block_shape[1] and dtype == torch.float32
        if (
            isinstance(case.shape, LinearShape) and runs_in_torch and density <= 0.5
        ):  # above, it takes seconds
            calls[f"{density}/torch_bsr"] = baselines.torch_bsr_linear(sparse, x, block_shape)

    timings = {name: t.to_json(copies) for name, t in interleave(calls, budget=budget).items()}
    dense = {name: timings[name] for name in dense_names}
    others = engine_calls(Several(layers, relu), x) if engines and dtype == torch.float32 else {}
    other_timings = interleave(others, budget=budget / 2) if others else {}
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
            "dtype": case.dtype,
            "kept": ours[density].density,
            "kernel": ours[density].kernel,
            "dense": dense,
            "torch_bsr": bsr,
            "engines": {name: t.to_json(copies) for name, t in other_timings.items()},
            "threads": torch.get_num_threads(),
            "copies": copies,
            "ours": mine,
            "best_dense": report.best(dense),
            "speedup": {mode: report.speedup(dense, t) for mode, t in mine.items()},
            **checks[density],
        }


def _dense_calls(layers: list[Any], x: Tensor, relu: bool) -> dict[str, Call]:
    if isinstance(layers[0], nn.Conv2d):
        return baselines.dense_convolutions(layers, x, relu)
    return baselines.dense_linears(layers, x)


def check(ours: Ours, layers: Sequence[nn.Module], x: Tensor, relu: bool) -> dict[str, float]:
    """Relative error of ours and of torch's own dense kernel against float64; raises if ours is wrong."""
    after = torch.relu if relu else lambda y: y
    references = [after(copy.deepcopy(layer).double()(x.double())) for layer in layers]

    def error(outputs: list[Tensor]) -> float:
        pairs = zip(outputs, references, strict=True)
        return max(float((y - reference).norm() / reference.norm()) for y, reference in pairs)

    floor = error([after(layer(x)) for layer in layers])
    worst = max(error(call()) for call in ours.calls.values())
    if not worst < max(10 * floor, 1e-5):
        raise RuntimeError(f"{layers[0]}: relative error {worst:.1e}, dense {floor:.1e}; nothing was timed")
    return {"error": worst, "dense_error": floor}


def all_cases(
    batches: list[int], blocks: list[str], epilogues: list[str], linear: bool, dtype: str = "float32"
) -> Iterator[Case]:
    """Convolutions in every combination, without ReLU for the first block only; linear layers at the last
    batch, because torch's block-sparse product takes seconds at larger ones."""
    for shape, batch, block, epilogue in itertools.product(CONVOLUTIONS, batches, blocks, epilogues):
        if epilogue == "relu" or block == blocks[0]:
            yield Case(shape, batch, block, epilogue, dtype)
    if linear:
        for linear_shape, block in itertools.product(LINEARS, blocks):
            yield Case(linear_shape, batches[-1], block, "none", dtype)


def run(
    batch: Annotated[list[int], typer.Option(help="Batch sizes.")] = [8, 1],  # noqa: B006
    block: Annotated[list[str], typer.Option(help="Block shapes.")] = list(SQUARES),  # noqa: B006
    density: Annotated[list[float], typer.Option(help="Kept fractions.")] = list(DENSITIES),  # noqa: B006
    epilogue: Annotated[list[str], typer.Option(help="relu, none.")] = list(EPILOGUES),  # noqa: B006
    shape: Annotated[str, typer.Option(help="Only shapes whose name contains this.")] = "",
    linear: Annotated[bool, typer.Option(help="Also BERT's linear layers.")] = True,
    dtype: Annotated[str, typer.Option(help="Of weights and activations: float32, bfloat16.")] = "float32",
    copies: Annotated[int, typer.Option(help="Layers of one shape per call; more at batch 1.")] = 4,
    threads: Annotated[int, typer.Option(help="0: as many as torch takes by itself.")] = 0,
    engines: Annotated[bool, typer.Option(help="Also ONNX Runtime and OpenVINO.")] = True,
    budget: Annotated[float, typer.Option(help="Seconds of timing per group.")] = 0.3,
    merge: Annotated[bool, typer.Option(help="Keep the other rows of an existing results file.")] = False,
    name: Annotated[
        str, typer.Option(help="Results are written as <name>.json and .png; default by dtype.")
    ] = "",
) -> None:
    """Layer by layer against the strongest dense baseline."""
    name = name or report.with_dtype("layers", dtype)
    cases = [case for case in all_cases(batch, block, epilogue, linear, dtype) if shape in str(case.shape)]
    keep_freed_memory()
    all_threads = torch.get_num_threads()
    torch.set_num_threads(threads or all_threads)
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), report.progress() as bar:
        task = bar.add_task("layers", total=len(cases))
        for case in cases:
            bar.update(task, description=f"{case.shape}, batch {case.batch}, {case.block}")
            in_call = copies if case.batch > 1 else 2 * copies
            rows += measure(case, tuple(density), budget, in_call, engines)
            bar.advance(task)
    pictures.print_layers(rows)
    torch.set_num_threads(all_threads)
    if merge:
        keys = ("shape", "batch", "block", "epilogue", "density", "threads")
        rows = report.merge(report.path_of(name), rows, keys)
    path = report.save(name, rows, copies=copies, summary=pictures.summarize(rows))
    pictures.draw_layers(rows, path.with_suffix(".png"))
    report.console.print(f"wrote {path.name} and {path.with_suffix('.png').name} in {path.parent.name}/")


if __name__ == "__main__":
    if report.asks_for_gpu(sys.argv):
        from .gpu_layers import run
    typer.run(run)
