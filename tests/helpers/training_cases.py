"""Random layers of every kind, for property tests; and the slow, obvious way to expand block scales."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, Tensor, tuple[int, int]]:
    """A float64 layer, an input for it, and a block shape that fits it (mostly ragged)."""
    dims, transposed = draw(st.integers(0, 3)), draw(st.booleans())
    groups = draw(st.sampled_from([1, 1, 2, 3])) if dims else 1
    out_channels, in_channels = (groups * draw(st.integers(1, 7)) for _ in range(2))
    block = (draw(st.integers(1, out_channels // groups)), draw(st.integers(1, in_channels // groups)))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    bias = draw(st.booleans())
    if dims == 0:
        layer: nn.Module = nn.Linear(in_channels, out_channels, bias=bias)
        return layer.double(), torch.randn(2, in_channels, dtype=torch.float64), block
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    stride = draw(st.integers(1, 2))
    make = (TRANSPOSED if transposed else CONVS)[dims]
    layer = make(in_channels, out_channels, kernel, stride=stride, groups=groups, bias=bias)
    x = torch.randn(2, in_channels, *[4] * dims, dtype=torch.float64)
    return layer.double(), x, block


def is_transposed(layer: nn.Module) -> bool:
    return isinstance(layer, tuple(TRANSPOSED.values()))


def block_of_each_weight(layer: nn.Module, block: tuple[int, int]) -> Tensor:
    """int64 `[*weight.shape, 2]`: (row, column) in S of every weight element, one element at a time."""
    groups = getattr(layer, "groups", 1)
    shape = layer.weight.shape
    if is_transposed(layer):
        in_per_group, out_per_group = shape[0] // groups, shape[1]
    else:
        in_per_group, out_per_group = shape[1], shape[0] // groups
    rows = -(-out_per_group // block[0])
    where = torch.empty(*shape, 2, dtype=torch.int64)
    for a in range(shape[0]):
        for b in range(shape[1]):
            if is_transposed(layer):
                group, o, c = a // in_per_group, b, a % in_per_group
            else:
                group, o, c = a // out_per_group, a % out_per_group, b
            where[a, b] = torch.tensor([group * rows + o // block[0], c // block[1]])
    return where


def small_net() -> nn.Module:
    """A convolution, a grouped one, a transposed one, batch norm and a linear layer; input `[N, 3, 8, 8]`."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, groups=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(24, 12, 2, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )
