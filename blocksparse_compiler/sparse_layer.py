"""A weight that `BlockSparsifier` works on, and its gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .gates import BlockGate, whole
from .importance import block_strength
from .layout import canonical_weight
from .pattern import BlockPattern, BlockShape
from .selection import Layer
from .weights import full_pattern


@dataclass(frozen=True, eq=False)
class SparseLayer:
    """A weight that `BlockSparsifier` works on.

    Args:
        names: qualified names of the layers that use it; several if the weight is tied.
        module: the first of them.
        full: the pattern of all its blocks.
    """

    names: tuple[str, ...]
    module: nn.Module
    gate: BlockGate
    full: BlockPattern

    @property
    def name(self) -> str:
        return self.names[0]

    def strength(self, per_tap: bool) -> Tensor:
        """Root mean square of each block before the gate; of a sharded weight, of all of it (collective)."""
        stages = self.module.parametrizations["weight"]  # type: ignore[index,union-attr]
        with torch.no_grad():
            weight: Any = [whole(p) for _, p in sorted(stages.named_parameters(recurse=False))]  # type: ignore[union-attr,operator]
            for stage in stages:  # type: ignore[union-attr]
                if stage is self.gate:
                    break
                weight = [stage(*weight)]
            return block_strength(canonical_weight(weight[0], self.module), self.full, per_tap)


def layers_by_gate(
    planned: Sequence[tuple[Layer, BlockGate]], block_shape: BlockShape
) -> tuple[SparseLayer, ...]:
    """One per weight, in order."""
    names: dict[BlockGate, list[str]] = {}
    first: dict[BlockGate, Layer] = {}
    for layer, gate in planned:
        names.setdefault(gate, []).append(layer.name)
        first.setdefault(gate, layer)
    return tuple(
        SparseLayer(tuple(names[gate]), layer.module, gate, full_pattern(layer, block_shape))
        for gate, layer in first.items()
    )
