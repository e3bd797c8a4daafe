"""What follows a layer runs in its Triton kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import BFLOAT, GpuCase, GpuLayer, generate
from torch import Tensor, nn

pytest.importorskip("triton")

ONE = (1, 1, 1, 1)


class Block(nn.Module):
    """What surrounds a layer in networks: batch norm as scale and shift, a residual sum, an activation."""

    def __init__(self, layer: GpuLayer, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.activation = layer, activation
        channels = (1, -1, 1, 1) if layer.case.kernel_size else (-1,)
        self.register_buffer("scale", torch.rand(layer.case.out_channels).reshape(channels) + 0.5)
        self.register_buffer("shift", torch.randn(layer.case.out_channels).reshape(channels))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.follow(self.layer(x), residual)

    def follow(self, y: Tensor, residual: Tensor) -> Tensor:
        return self.activation((y * self.scale + self.shift).to(residual.dtype) + residual)


FUSED = [
    (GpuCase((2, 64, 6, 6), 64, (3, 3), (32, 32), padding=ONE, parameters={"step": 2}), 1),
    (GpuCase((2, 64, 6, 6), 64, (1, 1), (64, 64), parameters={"swapped": 1, "pixels": 64}), 1),
    (GpuCase((6, 64), 48), 1),
    (GpuCase((6, 64), 48, variant="triton_decode", parameters={"pixels": 16}), 1),
    (GpuCase((6, 64), 48, variant="triton_decode", parameters={"pixels": 16, "split": 2}), 2),
]


@pytest.mark.parametrize("activation", [F.relu, F.silu, F.gelu], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("case", "kernels"), FUSED, ids=["gather", "swapped", "linear", "decode", "split"])
def test_everything_that_follows_is_fused(case, kernels, activation):
    block = Block(GpuLayer(case), activation)
    x = case.input()
    residual = torch.randn_like(block.layer.reference(x, BFLOAT))
    program = generate(block, x, residual)
    assert len(program.kernels) == kernels, [kernel.name for kernel in program.kernels]
    assert not program.externs
    exact = block.double().follow(block.layer.reference(x), residual.double())
    assert (program.run(x, residual) - exact).norm() <= 2.0**-7 * exact.norm()
