"""Operators keep their signatures: exported programs hold calls of them."""

from __future__ import annotations

import pytest
import torch

from blocksparse_compiler.codegen import lowerings
from blocksparse_compiler.ops import OPERATORS

WEIGHT = "Tensor x, Tensor values, Tensor row_ptr, Tensor tile_index"
WINDOW = "int[] kernel_size, int[] stride, int[] padding, int[] dilation"
IMAGES = f"{WINDOW}, bool channels_last"
QUANTIZED = f"{WEIGHT}, Tensor? bias, Tensor scale, Tensor weight_sums, int zero_point, int out_channels"

SIGNATURES = {
    "conv": f"{WEIGHT}, Tensor? bias, int out_channels, {IMAGES}, str kernel",
    "linear": f"{WEIGHT}, Tensor? bias, int out_channels, str kernel",
    "depthwise": f"Tensor x, Tensor weight, Tensor? bias, {IMAGES}, str kernel",
    "pointwise_depthwise": f"{WEIGHT}, Tensor row_bias, str activation, Tensor weight, Tensor bias, "
    f"{IMAGES}, str kernel",
    "quantized_conv": f"{QUANTIZED}, {IMAGES}, str kernel",
    "quantized_linear": f"{QUANTIZED}, str kernel",
    "layer_chain": f"{WEIGHT}, Tensor filters, Tensor biases, str layers, bool channels_last, str kernel",
    "weight_grad": "Tensor grad, Tensor x, Tensor tile_index, int[] block_shape, "
    f"{WINDOW}, Tensor? groups=None",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    op = getattr(torch.ops.blocksparse, name).default
    assert str(op._schema) == f"blocksparse::{name}({SIGNATURES[name]}) -> Tensor"


def test_every_operator_with_lowerings_has_one_for_a_cpu():
    lowerings.register()
    for name in OPERATORS:
        assert hasattr(lowerings._family("cpu", f"lower_{name}"), f"lower_{name}")
