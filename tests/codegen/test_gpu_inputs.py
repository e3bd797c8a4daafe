"""Triton kernels on symbolic sizes, views, large tensors, and what they leave to the operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_cases import (
    BFLOAT,
    FLOAT,
    HALF,
    GpuCase,
    GpuLayer,
    GpuLayers,
    assert_close_to_float64,
    check,
    generate,
)
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import blocksparse_compiler as bsc
from blocksparse_compiler.codegen import offline

pytest.importorskip("triton")

ONE = (1, 1, 1, 1)


def test_one_program_serves_every_batch():
    module = GpuLayers(
        [
            GpuCase((3, 32, 7, 9), 32, (3, 3), padding=ONE),
            GpuCase((3, 64, 7, 9), 48, (1, 1), (32, 32), stride=(2, 2)),
            GpuCase((3, 32, 7, 9), 32, (1, 1)),
            GpuCase((3, 5, 32), 48),
        ]
    )
    batch = {0: torch.export.Dim("batch")}
    program = serves(module, {"xs": [batch] * len(module.layers)}, [(3,), (2,), (7,)])
    assert all("ks0" in kernel.source for kernel in program.templates)


def test_one_program_serves_every_image_size():
    dim = torch.export.Dim
    module = GpuLayers(
        [
            GpuCase((2, 32, 7, 9), 32, (3, 3), padding=ONE),
            GpuCase((2, 32, 7, 9), 32, (3, 3), stride=(2, 2), dilation=(1, 2), padding=(0, 1, 1, 1)),
            GpuCase((2, 32, 7, 9), 48, (1, 1)),
            GpuCase((2, 32, 7, 9), 48, (1, 1), stride=(2, 2)),
        ]
    )
    sizes = {0: dim("batch"), 2: dim("height", min=5), 3: dim("width", min=5)}
    serves(module, {"xs": [sizes] * len(module.layers)}, [(2, None, 7, 9), (3, None, 8, 6), (1, None, 5, 11)])


def serves(module: GpuLayers, dynamic_shapes: Any, sizes: list[tuple[int | None, ...]]) -> Any:
    """Runs one program on inputs of several sizes (None: as in the case), and compares."""
    program = None
    for size in sizes:
        xs = []
        for layer in module.layers:
            shape = layer.case.input_shape
            shape = tuple(new or old for new, old in zip(size, shape, strict=False)) + shape[len(size) :]
            xs.append(replace(layer.case, input_shape=shape).input())
        program = program or generate(module, xs, dynamic_shapes=dynamic_shapes)
        for layer, x, out in zip(module.layers, xs, program.run(xs), strict=True):
            assert_close_to_float64(layer, x, out)
    return program


class Views(nn.Module):
    """A layer on part of a larger tensor: other strides, a storage that starts elsewhere."""

    def __init__(self, layer: GpuLayer, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.view = layer, view

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.view(x))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 16:],
        lambda x: x[1:, :16],
        lambda x: x[:2, 8:24, 1:, ::2],
        lambda x: x[:, 1:17].flip(2),
        lambda x: x[:2, :16, :3, :4].contiguous(),
    ],
    ids=["channels", "batch", "strided", "computed", "channels_first"],
)
def test_inputs_that_are_views(view):
    x = GpuCase((3, 32, 6, 7), 16, (1, 1)).input()
    for kernel, padding in (((1, 1), ()), ((3, 3), ONE)):
        layer = GpuLayer(GpuCase(tuple(view(x).shape), 32, kernel, padding=padding))
        got = generate(module := Views(layer, view), x).run(x)
        assert_close_to_float64(layer, module.view(x), got)


def test_more_elements_than_int32_counts():
    """Offsets of pixels and weights are 64-bit; the kernel is read only, since it would take 5 GB to run."""
    layer = GpuLayer(GpuCase((1, 64, 9, 9), 64, (3, 3), (64, 64), padding=ONE))
    small = torch.empty(1, 64, 9, 9, dtype=BFLOAT)
    with FakeTensorMode(allow_non_fake_inputs=True):
        large = torch.empty(2, 64, 4200, 4200, dtype=BFLOAT).to(memory_format=torch.channels_last)
    source = {}
    for x in (small, large):
        program = generate(layer, x)
        source[x.numel() > 2**31] = program.templates[0].source
        assert program.templates[0].compile().resources.spill_bytes == 0
    assert "INDEX_DTYPE : tl.constexpr = tl.int32" in source[False]
    assert "INDEX_DTYPE : tl.constexpr = tl.int64" in source[True]


@pytest.mark.parametrize("bias_dtype", [FLOAT, HALF], ids=str)
def test_bias_of_another_dtype(bias_dtype):
    check(
        [
            GpuCase((1, 32, 5, 5), 32, (1, 1), bias_dtype=bias_dtype),
            GpuCase((1, 32, 5, 5), 32, (1, 1), bias_dtype=bias_dtype, density=0.0),
            GpuCase((2, 32), 32, variant="triton_decode", parameters={"split": 2}, bias_dtype=bias_dtype),
        ]
    )


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (GpuCase((2, 32), 32, parameters={"step": 8}), "8 tiles of 16 channels at a time"),
        (GpuCase((17, 32), 32, variant="triton_decode", parameters={"pixels": 16}), "at most 16 rows"),
        (GpuCase((1, 32, 3, 3), 32, (1, 1), variant="triton_decode"), "at most"),
    ],
    ids=["step", "rows", "convolution"],
)
def test_what_a_kernel_cannot_do_is_left_to_the_operator(case, reason, caplog):
    layer, x = GpuLayer(case), case.input()
    program = offline.generate(bsc.trace(layer, x), target="sm_90")
    assert not program.templates
    assert "blocksparse" in " ".join(program.externs)
    assert reason in caplog.text
    assert_close_to_float64(layer, x, program.run(x))
