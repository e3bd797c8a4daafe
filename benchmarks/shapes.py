"""The layer shapes that the benchmarks time: ResNet-50's convolutions and BERT-base's linear layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ConvShape:
    """A square convolution on a square image, `kernel // 2` of padding."""

    in_channels: int
    size: int
    out_channels: int
    kernel: int
    stride: int = 1

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel}{stride} {self.in_channels}->{self.out_channels} @{self.size}"

    @property
    def out_size(self) -> int:
        return (self.size - 1) // self.stride + 1

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels, self.kernel, self.kernel)

    @property
    def weights(self) -> int:
        return math.prod(self.weight_shape)

    @property
    def macs(self) -> int:
        """Of one image."""
        return self.weights * self.out_size**2

    def layer(self) -> nn.Module:
        return nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel, self.stride, self.kernel // 2, bias=False
        )

    def input(self, batch: int) -> Tensor:
        x = torch.randn(batch, self.in_channels, self.size, self.size)
        return x.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Conv1dShape:
    """A convolution along a sequence of `size` steps, `kernel // 2` of padding."""

    in_channels: int
    size: int
    out_channels: int
    kernel: int

    def __str__(self) -> str:
        return f"conv1d {self.kernel} {self.in_channels}->{self.out_channels} @{self.size}"

    @property
    def weights(self) -> int:
        return self.out_channels * self.in_channels * self.kernel

    @property
    def macs(self) -> int:
        return self.weights * self.size

    def layer(self) -> nn.Module:
        return nn.Conv1d(
            self.in_channels, self.out_channels, self.kernel, padding=self.kernel // 2, bias=False
        )

    def input(self, batch: int) -> Tensor:
        return torch.randn(batch, self.in_channels, self.size)


@dataclass(frozen=True)
class LinearShape:
    in_features: int
    out_features: int
    rows_per_item: int = 128

    def __str__(self) -> str:
        return f"linear {self.in_features}->{self.out_features} x{self.rows_per_item}"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def macs(self) -> int:
        return self.weights * self.rows_per_item

    def layer(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features)

    def input(self, batch: int) -> Tensor:
        return torch.randn(batch * self.rows_per_item, self.in_features)


Shape = ConvShape | Conv1dShape | LinearShape

CONVOLUTIONS = tuple(
    ConvShape(*sizes)
    for sizes in (
        (64, 56, 64, 3),
        (128, 28, 128, 3),
        (256, 14, 256, 3),
        (512, 7, 512, 3),
        (128, 56, 128, 3, 2),
        (256, 56, 64, 1),
        (64, 56, 256, 1),
        (512, 28, 128, 1),
        (1024, 14, 256, 1),
        (256, 14, 1024, 1),
        (2048, 7, 512, 1),
        (512, 7, 2048, 1),
    )
)
LINEARS = (LinearShape(768, 768), LinearShape(768, 3072), LinearShape(3072, 768))
