"""scikit-learn's handwritten digits, a small residual network, and DBSR training for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blocksparse_compiler as bsc


@dataclass(frozen=True)
class Split:
    """Images `[n, 1, size, size]` and labels `[n]`."""

    images: Tensor
    labels: Tensor


def load_digits(size: int = 14, seed: int = 0) -> tuple[Split, Split]:
    """(training, held-out test): 1797 digits, a quarter held out, resized from 8x8 to `size`."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    data = load()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    images = (images - images.mean()) / images.std()
    train, test = train_test_split(
        range(len(images)), test_size=0.25, random_state=seed, stratify=data.target
    )
    labels = torch.tensor(data.target)
    return Split(images[train], labels[train]), Split(images[test], labels[test])


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, as in ResNet-18."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != channels:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitNet(nn.Module):
    """A stem and four residual blocks: 128 channels at full size, then 256 at half."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU())
        self.blocks = nn.Sequential(
            ResidualBlock(128, 128, 1),
            ResidualBlock(128, 256, 2),
            ResidualBlock(256, 256, 1),
        )
        self.head = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@dataclass(frozen=True)
class Recipe:
    """How to train; the same for the dense and the block-sparse network, except for `gamma`.

    Args:
        gamma: strength of the penalty γ·Σ|S| on the block scales; 0 for a network without them.
        freeze_after: share of the epochs after which the mask is frozen and only W is tuned.
    """

    epochs: int = 12
    batch: int = 64
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    momentum: float = 0.9
    gamma: float = 0.0
    freeze_after: float = 0.6


def train(
    model: nn.Module, data: Split, recipe: Recipe, on_step: Callable[[float], None], seed: int = 0
) -> nn.Module:
    """SGD with momentum and a cosine schedule; with scales, DBSR. Calls `on_step(loss)` after each step.

    Weight decay acts on the weights and never on the scales, or the scales would shrink while the
    weights grow. The penalty γ·Σ|S| acts through its proximal step, so that zeros are exact.
    """
    scaled = recipe.gamma > 0
    groups = bsc.param_groups(model, recipe.weight_decay) if scaled else model.parameters()
    optimizer = torch.optim.SGD(
        groups, recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay
    )
    steps = steps_of(data, recipe)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=steps, cycle_momentum=False, pct_start=0.2
    )
    generator = torch.Generator().manual_seed(seed)
    freeze_at = int(recipe.freeze_after * recipe.epochs)
    model.train()
    for epoch in range(recipe.epochs):
        searching = scaled and epoch < freeze_at
        if scaled and epoch == freeze_at:
            bsc.freeze_scales(model)
        order = torch.randperm(len(data.labels), generator=generator)
        for picked in order.split(recipe.batch)[: steps_of(data, recipe) // recipe.epochs]:
            images = data.images[picked].contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(images), data.labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if searching:
                bsc.proximal_step(model, schedule.get_last_lr()[0] * recipe.gamma)
            schedule.step()
            on_step(float(loss.detach()))
    return model.eval()


def steps_of(data: Split, recipe: Recipe) -> int:
    """Optimizer steps of a whole training; a last, smaller batch would upset the batch norms."""
    return recipe.epochs * (len(data.labels) // recipe.batch)


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    """Share of correct labels, in evaluation mode."""
    images = data.images.contiguous(memory_format=torch.channels_last)
    return float((model.eval()(images).argmax(1) == data.labels).float().mean())
