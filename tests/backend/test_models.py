"""Real networks, half of their blocks pruned: compiled equals eager, at every batch size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blocksparse_compiler import BlockPattern
from blocksparse_compiler.backend import compiled_graphs

transformers = pytest.importorskip("transformers")


def resnet():
    config = transformers.ResNetConfig(
        depths=[2, 1, 1, 1], hidden_sizes=[128, 256, 256, 512], embedding_size=32
    )
    return transformers.ResNetForImageClassification(config), image(64)


def mobilenet_v2():
    return transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config()), image(64)


def convnext():
    config = transformers.ConvNextConfig(depths=[1, 1, 2, 1], hidden_sizes=[32, 64, 96, 128])
    return transformers.ConvNextForImageClassification(config), image(64)


def regnet():
    config = transformers.RegNetConfig(
        depths=[1, 1, 2, 1], hidden_sizes=[64, 128, 192, 256], groups_width=32, embedding_size=32
    )
    return transformers.RegNetForImageClassification(config), image(64)


def vit():
    config = transformers.ViTConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, image_size=64
    )
    return transformers.ViTForImageClassification(config), image(64)


def bert():
    config = transformers.BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512, vocab_size=100
    )
    tokens = lambda n, seed: torch.randint(0, 100, (n, 24), generator=torch.Generator().manual_seed(seed))  # noqa: E731
    return transformers.BertModel(config), tokens


def image(size):
    return lambda n, seed: torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def prune_half(model, block=32):
    """Zeroes half of the blocks of every conv/linear that holds at least one, and wakes up batch norms."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
        if isinstance(layer, nn.Conv2d | nn.Linear) and min(layer.weight.shape[:2]) >= block:
            pattern = BlockPattern.full(layer.weight.shape, (block, block), getattr(layer, "groups", 1))
            rows, _, cols = pattern.grid_shape
            keep = torch.rand(rows, 1, cols, generator=generator) < 0.5
            layer.weight.data = pattern.with_kept(keep.expand(pattern.grid_shape)).apply(layer.weight.data)
    return model.eval()


def logits(output):
    return output[0] if not hasattr(output, "logits") else output.logits


@pytest.mark.parametrize("make", [resnet, mobilenet_v2, convnext, regnet, vit, bert])
@torch.no_grad()
def test_compiled_equals_eager(make):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, inputs = make()
    prune_half(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("blocksparse")
    fast = torch.compile(model, backend=counter, fullgraph=True)
    for batch in (1, 3, 8, 5):
        x = inputs(batch, batch)
        expected, got = logits(model(x)), logits(fast(x))
        scale = expected.abs().max()
        torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=2e-5)
        assert got.stride() == expected.stride()
    assert counter.frame_count <= 2, "recompiled more than once for dynamic batch"


@torch.no_grad()
def test_layers_really_go_sparse():
    torch._dynamo.reset()
    model, inputs = resnet()
    fast = torch.compile(prune_half(model), backend="blocksparse", options={"dense": "never"})
    x = inputs(2, 0).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(logits(fast(x)), logits(model(x)), rtol=1e-4, atol=1e-5)
    plan = compiled_graphs()[-1].plan
    sparse = [d for d in plan if not d.is_dense]
    assert len(sparse) >= len(plan) - 2
    kept = sum(d.pattern.kept_elements for d in sparse) / sum(d.pattern.mask().numel() for d in sparse)
    assert 0.4 < kept < 0.6


@torch.no_grad()
def test_a_network_of_other_dimensions_and_transposed_layers():
    torch._dynamo.reset()
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Conv1d(32, 64, 3, padding=1)
            self.two = nn.ConvTranspose2d(32, 64, 2, stride=2)
            self.three = nn.Conv3d(32, 64, 3, padding=1)

        def forward(self, a, b, c):
            return self.one(a).relu(), self.two(b).relu(), self.three(c).relu()

    model = Net().eval()
    for layer in model.children():
        layer.weight.data[:, :16] = 0
        layer.weight.data[:16] = 0
    inputs = torch.randn(2, 32, 20), torch.randn(2, 32, 7, 7), torch.randn(2, 32, 5, 5, 5)
    fast = torch.compile(model, backend="blocksparse", fullgraph=True)
    for got, expected in zip(fast(*inputs), model(*inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert got.stride() == expected.stride()
    plan = compiled_graphs()[-1].plan
    assert [d.site.op for d in plan] == ["conv1d", "conv_transpose2d", "conv3d"]
    assert all(d.reason for d in plan)
