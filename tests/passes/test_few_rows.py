"""Layers without zeros on few rows run whole on kernels of ours, and nothing else does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import blocksparse_compiler as bsc
from blocksparse_compiler.backend import compiled_graphs
from blocksparse_compiler.devices import device
from blocksparse_compiler.few_rows import whole_patterns

SPEC = device("avx512-2core")


class Gate(nn.Module):
    """Squeeze-excite: a product of an image and of two layers on its mean."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * nn.functional.hardsigmoid(self.up(torch.relu(self.down(mean))))


def plan_of(model: nn.Module, x: torch.Tensor) -> bsc.Plan:
    return bsc.passes.choose_kernels(bsc.trace(model.eval(), x), SPEC)


@pytest.mark.parametrize(
    ("layer", "shape", "block"),
    [
        (nn.Linear(256, 100), (1, 256), (32, 1)),
        (nn.Linear(256, 20), (4, 4, 256), (16, 1)),
        (nn.Conv2d(96, 4, 1), (2, 96, 1, 1), (4, 1)),
        (nn.Conv2d(96, 33, 1, stride=2), (1, 96, 2, 2), (32, 1)),
        (nn.Linear(3, 1), (2, 3), (1, 1)),
        (nn.Linear(256, 100).bfloat16(), (1, 256), (32, 2)),
        (nn.Linear(256, 100), (17, 256), None),
        (nn.Conv2d(64, 64, 3, padding=1), (1, 64, 2, 2), None),
        (nn.Conv2d(64, 64, 1, groups=2), (1, 64, 1, 1), None),
        (nn.ConvTranspose2d(64, 64, 1), (1, 64, 1, 1), None),
        (nn.Linear(256, 100).double(), (1, 256), None),
    ],
)
def test_which_layers_may_run_whole(
    layer: nn.Module, shape: tuple[int, ...], block: tuple[int, int] | None
) -> None:
    model = nn.Sequential(layer).eval()
    (site,) = bsc.passes.find_sites(bsc.trace(model, torch.zeros(shape, dtype=layer.weight.dtype)))
    found = whole_patterns(site)
    assert [p.block_shape for p in found] == ([block] if block else [])
    assert all(p.density == 1 and p.weight_shape == tuple(layer.weight.shape) for p in found)


def test_estimates_decide() -> None:
    small, large = nn.Linear(256, 256), nn.Linear(4096, 4096)
    model = nn.Sequential(small, nn.Unflatten(1, (1, 256)), nn.Flatten(), nn.Linear(256, 4096), large)
    first, _, last = plan_of(model, torch.zeros(1, 256))
    assert first.kernel == "cpu_f32" and first.reason.startswith("dense on its own kernel: ")
    assert not first.is_dense and not first.is_block_sparse
    assert last.is_dense and "torch's kernel is as fast" in last.reason


def test_a_gate_computes_the_same_on_whole_kernels() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = Gate(72, 20).eval(), torch.randn(2, 72, 5, 5).to(memory_format=torch.channels_last)
    fast = torch.compile(model, backend="blocksparse", fullgraph=True)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        assert (fast(x) - exact).norm() <= 1e-6 * exact.norm()
    assert [d.pattern and d.pattern.block_shape for d in compiled_graphs()[-1].plan] == [(16, 1), (32, 1)]
