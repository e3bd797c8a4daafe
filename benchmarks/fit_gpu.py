"""Fits the cost model's figures of a GPU to the layers that were measured on it.

python -m benchmarks.fit_gpu                       # reads results/gpu_layers.json, shows the errors
python -m benchmarks.fit_gpu --write               # and makes the figures those of the package
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from blocksparse_compiler import devices, gpu_fit
from blocksparse_compiler.gpu_devices import GpuSpec
from blocksparse_compiler.gpu_fit import Measurement

from . import report
from .gpu_cases import Candidate, Cell

RESULTS = report.path_of("gpu_layers")


def measurements(rows: list[dict[str, Any]]) -> list[Measurement]:
    """The best dense build of each layer, and every candidate."""
    found: list[Measurement] = []
    dense: dict[str, Measurement] = {}
    for row in rows:
        cell = Cell.from_json(row["cell"])
        site = cell.site()
        best = min(timing["median_ms"] for timing in row["dense"].values())
        dense.setdefault(f"{row['shape']} {row['batch']}", Measurement(site, best / 1e3))
        for timed in row["candidates"]:
            bh, bw = (int(side) for side in timed["tile"].split("x"))
            pattern = Candidate(cell, timed["variant"], (bh, bw), timed["config"]).pattern
            seconds = timed["median_ms"] / 1e3
            found.append(Measurement(site, seconds, timed["variant"], pattern, timed["config"]))
    return [*dense.values(), *found]


def run(
    results: Annotated[Path, typer.Argument(help="Written by benchmarks.layers --device cuda.")] = RESULTS,
    write: Annotated[bool, typer.Option(help="Make the figures those of the package.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the package keeps figures.")] = gpu_fit.MEASURED_FOLDER,
) -> None:
    """Estimates against measurements, before and after fitting."""
    data = report.load(results)
    spec = devices.device(data["machine"]["spec"])
    assert isinstance(spec, GpuSpec)
    spec, measured = spec.with_graphs(), measurements(data["rows"])  # times are those of CUDA graphs
    fitted = gpu_fit.fit(spec, measured)
    report.console.print(_table(spec, fitted, measured))
    if write:
        machine = data["machine"]
        source = f"fitted to {len(measured)} kernels on {machine['gpu']}, torch {machine['torch']}"
        report.console.print(f"wrote {gpu_fit.write(fitted, source, folder)}", highlight=False)


def _table(spec: GpuSpec, fitted: GpuSpec, measured: list[Measurement]) -> Table:
    table = Table(title=f"estimates over measurements on {spec.name}, medians", title_justify="left")
    table.add_column("kernel")
    for name in ("layers", "ratio before", "after", "off by a factor, before", "after"):
        table.add_column(name, justify="right")
    before, after = (gpu_fit.errors(s, measured) for s in (spec, fitted))
    for variant, (count, ratio, factor) in before.items():
        _, new_ratio, new_factor = after[variant]
        table.add_row(variant, str(count), *(f"{x:.2f}" for x in (ratio, new_ratio, factor, new_factor)))
    return table


if __name__ == "__main__":
    typer.run(run)
