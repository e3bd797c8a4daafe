"""Linear layers on few rows, as when a language model generates text: bound by reading the weights.

    python -m benchmarks.decode
    python -m benchmarks.decode --rows 1 --block 16x1 --density 0.1

The sizes are those of a Llama of 7 billion parameters. As in `benchmarks.layers`, the fastest of eager,
oneDNN with prepacked weights, and frozen Inductor counts as dense.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from . import report
from .layers import Case, measure
from .shapes import LinearShape
from .timing import keep_freed_memory

SHAPES = (LinearShape(4096, 4096, 1), LinearShape(4096, 11008, 1), LinearShape(11008, 4096, 1))
BLOCKS = ("32x32", "16x16", "32x1", "16x1")
DENSITIES = (0.5, 0.25, 0.1)


def print_rows(rows: list[dict[str, Any]]) -> None:
    table = Table(title="linear layers on few rows: speed-up over the fastest dense build")
    for column in ("layer", "rows", "blocks", "kept", "dense ms", "ours ms", "GB/s", "speed-up"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for row in rows:
        dense, ours = row["dense"][row["best_dense"]]["median_ms"], row["ours"]["auto"]["median_ms"]
        cells = (f"{row['density']:.0%}", f"{dense:.2f}", f"{ours:.2f}", f"{row['weight_gb_per_s']:.0f}")
        table.add_row(row["shape"], str(row["batch"]), row["block"], *cells, f"{row['speedup']['auto']:.2f}")
    report.console.print(table)


def run(
    rows: Annotated[list[int], typer.Option(help="Rows of the input.")] = [1, 4, 16],  # noqa: B006
    block: Annotated[list[str], typer.Option(help="Block shapes.")] = list(BLOCKS),  # noqa: B006
    density: Annotated[list[float], typer.Option(help="Kept fractions.")] = list(DENSITIES),  # noqa: B006
    shape: Annotated[str, typer.Option(help="Only shapes whose name contains this.")] = "",
    engines: Annotated[bool, typer.Option(help="Also ONNX Runtime and OpenVINO.")] = True,
    budget: Annotated[float, typer.Option(help="Seconds of timing per group.")] = 0.5,
    merge: Annotated[bool, typer.Option(help="Keep the other rows of an existing results file.")] = False,
    name: Annotated[str, typer.Option(help="Results are written as <name>.json.")] = "decode",
) -> None:
    """Few rows, large weights, against the strongest dense baseline."""
    keep_freed_memory()
    found: list[dict[str, Any]] = []
    cases = [Case(s, m, b, "none") for s in SHAPES if shape in str(s) for m in rows for b in block]
    with torch.no_grad(), report.progress() as bar:
        for case in bar.track(cases, description="linear layers on few rows"):
            others = engines and case.block == block[0]  # which are dense: once is enough
            for row in measure(case, tuple(density), budget, engines=others):
                assert isinstance(case.shape, LinearShape)
                weights = 4 * row["kept"] * case.shape.in_features * case.shape.out_features
                found.append({**row, "weight_gb_per_s": weights / row["ours"]["auto"]["median_ms"] / 1e6})
    print_rows(found)
    report.publish(name, found, ("shape", "batch", "block", "density", "threads"), merged=merge)


if __name__ == "__main__":
    typer.run(run)
