"""Trains a network of the papers to block sparsity on CIFAR, ImageNet, Cityscapes or digits.

    python -m examples.train cifar100 --data /data --network resnet20 --block 8 --density 0.5
    python -m examples.train imagenet --data /data/imagenet --network resnet50 --block 32 --gamma 1e-3 --amp
    torchrun --nproc-per-node 8 -m examples.train imagenet …          # the same on eight devices
    python -m examples.train cityscapes --data /data/cityscapes --network erfnet --block 8 --density 0.7

Writes to `--out`: a checkpoint after every epoch (`--resume` goes on from it, exactly), `log.csv`,
TensorBoard events if tensorboard is installed, and at the end the folded model, its report, and a picture
of its blocks.
"""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import blocksparse_compiler as bsc

from . import masks
from .datasets import DATASETS, IGNORE, Data
from .paper_networks import NETWORKS


@dataclass(frozen=True)
class Recipe:
    """How to train. Shares are of all steps.

    Args:
        block, gamma, density, budget, importance: as in `BlockSparsifier`; neither gamma nor density: dense.
        warmup, ramp, freeze: when the pressure sets in, how long it grows, when the structure is fixed.
    """

    network: str
    epochs: int
    batch: int
    lr: float
    block: int = 32
    gamma: float | None = None
    density: float | None = None
    budget: Any = "parameters"
    importance: str = "scales"
    weight_decay: float = 1e-4
    momentum: float = 0.9
    warmup: float = 0.05
    ramp: float = 0.4
    freeze: float = 0.7
    amp: bool = False
    workers: int = 0
    seed: int = 0


