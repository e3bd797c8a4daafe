"""The input of a convolution as a tensor descriptor: boxes of pixels that one instruction copies.

What a box reads outside the image is zero, so that padding needs no masks. A stride of the convolution
becomes strides of the view that the descriptor describes:

    one phase     all taps read pixels of one residue modulo the stride: a view of these alone
    all phases    `[H]` becomes `[H / stride, stride]`; along the last axis, the phase joins the channels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .gpu_template import Axis

MAX_RANK = 5
"""Most dimensions of a tensor descriptor."""


@dataclass(frozen=True)
class Descriptor:
    """Arguments of `tl.make_tensor_descriptor` and of its `load`, outermost dimension first, as text."""

    base: str
    shape: tuple[str, ...]
    strides: tuple[str, ...]
    block: tuple[str, ...]
    place: tuple[str, ...]


def describe(axes: Sequence[Axis], taps: Sequence[str], images: tuple[str, str], channels: str) -> Descriptor:
    """The descriptor of an NHWC input, in boxes of `BOX_N` images by `BOX_<axis>` pixels by `BW` channels.

    Args:
        taps: for each axis, which of its taps, as an expression.
        images: size and stride of the batch dimension.
        channels: number of channels, whose stride is 1.
    """
    base = "X"
    dims: list[tuple[str, str, str, str]] = [(*images, "BOX_N", "n0")]
    channel = (channels, "1", "BW", "first")
    for axis, tap in zip(axes, taps, strict=True):
        step, start, box = axis.stride, f"{axis.name}0", f"BOX_{axis.name.upper()}"
        if not has_phases(axis):
            shift, phase = divmod(-axis.padding, step)
            size, stride = axis.size, axis.input_stride
            if step > 1:
                size, stride = f"({size} + {step - 1 - phase}) // {step}", f"{step} * {stride}"
            if phase:
                base += f" + {phase} * {axis.input_stride}"
            moved = _scaled(tap, axis.dilation // step) if axis.kernel > 1 else "0"
            dims.append((size, stride, box, _sum(start, moved, shift)))
            continue
        before = -(-axis.padding // step)  # keeps the operands of // and % from being negative
        place = _sum(_scaled(tap, axis.dilation), "0", before * step - axis.padding)
        start = _sum(start, f"({place}) // {step}", -before)
        dims.append((f"{axis.size} // {step}", f"{step} * {axis.input_stride}", box, start))
        if axis is axes[-1]:
            inner = f"{step - 1} * {axis.input_stride} + {channels}"
            channel = (inner, "1", "BW", f"({place}) % {step} * {axis.input_stride} + first")
        else:
            dims.append((str(step), axis.input_stride, "1", f"({place}) % {step}"))
    shape, strides, block, places = zip(*dims, channel, strict=True)
    return Descriptor(base, shape, strides, block, places)


def has_phases(axis: Axis) -> bool:
    """Whether the taps along this axis read pixels of several residues modulo the stride."""
    return axis.kernel > 1 and axis.dilation % axis.stride > 0


def rank(axes: Sequence[Axis]) -> int:
    """Dimensions of the descriptor; at most `MAX_RANK` are possible."""
    return 2 + len(axes) + sum(has_phases(axis) for axis in axes[:-1])


def _scaled(value: str, factor: int) -> str:
    return value if factor == 1 else f"{value} * {factor}"


def _sum(start: str, moved: str, shift: int) -> str:
    terms = [start, *([moved] if moved != "0" else [])]
    return " + ".join(terms) + (f" {'-' if shift < 0 else '+'} {abs(shift)}" if shift else "")
