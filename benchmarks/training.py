"""A training step of ResNet-50's stages, forward and backward, against dense training.

    python -m benchmarks.training
    python -m benchmarks.training --stage layer3 --density 0.5

A stage is trained on one batch: forward with batch norm in training mode, backward to its input and to all
its parameters; no optimizer. Masks of random 32x32 blocks are fixed from the start (`RandomBlocks`), and
stored as masks, or folded (`fold_zero_blocks`). The dense stage has the same shapes and no masks, and runs
eager in channels-last or compiled by Inductor, whichever is faster.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor, nn

import blocksparse_compiler as bsc

from . import baselines, report, zoo
from .models import kernels
from .ours import newest_plan
from .timing import interleave, keep_freed_memory

STAGES = {"layer2": (1, 256, 56), "layer3": (2, 512, 28)}
"""Position in the network, channels and size of the input."""
FORMS = ("masked", "folded")
Step = Callable[[], list[Tensor]]


def build(stage: str, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The stage with random weights, an input, and a gradient for its output."""
    torch.manual_seed(0)
    position, channels, size = STAGES[stage]
    model = zoo.resnet50().model.resnet.encoder.stages[position].train()
    x = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)
    return model, x.requires_grad_(), torch.randn_like(model(x))


def sparse_copy(model: nn.Module, block_shape: tuple[int, int], density: float, form: str) -> nn.Module:
    """The same stage on a random share of its blocks."""
    masked = bsc.apply_pattern(copy.deepcopy(model), bsc.RandomBlocks(block_shape, density))
    return bsc.fold_zero_blocks(masked) if form == "folded" else masked


def training_step(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Step:
    """One step, as a call without arguments that returns the gradients."""
    tensors = [x, *(p for p in model.parameters() if p.requires_grad)]

    def step() -> list[Tensor]:
        for tensor in tensors:
            tensor.grad = None
        forward(x).backward(grad)
        return [tensor.grad for tensor in tensors if tensor.grad is not None]

    return step


def measure(
    stage: str, batch: int, block: int, densities: tuple[float, ...], budget: float
) -> Iterator[dict[str, Any]]:
    """One row per density and form; all of them and the dense builds take turns."""
    torch._dynamo.reset()
    model, x, grad = build(stage, batch)
    steps = {
        "eager": training_step(model, model, x, grad),
        "inductor": training_step(model, baselines.compiled(model), x, grad),
    }
    dense_names = list(steps)
    facts: dict[str, dict[str, Any]] = {}
    for density in densities:
        for form in FORMS:
            sparse = sparse_copy(model, (block, block), density, form)
            step = training_step(sparse, baselines.compiled(sparse, backend="blocksparse"), x, grad)
            errors = check(step, sparse, x, grad)
            facts[f"{density}/{form}"] = {**errors, **kernels(newest_plan())}
            steps[f"{density}/{form}"] = step
    timings = {name: t.to_json() for name, t in interleave(steps, budget=budget).items()}
    dense = {name: timings[name] for name in dense_names}
    for name, fact in facts.items():
        density, form = name.split("/")
        yield {
            "stage": stage,
            "batch": batch,
            "block": f"{block}x{block}",
            "density": float(density),
            "form": form,
            **report.compared(dense, timings[name]),
            **fact,
        }


def check(step: Step, model: nn.Module, x: Tensor, grad: Tensor) -> dict[str, float]:
    """Largest relative error of a gradient against float64, ours and eager's; raises if ours is wrong."""
    exact_model, exact_x = copy.deepcopy(model).double(), x.detach().double().requires_grad_()
    exact = training_step(exact_model, exact_model, exact_x, grad.double())()
    eager = training_step(model, model, x, grad)

    def error(gradients: list[Tensor]) -> float:
        pairs = zip(gradients, exact, strict=True)
        return max(float((g.detach() - e).norm() / e.norm()) for g, e in pairs)

    worst, floor = error(step()), error(eager())
    if not worst < max(10 * floor, 1e-5):
        raise RuntimeError(f"relative error {worst:.1e}, eager {floor:.1e}; nothing was timed")
    return {"error": worst, "dense_error": floor}


def print_rows(rows: list[dict[str, Any]]) -> None:
    table = Table(title="training step, fp32: fastest dense build against ours")
    for column in ("stage", "batch", "blocks", "kept", "stored", "dense ms", "ours ms", "speed-up"):
        table.add_column(column, justify="left" if column in ("stage", "stored") else "right")
    for r in rows:
        dense = f"{r['dense'][r['best_dense']]['median_ms']:.1f} {r['best_dense']}"
        kept, ours = f"{r['density']:.0%}", f"{r['ours']['median_ms']:.1f}"
        table.add_row(
            r["stage"], str(r["batch"]), r["block"], kept, r["form"], dense, ours, f"{r['speedup']:.2f}"
        )
    report.console.print(table)


def run(
    stage: Annotated[list[str], typer.Option(help="layer2, layer3.")] = list(STAGES),  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Batch sizes.")] = [8],  # noqa: B006
    density: Annotated[list[float], typer.Option(help="Kept fractions.")] = [0.5, 0.25],  # noqa: B006
    block: Annotated[int, typer.Option(help="Edge of the square blocks.")] = 32,
    budget: Annotated[float, typer.Option(help="Seconds of timing per stage and batch.")] = 15.0,
    merge: Annotated[bool, typer.Option(help="Keep the other rows of an existing results file.")] = False,
    name: Annotated[str, typer.Option(help="Results are written as <name>.json.")] = "training",
) -> None:
    """Training steps against the strongest dense baseline."""
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    with report.progress() as bar:
        task = bar.add_task("stages", total=len(stage) * len(batch))
        for s in stage:
            for b in batch:
                bar.update(task, description=f"{s}, batch {b}")
                rows += measure(s, b, block, tuple(density), budget)
                bar.advance(task)
    print_rows(rows)
    report.publish(name, rows, ("stage", "batch", "block", "density", "form"), merged=merge)


if __name__ == "__main__":
    typer.run(run)
