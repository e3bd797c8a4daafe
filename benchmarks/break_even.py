"""From which share of zeros on the 1x1 convolutions of MobileNets pay, shape by shape.

    python -m benchmarks.break_even
    python -m benchmarks.break_even --model mobilenet_v2 --height 1 --merge

Every distinct 1x1 convolution runs dense and with 100 % to 5 % of its weights kept, in turn, with a ReLU.
The break-even is where the measured times cross; next to it stands the one of the cost model, which decides.
Times must fall with the share that is kept: `monotone` says whether they do, within 3 %.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import blocksparse_compiler as bsc
from blocksparse_compiler import BlockPattern, Site, cost, devices, tune
from blocksparse_compiler.cpu_spmm import SPMM
from blocksparse_compiler.plan import DENSE

from . import report, zoo
from .timing import keep_freed_memory

DENSITIES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05)
NOISE = 1.03
Call = Callable[[], Any]
SHOWN = ("shape", "block", "dense us", *(f"{d:.0%}" for d in DENSITIES), "break-even", "planned", "monotone")


def pointwise_sites(model: str) -> dict[str, Site]:
    """The distinct 1x1 convolutions of a network at batch 1, by channels and image size."""
    network = zoo.NETWORKS[model]()
    graph = bsc.trace(network.model, network.input(1))
    found: dict[str, Site] = {}
    for site in bsc.passes.find_sites(graph):
        if site.kernel_size == (1, 1) and site.groups == 1 and site.stride == (1, 1):
            size = "x".join(map(str, site.input_shape[2:]))
            found.setdefault(f"{site.in_channels}→{site.out_channels} @{size}", site)
    return found


def scattered(site: Site, height: int, density: float) -> BlockPattern:
    """Random blocks, the same for every run."""
    full = BlockPattern.full((site.out_channels, site.in_channels, 1, 1), (height, 1))
    draw = torch.rand(full.grid_shape, generator=torch.Generator().manual_seed(0))
    return full.with_kept(draw < density)


def compiled(site: Site, height: int, device: Any) -> dict[str, Call]:
    """The layer dense, and at each density; and a graph that does nothing."""
    calls: dict[str, Call] = {"empty": tune.call_cost()}
    for density in (None, *DENSITIES):
        pattern = None if density is None else scattered(site, height, density)
        kernel = DENSE if pattern is None else SPMM.name
        config = {} if pattern is None else SPMM.configs(site, pattern, device)[0]
        run, x = tune.compile_candidate(site, pattern, kernel, config)
        calls[kernel if density is None else f"{density}"] = functools.partial(run, x)
    return calls


def measure(
    label: str, site: Site, height: int, device: Any, calls: dict[str, Call], seconds: float
) -> dict[str, Any]:
    """One row of the results."""
    times = tune.interleave(calls, seconds)
    net = {name: max(t.median - times["empty"].median, 1e-7) for name, t in times.items()}
    ours = [net[f"{d}"] for d in DENSITIES]
    return {
        "shape": label,
        "block": f"{height}x1",
        "dense_us": net[DENSE] * 1e6,
        "ours_us": {f"{d}": net[f"{d}"] * 1e6 for d in DENSITIES},
        "break_even": break_even(DENSITIES, ours, net[DENSE]),
        "planned": cost.break_even_density(site, (height, 1), device, variant=SPMM.name),
        "monotone": all(b <= NOISE * a for a, b in itertools.pairwise(ours)),
    }


def break_even(densities: Sequence[float], seconds: Sequence[float], dense: float) -> float:
    """The share kept at which times, interpolated between descending densities, fall below `dense`."""
    if seconds[0] <= dense:
        return densities[0]
    points = itertools.pairwise(zip(densities, seconds, strict=True))
    for (d_high, t_high), (d_low, t_low) in points:
        if t_low <= dense:
            return d_low + (d_high - d_low) * (dense - t_low) / max(t_high - t_low, 1e-12)
    return 0.0


def print_rows(rows: list[dict[str, Any]]) -> None:
    table = Table(title="1x1 convolutions, batch 1, fp32: speed-up by share of weights kept")
    for column in SHOWN:
        table.add_column(column, justify="left" if column == "shape" else "right")
    for r in rows:
        gains = (f"{r['dense_us'] / r['ours_us'][f'{d}']:.2f}" for d in DENSITIES)
        limits = (f"{r['break_even']:.0%}", f"{r['planned']:.0%}", "yes" if r["monotone"] else "NO")
        table.add_row(r["shape"], r["block"], f"{r['dense_us']:.0f}", *gains, *limits)
    report.console.print(table)


def run(
    model: Annotated[list[str], typer.Option(help="Networks.")] = ["mobilenet_v1", "mobilenet_v2"],  # noqa: B006
    height: Annotated[list[int], typer.Option(help="Output channels of a block.")] = [1, 4],  # noqa: B006
    seconds: Annotated[float, typer.Option(help="Of timing per shape and height.")] = 0.4,
    merge: Annotated[bool, typer.Option(help="Keep the other rows of an existing results file.")] = False,
    name: Annotated[str, typer.Option(help="Results are written as <name>.json.")] = "break_even",
) -> None:
    """Time against density of every 1x1 convolution."""
    unknown = [m for m in model if m not in zoo.NETWORKS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: known are {', '.join(zoo.NETWORKS)}")
    keep_freed_memory()
    device = devices.device("cpu")
    sites = {label: site for m in model for label, site in pointwise_sites(m).items()}
    work = list(itertools.product(sites.items(), height))
    with torch.no_grad(), report.progress() as bar:
        task = bar.add_task("compiling", total=len(work))
        builds = []
        for (_, site), tall in work:
            builds.append(compiled(site, tall, device))
            bar.advance(task)
        rows = [
            measure(label, site, tall, device, calls, seconds)
            for ((label, site), tall), calls in zip(work, builds, strict=True)
        ]
    print_rows(rows)
    report.publish(name, rows, ("shape", "block"), merged=merge)


if __name__ == "__main__":
    if report.asks_for_gpu(sys.argv):
        raise SystemExit("Sparse 1x1 convolutions have CPU kernels only.")
    typer.run(run)
