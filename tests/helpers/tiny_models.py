"""A small network with zero blocks, for tests of inspection; importable by name, as the command line does."""

from __future__ import annotations

import torch
from torch import nn

from blocksparse_compiler import BlockPattern


def make() -> nn.Module:
    """Convolution, batch norm, depthwise and pointwise convolution, linear: two of them block-sparse."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(64, 96, 3, padding=1, stride=2),
        nn.BatchNorm2d(96),
        nn.ReLU(),
        nn.Conv2d(96, 96, 3, groups=96),
        nn.Conv2d(96, 128, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    ).eval()
    for i in (0, 4):
        weight = model[i].weight
        full = BlockPattern.full(weight.shape, (32, 32))
        kept = torch.zeros_like(full.kept)
        kept[:, :, 0] = True
        with torch.no_grad():
            weight.copy_(full.with_kept(kept).apply(weight))
    return model


MODEL = make()
INPUT = (2, 64, 28, 28)
NUMBER = 3


def needs_argument(width: int) -> nn.Module:
    return nn.Linear(width, width)


def makes_nothing() -> None:
    return None


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU())
