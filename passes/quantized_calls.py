"""Reads a layer on quantized tensors, as PyTorch's PT2E flow writes it.

    conv2d(dequantize_per_tensor(x, s, z, …), dequantize_per_channel(W, s_W, z_W, 0, …), b)

The operators are known by name: torch registers them when something first needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .calls import LayerCall, layer_call, tensor_meta
from .static_values import StaticValues

_OPERATOR = "quantized_decomposed.dequantize_per_"
_PER_TENSOR = ("input", "scale", "zero_point", "quant_min", "quant_max", "dtype")
_PER_CHANNEL = ("input", "scales", "zero_points", "axis", "quant_min", "quant_max", "dtype")


@dataclass(frozen=True)
class QuantizedCall:
    """A convolution or linear layer whose input and weight are dequantized just before.

    Attributes:
        layer: the call on the dequantized operands.
        input, weight: the quantized operands.
        scale, zero_point: of the input; numbers.
    """

    layer: LayerCall
    input: Node
    scale: float
    zero_point: int
    weight: Node

    @property
    def dtype(self) -> torch.dtype:
        """Of the quantized input."""
        value = tensor_meta(self.input)
        assert value is not None  # quantized_call has looked at it
        return value.dtype

    def weight_scale(self, values: StaticValues) -> Tensor | None:
        """One scale per output channel, float64; None if the weight is no constant, or not symmetric."""
        name, arguments = _dequantized(self.layer.weight)
        names = ("scales", "zero_points") if name == "channel" else ("scale", "zero_point")
        scale, zero_point = (_number_or_value(arguments.get(key), values) for key in names)
        weight = values.get(self.weight)
        if weight is None or weight.dtype != torch.int8 or scale is None:
            return None
        if zero_point is not None and bool(torch.as_tensor(zero_point).ne(0).any()):
            return None
        return torch.as_tensor(scale, dtype=torch.float64).expand(weight.shape[0])


def quantized_call(node: Node) -> QuantizedCall | None:
    """`node` as a `QuantizedCall`, or None if it is no layer on quantized operands of types we know.

    Of the input, uint8 or int8 with numbers for scale and zero point; of the weight, int8, quantized as a
    whole or by output channel. The layer itself computes in fp32.
    """
    layer = layer_call(node)
    if layer is None or layer.transposed or _dtype(node) != torch.float32:
        return None
    kind, x = _dequantized(layer.input)
    scale, zero_point = x.get("scale"), x.get("zero_point")
    if kind != "tensor" or _dtype(x["input"]) not in (torch.uint8, torch.int8):
        return None
    if not isinstance(scale, int | float) or not isinstance(zero_point, int):
        return None
    kind, weight = _dequantized(layer.weight)
    if not kind or weight.get("axis", 0) != 0 or _dtype(weight["input"]) != torch.int8:
        return None
    return QuantizedCall(layer, x["input"], float(scale), zero_point, weight["input"])


def why_dequantized(node: Node) -> str | None:
    """Why a layer on a quantized input runs in floats all the same, as a phrase; None for other layers."""
    layer = layer_call(node)
    kind, x = _dequantized(layer.input) if layer else ("", {})
    if not kind or quantized_call(node):
        return None
    if kind != "tensor":
        return "its input has more than one scale"
    if not isinstance(x.get("scale"), int | float) or not isinstance(x.get("zero_point"), int):
        return "the scale of its input is known only at run time (dynamic quantization)"
    dtype = _dtype(x["input"])
    if dtype not in (torch.uint8, torch.int8):
        return f"no kernel reads {str(dtype).removeprefix('torch.')}"
    return "its weight is not quantized to int8 as a whole or by output channel"


def _dequantized(node: Node) -> tuple[str, dict[str, Any]]:
    """What `node` dequantizes by (`"tensor"`, `"channel"`, or nothing), and the arguments of that call."""
    name = str(node.target) if node.op == "call_function" else ""
    if not name.startswith(_OPERATOR):
        return "", {}
    kind = name.removeprefix(_OPERATOR).partition(".")[0]
    names: Sequence[str] = {"tensor": _PER_TENSOR, "channel": _PER_CHANNEL}.get(kind, ())
    arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return (kind, arguments) if isinstance(arguments.get("input"), Node) else ("", {})


def _dtype(node: Node) -> torch.dtype | None:
    value = tensor_meta(node)
    return None if value is None else value.dtype


def _number_or_value(argument: Any, values: StaticValues) -> Any:
    return values.get(argument) if isinstance(argument, Node) else argument
