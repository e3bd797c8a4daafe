"""Programs for a GPU that once failed or were wrong."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import blocksparse_compiler as bsc
from blocksparse_compiler.codegen import offline
from blocksparse_compiler.devices import device
from blocksparse_compiler.passes.lower_sites import lower_sites
from blocksparse_compiler.passes.pipeline import PassContext, run_pipeline
from blocksparse_compiler.variants import block_shapes

pytest.importorskip("triton", reason="Triton is not installed")


def run(model, x, target="h200"):
    """The program for `target` in the interpreter; a kernel wherever one exists."""
    gm = bsc.trace(model, x)
    run_pipeline(gm, PassContext(device=device(target), allow_dense=False))
    return offline.generate(gm, (x,), device(target)).run(x)


def assert_close(got, model, x):
    torch.testing.assert_close(got.double(), copy.deepcopy(model).double()(x.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["h200", "a100"])
def test_pointwise_layer_behind_a_strided_one_of_symbolic_size(target):
    """Of (h - 1) // 2 + 1 pixels, the last one is not known to be below that many."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(64, 96, 1)).eval()
    bsc.prune_blocks(model, (32, 32), 0.5)
    x = torch.randn(2, 64, 8, 9)
    sizes = {2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w", min=4)}
    gm = bsc.trace(model, x, dynamic_shapes=(sizes,))
    run_pipeline(gm, PassContext(device=device(target), allow_dense=False))
    program = offline.generate(gm, (x,), device(target))
    for height, width in ((8, 9), (5, 12)):
        x = torch.randn(2, 64, height, width)
        assert_close(program.run(x), model, x)
    assert "inside" not in program.kernel("2").source  # there is no padding


def test_a_block_row_of_128_without_a_partner():
    """Its partner lies past all channels, but not so far that 32-bit indices overflow into memory before."""
    torch.manual_seed(0)
    model, x = nn.Linear(512, 384).eval(), torch.randn(40, 512)
    bsc.prune_blocks(model, (128, 64), 0.5)
    gm = bsc.trace(model, x)
    (decision,) = bsc.plan(gm, "a100", block_shape=(128, 64), allow_dense=False)
    config = {"pixels": 32, "warps": 4, "stages": 2, "precision": "ieee"}
    lower_sites(gm, bsc.Plan((replace(decision, kernel="triton_pair", config=config),)))
    assert_close(offline.generate(gm, (x,), device("a100")).run(x), model, x)


class Sum(nn.Module):
    def forward(self, x):
        return (x * x).mean()


def test_reduction_to_a_scalar():
    """The launch of a kernel with one output element passes that 1, which is a constant of the kernel."""
    x = torch.randn(3, 3000)
    assert_close(run(Sum(), x), Sum(), x)


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.ConvTranspose1d])
def test_dense_1d_convolution_of_a_transposed_input(layer):
    model, x = layer(32, 16, 3).eval(), torch.randn(2, 9, 32).transpose(1, 2)
    assert_close(run(model, x), model, x)


@pytest.mark.parametrize(
    ("wanted", "tile"),
    [
        ((8, 8), (16, 16)),
        ((1, 1), (16, 16)),
        ((64, 32), (64, 32)),
        ((256, 64), (128, 64)),
        ((24, 40), (16, 16)),
        ((96, 48), (32, 16)),
    ],
)
def test_tiles_end_where_the_users_blocks_do(wanted, tile):
    """Tiles of 32x64 hide nearly all zero blocks of 24x40."""
    assert block_shapes("cuda", wanted) == (tile,)
