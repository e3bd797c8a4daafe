"""MobileNet-v3-large (Howard et al., 2019) and EfficientNet-B0 (Tan, Le, 2019): residuals with gates."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Stage:
    """Equal blocks, of which the first has the stride; `squeeze`: channels of the gate, 0 for none."""

    kernel: int
    expanded: int
    outputs: int
    squeeze: int
    activation: type[nn.Module]
    stride: int = 1
    blocks: int = 1


class SqueezeExcite(nn.Module):
    """Scales every channel by a gate that sees the mean of all of them."""

    def __init__(self, channels: int, squeezed: int, activation: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            activation,
            nn.Conv2d(squeezed, channels, 1),
            gate,
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, s: Stage, stride: int, gate: nn.Module | None) -> None:
        super().__init__()
        expand = _conv(inputs, s.expanded, s.activation, 1) if s.expanded != inputs else []
        depthwise = _conv(s.expanded, s.expanded, s.activation, s.kernel, stride, s.expanded)
        self.body = nn.Sequential(
            *expand, *depthwise, *([gate] if gate else []), *_conv(s.expanded, s.outputs)
        )
        self.residual = stride == 1 and inputs == s.outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def _conv(
    inputs: int,
    outputs: int,
    activation: type[nn.Module] | None = None,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), *([activation()] if activation else [])]


V3_LARGE = (
    Stage(3, 16, 16, 0, nn.ReLU),
    Stage(3, 64, 24, 0, nn.ReLU, 2),
    Stage(3, 72, 24, 0, nn.ReLU),
    Stage(5, 72, 40, 24, nn.ReLU, 2),
    Stage(5, 120, 40, 32, nn.ReLU, blocks=2),
    Stage(3, 240, 80, 0, nn.Hardswish, 2),
    Stage(3, 200, 80, 0, nn.Hardswish),
    Stage(3, 184, 80, 0, nn.Hardswish, blocks=2),
    Stage(3, 480, 112, 120, nn.Hardswish),
    Stage(3, 672, 112, 168, nn.Hardswish),
    Stage(5, 672, 160, 168, nn.Hardswish, 2),
    Stage(5, 960, 160, 240, nn.Hardswish, blocks=2),
)


def mobilenet_v3_large(classes: int = 1000) -> nn.Sequential:
    layers = _conv(3, 16, nn.Hardswish, 3, 2)
    channels = 16
    for s in V3_LARGE:
        for block in range(s.blocks):
            gate = SqueezeExcite(s.expanded, s.squeeze, nn.ReLU(), nn.Hardsigmoid()) if s.squeeze else None
            layers.append(InvertedResidual(channels, s, 1 if block else s.stride, gate))
            channels = s.outputs
    layers += [*_conv(channels, 960, nn.Hardswish), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(960, 1280), nn.Hardswish(), nn.Linear(1280, classes))


B0 = (
    (3, 1, 16, 1, 1),
    (3, 6, 24, 2, 2),
    (5, 6, 40, 2, 2),
    (3, 6, 80, 2, 3),
    (5, 6, 112, 1, 3),
    (5, 6, 192, 2, 4),
    (3, 6, 320, 1, 1),
)
"""Kernel, expansion, outputs, stride, blocks."""


def efficientnet_b0(classes: int = 1000) -> nn.Sequential:
    layers = _conv(3, 32, nn.SiLU, 3, 2)
    channels = 32
    for kernel, expansion, outputs, stride, blocks in B0:
        for block in range(blocks):
            s = Stage(kernel, channels * expansion, outputs, channels // 4, nn.SiLU)
            gate = SqueezeExcite(s.expanded, s.squeeze, nn.SiLU(), nn.Sigmoid())
            layers.append(InvertedResidual(channels, s, 1 if block else stride, gate))
            channels = outputs
    layers += [*_conv(channels, 1280, nn.SiLU), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(1280, classes))
