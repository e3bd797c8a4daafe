"""Stores only the weight blocks that are not zero.

Conv2d(weight = clamp(S, 0, 1) * W)  ─┐
Conv2d(weight_orig, weight_mask)     ─┼→  BlockSparseConv2d(values [n, bh, bw], pattern)
Conv2d(weight with zero blocks)      ─┘

Every layer computes exactly what it did before. A layer without zero blocks keeps a dense weight, with
S multiplied in.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from ..errors import LayerError, PatternError
from ..layers import KeptTiles, become_block_sparse, dense_type_of, groups_of, layer_weight
from ..pattern import BlockPattern, BlockShape, check_block_shape
from ..scales import block_scale_of
from ..selection import Filter, Layer, check_untied, effective_weight, select_layers, weight_parameters
from ..zero_blocks import find_zero_blocks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Fold:
    """What to do with one layer: `pattern` is None if it stays dense (and loses its scales)."""

    layer: Layer
    weight: Tensor
    pattern: BlockPattern | None


def fold_zero_blocks(
    model: nn.Module,
    block_shape: BlockShape | None = None,
    *,
    include: Filter = None,
    exclude: Filter = None,
) -> nn.Module:
    """Turns each layer with zero blocks into its folded form (`BlockSparseConv2d`, …), in place.

    Scaled layers (`insert_block_scales`) keep their block shape and get S multiplied into W; masks of
    torch.nn.utils.prune and other parametrizations are evaluated and dropped; plain dense weights are
    searched for zero blocks. Outputs do not change. Folded layers still train, save and load, copy,
    export and move; make the optimizer anew, as their `values` are new parameters.

    Args:
        block_shape: (output, input) channels of the tiles of layers that are not scaled; chosen for each
            layer from its zeros if not given (`find_zero_blocks`).
        include, exclude: names (with wildcards; a name also stands for what is below it) or module types.

    Raises:
        PatternError: if the block is not two positive integers, or larger than a named layer's weight.
        LayerError: if a name matches no layer, or a weight is not finite.
    """
    if block_shape is not None:
        check_block_shape(block_shape, "fold_zero_blocks")
    layers = select_layers(model, "fold_zero_blocks", include, exclude)
    folds = []
    for layer in layers:
        if isinstance(layer.module, KeptTiles):
            continue
        try:
            dense_type_of(layer.module)
            check_untied(layer, layers, model)
            weight = effective_weight(layer)
            pattern = _pattern(layer, weight, block_shape)
        except ...:
            layer.skip("fold_zero_blocks", error)
            continue
