"""Channels with zeros in the same places: which they are, and an order that brings them together.

Periodic kernels, for one, depend on channels only modulo their period: sorted by residue, their scattered
taps become dense tiles.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MOST_CLASSES = 1 / 4
"""Classes per channel above which no order makes tiles worth having."""
_ALIKE = 0.9
"""A channel with this share of a class's nonzeros, and no others, may belong to it."""


def channel_classes(masks: Tensor) -> Tensor:
    """The class of each channel, int64 `[n]`, from its nonzeros, bool `[n, m]`; classes count from 0.

    Equal rows share a class. A weight may be zero by chance, too: a row that lacks little of a much larger
    class joins it.
    """
    number: dict[bytes, int] = {}
    rows = (row.tobytes() for row in np.packbits(masks.numpy(), axis=1))
    classes = torch.tensor([number.setdefault(row, len(number)) for row in rows])
    counts = classes.bincount()
    large = counts * 4 > counts.max()
    if large.all():
        return classes
    first = _representatives(classes)
    kept = masks[first].float()
    whole, part = kept[large], kept[~large]
    inside = (part @ (1 - whole).T == 0) & (part.sum(1)[:, None] >= _ALIKE * whole.sum(1))
    joined = classes.clone()
    names, least = large.nonzero()[:, 0], torch.where(inside, whole.sum(1), torch.inf).argmin(1)
    for i in inside.any(1).nonzero()[:, 0].tolist():
        joined[classes == (~large).nonzero()[i, 0]] = names[least[i]]
    return torch.unique(joined, return_inverse=True)[1]


def grouped_order(masks: Tensor, classes: Tensor) -> Tensor:
    """The channels, int64 `[n]`, class by class; each class is followed by one that is most like it."""
    kept = masks[_representatives(classes)].float()
    overlap = kept @ kept.T
    size = overlap.diagonal()
    differing = size[:, None] + size - 2 * overlap
    order = [0]
    for _ in range(len(kept) - 1):
        differing[:, order[-1]] = torch.inf
        order.append(int(differing[order[-1]].argmin()))
    place = torch.empty(len(kept), dtype=torch.int64)
    place[order] = torch.arange(len(kept))
    return place[classes].argsort(stable=True)


def has_few_classes(masks: Tensor) -> bool:
    """Whether the channels, rows of bool `[n, m]`, fall into few classes; a glance settles most cases."""
    most = len(masks) * MOST_CLASSES
    return all(int(channel_classes(part).max()) < most for part in (masks[:, :64], masks))


def _representatives(classes: Tensor) -> Tensor:
    """The first channel of each class."""
    first = torch.full((int(classes.max()) + 1,), len(classes))
    return first.scatter_reduce(0, classes, torch.arange(len(classes)), "amin")
