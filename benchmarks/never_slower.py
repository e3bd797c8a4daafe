"""Is `backend="blocksparse"` ever slower than dense? A sample of layers, against their fastest dense build.

    python -m benchmarks.never_slower
    python -m benchmarks.never_slower --cases 20 --seed 1 --name another

Kinds of layers, channels, image sizes, batches, block shapes, kept shares and dtypes are drawn at random, the
same for every run of one seed. Everything runs as the cost model decides. Several layers of one shape run in
each call, as in `benchmarks.layers`; of layers that stay dense, that shows what our backend costs besides.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from . import baselines, layers, report
from .ours import compile_layers, newest_plan
from .shapes import Conv1dShape, ConvShape, LinearShape, Shape
from .timing import Call, geometric_mean, interleave, keep_freed_memory

BLOCKS = ((32, 32), (16, 16), (8, 8), (4, 1), (1, 1))
DENSITIES = (1.0, 0.9, 0.75, 0.5, 0.25, 0.1)
CHANNELS = (32, 64, 96, 128, 192, 256, 320, 512, 768, 1024)
KINDS = ("1x1", "3x3", "1x1/2", "3x3/2", "conv1d", "linear")
MOST_MACS, MOST_WEIGHTS = 4e8, 2**21
NOISE = 1.05
LIMITS = (0.9, 0.95, 1.0, 1.05, 1.2, 1.5, 2.0, 3.0)
"""Of the speed-ups that are counted together."""

COPIES = 8


@dataclass(frozen=True)
class Case:
    shape: Shape
    batch: int
    block: tuple[int, int]
    density: float
    dtype: torch.dtype


def cases(count: int, seed: int) -> list[Case]:
    """Layers of moderate size, all different."""
    draw, found = random.Random(seed), dict[Case, None]()
    while len(found) < count:
        shape, batch = _shape(draw), draw.choice((1, 8))
        dtype = draw.choice((torch.float32, torch.float32, torch.bfloat16))
        case = Case(shape, batch, draw.choice(BLOCKS), draw.choice(DENSITIES), dtype)
        if shape.macs * batch <= MOST_MACS and shape.weights <= MOST_WEIGHTS:
            found[case] = None
    return list(found)


def _shape(draw: random.Random) -> Shape:
    kind, inputs, outputs = draw.choice(KINDS), draw.choice(CHANNELS), draw.choice(CHANNELS)
    if kind == "linear":
        return LinearShape(inputs, outputs, draw.choice((1, 4, 16, 64, 128)))
    if kind == "conv1d":
        return Conv1dShape(inputs, draw.choice((50, 200, 400)), outputs, draw.choice((1, 3, 5)))
    kernel, _, stride = kind.partition("/")
    return ConvShape(inputs, draw.choice((7, 14, 28, 56)), outputs, int(kernel[0]), int(stride or 1))


@dataclass(frozen=True)
class Compiled:
    """What is timed of a case, and what is known of it."""

    calls: dict[str, Call]
    row: dict[str, Any]


def compiled(case: Case) -> Compiled:
    """The dense builds and ours, which is checked."""
    torch.manual_seed(0)
    x = case.shape.input(case.batch).to(case.dtype)
    dense = [case.shape.layer().eval().to(case.dtype) for _ in range(COPIES)]
    if x.dim() == 4:
        dense = [layer.to(memory_format=torch.channels_last) for layer in dense]
    relu = not isinstance(case.shape, LinearShape)
    calls = dense_builds(dense, x, relu)
    sparse = [layers.sparse_copy(layer, case.block, case.density) for layer in dense]
    ours = compile_layers(sparse, x, relu)
    row = {
        "shape": str(case.shape),
        "batch": case.batch,
        "block": "x".join(map(str, case.block)),
        "density": case.density,
        "dtype": str(case.dtype).removeprefix("torch."),
        "kernel": ours.kernel,
        "estimates": dict(newest_plan().decisions[0].estimates),
        **layers.check(ours, sparse, x, relu),
    }
    return Compiled({**calls, "auto": ours.calls["auto"]}, row)


def dense_builds(dense: list[Any], x: Tensor, relu: bool) -> dict[str, Call]:
    """What a user can have: eager torch, and frozen Inductor."""
    eager = baselines.several([baselines.with_relu(layer, torch.relu_) if relu else layer for layer in dense])
    whole = baselines.several([baselines.with_relu(layer) if relu else layer for layer in dense])
    with baselines.frozen_inductor(cpp_wrapper=False, best_linear=True):
        fast = baselines.compiled(whole)
        fast(x)
    return {"eager": lambda: eager(x), "inductor": lambda: fast(x)}


def measure(chosen: list[Case], budget: float) -> Iterator[dict[str, Any]]:
    """Compiles all, then times all: the machine does one thing at a time."""
    torch._dynamo.reset()
    with report.progress() as bar:
        ready = [compiled(case) for case in bar.track(chosen, description="compiling")]
    for each in ready:
        found = interleave(each.calls, budget=budget, rounds=(15, 200))
        timings = {name: t.to_json(COPIES) for name, t in found.items()}
        ours = timings.pop("auto")
        yield {**each.row, **report.compared(timings, ours)}


def print_rows(rows: list[dict[str, Any]], worst: int = 12) -> None:
    """The slowest layers, and how many fall between which limits."""
    table = Table(title=f"{len(rows)} layers against their fastest dense build: the worst")
    for column in ("layer", "batch", "blocks", "kept", "dtype", "kernel", "dense us", "ours us", "speed-up"):
        table.add_column(column, justify="left" if column in ("layer", "kernel") else "right")
    for r in sorted(rows, key=lambda row: float(row["speedup"]))[:worst]:
        times = (f"{t['median_ms'] * 1e3:.1f}" for t in (r["dense"][r["best_dense"]], r["ours"]))
        cells = (r["shape"], str(r["batch"]), r["block"], f"{r['density']:.0%}", r["dtype"], r["kernel"])
        table.add_row(*cells, *times, f"{r['speedup']:.2f}")
    report.console.print(table)
    for name, members in by_decision(rows).items():
        counts = ", ".join(f"{label}: {n}" for label, n in histogram(members).items() if n)
        mean = geometric_mean([r["speedup"] for r in members])
        report.console.print(f"{name}: {len(members)} layers, geometric mean {mean:.2f}; {counts}")


def by_decision(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Layers on kernels of ours, and those that stay dense."""
    dense = [row for row in rows if row["kernel"] == "dense"]
    return {"on our kernels": [row for row in rows if row not in dense], "left dense": dense}


def histogram(rows: list[dict[str, Any]]) -> dict[str, int]:
    """How many speed-ups lie below each of `LIMITS` and above those before it."""
    return {
        f"{low:g}-{high:g}": sum(low <= row["speedup"] < high for row in rows)
        for low, high in itertools.pairwise((0.0, *LIMITS, float("inf")))
    }


def run(
    cases_: Annotated[int, typer.Option("--cases", help="Layers to draw.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    budget: Annotated[float, typer.Option(help="Seconds of timing per layer.")] = 0.5,
    merge: Annotated[bool, typer.Option(help="Keep the other rows of an existing results file.")] = False,
    name: Annotated[str, typer.Option(help="Results are written as <name>.json.")] = "never_slower",
) -> None:
    """Layers drawn at random, as the cost model decides, against the strongest dense baseline."""
    keep_freed_memory()
    with torch.no_grad():
        rows = list(measure(cases(cases_, seed), budget))
    print_rows(rows)
    report.publish(name, rows, ("shape", "batch", "block", "density", "dtype"), merged=merge)


if __name__ == "__main__":
    typer.run(run)
