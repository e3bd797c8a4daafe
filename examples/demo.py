"""Train, fold, compile, measure: a block-sparse network on handwritten digits, end to end.

    make demo                                   # or: python -m examples.demo

Trains the same small residual network twice for the same number of epochs, dense and with a trainable
scale per 32x32 weight block (DBSR), and compares both on held-out digits: accuracy, size, and the time of
a forward pass against the strongest dense build. Writes its pictures and pages to out/.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import blocksparse_compiler as bsc
from benchmarks import baselines, timing

from . import digits, masks

OUT = Path("out")
BLOCK = (32, 32)
GAMMA = 0.5
console = Console(width=None if sys.stdout.isatty() else 120)


def train_both(data: digits.Split, epochs: int) -> tuple[nn.Module, nn.Module]:
    """The dense network and the scaled one, from the same initial weights."""
    torch.manual_seed(0)
    dense = digits.DigitNet().to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    scaled = digits.DigitNet().to(memory_format=torch.channels_last)
    bsc.insert_block_scales(scaled, BLOCK, exclude=["stem", "head"])

    columns = (TextColumn("{task.description:14}"), BarColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        for name, model, gamma in (("dense", dense, 0.0), ("block-sparse", scaled, GAMMA)):
            recipe = digits.Recipe(epochs=epochs, gamma=gamma)
            task = progress.add_task(f"train {name}", total=digits.steps_of(data, recipe), loss=float("nan"))
            digits.train(
                model, data, recipe, lambda loss, task=task: progress.update(task, advance=1, loss=loss)
            )
    return dense, scaled


@torch.no_grad()
def fold(model: nn.Module, data: digits.Split) -> nn.Module:
    """Keeps the nonzero tiles only; the outputs must not change."""
    before = model(data.images)
    bsc.fold_zero_blocks(model)
    torch.testing.assert_close(model(data.images), before, rtol=1e-4, atol=1e-4)
    return model


@torch.no_grad()
def measure(dense: nn.Module, sparse: nn.Module, x: Tensor) -> Table:
    """Milliseconds of a forward pass: three dense builds and ours, taking turns in one run."""
    calls: dict[str, timing.Call] = {"dense, eager channels-last": lambda: dense(x)}
    seconds = {}
    for name, cpp_wrapper in (
        ("dense, frozen Inductor", False),
        ("dense, frozen Inductor + C++ wrapper", True),
    ):
        with baselines.frozen_inductor(cpp_wrapper):
            calls[name], seconds[name] = _compile(dense, x, "inductor")
    ours = "block-sparse, this package"
    calls[ours], seconds[ours] = _compile(sparse, x, "blocksparse")
    torch.testing.assert_close(calls[ours](), sparse(x), rtol=1e-3, atol=1e-3)

    times = timing.interleave(calls, budget=8, rounds=(5, 100), turn=timing.TURN)
    fastest = min((name for name in calls if name != ours), key=lambda name: times[name].median)
    table = Table(title=f"forward pass, batch {len(x)}, {torch.get_num_threads()} threads, fp32")
    for column in ("build", "median ms", "minimum ms", "compiled in", "speed-up"):
        table.add_column(column, justify="left" if column == "build" else "right")
    for name, t in times.items():
        compiled = f"{seconds[name]:.1f} s" if name in seconds else ""
        ratio = f"{times[fastest].median / t.median:.2f}x"
        style = "bold green" if name == ours else None
        cells = (f"{t.median * 1e3:.2f}", f"{t.minimum * 1e3:.2f}", compiled, ratio)
        table.add_row(name, *cells, style=style)
    table.caption = f"speed-up over the fastest dense build ({fastest.removeprefix('dense, ')})"
    return table


def _compile(model: nn.Module, x: Tensor, backend: str) -> tuple[timing.Call, float]:
    start = time.perf_counter()
    fast = baselines.compiled(model, backend=backend)
    fast(x)
    return lambda: fast(x), time.perf_counter() - start


def main(
    epochs: Annotated[int, typer.Option(help="Epochs of both trainings.")] = 8,
    batch: Annotated[int, typer.Option(help="Batch size of the measured forward pass.")] = 32,
    out: Annotated[Path, typer.Option(help="Folder for the pictures and pages.")] = OUT,
) -> None:
    """Train, fold, compile and measure."""
    train_set, test_set = digits.load_digits()
    console.rule("1. train: dense, and with one trainable scale per 32x32 block")
    dense, scaled = train_both(train_set, epochs)
    accuracies = {
        "dense": digits.accuracy(dense, test_set),
        "block-sparse": digits.accuracy(scaled, test_set),
    }

    console.rule("2. fold: keep the nonzero blocks only")
    sparse = fold(scaled, test_set)
    x = test_set.images[:batch].contiguous(memory_format=torch.channels_last)
    report = bsc.sparsity_report(sparse, x)
    console.print(report)

    console.rule("3. explain: what the compiler does with each layer, and why")
    with torch.no_grad():
        explanation = bsc.explain(sparse, x)
    console.print(explanation)

    console.rule("4. compile and measure")
    timing.keep_freed_memory()
    table = measure(dense, sparse, x)

    console.rule("result")
    for name, value in accuracies.items():
        console.print(f"accuracy on {len(test_set.labels)} held-out digits, {name:12}: {value:.2%}")
    kept = report.total
    console.print(f"parameters kept: {kept.parameters / kept.dense_parameters:.1%}")
    console.print(table)
    out.mkdir(parents=True, exist_ok=True)
    picture = masks.draw(sparse, out / "demo_masks.png")
    page = explanation.to_html(out / "demo_explain.html")
    console.print(f"block masks: {picture}    explanation: {page}")


if __name__ == "__main__":
    typer.run(main)
