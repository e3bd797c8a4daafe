"""Whether a layer's input can be copied in boxes of pixels, and in which."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from .gpu_descriptor import MAX_RANK, has_phases, rank
from .gpu_template import Axis
from .inductor_api import V, ir, kernels_have_scratch
from .tiling import is_static

log = logging.getLogger(__name__)


def box_sides(
    x: Any, axes: tuple[Axis, ...], parameters: Mapping[str, int | str], *, flat: bool
) -> dict[str, int] | None:
    """The constants `BOX_N`, `BOX_H` … of a kernel, none of them if its pixels need no boxes.

    Returns:
        None if activations have to be read through pointers.
    """
    # A 2-D kernel that runs a 1-D layer has boxes of one row.
    names = [] if flat else ["n", *(axis.name for axis in axes)]
    boxes = {f"BOX_{name.upper()}": int(parameters.get(f"box_{name}", 1)) for name in names}
    reason = _no_descriptor(x, axes, flat=flat)
    if boxes and math.prod(boxes.values()) != parameters["pixels"]:
        reason = f"boxes of {boxes} do not hold {parameters['pixels']} pixels"
    if reason is None:
        return boxes
    log.info("activations are read through pointers: %s", reason)
    return None


def pixels_through_pointers(parameters: Mapping[str, int | str], bh: int) -> int:
    """How many pixels such a kernel holds sums of, next to pointers, if it cannot copy boxes."""
    return 64 * 32 * int(parameters["warps"]) // (bh * (2 if "box" in parameters else 1))


def _no_descriptor(x: Any, axes: tuple[Axis, ...], *, flat: bool) -> str | None:
    """Why a tensor descriptor cannot describe this input; None if it can."""
    if not kernels_have_scratch():
        return "there is no memory for descriptors"
    if not flat and rank(axes) > MAX_RANK:
        return f"strided taps along {len(axes)} dimensions"
    item, layout = x.get_dtype().itemsize, x.get_layout()
    strides = [s for s, size in zip(layout.stride, layout.size, strict=True) if size != 1]
    strides.remove(1)
    # TMA copies 16 bytes at a time.
    starts = [layout.offset, *strides, x.get_size()[1]]
    if x.get_name() in V.graph.unaligned_buffers or isinstance(layout, ir.NonOwningLayout):
        return "where it starts is unknown"
    if not all(V.graph.sizevars.statically_known_multiple_of(s * item, 16) for s in starts):
        return f"pixels do not start at multiples of 16 bytes (strides {layout.stride})"
    for axis, size in zip(axes, x.get_size()[2:], strict=True):
        if flat or axis.stride == 1:
            continue
        if not is_static(size) or size < axis.stride or (has_phases(axis) and size % axis.stride):
            return f"{size} pixels are no multiple of the stride {axis.stride}"
    return None
