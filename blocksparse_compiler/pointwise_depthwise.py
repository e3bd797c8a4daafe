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
from .ops import LIBRARY, conv_output, dense_conv, layout_of
from .packing import unpack_weight

FUSE = "fuse"
"""A parameter of both layers' kernels, whose value is `"depthwise"`: they run as one."""


def is_fused(config: Mapping[str, int | str]) -> bool:
    return config.get(FUSE) == "depthwise"


_SCHEMA = (
    "pointwise_depthwise(Tensor x, Tensor values, Tensor row_ptr, Tensor tile_index, Tensor row_bias, "
    "str activation, Tensor weight, Tensor bias, int[] kernel_size, int[] stride, int[] padding, "
    "int[] dilation, bool channels_last, str kernel) -> Tensor"
)


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


LIBRARY.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


def _reference(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    tile_index: Tensor,
    row_bias: Tensor,
    activation: str,
    weight: Tensor,
    bias: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    kernel: str,
) -> Tensor:
    hidden = row_bias.shape[0]
    pointwise = unpack_weight(values, row_ptr, tile_index, hidden, x.shape[1], (1, 1), layout_of(kernel))
    inner = Activation.parse(activation)(torch.conv2d(x, pointwise, row_bias))
    filters = weight.t().reshape(hidden, 1, *kernel_size)
    return dense_conv(inner, filters, bias, stride, padding, dilation, channels_last, groups=hidden)


def _fake(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    tile_index: Tensor,
    row_bias: Tensor,
    activation: str,
    weight: Tensor,
    bias: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    kernel: str,
) -> Tensor:
    hidden = row_bias.shape[0]
    return conv_output(x, x.dtype, hidden, kernel_size, stride, padding, dilation, channels_last)


LIBRARY.impl("pointwise_depthwise", _reference, "CompositeExplicitAutograd")
torch.library.register_fake("blocksparse::pointwise_depthwise", _fake, lib=LIBRARY)
