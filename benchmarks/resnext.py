"""ResNeXt-50 (32x4d): Xie et al., Aggregated Residual Transformations for Deep Neural Networks, 2017."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STAGES = ((128, 256, 3), (256, 512, 4), (512, 1024, 6), (1024, 2048, 3))
"""Width inside a block, width between blocks, blocks."""
GROUPS = 32


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv(inputs, width, 1),
            nn.ReLU(),
            *_conv(width, width, 3, stride, GROUPS),
            nn.ReLU(),
            *_conv(width, outputs, 1),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def resnext50(stages: tuple[tuple[int, int, int], ...] = STAGES, classes: int = 1000) -> nn.Sequential:
    layers: list[nn.Module] = [*_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, (width, outputs, blocks) in enumerate(stages):
        for block in range(blocks):
            layers.append(Bottleneck(channels, width, outputs, 2 if stage and not block else 1))
            channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
