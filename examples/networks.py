"""Well-known networks with random weights, for `blocksparse inspect`, `explain` and `recommend`.

blocksparse inspect examples.networks:resnet50 -i 64x3x224x224 --dtype bf16 --density 0.25 --out kernels
"""

from __future__ import annotations

from torch import nn


def resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=1000)).eval()


def vit_b16() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=1000)).eval()
