"""Models as PyTorch's PT2E flow leaves them: fp32 layers between dequantize and quantize."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers what quantized programs are made of
from torch.nn import functional as F

from blocksparse_compiler import BlockPattern

Q: Any = torch.ops.quantized_decomposed
BOUNDS = {torch.uint8: (0, 255), torch.int8: (-128, 127)}
U8, S8 = torch.uint8, torch.int8


def quantize(x: Tensor, scale: float = 0.05, zero_point: int = 0, dtype: torch.dtype = U8) -> Tensor:
    return Q.quantize_per_tensor.default(x, scale, zero_point, *BOUNDS[dtype], dtype)


def dequantize(x: Tensor, scale: float = 0.05, zero_point: int = 0) -> Tensor:
    return Q.dequantize_per_tensor.default(x, scale, zero_point, *BOUNDS[x.dtype], x.dtype)


class Quantized(nn.Module):
    """A pruned layer with an int8 weight of one scale per output channel, on a quantized input.

    Args:
        layer: the fp32 layer.
        block, density: of the tiles that are kept.
        scale, zero_point: of the input.
    """

    def __init__(
        self,
        layer: nn.Module,
        block: tuple[int, int] = (32, 32),
        density: float = 0.5,
        scale: float = 0.05,
        zero_point: int = 0,
        weight_zero_point: int = 0,
    ) -> None:
        super().__init__()
        weight = layer.weight.detach()
        self.groups, self.scale, self.zero_point = getattr(layer, "groups", 1), scale, zero_point
        pattern = BlockPattern.full(tuple(weight.shape), block, self.groups)
        kept = torch.rand(pattern.grid_shape, generator=torch.Generator().manual_seed(0)) < density
        weight = pattern.with_kept(kept).apply(weight)
        scales = weight.flatten(1).abs().amax(1).clamp(min=1e-3) / 127
        weight = (weight / scales.view(-1, *[1] * (weight.dim() - 1))).round()
        self.register_buffer("weight", weight.to(torch.int8) + weight_zero_point)
        self.register_buffer("scales", scales)
        self.register_buffer("zero_points", torch.full((len(scales),), weight_zero_point))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.geometry = () if isinstance(layer, nn.Linear) else (layer.stride, layer.padding, layer.dilation)

    def dequantized_weight(self) -> Tensor:
        bounds = (-128, 127, torch.int8)
        return Q.dequantize_per_channel.default(self.weight, self.scales, self.zero_points, 0, *bounds)

    def forward(self, x: Tensor) -> Tensor:
        operands = (dequantize(x, self.scale, self.zero_point), self.dequantized_weight(), self.bias)
        if not self.geometry:
            return F.linear(*operands)
        conv = {3: F.conv1d, 4: F.conv2d}[self.weight.dim()]
        return conv(*operands, *self.geometry, self.groups)


class ResidualNet(nn.Module):
    """fp32 in and out, quantized in between; the last layer's input has a zero point."""

    def __init__(self, dtype: torch.dtype = U8) -> None:
        super().__init__()
        self.dtype, self.zero = dtype, BOUNDS[dtype][0]
        torch.manual_seed(0)
        self.first = Quantized(nn.Conv2d(3, 64, 3, padding=1), (32, 3), 1.0, zero_point=self.zero + 120)
        self.conv1 = Quantized(nn.Conv2d(64, 64, 3, padding=1), zero_point=self.zero)
        self.conv2 = Quantized(nn.Conv2d(64, 64, 1, bias=False), zero_point=self.zero)
        self.fc = Quantized(nn.Linear(64, 96), scale=0.01, zero_point=self.zero + 3)

    def forward(self, x: Tensor) -> Tensor:
        x = quantize(x, 0.05, self.zero + 120, self.dtype)
        x = quantize(torch.relu(self.first(x)), 0.05, self.zero, self.dtype)
        y = quantize(torch.relu(self.conv1(x)), 0.05, self.zero, self.dtype)
        y = torch.relu(self.conv2(y) + dequantize(x, 0.05, self.zero))
        return self.fc(quantize(y.mean((2, 3)), 0.01, self.zero + 3, self.dtype))
