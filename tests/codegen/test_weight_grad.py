"""The kernel for the gradient of kept tiles: vector widths, threads, dynamic sizes, strides, fallback."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import compiling

from blocksparse_compiler import BlockPattern
from blocksparse_compiler.packing import pack_weight

WIDTHS = """
import sys, torch
from test_weight_grad import check, weight_grad
from kernel_cases import compiling
torch.set_num_threads(int(sys.argv[1]))
with compiling() as sources:
    check([(2, (64, 32), (32, 32), (3, 3), 1, 7), (1, (32, 64), (16, 16), (1, 1), 1, 5),
           (1, (16, 8), (8, 8), (3, 3), 2, 9), (1, (4, 8), (4, 8), (1, 1), 2, 4)])
assert sys.argv[2] in "".join(sources), "".join(sources)
"""


def weight_grad(grad, x, index, block, geometry):
    return torch.ops.blocksparse.weight_grad(grad, x, index, list(block), *geometry)


def make(images, channels, block, kernel, stride, size):
    """(gradient, input, table, block, geometry) of a layer with padding that keeps the size at stride 1."""
    out_channels, in_channels = channels
    torch.manual_seed(0)
    full = BlockPattern.full((out_channels, in_channels, *kernel), block)
    pattern = full.with_kept(torch.rand(full.grid_shape) < 0.6)
    index = pack_weight(torch.zeros(pattern.weight_shape), pattern).tile_index
    pads = [k // 2 for k in kernel for _ in range(2)]
    x = torch.randn(images, in_channels, size, size).to(memory_format=torch.channels_last)
    out = [(size + 2 * (k // 2) - k) // stride + 1 for k in kernel]
    grad = torch.randn(images, out_channels, *out).to(memory_format=torch.channels_last)
    return grad, x, index, block, (list(kernel), [stride, stride], pads, [1, 1])


def assert_right(got, grad, x, *rest):
    exact = weight_grad(grad.double(), x.double(), *rest)
    assert got.shape == exact.shape
    assert (got - exact).norm() <= 1e-6 * exact.norm()


def check(cases) -> None:
    layers = [make(*case) for case in cases]
    results = torch.compile(lambda ls: [weight_grad(*layer) for layer in ls], fullgraph=True)(layers)
    for result, layer in zip(results, layers, strict=True):
        assert_right(result, *layer)


@pytest.mark.parametrize(
    ("capability", "threads", "tile"),
    [("avx2", 4, "TileGradient<8, 2, 4, "), ("default", 3, "TileGradient<4, ")],
)
def test_other_vector_widths_and_thread_counts(capability, threads, tile):
    path = (
        os.pathsep.join(p for p in sys.path if p.endswith("helpers")) + os.pathsep + os.path.dirname(__file__)
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": path}
    command = [sys.executable, "-c", WIDTHS, str(threads), tile]
    subprocess.run(command, env=environment, check=True, timeout=300)


def test_dynamic_sizes_and_strided_inputs():
    grad, x, index, block, geometry = make(4, (32, 32), (16, 16), (3, 3), 1, 9)
    rows, columns, flat = torch.randn(6, 48)[:, :32], torch.randn(6, 64)[:, 32:], index[:, index[1] == 0]
    with compiling():
        conv = torch.compile(lambda g, x: weight_grad(g, x, index, block, geometry), dynamic=True)
        linear = torch.compile(lambda g, x: weight_grad(g, x, flat, block, ([], [], [], [])))
        cropped = torch.randn(4, 40, 12, 12)[:, 4:36, 1:10, 2:11]
        for g, inputs in ((grad, x), (grad[:3], x[:3]), (grad.contiguous(), cropped), (grad[1:2], x[1:2])):
            assert_right(conv(g, inputs), g, inputs, index, block, geometry)
        assert_right(linear(rows, columns), rows, columns, flat, block, ([], [], [], []))


def test_epilogue_and_other_users():
    layer = make(2, (32, 32), (16, 16), (1, 1), 1, 6)
    with compiling():

        def scaled(layer):
            raw = weight_grad(*layer)
            return raw, 2 * raw + 1

        raw, both = torch.compile(scaled)(layer)
    assert_right(raw, *layer)
    torch.testing.assert_close(both, 2 * raw + 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_run_as_the_operator(dtype, caplog):
    grad, x, *rest = make(1, (16, 16), (16, 16), (1, 1), 1, 4)
    grad, x = grad.to(dtype), x.to(dtype)
    with compiling(), caplog.at_level(logging.WARNING):
        result = torch.compile(lambda g, x: weight_grad(g, x, *rest))(grad, x)
    torch.testing.assert_close(result, weight_grad(grad, x, *rest))
    assert "runs without a generated kernel" in caplog.text
