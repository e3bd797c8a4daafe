"""Chains of sparse 1x1 and depthwise convolutions in one kernel, on bands of image rows."""

from __future__ import annotations

from pathlib import Path

import torch
from chain_cases import IDENTITY, ChainCase, ChainModule, depthwise, pointwise
from kernel_cases import run
from torch import Tensor, nn

from blocksparse_compiler.layouts import Layouts
from blocksparse_compiler.pointwise_depthwise import Activation

HELPERS = Path(__file__).parents[1] / "helpers"
RELU, SWISH, SILU = (Activation(name) for name in ("relu", "hardswish", "silu"))

# An inverted residual, strided, and one that adds its input, as in MobileNet-v2.
RESIDUALS = (
    *(pointwise(72, 4, RELU), depthwise(stride=2), pointwise(24, 4)),
    *(pointwise(100, 4, RELU), depthwise(), pointwise(24, 4, IDENTITY, adds=3)),
    *(pointwise(96, 2, SWISH), depthwise(5, activation=SILU), pointwise(24, 1, RELU, adds=6)),
)
LAST, FIRST = Layouts(False, False), Layouts(True, True)
TRICKY = [
    ChainCase((1, 16, 28, 28), RESIDUALS),
    ChainCase((1, 16, 14, 14), RESIDUALS, layouts=LAST),
    ChainCase((1, 3, 9, 7), (depthwise(), pointwise(37, 1, SWISH), depthwise(3, 2), pointwise(5, 2)), 3),
    ChainCase((1, 24, 7, 7), (depthwise(5), depthwise(3, activation=SILU), depthwise(7)), layouts=Layouts(True, False)),
    ChainCase((1, 40, 5, 40), (pointwise(21, 4, RELU), pointwise(40, 4, adds=0), pointwise(10, 2)), 4, Layouts(False, True)),
    ChainCase((2, 150, 6, 6), (pointwise(13, 4, RELU), depthwise(3, 3, padding=2, dilation=2)), 1, density=1.0),
    ChainCase((5, 8, 12, 10), RESIDUALS[:6]),
    ChainCase((1, 16, 3, 33), RESIDUALS, 8),
]


def check(cases: list[ChainCase]) -> None:
    chains = nn.ModuleList(ChainModule(case) for case in cases)
    xs = [torch.randn(case.shape) for case in cases]

    def all_chains(xs: list[Tensor]) -> list[Tensor]:
        return [torch.relu(chain(x)) for chain, x in zip(chains, xs, strict=True)]

    outs, source = run(all_chains, xs, dynamic=False)
    for chain, x, out in zip(chains, xs, outs, strict=True):
        exact = chain.reference(x).relu()
        error, dense = out - exact, chain.reference(x, torch.float32).relu() - exact
        assert out.shape == exact.shape
        assert error.norm() <= 2 * dense.norm() + 2.0**-21 * exact.norm(), chain.case
    assert "blocksparse" not in source.replace("blocksparse_compiler", ""), "an operator was not lowered"


def test_tricky_chains():
    check(TRICKY)
