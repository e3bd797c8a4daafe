"""Real networks with random weights, and random block masks on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import blocksparse_compiler as bsc

from . import mobile

Forward = Callable[[Tensor], Tensor]
BERT_TOKENS = 128
PROMPT_TOKENS = 128


@dataclass(frozen=True)
class Network:
    """A model in evaluation mode, how to call it, and how to make its input for a batch size."""

    model: nn.Module
    forward: Forward
    input: Callable[[int], Tensor]


def resnet50() -> Network:
    from transformers import ResNetConfig, ResNetForImageClassification

    return _vision(ResNetForImageClassification(ResNetConfig(num_labels=1000)))


def resnext50() -> Network:
    from .resnext import resnext50 as build

    model = prepare(build())
    return Network(model, model, image)


def vit_b16() -> Network:
    from transformers import ViTConfig, ViTForImageClassification

    return _vision(ViTForImageClassification(ViTConfig(num_labels=1000)))


def vgg16() -> Network:
    """Simonyan and Zisserman's configuration D."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if width:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2))
    head = [nn.Linear(512 * 49, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)]
    model = prepare(nn.Sequential(*layers, nn.Flatten(), *head))
    return Network(model, model, image)


def mobilenet_v1() -> Network:
    from transformers import MobileNetV1Config, MobileNetV1ForImageClassification

    return _vision(MobileNetV1ForImageClassification(MobileNetV1Config(num_labels=1000, tf_padding=False)))


def mobilenet_v2() -> Network:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return _vision(MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1000, tf_padding=False)))


def mobilenet_v3() -> Network:
    """The large one."""
    model = prepare(mobile.mobilenet_v3_large())
    return Network(model, model, image)


def efficientnet_b0() -> Network:
    model = prepare(mobile.efficientnet_b0())
    return Network(model, model, image)


def bert_base() -> Network:
    from transformers import BertConfig, BertModel

    model = prepare(BertModel(BertConfig(), add_pooling_layer=False))

    def tokens(batch: int) -> Tensor:
        return torch.randint(0, 30000, (batch, BERT_TOKENS))

    return Network(model, lambda ids: model(ids).last_hidden_state, tokens)


def llama_block() -> Network:
    """Two decoder layers in the sizes of TinyLlama, reading a prompt."""
    from transformers import LlamaConfig, LlamaModel

    sizes = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=1000,
        use_cache=False,
    )
    model = prepare(LlamaModel(sizes))

    def tokens(batch: int) -> Tensor:
        return torch.randint(0, 1000, (batch, PROMPT_TOKENS))

    return Network(model, lambda ids: model(ids).last_hidden_state, tokens)


NETWORKS: dict[str, Callable[[], Network]] = {
    "resnet50": resnet50,
    "vgg16": vgg16,
    "vit_b16": vit_b16,
    "bert_base": bert_base,
    "llama_block": llama_block,
    "resnext50": resnext50,
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3": mobilenet_v3,
    "efficientnet_b0": efficientnet_b0,
}


def _vision(model: nn.Module) -> Network:
    model = prepare(model)
    return Network(model, lambda x: model(x).logits, image)


def image(batch: int, pixels: int = 224) -> Tensor:
    return torch.randn(batch, 3, pixels, pixels).to(memory_format=torch.channels_last)


def prepare(model: Any) -> Any:
    """Evaluation mode, channels-last, and batch norms that are not the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval().to(memory_format=torch.channels_last)


def prunable(model: nn.Module, block_shape: tuple[int, int]) -> list[str]:
    """Names of the convolutions and linear layers with at least one whole block in each direction."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        and module.weight.shape[0] >= block_shape[0]
        and module.weight.shape[1] >= block_shape[1]
    ]


def pointwise(model: nn.Module) -> list[str]:
    """Names of the ungrouped 1x1 convolutions on images; gates compute on one pixel."""
    gates = {m for gate in model.modules() if isinstance(gate, mobile.SqueezeExcite) for m in gate.modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.groups == 1
        and module not in gates
    ]


def prune(model: nn.Module, block_shape: tuple[int, int], density: float) -> float:
    """Zeroes blocks so that each prunable layer keeps `density`; returns the kept share of all parameters."""
    bsc.prune_blocks(model, block_shape, density, include=prunable(model, block_shape))
    return kept_parameters(model, block_shape)


def prune_to_fraction(model: nn.Module, block_shape: tuple[int, int], fraction: float) -> float:
    """As `prune`, with the density that leaves `fraction` of all the model's parameters."""
    names = set(prunable(model, block_shape))
    total = sum(p.numel() for p in model.parameters())
    eligible = sum(m.weight.numel() for name, m in model.named_modules() if name in names)
    return prune(model, block_shape, (fraction * total - (total - eligible)) / eligible)


def kept_parameters(model: nn.Module, block_shape: tuple[int, int]) -> float:
    """Nonzero weights of the prunable layers and all other parameters, over all parameters."""
    names = set(prunable(model, block_shape))
    total = sum(p.numel() for p in model.parameters())
    zeros = sum(int(m.weight.eq(0).sum()) for name, m in model.named_modules() if name in names)
    return 1 - zeros / total
