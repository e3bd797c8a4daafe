"""The tuned table from measured layers, several results files together.

python -m benchmarks.gpu_tuned benchmarks/results/gpu_layers.json
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from blocksparse_compiler import tuned_table

from . import report
from .gpu_cases import Candidate, Cell

Row = dict[str, Any]


def entries(rows: Sequence[Row]) -> list[tuned_table.Entry]:
    """The time of every candidate, with the class of layers that it stands for."""
    found = []
    for row in rows:
        cell = Cell.from_json(row["cell"])
        for measured in row["candidates"]:
            bh, bw = (int(side) for side in measured["tile"].split("x"))
            candidate = Candidate(cell, measured["variant"], (bh, bw), measured["config"])
            entry = tuned_table.shape_class(candidate.variant, cell.site(), candidate.pattern)
            assert entry is not None
            found.append({**entry, "config": measured["config"], "ms": round(measured["median_ms"], 5)})
    return found


def write(results: Sequence[dict[str, Any]], folder: Path = tuned_table.FOLDER) -> Path:
    """Writes `<device>.json` from the contents of results files of one GPU."""
    machine = results[-1]["machine"]
    path = folder / f"{machine['spec']}.json"
    measured_with = {key: str(machine[key]) for key in ("gpu", "torch", "triton", "date")}
    rows = [row for data in results for row in data["rows"]]
    tuned_table.write(path, machine["spec"], entries(rows), measured_with)
    return path


def run(
    results: Annotated[list[Path], typer.Argument(help="Files that benchmarks.layers wrote.")],
    folder: Annotated[Path, typer.Option(help="For the table; by default the package's.")] = (
        tuned_table.FOLDER
    ),
) -> None:
    """Makes a tuned table."""
    report.console.print(f"wrote {write([report.load(path) for path in results], folder)}")


if __name__ == "__main__":
    typer.run(run)
