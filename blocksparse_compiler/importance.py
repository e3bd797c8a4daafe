"""Ways to value blocks, one gate class each, that `BlockSparsifier` prunes to an exact budget.

    scales       BudgetScale      trainable scales, straight through the selection: a pruned block can return
    magnitude    BlockMagnitude   root mean square of the block; nothing to train
    attention    BlockAttention   softmax over trainable block logits

The rows of `IMPORTANCES` feed the option `importance`, the tests and the examples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .gates import BlockGate, whole
from .layout import swap_channels
from .pattern import BlockPattern
from .scales import BlockScale


class BudgetScale(BlockScale):
    """Block scales (DBSR) with an exact selection instead of a penalty.

    The factor is `clamp(S, 0, 1)` for selected blocks and zero for others. The gradient of S passes straight
    through clamp and selection, so S of a pruned block goes on learning what the block would be worth, and
    the block returns when its score passes another's. The score is the strength of the effective block,
    `clamp(S, 0, 1)` times that of W.
    """

    selected: Tensor

    def __init__(
        self,
        full: BlockPattern,
        transposed: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(full, transposed, dtype, device)
        self.register_buffer("selected", torch.ones(self.scale.shape, dtype=torch.bool, device=device))

    def clamp(self, scale: Tensor) -> Tensor:
        # A selected block is never exactly zero, or fewer blocks than the budget allows would be kept.
        return torch.where(self.selected, scale.clamp(torch.finfo(scale.dtype).eps, 1), 0)

    @property
    def kept(self) -> Tensor:
        return self.selected

    def score(self, strength: Tensor) -> Tensor:
        return relative(strength) * whole(self.scale).to(strength).clamp(0, 1)

    @torch.no_grad()
    def select(self, kept: Tensor) -> None:
        self.selected.copy_(kept)


class BlockMagnitude(BlockGate):
    """Keeps the strongest blocks. Pruned weights get no gradient, and return if others become weaker yet."""

    name = "magnitude"
    per_tap = True
    selected: Tensor

    def __init__(
        self,
        full: BlockPattern,
        transposed: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(full, transposed)
        self.full = full
        rows, _, cols = full.grid_shape
        self.register_buffer("selected", torch.ones(rows, cols, dtype=torch.bool, device=device))

    def tell_taps_apart(self) -> None:
        """From one decision per block to one per block and tap (for 1x1 blocks, per weight)."""
        self.selected = torch.ones(self.full.grid_shape, dtype=torch.bool, device=self.selected.device)

    def gated(self, weight: Tensor) -> Tensor:
        kept = self.selected
        if kept.dim() == 2:
            return torch.where(self.expand(kept, weight.dim() - 2), weight, 0)
        mask = self.full.from_tiles(kept[..., None, None].expand(*kept.shape, *self.block_shape))
        return torch.where(swap_channels(mask, self.groups) if self.transposed else mask, weight, 0)

    @property
    def kept(self) -> Tensor:
        return self.selected

    def score(self, strength: Tensor) -> Tensor:
        return relative(strength)

    @torch.no_grad()
    def select(self, kept: Tensor) -> None:
        self.selected.copy_(kept)


class BlockAttention(BlockGate):
    """Softmax attention over the kept blocks of a layer, times their number, so that its mean is 1.

    The attention of Yasuda et al., SequentialAttention++ (NeurIPS 2024); scaling by the number of blocks is
    ours. The logit of a pruned block gets no gradient; use it with a schedule that has dense phases
    (`SparsitySchedule(cycles=...)`).

    Attributes:
        logit: Parameter `[groups * ceil(O/groups/bh), ceil(C/groups/bw)]`, initialised to 0.
    """

    name = "attention"
    selected: Tensor

    def __init__(
        self,
        full: BlockPattern,
        transposed: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(full, transposed)
        rows, _, cols = full.grid_shape
        self.logit = nn.Parameter(torch.zeros(rows, cols, dtype=dtype, device=device))
        self.register_buffer("selected", torch.ones(rows, cols, dtype=torch.bool, device=device))

    def gated(self, weight: Tensor) -> Tensor:
        factor = attention(self.logit, self.selected)
        return weight * self.expand(factor, weight.dim() - 2).to(weight.dtype)

    def factors(self) -> Tensor:
        return attention(whole(self.logit), self.selected)

    @property
    def kept(self) -> Tensor:
        return self.selected

    def score(self, strength: Tensor) -> Tensor:
        logit = whole(self.logit).to(strength)
        return attention(logit, torch.ones_like(self.selected)) * relative(strength)

    @torch.no_grad()
    def select(self, kept: Tensor) -> None:
        self.selected.copy_(kept)


IMPORTANCES: dict[str, type[BlockGate]] = {
    gate.name: gate for gate in (BudgetScale, BlockMagnitude, BlockAttention)
}


def attention(logit: Tensor, among: Tensor) -> Tensor:
    """Softmax over the blocks in `among`, scaled to a mean of 1 over them; 0 elsewhere."""
    weights = logit.masked_fill(~among, -torch.inf).flatten().softmax(0).reshape(logit.shape)
    return weights * among.sum()


def relative(strength: Tensor) -> Tensor:
    """Strength over the layer's mean, so that layers of different weight scale compete fairly."""
    return strength / strength.mean().clamp(min=torch.finfo(strength.dtype).tiny)


def block_strength(weight: Tensor, full: BlockPattern, per_tap: bool = False) -> Tensor:
    """Root mean square of each block: float64 `[rows, cols]` over all taps, or `[rows, taps, cols]`."""
    over = (3, 4) if per_tap else (1, 3, 4)
    square = full.to_tiles(weight.double().square()).sum(over)
    count = full.to_tiles(torch.ones_like(weight, dtype=torch.float64)).sum(over)
    return (square / count).sqrt()
