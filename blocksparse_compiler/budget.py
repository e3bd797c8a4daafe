"""What blocks cost, and which of them fit a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import cost
from .devices import AnyDevice
from .errors import OptionError
from .pattern import BlockPattern
from .plan import Site
from .planning import plan
from .trace import trace
from .variants import block_shapes
from .weights import evaluation_mode
from .zero_blocks import zero_block_patterns

Masks = list[Tensor]
BUDGETS = ("parameters", "macs", "latency")


class Budget(Protocol):
    """What the kept blocks of all layers cost together."""

    def per_weight(self, layer: int) -> float:
        """The cost of one weight of this layer in comparison with those of others, for ranking."""
        ...

    def total(self, kept: Masks) -> float:
        """The cost of these blocks, one bool mask per layer; grows with every block."""
        ...


@dataclass(frozen=True)
class WeightBudget:
    """Counts kept weights, each as often as it is used: 1 for parameters, output positions for MACs.

    Args:
        elements: int64 per layer, the weights in each block, like its mask.
        uses: per layer.
    """

    elements: tuple[Tensor, ...]
    uses: tuple[int, ...]

    def per_weight(self, layer: int) -> float:
        return float(self.uses[layer])

    def total(self, kept: Masks) -> int:
        parts = zip(self.elements, self.uses, kept, strict=True)
        return sum(uses * int(elements[mask.cpu()].sum()) for elements, uses, mask in parts)


@dataclass(frozen=True)
class LatencyBudget:
    """Seconds that the cost model predicts for the layers on a device, each on its best kernel.

    Args:
        patterns: all blocks of each layer.
        sites: per layer, where it is called.
    """

    patterns: tuple[BlockPattern, ...]
    sites: tuple[tuple[Site, ...], ...]
    device: AnyDevice
    _known: dict[tuple[int, str], float] = field(default_factory=dict, compare=False)

    def per_weight(self, layer: int) -> float:
        full = self.patterns[layer]
        return self.seconds(layer, full) / math.prod(full.weight_shape)

    def total(self, kept: Masks) -> float:
        return sum(
            self.seconds(i, full.with_kept(_with_taps(mask, full)))
            for i, (full, mask) in enumerate(zip(self.patterns, kept, strict=True))
        )

    def seconds(self, layer: int, pattern: BlockPattern) -> float:
        key = layer, pattern.digest
        if key not in self._known:
            tiles = zero_block_patterns(pattern.mask(), pattern.groups, block_shapes(self.device.type, None))
            decisions = [cost.choose(site, tiles, self.device) for site in self.sites[layer]]
            self._known[key] = sum(d.estimates.get(d.kernel, 0.0) for d in decisions)
        return self._known[key]


def weight_budget(patterns: Sequence[BlockPattern], uses: Sequence[int], per_tap: bool) -> WeightBudget:
    return WeightBudget(tuple(block_elements(full, per_tap) for full in patterns), tuple(uses))


def latency_budget(
    model: nn.Module,
    names: Sequence[Sequence[str]],
    patterns: Sequence[BlockPattern],
    device: AnyDevice,
    inputs: tuple[Any, ...],
) -> LatencyBudget:
    """For layers known by (several) `names`, as `model(*inputs)` calls them. The model is dense yet."""
    with evaluation_mode(model), torch.no_grad():
        sites = [decision.site for decision in plan(trace(model, *inputs), device)]
    called = tuple(tuple(site for site in sites if site.name in own) for own in names)
    return LatencyBudget(tuple(patterns), called, device)


def block_elements(full: BlockPattern, per_tap: bool = False) -> Tensor:
    """int64: weights in each block; `[rows, cols]` over all taps, or `[rows, taps, cols]`."""
    rows, taps, cols = full.grid_shape
    (bh, bw), (og, cg) = full.block_shape, full.group_channels
    heights = (og - bh * torch.arange(rows // full.groups)).clamp(max=bh).repeat(full.groups)
    widths = (cg - bw * torch.arange(cols)).clamp(max=bw)
    area = heights[:, None] * widths
    return area[:, None].expand(rows, taps, cols) if per_tap else area * taps


def choose_blocks(scores: Masks, budget: Budget, target: float) -> Masks:
    """bool masks of the blocks worth most for their cost, which together cost at most `target`.

    Blocks compete over all layers by score² per unit of cost (energy kept for what it costs). The best block
    of each layer always stays: a layer without any would cut the network in two. Of a cost that adds up over
    blocks (`WeightBudget`), less than the cheapest pruned block is left unspent.
    """
    flat = [score.flatten().double().cpu() for score in scores]
    value = [s.square() / budget.per_weight(i) for i, s in enumerate(flat)]
    value = [v.index_fill(0, v.argmax(), torch.inf) for v in value]
    order = torch.cat(value).sort(descending=True, stable=True).indices
    sizes = [s.numel() for s in flat]

    def masks(count: int) -> Masks:
        kept = torch.zeros(sum(sizes), dtype=torch.bool)
        kept[order[:count]] = True
        return _split(kept, scores)

    if isinstance(budget, WeightBudget):
        return _split(_fill(order, budget, math.floor(target), len(scores)), scores)
    low, high = len(scores), len(order)  # `low` blocks are taken even where they do not fit
    if budget.total(masks(high)) <= target:
        return masks(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if budget.total(masks(middle)) <= target else (low, middle)
    return masks(low)


def _fill(order: Tensor, budget: WeightBudget, target: int, always: int) -> Tensor:
    """bool, flat: blocks in order until the budget is spent; one too large for the rest is passed over."""
    costs = torch.cat([e.flatten() * uses for e, uses in zip(budget.elements, budget.uses, strict=True)])
    ordered = costs[order]
    count = max(always, int((ordered.cumsum(0) <= target).sum()))
    kept = torch.zeros(len(order), dtype=torch.bool)
    kept[order[:count]] = True
    left = target - int(ordered[:count].sum())
    while count < len(order):
        fitting = (ordered[count:] <= left).nonzero()
        if not len(fitting):
            break
        count += int(fitting[0])
        kept[order[count]] = True
        left -= int(ordered[count])
        count += 1
    return kept


def _split(kept: Tensor, like: Masks) -> Masks:
    parts = kept.split([t.numel() for t in like])
    return [part.reshape(t.shape).to(t.device) for part, t in zip(parts, like, strict=True)]


def _with_taps(kept: Tensor, full: BlockPattern) -> Tensor:
    return kept if kept.dim() == 3 else kept[:, None].expand(full.grid_shape)


def check_reachable(budget: Budget, scores: Masks, target: float, dense: float, density: float) -> None:
    """Raises `OptionError` if even one block per layer costs more than the target."""
    least = budget.total(choose_blocks(scores, budget, 0))
    if least > target:
        raise OptionError(
            "BlockSparsifier",
            f"a target_density of at least {least / dense:.3g}, which one block in each layer costs",
            f"{density}",
            "Raise the target, use smaller blocks, or exclude layers.",
        )
