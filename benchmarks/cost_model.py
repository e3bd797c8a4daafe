"""How well the cost model predicts this machine: CPU kernels and torch's operators, on a spread of layers.

    python -m benchmarks.cost_model
    python -m benchmarks.cost_model --kernel cpu_bf16 --kernel cpu_int8 --batch 1

Every layer runs dense and on its kernel in several tiles and densities, in turn, with a ReLU. A row holds
what was measured and what the calibrated model says; the summary, by kernel: quantiles of predicted over
measured time, of predicted over measured gain, and what decisions cost (`regret`: the time of what the model
chooses among dense and ours, over the faster of the two).
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import blocksparse_compiler as bsc
from blocksparse_compiler import BlockPattern, Site, cost, devices, tune
from blocksparse_compiler.cpu_spmm import SPMM
from blocksparse_compiler.depthwise import DEPTHWISE, depthwise_pattern
from blocksparse_compiler.devices import DeviceSpec
from blocksparse_compiler.plan import DENSE
from blocksparse_compiler.variants import VARIANTS

from . import report, zoo
from .break_even import pointwise_sites
from .shapes import CONVOLUTIONS, LINEARS, ConvShape, Shape
from .timing import Call, keep_freed_memory

KERNELS = tuple(name for name, variant in VARIANTS.items() if variant.device == "cpu")
SQUARES = ((32, 32), (16, 16), (8, 8))
DENSITIES = (0.5, 0.2)
SCATTERED = (0.3, 0.1)
MOBILE = ("mobilenet_v1", "mobilenet_v2")
QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Case:
    """A layer, and the tiles that one kernel runs it in; all are timed in one group."""

    label: str
    site: Site
    kernel: str
    patterns: tuple[BlockPattern, ...]


# ---- layers ------------------------------------------------------------------------------------------


def cases(kernels: Sequence[str], batches: Sequence[int], device: DeviceSpec) -> Iterator[Case]:
    """Layers for each kernel that runs on this device."""
    for kernel in kernels:
        for case in _cases(kernel, batches):
            variant = VARIANTS[kernel]
            runs = [
                pattern
                for pattern in case.patterns
                if not variant.unsupported(case.site, pattern) and variant.configs(case.site, pattern, device)
            ]
            if runs:
                yield replace(case, patterns=tuple(runs))


def _cases(kernel: str, batches: Sequence[int]) -> Iterator[Case]:
    if kernel in (SPMM.name, DEPTHWISE.name):
        find = scattered_layers if kernel == SPMM.name else depthwise_layers
        yield from find(
            {label: site for model in MOBILE for label, site in find_sites(model, kernel).items()}
        )
        return
    for shape in (*CONVOLUTIONS, *LINEARS):
        for batch in batches:
            site = site_of(shape, batch, VARIANTS[kernel].dtypes[0])
            patterns = (random_tiles(site, b, density) for b in SQUARES for density in DENSITIES)
            yield Case(str(shape), site, kernel, tuple(patterns))


def find_sites(model: str, kernel: str) -> dict[str, Site]:
    """The distinct layers of a mobile network that this kernel is for, at batch 1."""
    if kernel == SPMM.name:
        return pointwise_sites(model)
    network = zoo.NETWORKS[model]()
    sites = bsc.passes.find_sites(bsc.trace(network.model, network.input(1)))
    return {_depthwise_label(site): site for site in sites if depthwise_pattern(site)}


def _depthwise_label(site: Site) -> str:
    size = "x".join(map(str, site.input_shape[2:]))
    return f"{site.in_channels} @{size}/{site.stride[0]}"


def scattered_layers(sites: dict[str, Site]) -> Iterator[Case]:
    for label, site in sites.items():
        patterns = (random_tiles(site, b, density) for b in SPMM_TILES for density in SCATTERED)
        yield Case(label, site, SPMM.name, tuple(patterns))


SPMM_TILES = ((1, 1), (2, 1), (4, 1))


def depthwise_layers(sites: dict[str, Site]) -> Iterator[Case]:
    for label, site in sites.items():
        yield Case(label, site, DEPTHWISE.name, tuple(depthwise_pattern(site)))


def site_of(shape: Shape, batch: int, dtype: str) -> Site:
    """The layer of a shape as the planner sees it."""
    if not isinstance(shape, ConvShape):
        rows = batch * shape.rows_per_item
        sizes = shape.out_features, shape.in_features
        return Site("fc", "linear", "linear", *sizes, input_shape=(rows, shape.in_features), dtype=dtype)
    return Site(
        "layer",
        "conv",
        "conv2d",
        shape.out_channels,
        shape.in_channels,
        (shape.kernel,) * 2,
        stride=(shape.stride,) * 2,
        padding=((shape.kernel // 2,) * 2,) * 2,
        dilation=(1, 1),
        output_padding=(0, 0),
        input_shape=(batch, shape.in_channels, shape.size, shape.size),
        dtype=dtype,
        bias=True,
    )


def random_tiles(site: Site, block_shape: tuple[int, int], density: float) -> BlockPattern:
    """Random tiles, the same for every run."""
    full = BlockPattern.full((site.out_channels, site.in_channels, *site.kernel_size), block_shape)
    draw = torch.rand(full.grid_shape, generator=torch.Generator().manual_seed(0))
    return full.with_kept(draw < density)


# ---- measuring ---------------------------------------------------------------------------------------


def compiled(case: Case, device: DeviceSpec) -> dict[str, Call]:
    """The layer dense, and in each pattern, all on one input."""
    run, x = tune.compile_candidate(case.site, None, DENSE, {})
    calls: dict[str, Call] = {DENSE: functools.partial(run, x)}
    for number, pattern in enumerate(case.patterns):
        config = VARIANTS[case.kernel].configs(case.site, pattern, device)[0]
        run, _ = tune.compile_candidate(case.site, pattern, case.kernel, config)
        calls[str(number)] = functools.partial(run, x)
    return calls


def measured(calls: dict[str, Call], empty: Call, seconds: float) -> dict[str, float]:
    """Median seconds of each, net of the cost of calling a compiled graph."""
    times = tune.interleave({"empty": empty, **calls}, seconds)
    return {name: max(times[name].median - times["empty"].median, 1e-7) for name in calls}


def rows_of(case: Case, seconds: dict[str, float], device: DeviceSpec) -> list[dict[str, Any]]:
    """Measured and predicted, side by side."""
    dense = cost.dense_cost(case.site, device).evaluate()
    rows = []
    for number, pattern in enumerate(case.patterns):
        ours = cost.sparse_cost(case.site, pattern, device, case.kernel).evaluate()
        rows.append(
            {
                "kernel": case.kernel,
                "shape": case.label,
                "batch": case.site.input_shape[0],
                "block": "x".join(map(str, pattern.block_shape)),
                "kept": round(pattern.density, 3),
                "dense_us": round(seconds[DENSE] * 1e6, 2),
                "dense_predicted_us": round(dense * 1e6, 2),
                "ours_us": round(seconds[str(number)] * 1e6, 2),
                "ours_predicted_us": round(ours * 1e6, 2),
            }
        )
    return rows


# ---- summary -----------------------------------------------------------------------------------------


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How far estimates are off, and what decisions by them cost."""
    ours = [r["ours_predicted_us"] / r["ours_us"] for r in rows]
    dense = [r["dense_predicted_us"] / r["dense_us"] for r in rows]
    gains = [a / b for a, b in zip(dense, ours, strict=True)]
    regrets = [regret(r) for r in rows]
    return {
        "layers": len(rows),
        "ours": quantiles(ours),
        "dense": quantiles(dense),
        "gain": quantiles(gains),
        "right": sum(r <= 1.0 for r in regrets) / len(regrets),
        "regret": statistics.geometric_mean(regrets),
        "worst_regret": max(regrets),
    }


