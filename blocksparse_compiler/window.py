"""What a convolution's filter sees of its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Size and steps of a filter, for each spatial dimension.

    Args:
        padding: before and after each dimension in turn; what is negative is cut off.
    """

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    @property
    def dims(self) -> int:
        return len(self.kernel_size)

    @property
    def borders(self) -> list[tuple[int, int]]:
        """`padding` as pairs."""
        return list(zip(self.padding[::2], self.padding[1::2], strict=True))

    def output_size(self, size: Sequence[Any]) -> list[Any]:
        """Of an input of this size; both may be symbolic."""
        return [
            (size[i] + before + after - self.dilation[i] * (self.kernel_size[i] - 1) - 1) // self.stride[i]
            + 1
            for i, (before, after) in enumerate(self.borders)
        ]

    def pad(self, x: Tensor, value: float = 0) -> Tensor:
        pads = [p for border in reversed(self.borders) for p in border]
        return torch.nn.functional.pad(x, pads, value=value)

    def of_one_row(self) -> Window:
        """A window of one dimension on images of one row."""
        return Window([1, *self.kernel_size], [1, *self.stride], [0, 0, *self.padding], [1, *self.dilation])
