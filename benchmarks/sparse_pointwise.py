"""MobileNets whose 1x1 convolutions keep few weights, against their fastest dense build.

    python -m benchmarks.sparse_pointwise
    python -m benchmarks.sparse_pointwise --model mobilenet_v1 --sparsity 0.9 --height 4

The setting of "Fast Sparse ConvNets" (CVPR 2020): 90 % zeros in MobileNet-v1, 85 % in v2, single or in groups
of output channels; first layer, depthwise layers and classifier keep theirs. Weights are random.
Dense candidates are those of `benchmarks.models`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import blocksparse_compiler as bsc

from . import baselines, report, zoo
from .models import check, dense_builds, kernels
from .ours import newest_plan
from .timing import keep_freed_memory, time_networks

OUR_BUILDS: dict[str, dict[str, Any]] = {"blocksparse": {}, "blocksparse+cpp_wrapper": {"cpp_wrapper": True}}
"""As of the dense builds, the faster one counts."""

SPARSITIES = {
    "mobilenet_v1": (0.9,),
    "mobilenet_v2": (0.85,),
    "mobilenet_v3": (0.8,),
    "efficientnet_b0": (0.85,),
}


def measure(
    name: str, batch: int, sparsities: tuple[float, ...], heights: tuple[int, ...], budget: float
) -> Iterator[dict[str, Any]]:
    """One row per mask; every mask and every dense build take turns."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = zoo.NETWORKS[name]()
    x = network.input(batch)
    builds = dense_builds(network, x)
    dense_names = list(builds)
    facts: dict[tuple[float, int], dict[str, Any]] = {}
    for sparsity in sparsities:
        for height in heights:
            torch.manual_seed(0)
            sparse = zoo.NETWORKS[name]()
            bsc.prune_blocks(sparse.model, (height, 1), 1 - sparsity, include=zoo.pointwise(sparse.model))
            for build, options in OUR_BUILDS.items():
                fast = baselines.compiled(sparse.forward, backend="blocksparse", options=options)
                facts[sparsity, height] = {**check(fast, sparse, x), **kernels(newest_plan())}
                builds[f"{sparsity}/{height}/{build}"] = fast
    timings = time_networks(builds, x, budget)
    dense = {key: timings[key] for key in dense_names}
    for (sparsity, height), known in facts.items():
        all_ours = {build: timings[f"{sparsity}/{height}/{build}"] for build in OUR_BUILDS}
        best_ours = report.best(all_ours)
        yield {
            "model": name,
            "batch": batch,
            "threads": torch.get_num_threads(),
            "sparsity": sparsity,
            "block": f"{height}x1",
            **report.compared(dense, all_ours[best_ours]),
            "all_ours": all_ours,
            "best_ours": best_ours,
            **known,
        }


def print_rows(rows: list[dict[str, Any]]) -> None:
    table = Table(title="sparse 1x1 convolutions, fp32: fastest dense build against ours")
    for column in (
        "model",
        "batch",
        "threads",
        "zeros",
        "block",
        "sparse layers",
        "dense ms",
        "ours ms",
        "speed-up",
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    for r in rows:
        dense = f"{r['dense'][r['best_dense']]['median_ms']:.2f} {r['best_dense']}"
        layers = f"{r['sparse_layers']} of {r['sparse_layers'] + r['dense_layers']}"
        sizes = (str(r["batch"]), str(r["threads"]), f"{r['sparsity']:.0%}", r["block"])
        table.add_row(
            r["model"], *sizes, layers, dense, f"{r['ours']['median_ms']:.2f}", f"{r['speedup']:.2f}"
        )
    report.console.print(table)


def run(
    model: Annotated[list[str], typer.Option(help="Networks.")] = list(SPARSITIES),  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Batch sizes.")] = [1],  # noqa: B006
    sparsity: Annotated[list[float], typer.Option(help="Zeros of 1x1 convolutions; default per model.")] = [],  # noqa: B006
    height: Annotated[list[int], typer.Option(help="Output channels of a block.")] = [1, 4],  # noqa: B006
    threads: Annotated[int, typer.Option(help="0: as many as torch takes by itself.")] = 0,
    budget: Annotated[float, typer.Option(help="Seconds of timing per model and batch.")] = 5.0,
    merge: Annotated[bool, typer.Option(help="Keep the other rows of an existing results file.")] = False,
    name: Annotated[str, typer.Option(help="Results are written as <name>.json.")] = "sparse_pointwise",
) -> None:
    """Whole MobileNets against the strongest dense baseline."""
    unknown = [m for m in model if m not in zoo.NETWORKS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: known are {', '.join(zoo.NETWORKS)}")
    keep_freed_memory()
    all_threads = torch.get_num_threads()
    torch.set_num_threads(threads or all_threads)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for network in model:
            wanted = tuple(sparsity) or SPARSITIES.get(network, (0.9,))
            for size in batch:
                rows += measure(network, size, wanted, tuple(height), budget)
    torch.set_num_threads(all_threads)
    print_rows(rows)
    report.publish(name, rows, ("model", "batch", "threads", "sparsity", "block"), merged=merge)


if __name__ == "__main__":
    if report.asks_for_gpu(sys.argv):
        raise SystemExit("Sparse 1x1 convolutions have CPU kernels only.")
    typer.run(run)
