"""Whole networks against their fastest dense build: ResNet-50, VGG-16, ViT-B/16, BERT, Llama.

    python -m benchmarks.models
    python -m benchmarks.models --model resnet50 --batch 8 --keep DBSR-B
    python -m benchmarks.models --dtype bfloat16
    python -m benchmarks.models --device cuda         # on a GPU, with options of its own: see gpu_models

Weights are random, and so are the block masks. `DBSR-A` and `DBSR-B` keep the share of ResNet-50's
parameters that the DBSR paper reports (17.89 M and 13.36 M of 25.56 M); a number is the share of the
blocks of every layer. Dense candidates are eager channels-last and three builds of frozen Inductor: plain,
with its C++ wrapper, and with oneDNN for linear layers.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from blocksparse_compiler import Plan

from . import baselines, pictures, report, zoo
from .ours import newest_plan
from .timing import keep_freed_memory, time_networks

DBSR_FRACTIONS = {"DBSR-A": 17.89 / 25.56, "DBSR-B": 13.36 / 25.56}
PARTS = {
    "resnet50": ("DBSR-A", "DBSR-B", "0.25"),
    "vgg16": ("0.5", "0.25"),
    "vit_b16": ("0.5", "0.25"),
    "bert_base": ("0.5", "0.25"),
    "llama_block": ("0.5", "0.25"),
}

DENSE_BUILDS = (
    ("inductor", False, False),
    ("inductor+cpp_wrapper", True, False),
    ("inductor+onednn", False, True),
)
"""Name, with a C++ wrapper, with oneDNN for linear layers (see `baselines.frozen_inductor`)."""


def pruned(
    name: str, keep: str, block_shape: tuple[int, int], dtype: torch.dtype = torch.float32
) -> tuple[zoo.Network, float]:
    """The network with its mask applied, and the share of its parameters that is left."""
    torch.manual_seed(0)
    network = zoo.NETWORKS[name]()
    network.model.to(dtype)
    if keep in DBSR_FRACTIONS:
        return network, zoo.prune_to_fraction(network.model, block_shape, DBSR_FRACTIONS[keep])
    return network, zoo.prune(network.model, block_shape, float(keep))


def dense_builds(network: zoo.Network, x: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name → callable, each called once already."""
    builds = {"eager": network.forward}
    for name, cpp_wrapper, best_linear in DENSE_BUILDS:
        with baselines.frozen_inductor(cpp_wrapper, best_linear):
            builds[name] = baselines.compiled(network.forward)
            builds[name](x)
    return builds


def measure(
    name: str,
    batch: int,
    keeps: tuple[str, ...],
    block_shape: tuple[int, int],
    budget: float,
    dtype: str = "float32",
) -> Iterator[dict[str, Any]]:
    """One row per mask; every mask and every dense build take turns."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    network, number = zoo.NETWORKS[name](), report.dtype_of(dtype)
    network.model.to(number)
    x = network.input(batch)
    x = x.to(number) if x.is_floating_point() else x
    builds = dense_builds(network, x)
    dense_names = list(builds)
    facts: dict[str, dict[str, Any]] = {}
    for keep in keeps:
        sparse, kept = pruned(name, keep, block_shape, number)
        fast = baselines.compiled(sparse.forward, backend="blocksparse")
        facts[keep] = {"kept": kept, **check(fast, sparse, x), **kernels(newest_plan())}
        builds[keep] = fast
    timings = time_networks(builds, x, budget)
    dense = {key: timings[key] for key in dense_names}
    for keep in keeps:
        yield {
            "model": name,
            "batch": batch,
            "keep": keep,
            "dtype": dtype,
            "block": "x".join(map(str, block_shape)),
            **report.compared(dense, timings[keep]),
            **facts[keep],
        }


def check(fast: Callable[[Tensor], Tensor], network: zoo.Network, x: Tensor) -> dict[str, float]:
    """Relative error of ours and of eager against float64, on one item; raises if ours is wrong."""
    y, eager = fast(x)[:1], network.forward(x)[:1]
    reference = copy.deepcopy(network.model).double()
    item = x[:1].double() if x.is_floating_point() else x[:1]
    output = reference(item)
    if not isinstance(output, Tensor):
        output = output[0]
    scale = output.norm()
    error, floor = float((y - output).norm() / scale), float((eager - output).norm() / scale)
    if not error < max(10 * floor, 1e-4):
        raise RuntimeError(f"relative error {error:.1e}, eager {floor:.1e}; nothing was timed")
    return {"error": error, "dense_error": floor}


def kernels(plan: Plan) -> dict[str, int]:
    """How many layers the plan runs sparse, and how many dense."""
    sparse = sum(decision.is_block_sparse for decision in plan)
    return {"sparse_layers": sparse, "dense_layers": len(plan) - sparse}


def print_models(rows: list[dict[str, Any]]) -> None:
    table = Table(title="whole models: fastest dense build against ours")
    for column in ("model", "batch", "mask", "parameters kept", "dense ms", "ours ms", "speed-up"):
        table.add_column(column, justify="left" if column in ("model", "mask") else "right")
    for r in rows:
        dense = r["dense"][r["best_dense"]]["median_ms"]
        ours, mask = r["ours"]["median_ms"], f"{r['keep']}, {r['block']}"
        kept, times = f"{r['kept']:.1%}", (f"{dense:.1f} {r['best_dense']}", f"{ours:.1f}")
        table.add_row(r["model"], str(r["batch"]), mask, kept, *times, f"{r['speedup']:.2f}")
    report.console.print(table)


def run(
    model: Annotated[list[str], typer.Option(help="Networks.")] = list(PARTS),  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Batch sizes.")] = [8, 1],  # noqa: B006
    keep: Annotated[list[str], typer.Option(help="DBSR-A, DBSR-B or a density; default per model.")] = [],  # noqa: B006
    block: Annotated[int, typer.Option(help="Edge of the square blocks.")] = 32,
    dtype: Annotated[str, typer.Option(help="Of weights and activations: float32, bfloat16.")] = "float32",
    budget: Annotated[float, typer.Option(help="Seconds of timing per model and batch.")] = 8.0,
    merge: Annotated[bool, typer.Option(help="Keep the other rows of an existing results file.")] = False,
    name: Annotated[
        str, typer.Option(help="Results are written as <name>.json and .png; default by dtype.")
    ] = "",
) -> None:
    """Whole networks against the strongest dense baseline."""
    keep_freed_memory()
    name = name or report.with_dtype("models", dtype)
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), report.progress() as bar:
        task = bar.add_task("models", total=len(model) * len(batch))
        for network in model:
            for size in batch:
                bar.update(task, description=f"{network}, batch {size}")
                rows += measure(
                    network, size, tuple(keep) or PARTS.get(network, ("0.5",)), (block, block), budget, dtype
                )
                bar.advance(task)
    print_models(rows)
    rows = report.publish(name, rows, ("model", "batch", "keep", "block"), merged=merge)
    pictures.draw_models(rows, report.path_of(name).with_suffix(".png"))


if __name__ == "__main__":
    if report.asks_for_gpu(sys.argv):
        from .gpu_models import run
    typer.run(run)
