"""Accuracy against the share of weights kept, for every method of this package, on handwritten digits.

    python -m examples.compare_methods            # a few minutes; prints the table, writes out/methods.png

The same small network, initial weights, batches and number of epochs for all; only the way to sparsity
differs. Accuracy is measured in evaluation mode on a held-out quarter. The stem and the head stay dense, and
"kept" counts the layers between. Each method's last network is folded, compiled, and compared with eager;
the column "compiled for" says what the planner would do on a device: the predicted speed-up of these layers,
or the reason for staying dense.
"""

from __future__ import annotations

import statistics
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import blocksparse_compiler as bsc
from blocksparse_compiler.devices import device as find_device

from . import digits

BLOCK = (8, 8)
DENSITIES = (0.5, 0.2, 0.1, 0.05)
IMAGES = 300  # for training: with all 1347, every method reaches 99 %


def network(width: int = 32) -> nn.Sequential:
    """Four convolutions on 8x8 images; stem and head stay dense."""

    def conv(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]

    body = [*conv(width, 2 * width, 2), *conv(2 * width, 2 * width), *conv(2 * width, 2 * width)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)]
    return nn.Sequential(*conv(1, width), *body, *head)


LAYERS = ["3", "6", "9"]  # what the methods work on

Prepare = Callable[[nn.Module, int, int], "bsc.BlockSparsifier | None"]


def learned(**options: Any) -> Prepare:
    """A `BlockSparsifier`: ramp until half of the training, frozen at 70 %."""

    def prepare(model: nn.Module, steps: int, seed: int) -> bsc.BlockSparsifier:
        del seed
        schedule: dict[str, Any] = {"freeze": int(0.7 * steps), "every": 2}
        if "gamma" not in options:
            schedule["warmup"] = steps // 10
            schedule |= {"cycles": 2} if options["importance"] == "attention" else {"ramp": int(0.4 * steps)}
        return bsc.BlockSparsifier(
            model, BLOCK, include=LAYERS, schedule=bsc.SparsitySchedule(**schedule), **options
        )

    return prepare


def fixed(scheme: Callable[[int], Any]) -> Prepare:
    """A scheme held from the first step; random ones differ by seed."""

    def prepare(model: nn.Module, steps: int, seed: int) -> None:
        del steps
        bsc.apply_pattern(model, scheme(seed), include=LAYERS)

    return prepare


