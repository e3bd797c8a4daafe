"""`blocksparse::padded_conv2d`: torch's convolution, with borders of their own size on every side.

It stands in graphs while they are planned; where a layer stays dense, tracing takes it apart again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .ops import LIBRARY

LIBRARY.define(
    "padded_conv2d(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    "int groups) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _padded_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`padding`: top, bottom, left, right; its lesser part is the convolution's, the rest goes before it."""
    top, bottom, left, right = padding
    rows, columns = min(top, bottom), min(left, right)
    rest = (left - columns, right - columns, top - rows, bottom - rows)
    if any(rest):
        x = torch.nn.functional.pad(x, rest)
    return torch.conv2d(x, weight, bias, stride, (rows, columns), dilation, groups)


LIBRARY.impl("padded_conv2d", _padded_conv2d, "CompositeImplicitAutograd")