def regret(row: dict[str, Any]) -> float:
    """Time of what the model chooses over that of the faster way."""
    sparse = row["ours_predicted_us"] < cost.MARGIN * row["dense_predicted_us"]
    chosen = row["ours_us"] if sparse else row["dense_us"]
    return float(chosen / min(row["ours_us"], row["dense_us"]))


def quantiles(values: Sequence[float]) -> list[float]:
    """Those of `QUANTILES`."""
    ordered = sorted(values)
    return [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in QUANTILES]


def print_summary(found: dict[str, dict[str, Any]]) -> None:
    table = Table(title="predicted over measured: 10 %, 50 % and 90 % quantiles")
    for column in ("kernel", "layers", "ours", "dense", "gain", "right", "regret", "worst"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for kernel, s in found.items():
        spreads = (" ".join(f"{v:.2f}" for v in s[key]) for key in ("ours", "dense", "gain"))
        shown = f"{s['right']:.0%}", f"{s['regret']:.3f}", f"{s['worst_regret']:.2f}"
        table.add_row(kernel, str(s["layers"]), *spreads, *shown)
    report.console.print(table)


def run(
    kernel: Annotated[list[str], typer.Option(help="Rows of the kernel table.")] = list(KERNELS),  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Images, or 128 rows of linear layers.")] = [1, 8],  # noqa: B006
    seconds: Annotated[float, typer.Option(help="Of timing per layer.")] = 0.25,
    name: Annotated[str, typer.Option(help="Results are written as <name>.json.")] = "cost_model",
) -> None:
    """Predicted against measured times."""
    unknown = [k for k in kernel if k not in KERNELS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: known are {', '.join(KERNELS)}")
    keep_freed_memory()
    device = devices.device("cpu")
    work = list(cases(kernel, batch, device))
    with torch.no_grad(), report.progress() as bar:
        empty, task = tune.call_cost(), bar.add_task("compiling", total=len(work))
        builds = []
        for case in work:
            builds.append(compiled(case, device))
            bar.advance(task)
        rows = []
        for case, calls in zip(work, builds, strict=True):
            rows += rows_of(case, measured(calls, empty, seconds), device)
    found = {k: summary([r for r in rows if r["kernel"] == k]) for k in dict.fromkeys(c.kernel for c in work)}
    print_summary(found)
    path = report.save(name, rows, summary=found, figures=device.to_json())
    report.console.print(f"wrote {path.name} in {path.parent.name}/")


if __name__ == "__main__":
    if report.asks_for_gpu(sys.argv):
        raise SystemExit("On a GPU, benchmarks.fit_gpu compares the cost model with measured layers.")
    typer.run(run)
