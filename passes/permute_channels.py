"""Brings channels with zeros in the same places together, so that scattered taps become dense tiles.

    conv(relu(conv(x, V)), W)   →   conv(relu(conv(x, V[p])), W[:, p])

Periodic kernels, for one, keep taps that depend on (output + input channel) modulo a period: with channels
sorted by residue, each tap has a few dense tiles. One order serves all tensors that share channels
(`channel_axes`), and the weights, biases and norms around them absorb it, so that nothing is gathered at run
time. Channels that have to stay in order do, and the plan says why.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..channel_classes import MOST_CLASSES, channel_classes, grouped_order, has_few_classes
from ..cpu_spmm import BLOCK_SHAPES
from ..zero_blocks import zero_block_patterns
from .channel_axes import Axis, ChannelAxes, Reader
from .static_values import StaticValues, erase_unused, set_constant

NOTE = "blocksparse_channels"
"""Key in `node.meta` of a phrase about a layer's channels, for the plan."""
_FEW_ZEROS = 0.05


class _Use(NamedTuple):
    """A layer's nonzeros as a space sees them, bool `[channels, …]`."""

    masks: Tensor
    scattered: bool


def permute_channels(gm: GraphModule) -> int:
    """Rewrites `gm` in place; returns the number of groups of channels that were reordered."""
    axes, values = ChannelAxes(gm), StaticValues(gm)
    uses: dict[int, list[_Use]] = {}
    scattered = []
    for reader in axes.readers:
        mask = _nonzeros(values.get(reader.call.weight))
        if mask is None:
            continue
        hidden = _hides_tiles(mask)
        scattered += [reader] if hidden else []
        for axis, dim in ((reader.rows, 0), (reader.columns, 1)):
            for space, part in _parts(axes, axis, mask, dim):
                uses.setdefault(space, []).append(_Use(part, hidden))
    if not scattered:
        return 0
    orders = _Orders(axes, uses)
    for reader in scattered:
        reader.call.node.meta[NOTE] = orders.describe(reader)
    for reader in axes.readers:
        _reorder_layer(gm, reader, orders, values)
    for constant in axes.constants:
        index = orders.index(constant.axis)
        if index is not None:
            _replace(gm, constant.user, constant.operand, [(constant.dim, index)], values)
    if orders.found:
        gm.recompile()
    return len(orders.found)


# ---- which layers ----------------------------------------------------------------------------------


def _nonzeros(weight: Tensor | None) -> Tensor | None:
    """bool, the shape of the weight; None for a weight with few zeros, or none that can be read."""
    if weight is None or weight.is_meta or weight.layout != torch.strided:
        return None
    if int(weight.count_nonzero()) > (1 - _FEW_ZEROS) * weight.numel():
        return None
    return weight.ne(0).cpu()


def _hides_tiles(mask: Tensor) -> bool:
    """Whether channels repeat each other's zeros, in an order that leaves few tiles without a weight."""
    if not (has_few_classes(mask.flatten(1)) or has_few_classes(mask.transpose(0, 1).flatten(1))):
        return False
    shapes = [(n, n) for n in (16, 8, 4) if n <= min(mask.shape[:2])]
    shapes += [shape for shape in BLOCK_SHAPES if 1 < shape[0] <= mask.shape[0]]
    patterns = zero_block_patterns(mask, 1, shapes)
    visible = min((pattern.density for pattern in patterns), default=1.0)
    return visible > 1.1 * float(mask.float().mean())


def _parts(axes: ChannelAxes, axis: Axis | None, mask: Tensor, dim: int) -> list[tuple[int, Tensor]]:
    """Each space of an axis with the rows or columns of the mask that belong to it, bool `[channels, …]`."""
    if axis is None:
        return []
    sizes = [axes.sizes[space] for space in axis.spaces]
    rows = mask.movedim(dim, 0).unflatten(0, (-1, axis.inner)).flatten(1)
    return [(axes.root(space), part) for space, part in zip(axis.spaces, rows.split(sizes), strict=True)]


# ---- which order -----------------------------------------------------------------------------------


class _Orders:
    """The new order of the channels of each space that gets one, and why others get none."""

    def __init__(self, axes: ChannelAxes, uses: dict[int, list[_Use]]) -> None:
        self.found: dict[int, Tensor] = {}
        self._axes = axes
        self._classes: dict[int, int] = {}
        self._refusals: dict[int, str] = {}
        for space, found in uses.items():
            if any(use.scattered for use in found):
                self._decide(space, found)

    def _decide(self, space: int, uses: list[_Use]) -> None:
        why = self._axes.why_fixed(space)
        if why is None and not all(use.scattered for use in uses):
            why = "another layer has zero blocks in this order"
        if why is None:
            masks = torch.cat([use.masks for use in uses], 1)
            classes = channel_classes(masks)
            number = int(classes.max()) + 1
            if number <= MOST_CLASSES * len(classes):
                order = grouped_order(masks, classes)
                if not torch.equal(order, torch.arange(len(order))):
                    self.found[space], self._classes[space] = order, number
                return
            why = "layers around them repeat differently"
        self._refusals[space] = why

    def index(self, axis: Axis | None) -> Tensor | None:
        """Where each entry of an axis comes from; None if the axis stays as it is."""
        if axis is None or not any(self._axes.root(space) in self.found for space in axis.spaces):
            return None
        parts, first = [], 0
        for space in axis.spaces:
            size = self._axes.sizes[space]
            parts.append(first + self.found.get(self._axes.root(space), torch.arange(size)))
            first += size
        index = torch.cat(parts)[:, None] * axis.inner + torch.arange(axis.inner)
        return index.flatten()

    def describe(self, reader: Reader) -> str:
        spaces = [*reader.rows.spaces, *(reader.columns.spaces if reader.columns else ())]
        sides = dict.fromkeys(self._axes.root(space) for space in spaces)
        classes = [self._classes[space] for space in sides if space in self.found]
        phrases = [f"channels reordered by {max(classes)} classes of equal zeros"] if classes else []
        for side, axis in (("output", reader.rows), ("input", reader.columns)):
            known = self._refusals.get(self._axes.root(axis.spaces[0])) if axis else "they come from outside"
            phrases += [f"{side} channels keep their order: {known}"] if known else []
        return "; ".join(phrases)


# ---- carrying it out -------------------------------------------------------------------------------


def _reorder_layer(gm: GraphModule, reader: Reader, orders: _Orders, values: StaticValues) -> None:
    rows, columns = orders.index(reader.rows), orders.index(reader.columns)
    indices = [(dim, index) for dim, index in enumerate((rows, columns)) if index is not None]
    if indices:
        _replace(gm, reader.call.node, reader.call.weight, indices, values)
    if rows is not None and reader.call.bias is not None:
        _replace(gm, reader.call.node, reader.call.bias, [(0, rows)], values)


@torch.no_grad()
def _replace(
    gm: GraphModule, user: Node, operand: Node, indices: list[tuple[int, Tensor]], values: StaticValues
) -> None:
    """Gives `user` a copy of a static operand, reordered along some dimensions."""
    old = values.get(operand)
    assert old is not None  # the axes took static operands only
    new = old
    for dim, index in indices:
        new = new.index_select(dim, index.to(new.device))
    if new.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last):
        new = new.contiguous(memory_format=torch.channels_last)
    with gm.graph.inserting_before(user):
        constant = set_constant(gm, "reordered", new)
    user.replace_input_with(operand, constant)
    erase_unused(gm, [operand])