@dataclass(frozen=True)
class Band:
    """`StructuredBand` of a share of each layer's channels, moving on by an eighth of them per output."""

    density: float
    dense_stem = False

    def pattern(self, name: str, weight_shape: tuple[int, ...], groups: int) -> bsc.BlockPattern:
        channels = weight_shape[1]
        band = bsc.StructuredBand(width=max(1, round(self.density * channels)), stride=channels // 8)
        return band.pattern(name, weight_shape, groups)


def methods(densities: tuple[float, ...] = DENSITIES) -> dict[str, dict[str, Prepare]]:
    """method → setting → how to prepare a model."""
    by_density: dict[str, Callable[[float], Prepare]] = {
        "exact budget": lambda d: learned(target_density=d, importance="scales"),
        "attention": lambda d: learned(target_density=d, importance="attention"),
        "magnitude": lambda d: learned(target_density=d, importance="magnitude"),
        "random": lambda d: fixed(lambda seed: bsc.RandomBlocks(BLOCK, d, seed)),
        "band": lambda d: fixed(lambda _: Band(d)),
    }
    found = {name: {f"{d:g}": make(d) for d in densities} for name, make in by_density.items()}
    gammas = {0.5: 0.2, 0.2: 0.4, 0.1: 0.6, 0.05: 0.7}
    found["DBSR"] = {f"γ={gammas[d]}": learned(gamma=gammas[d]) for d in densities}
    supports = {0.5: 4, 0.2: 2, 0.1: 1}
    found["periodic"] = {
        f"PS{supports[d]}_P8": fixed(lambda _, n=supports[d]: bsc.PeriodicKernels(n, 8))
        for d in densities
        if d in supports
    }
    return {"dense": {"": lambda *_: None}, "DBSR": found.pop("DBSR"), **found}


@dataclass
class Row:
    """One method at one setting, over the seeds."""

    method: str
    setting: str
    kept: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    compiled: str = ""


def train(
    prepare: Prepare, data: digits.Split, epochs: int, seed: int, lr: float = 0.1, batch: int = 64
) -> nn.Module:
    torch.manual_seed(seed)
    model = network()
    steps = epochs * (len(data.labels) // batch)
    search = prepare(model, steps, seed)
    decay = 5e-4
    groups = search.param_groups(decay) if search else model.parameters()
    optimizer = torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=0 if search else decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, cycle_momentum=False, pct_start=0.2
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(data.labels), generator=generator)
        for picked in order.split(batch)[: steps // epochs]:
            loss = F.cross_entropy(model(data.images[picked]), data.labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if search:
                search.step(schedule.get_last_lr()[0])
            schedule.step()
    model.eval()
    return bsc.fold_zero_blocks(model, include=LAYERS)


def kept(model: nn.Module) -> float:
    report = bsc.sparsity_report(model)
    rows = [report[name] for name in LAYERS]
    return sum(row.parameters for row in rows) / sum(row.dense_parameters for row in rows)


@torch.no_grad()
def check_and_explain(model: nn.Module, x: Tensor, device: str) -> str:
    """Compiles, compares with eager, and says what the planner would do on `device`."""
    torch._dynamo.reset()
    fast = torch.compile(model, backend="blocksparse")
    torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-3)
    decisions = [d for d in bsc.plan(bsc.trace(model, x), find_device(device)) if d.site.name in LAYERS]
    sparse = [d for d in decisions if not d.is_dense]
    if not sparse:
        return Counter(d.reason for d in decisions).most_common(1)[0][0]
    dense_time = sum(d.estimates["dense"] for d in decisions)
    time = sum(d.estimates[d.kernel] for d in decisions)
    return f"{len(sparse)} of {len(decisions)} layers sparse, {dense_time / time:.1f}x"


def compare(densities: tuple[float, ...], seeds: int, epochs: int, device: str) -> list[Row]:
    everything, test_set = digits.load_digits(size=8)
    train_set = digits.Split(everything.images[:IMAGES], everything.labels[:IMAGES])
    rows = [Row(method, setting) for method, all_ in methods(densities).items() for setting in all_]
    prepares = {(m, s): prepare for m, all_ in methods(densities).items() for s, prepare in all_.items()}
    x = test_set.images[:64]
    with Progress() as progress:
        task = progress.add_task("train", total=len(rows) * seeds)
        for row in rows:
            for seed in range(seeds):
                model = train(prepares[row.method, row.setting], train_set, epochs, seed)
                row.kept.append(kept(model))
                correct = model(test_set.images).argmax(1) == test_set.labels
                row.accuracy.append(float(correct.float().mean()))
                progress.advance(task)
            row.compiled = check_and_explain(model, x, device)
    return rows


def print_table(rows: list[Row], device: str) -> None:
    table = Table(title="held-out accuracy, mean ± std over seeds")
    for column in ("method", "setting", "kept", "accuracy", f"compiled for {device}"):
        table.add_column(column, justify="right" if column in ("kept", "accuracy") else "left")
    for row in rows:
        spread = statistics.stdev(row.accuracy) if len(row.accuracy) > 1 else 0.0
        accuracy = f"{100 * statistics.mean(row.accuracy):.1f} ± {100 * spread:.1f} %"
        table.add_row(row.method, row.setting, f"{statistics.mean(row.kept):.1%}", accuracy, row.compiled)
    Console(width=130).print(table)


def draw(rows: list[Row], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    alive = [row for row in rows if statistics.mean(row.kept) > 0]  # DBSR may lose every block
    for method in dict.fromkeys(row.method for row in alive):
        own = sorted((r for r in alive if r.method == method), key=lambda r: statistics.mean(r.kept))
        spread = [statistics.stdev(r.accuracy) if len(r.accuracy) > 1 else 0 for r in own]
        axes.errorbar(
            [statistics.mean(r.kept) for r in own],
            [statistics.mean(r.accuracy) for r in own],
            spread,
            marker="o",
            capsize=3,
            label=method,
        )
    axes.set(xscale="log", xlabel="share of weights kept", ylabel="held-out accuracy (mean ± std)")
    axes.set_ylim(0.85, 1.0)
    axes.set_xticks([0.05, 0.1, 0.2, 0.5, 1], ["5 %", "10 %", "20 %", "50 %", "100 %"])
    axes.minorticks_off()
    axes.set_title(f"{IMAGES} digits to learn from, {len(rows[0].accuracy)} seeds, equal epochs")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def main(
    seeds: Annotated[int, typer.Option(help="Trainings of each method and setting.")] = 5,
    epochs: Annotated[int, typer.Option(help="Epochs of each training.")] = 40,
    quick: Annotated[
        bool, typer.Option(help="One setting, one seed, one epoch: does everything run?")
    ] = False,
    device: Annotated[str, typer.Option(help="Device to plan for, see `blocksparse devices`.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("out"),
) -> None:
    """Train by every method, print the table, draw the picture."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")  # of torch.export
    rows = compare((0.2,), 1, 1, device) if quick else compare(DENSITIES, seeds, epochs, device)
    print_table(rows, device)
    print(draw(rows, out / "methods.png"))


if __name__ == "__main__":
    typer.run(main)
