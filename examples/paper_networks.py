"""The networks of the papers, small enough to read: residual, VGG, MobileNet and ERFNet."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias that keeps the size (divided by the stride), then batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


# ---- residual networks -------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_bn(inputs, width, 3, stride)
        self.conv2 = conv_bn(width, width)
        plain = stride == 1 and inputs == width
        self.shortcut = nn.Identity() if plain else conv_bn(inputs, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with groups: ResNeXt), 1x1, and a shortcut."""

    expansion = 4

    def __init__(
        self, inputs: int, width: int, stride: int, groups: int = 1, width_per_group: int = 64
    ) -> None:
        super().__init__()
        inner, outputs = width * width_per_group // 64 * groups, width * self.expansion
        self.conv1 = conv_bn(inputs, inner, 1)
        self.conv2 = conv_bn(inner, inner, 3, stride, groups)
        self.conv3 = conv_bn(inner, outputs, 1)
        plain = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if plain else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))) + self.shortcut(x))


class ResNet(nn.Module):
    """Stages of residual blocks, each of half the size and twice the width of the one before.

    Args:
        small: for images of 32 or 64 pixels: a 3x3 stem without pooling.
    """

    def __init__(
        self,
        block: Callable[..., nn.Module],
        depths: tuple[int, ...],
        classes: int,
        width: int = 64,
        expansion: int = 1,
        small: bool = True,
    ) -> None:
        super().__init__()
        stem = conv_bn(3, width) if small else conv_bn(3, width, 7, 2)
        self.stem = nn.Sequential(stem, nn.ReLU(), nn.Identity() if small else nn.MaxPool2d(3, 2, 1))
        stages, inputs = [], width
        for stage, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                blocks.append(block(inputs, width << stage, 2 if stage and not i else 1))
                inputs = (width << stage) * expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def resnet18(classes: int) -> nn.Module:
    return ResNet(BasicBlock, (2, 2, 2, 2), classes)


def resnet20(classes: int) -> nn.Module:
    return ResNet(BasicBlock, (3, 3, 3), classes, width=16)


def resnet50(classes: int) -> nn.Module:
    return ResNet(Bottleneck, (3, 4, 6, 3), classes, expansion=4, small=False)


def resnext50(classes: int) -> nn.Module:
    """ResNeXt-50 32x4d."""
    block = partial(Bottleneck, groups=32, width_per_group=4)
    return ResNet(block, (3, 4, 6, 3), classes, expansion=4, small=False)


# ---- VGG and MobileNet ----------------------------------------------------------------------------------

VGG11 = (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


def vgg(widths: tuple[int, ...], classes: int) -> nn.Module:
    """3x3 convolutions, a 0 for each pooling, and one linear layer; for small images."""
    layers: list[nn.Module] = []
    inputs = 3
    for width in widths:
        if width:
            layers += [conv_bn(inputs, width), nn.ReLU()]
            inputs = width
        else:
            layers.append(nn.MaxPool2d(2))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
    return nn.Sequential(*layers, *head)


def mobilenet_v1(classes: int, small: bool = False) -> nn.Module:
    """Depthwise and pointwise convolutions in turn (Howard et al. 2017)."""
    layers = [conv_bn(3, 32, 3, 1 if small else 2), nn.ReLU()]
    inputs = 32
    for width, stride in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5):
        layers += _separable(inputs, width, stride)
        inputs = width
    layers += [*_separable(512, 1024, 2), *_separable(1024, 1024, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, classes))


def _separable(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [
        conv_bn(inputs, inputs, 3, stride, inputs),
        nn.ReLU(),
        conv_bn(inputs, outputs, 1),
        nn.ReLU(),
    ]


class InvertedResidual(nn.Module):
    """Pointwise up, depthwise, pointwise down (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = inputs * expand
        layers = [] if expand == 1 else [conv_bn(inputs, inner, 1), nn.ReLU6()]
        layers += [conv_bn(inner, inner, 3, stride, inner), nn.ReLU6(), conv_bn(inner, outputs, 1)]
        self.layers, self.plain = nn.Sequential(*layers), stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.plain else self.layers(x)


def mobilenet_v2(classes: int, small: bool = False) -> nn.Module:
    layers: list[nn.Module] = [conv_bn(3, 32, 3, 1 if small else 2), nn.ReLU6()]
    inputs = 32
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2))
    for expand, width, depth, stride in (*stages, (6, 320, 1, 1)):
        for i in range(depth):
            layers.append(InvertedResidual(inputs, width, 1 if i else stride, expand))
            inputs = width
    layers += [conv_bn(inputs, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(1280, classes))


# ---- ERFNet ---------------------------------------------------------------------------------------------


class Downsample(nn.Module):
    """A strided convolution beside a pooling, concatenated."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs - inputs, 3, 2, 1)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(torch.cat([self.conv(x), F.max_pool2d(x, 2)], 1)))


class NonBottleneck1d(nn.Module):
    """3x1 and 1x3 convolutions twice, the second time dilated, and a shortcut."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        d = dilation
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, (3, 1), padding=(1, 0)),
            nn.ReLU(),
            nn.Conv2d(width, width, (1, 3), padding=(0, 1)),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, (3, 1), padding=(d, 0), dilation=(d, 1)),
            nn.ReLU(),
            nn.Conv2d(width, width, (1, 3), padding=(0, d), dilation=(1, d)),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.layers(x))


def _upsample(inputs: int, outputs: int) -> list[nn.Module]:
    conv = nn.ConvTranspose2d(inputs, outputs, 3, 2, padding=1, output_padding=1)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def erfnet(classes: int) -> nn.Module:
    """Semantic segmentation (Romera et al. 2018): `[N, 3, H, W]` → `[N, classes, H, W]`; H, W divide by 8."""
    return nn.Sequential(
        Downsample(3, 16),
        Downsample(16, 64),
        *(NonBottleneck1d(64, 1) for _ in range(5)),
        Downsample(64, 128),
        *(NonBottleneck1d(128, dilation) for dilation in (2, 4, 8, 16) * 2),
        *_upsample(128, 64),
        NonBottleneck1d(64, 1),
        NonBottleneck1d(64, 1),
        *_upsample(64, 16),
        NonBottleneck1d(16, 1),
        NonBottleneck1d(16, 1),
        nn.ConvTranspose2d(16, classes, 2, 2),
    )


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet50": resnet50,
    "resnext50": resnext50,
    "vgg11": partial(vgg, VGG11),
    "vgg16": partial(vgg, VGG16),
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "erfnet": erfnet,
}