class Trainer:
    """Model, optimizer, schedule and sparsifier, and where they are in the training."""

    def __init__(self, recipe: Recipe, data: Data, device: torch.device, out: Path) -> None:
        self.recipe, self.data, self.device, self.out = recipe, data, device, out
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        torch.manual_seed(recipe.seed)
        self.model = NETWORKS[recipe.network](data.classes).to(device, memory_format=torch.channels_last)
        self.example = data.test[0][0][None].to(device)
        self.steps_per_epoch = max(1, len(data.train) // (recipe.batch * self.ranks))  # type: ignore[arg-type]
        self.total = recipe.epochs * self.steps_per_epoch
        self.sparsifier = self._sparsifier()
        self.wrapped: nn.Module = DistributedDataParallel(self.model) if self.ranks > 1 else self.model
        self.optimizer = torch.optim.SGD(self._groups(), recipe.lr, recipe.momentum)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, recipe.lr, total_steps=self.total, cycle_momentum=False, pct_start=0.1
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp and device.type == "cuda")
        self.epoch = 0

    def _sparsifier(self) -> bsc.BlockSparsifier | None:
        recipe = self.recipe
        if recipe.gamma is None and recipe.density is None:
            return None
        warmup, ramp = int(recipe.warmup * self.total), int(recipe.ramp * self.total)
        schedule = bsc.SparsitySchedule(
            warmup, ramp, freeze=max(int(recipe.freeze * self.total), warmup + ramp, 1), every=10
        )
        return bsc.BlockSparsifier(
            self.model,
            (recipe.block, recipe.block),
            gamma=recipe.gamma,
            target_density=recipe.density,
            budget=recipe.budget,
            importance=recipe.importance,
            example_inputs=(self.example,),
            schedule=schedule,
        )

    def _groups(self) -> list[dict[str, Any]]:
        if self.sparsifier:
            return self.sparsifier.param_groups(self.recipe.weight_decay)
        return [{"params": self.model.parameters(), "weight_decay": self.recipe.weight_decay}]

    def loader(self, train: bool) -> DataLoader[Any]:
        """Its order depends on seed and epoch alone, so that a resumed training sees the same batches."""
        dataset = self.data.train if train else self.data.test
        generator = torch.Generator().manual_seed(1000 * self.recipe.seed + self.epoch)
        sampler = None
        if self.ranks > 1:
            sampler = DistributedSampler(dataset, shuffle=train, seed=self.recipe.seed, drop_last=train)  # type: ignore[arg-type]
            sampler.set_epoch(self.epoch)
        return DataLoader(
            dataset,
            min(self.recipe.batch, len(dataset)),  # type: ignore[arg-type]
            shuffle=train and sampler is None,
            sampler=sampler,
            num_workers=self.recipe.workers,
            drop_last=train,
            generator=generator,
            pin_memory=self.device.type == "cuda",
        )

    def train_epoch(self, advance: Any) -> dict[str, float]:
        """One pass over the training set; mean loss, learning rate and density."""
        torch.manual_seed(self.recipe.seed + 7919 * (self.epoch + 1) + self.rank)  # for the augmentation
        self.wrapped.train()
        losses = []
        for x, labels in self.loader(train=True):
            x, labels = self._to_device(x, labels)
            with self._autocast():
                loss = F.cross_entropy(self.wrapped(x), labels, ignore_index=IGNORE)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            lr = self.schedule.get_last_lr()[0]
            if self.sparsifier:
                self.sparsifier.step(lr)
            self.schedule.step()
            losses.append(float(loss.detach()))
            advance()
        self.epoch += 1
        density = self.sparsifier.density if self.sparsifier else 1.0
        return {"epoch": self.epoch, "loss": sum(losses) / len(losses), "lr": lr, "density": density}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Accuracy on the held-out set, over pixels for segmentation, and there also the mean IoU."""
        self.model.eval()
        confusion = torch.zeros(self.data.classes, self.data.classes, dtype=torch.float64)
        for x, labels in self.loader(train=False):
            x, labels = self._to_device(x, labels)
            with self._autocast():
                predicted = self.model(x).argmax(1)
            known = labels != IGNORE
            pairs = (labels[known] * self.data.classes + predicted[known]).cpu()
            confusion += torch.bincount(pairs, minlength=confusion.numel()).reshape(confusion.shape)
        if self.ranks > 1:
            confusion = confusion.to(self.device)
            dist.all_reduce(confusion)
        right = confusion.diag()
        result = {"accuracy": float(right.sum() / confusion.sum())}
        if self.example.dim() == 4 and self.recipe.network == "erfnet":
            union = confusion.sum(0) + confusion.sum(1) - right
            result["mean_iou"] = float((right / union.clamp(min=1))[union > 0].mean())
        return result

    def _to_device(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = x.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        return x, labels.to(self.device, non_blocking=True)

    def _autocast(self) -> Any:
        dtype = torch.float16 if self.scaler.is_enabled() else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.recipe.amp)

    def _parts(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in ("model", "optimizer", "schedule", "scaler")}
        return {**parts, "sparsifier": self.sparsifier} if self.sparsifier else parts

    def save(self) -> None:
        if self.rank == 0:
            state = {name: part.state_dict() for name, part in self._parts().items()}
            temporary = self.out / "checkpoint.tmp"
            torch.save({**state, "epoch": self.epoch}, temporary)
            temporary.replace(self.out / "checkpoint.pt")  # never half a checkpoint

    def load(self) -> None:
        state = torch.load(self.out / "checkpoint.pt", map_location=self.device, weights_only=True)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.epoch = state["epoch"]


class Log:
    """`log.csv`, and TensorBoard if it is installed."""

    def __init__(self, out: Path, resume: bool) -> None:
        self.path, self.board = out / "log.csv", None
        if not resume:
            self.path.unlink(missing_ok=True)
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"))

    def write(self, row: dict[str, float]) -> None:
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(name, value, int(row["epoch"]))


def train(
    recipe: Recipe, data: Data, out: Path, device: torch.device, resume: bool = False, stop: int | None = None
) -> Trainer:
    """Trains, logging and saving each epoch; stops early after epoch `stop`."""
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(recipe, data, device, out)
    if resume:
        trainer.load()
    log = Log(out, resume) if trainer.rank == 0 else None
    with Progress(disable=trainer.rank > 0) as progress:
        task = progress.add_task(
            "train", total=trainer.total, completed=trainer.epoch * trainer.steps_per_epoch
        )
        while trainer.epoch < min(recipe.epochs, stop or recipe.epochs):
            row = trainer.train_epoch(lambda: progress.advance(task))
            row |= trainer.evaluate()
            trainer.save()
            if log:
                log.write(row)
                text = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
                progress.console.print(text)
    return trainer


def finish(trainer: Trainer, console: Console) -> nn.Module:
    """Folds, checks that nothing changed, and writes model, report and picture."""
    model = trainer.model.eval()
    with torch.no_grad():
        before = model(trainer.example)
        bsc.fold_zero_blocks(model)
        torch.testing.assert_close(model(trainer.example), before, rtol=1e-3, atol=1e-3)
    torch.save(model.state_dict(), trainer.out / "folded.pt")
    report = bsc.sparsity_report(model, trainer.example)
    console.print(report)
    (trainer.out / "report.json").write_text(report.to_json())
    if any(row.block_shape for row in report.rows):
        masks.draw(model, trainer.out / "blocks.png")
    console.print(f"written: {', '.join(sorted(p.name for p in trainer.out.iterdir()))} in {trainer.out}")
    return model


@contextlib.contextmanager
def ranks() -> Iterator[torch.device]:
    """This process's device; joins the others if torchrun started it."""
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(local)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield torch.device("cuda", local) if cuda else torch.device("cpu")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(
    dataset: Annotated[str, typer.Argument(help=", ".join(DATASETS))],
    data: Annotated[Path, typer.Option(help="Folder that holds the unpacked files.")] = Path("."),
    network: Annotated[str, typer.Option(help=", ".join(NETWORKS))] = "resnet20",
    epochs: int = 200,
    batch: Annotated[int, typer.Option(help="Per process.")] = 128,
    lr: float = 0.1,
    block: Annotated[int, typer.Option(help="Side of the weight blocks.")] = 8,
    gamma: Annotated[float | None, typer.Option(help="DBSR: strength of the penalty.")] = None,
    density: Annotated[float | None, typer.Option(help="Exact share to keep instead.")] = None,
    budget: Annotated[str, typer.Option(help="Share of: parameters, macs or latency.")] = "parameters",
    importance: Annotated[str, typer.Option(help="scales, magnitude or attention.")] = "scales",
    weight_decay: float = 1e-4,
    amp: Annotated[bool, typer.Option(help="Mixed precision.")] = False,
    workers: int = 0,
    seed: int = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out.")] = False,
    out: Path = Path("out/train"),
) -> None:
    """Train to block sparsity, fold, report."""
    recipe = Recipe(
        network,
        epochs,
        batch,
        lr,
        block,
        gamma,
        density,
        budget,
        importance,
        weight_decay,
        amp=amp,
        workers=workers,
        seed=seed,
    )
    with ranks() as device:
        trainer = train(recipe, DATASETS[dataset](data), out, device, resume)
        if trainer.rank == 0:
            finish(trainer, Console())


if __name__ == "__main__":
    typer.run(main)
