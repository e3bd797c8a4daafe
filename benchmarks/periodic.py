"""VGG-16 and ResNet-18 for small images, with pSConv's periodic kernels, against the fastest dense build.

    python -m benchmarks.periodic
    python -m benchmarks.periodic --model vgg16 --batch 8 --scheme PSD1_P16

Weights are random. `PS4_P4` keeps four taps of each 3x3 kernel, with period 4; `PSD2_P8` two, and one whole
kernel per period of 8. The first layer, 1x1 convolutions and the classifier stay dense. Dense candidates are
those of `benchmarks.models`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import blocksparse_compiler as bsc
from examples import paper_networks

from . import baselines, report, zoo
from .models import check, dense_builds, kernels
from .ours import newest_plan
from .timing import keep_freed_memory, time_networks

NETWORKS = {
    "vgg16": lambda: paper_networks.vgg(paper_networks.VGG16, 10),
    "resnet18": lambda: paper_networks.resnet18(10),
}


def network(name: str, pixels: int) -> zoo.Network:
    torch.manual_seed(0)
    model = zoo.prepare(NETWORKS[name]())
    return zoo.Network(model, model, lambda batch: zoo.image(batch, pixels))


def scheme(name: str) -> bsc.PeriodicKernels:
    """`PS<support>_P<period>`, or `PSD…` with one whole kernel per period."""
    found = re.fullmatch(r"PS(D?)(\d+)_P(\d+)", name)
    if not found:
        raise typer.BadParameter(f"{name}: a scheme is named like PS4_P4 or PSD2_P8")
    return bsc.PeriodicKernels(int(found[2]), int(found[3]), boosted=bool(found[1]))


def measure(
    name: str, batch: int, pixels: int, schemes: tuple[str, ...], budget: float
) -> Iterator[dict[str, Any]]:
    """One row per scheme; every scheme and every dense build take turns."""
    torch._dynamo.reset()
    dense_network = network(name, pixels)
    x = dense_network.input(batch)
    builds = dense_builds(dense_network, x)
    dense_names = list(builds)
    facts: dict[str, dict[str, Any]] = {}
    for each in schemes:
        sparse = network(name, pixels)
        bsc.apply_pattern(sparse.model, scheme(each))
        fast = baselines.compiled(sparse.forward, backend="blocksparse")
        macs = bsc.sparsity_report(sparse.model, x[:1]).total
        kept = macs.macs / macs.dense_macs
        facts[each] = {"kept_macs": kept, **check(fast, sparse, x), **kernels(newest_plan())}
        builds[each] = fast
    timings = time_networks(builds, x, budget)
    dense = {key: timings[key] for key in dense_names}
    for each in schemes:
        yield {
            "model": name,
            "batch": batch,
            "pixels": pixels,
            "scheme": each,
            **report.compared(dense, timings[each]),
            **facts[each],
        }


def print_rows(rows: list[dict[str, Any]]) -> None:
    table = Table(title="periodic kernels, fp32: fastest dense build against ours")
    for column in (
        "model",
        "batch",
        "scheme",
        "MACs kept",
        "sparse layers",
        "dense ms",
        "ours ms",
        "speed-up",
    ):
        table.add_column(column, justify="left" if column in ("model", "scheme") else "right")
    for r in rows:
        dense = f"{r['dense'][r['best_dense']]['median_ms']:.2f} {r['best_dense']}"
        layers = f"{r['sparse_layers']} of {r['sparse_layers'] + r['dense_layers']}"
        shown = (r["model"], str(r["batch"]), r["scheme"], f"{r['kept_macs']:.0%}", layers, dense)
        table.add_row(*shown, f"{r['ours']['median_ms']:.2f}", f"{r['speedup']:.2f}")
    report.console.print(table)


def run(
    model: Annotated[list[str], typer.Option(help="Networks.")] = list(NETWORKS),  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Batch sizes.")] = [1, 8],  # noqa: B006
    scheme: Annotated[list[str], typer.Option(help="Periodic kernels.")] = ["PS4_P4", "PSD2_P8"],  # noqa: B006
    pixels: Annotated[int, typer.Option(help="Edge of the images.")] = 32,
    budget: Annotated[float, typer.Option(help="Seconds of timing per model and batch.")] = 4.0,
    merge: Annotated[bool, typer.Option(help="Keep the other rows of an existing results file.")] = False,
    name: Annotated[str, typer.Option(help="Results are written as <name>.json.")] = "periodic",
) -> None:
    """Networks with periodic kernels against the strongest dense baseline."""
    unknown = [m for m in model if m not in NETWORKS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: known are {', '.join(NETWORKS)}")
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for each in model:
            for size in batch:
                rows += measure(each, size, pixels, tuple(scheme), budget)
    print_rows(rows)
    report.publish(name, rows, ("model", "batch", "pixels", "scheme"), merged=merge)


if __name__ == "__main__":
    if report.asks_for_gpu(sys.argv):
        raise SystemExit("This benchmark runs on CPUs.")
    typer.run(run)
