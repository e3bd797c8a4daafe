"""`blocksparse::pointwise_depthwise`: a sparse 1x1 convolution, an activation, a depthwise convolution.

Mobile networks expand channels by a 1x1 convolution that is nearly free once it is sparse. What then costs is
to write its output to memory and read it again, which one kernel for both never does
(codegen/cpu_pointwise_depthwise).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import PlanError
from .ops import Convolution, Operand, conv_output, define, dense_conv, layout_of
from .packing import unpack_weight

FUSE = "fuse"
"""A parameter of both layers' kernels, whose value is `"depthwise"`: they run as one."""


def is_fused(config: Mapping[str, int | str]) -> bool:
    return config.get(FUSE) == "depthwise"


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": torch.Tensor.clone,
    "relu": torch.relu,
    "hardswish": torch.nn.functional.hardswish,
    "silu": torch.nn.functional.silu,
}


@dataclass(frozen=True)
class Activation:
    """An elementwise function, as torch and as C++ (codegen/include/activations_f32.h).

    Args:
        name: `"identity"`, `"relu"`, `"hardswish"`, `"silu"` or `"clamp"`.
        low, high: of a clamp; finite.
    """

    name: str
    low: float = 0.0
    high: float = 0.0

    def __str__(self) -> str:
        return f"clamp:{self.low!r}:{self.high!r}" if self.name == "clamp" else self.name

    @classmethod
    def parse(cls, text: str) -> Activation:
        """Inverse of `str`. Raises `PlanError` on other text."""
        name, *bounds = text.split(":")
        if name in _PLAIN and not bounds:
            return cls(name)
        if name == "clamp" and len(bounds) == 2:
            with contextlib.suppress(ValueError):
                return cls(name, *map(float, bounds))
        known = ", ".join([*_PLAIN, "clamp:<low>:<high>"])
        raise PlanError("activation", f"one of {known}", repr(text), "Compile the model anew.")

    def __call__(self, x: Tensor) -> Tensor:
        return x.clamp(self.low, self.high) if self.name == "clamp" else _PLAIN[self.name](x)

    def cpp(self) -> str:
        """An expression of the vector `x`."""
        return f"clamp(x, {self.low!r}f, {self.high!r}f)" if self.name == "clamp" else f"{self.name}(x)"


@dataclass(frozen=True)
class PointwiseDepthwiseArguments(Convolution):
    """Of the pointwise layer: its packed weight and `row_bias`; of the depthwise layer: what follows."""

    x: Operand
    values: Operand
    row_ptr: Operand
    tile_index: Operand
    row_bias: Operand
    activation: str
    weight: Operand
    bias: Operand
    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    channels_last: bool
    kernel: str


def _reference(args: PointwiseDepthwiseArguments) -> Tensor:
    hidden = args.row_bias.shape[0]
    tables = (args.values, args.row_ptr, args.tile_index, hidden, args.x.shape[1], (1, 1))
    pointwise = unpack_weight(*tables, layout_of(args.kernel))
    inner = Activation.parse(args.activation)(torch.conv2d(args.x, pointwise, args.row_bias))
    filters = args.weight.t().reshape(hidden, 1, *args.kernel_size)
    return dense_conv(inner, filters, args.bias, args.window, args.channels_last, groups=hidden)


def _fake(args: PointwiseDepthwiseArguments) -> Tensor:
    return conv_output(args.x, args.x.dtype, args.row_bias.shape[0], args.window, args.channels_last)


define("pointwise_depthwise", PointwiseDepthwiseArguments, _reference, _fake)
