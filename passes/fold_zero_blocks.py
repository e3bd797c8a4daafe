"""Stores only the weight blocks that are not zero.

Conv2d(weight = clamp(S, 0, 1) * W)  ─┐
Conv2d(weight = mask * W)            ─┤
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

from ..errors import LayerError
from ..layers import KeptTiles, become_block_sparse, dense_type_of
from ..layout import layer_weight
from ..pattern import BlockPattern, BlockShape, check_block_shape
from ..selection import Filter, Layer, keep_valid, select_layers
from ..weights import (
    check_untied,
    check_weight_known,
    effective_weight,
    full_pattern,
    kept_pattern,
    make_plain,
    own_block_shape,
    weight_parameters,
    weight_users,
)

NAME = "fold_zero_blocks"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Fold:
    """What to do with one layer: `pattern` is None if it has no zero blocks and stays dense."""

    layer: Layer
    parameter: nn.Parameter
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

    Scaled layers (`insert_block_scales`) keep their block shape and get S multiplied into W, and masked
    ones (`apply_pattern`) keep theirs; masks of torch.nn.utils.prune and other parametrizations are
    evaluated and dropped; plain dense weights are searched for zero blocks. Outputs do not change. Folded
    layers still train, save and load, copy, export and move; make the optimizer anew, as their `values`
    are new parameters.

    Args:
        block_shape: (output, input) channels of the tiles of layers that have none of their own; chosen for
            each layer from its zeros if not given (`find_zero_blocks`).
        include, exclude: names (with wildcards; a name also stands for what is below it) or module types.

    Raises:
        PatternError: if the block is not two positive integers, or larger than a named layer's weight.
        LayerError: if a name matches no layer, or a weight is not finite.
    """
    if block_shape is not None:
        check_block_shape(block_shape, NAME)
    layers = [x for x in select_layers(model, NAME, include, exclude) if not isinstance(x.module, KeptTiles)]
    users = weight_users(model)
    layers, _ = keep_valid(
        layers,
        NAME,
        lambda layer: dense_type_of(layer.module, layer.name),
        check_weight_known,
        lambda layer: check_untied(layer, layers, users),
        lambda layer: block_shape and not own_block_shape(layer.module) and full_pattern(layer, block_shape),
    )
    folds = [_plan(layer, block_shape) for layer in layers]
    _check_tied_agree(folds)
    tied: dict[int, nn.Parameter] = {}  # values that layers with tied weights go on sharing
    for fold in folds:
        _apply(fold, tied)
    log.info("%s: %d layers folded", NAME, sum(fold.pattern is not None for fold in folds))
    return model


def _plan(layer: Layer, block_shape: BlockShape | None) -> _Fold:
    weight = effective_weight(layer)
    pattern = kept_pattern(layer, weight, block_shape)
    if pattern is not None and pattern.num_kept == pattern.kept.numel():
        pattern = None
    return _Fold(layer, weight_parameters(layer.module)[0], weight, pattern)


def _check_tied_agree(folds: list[_Fold]) -> None:
    """Raises `LayerError` if layers share a weight but not the mask on it."""
    first: dict[int, _Fold] = {}
    for fold in folds:
        other = first.setdefault(id(fold.parameter), fold)
        if other is not fold and not torch.equal(other.weight, fold.weight):
            expected = f"the same effective weight as {other.layer.name}, whose weight it shares"
            fix = "Untie the two layers, or give them the same mask."
            raise LayerError(fold.layer.name, expected, "another", fix)


def _apply(fold: _Fold, tied: dict[int, nn.Parameter]) -> None:
    module = fold.layer.module
    if fold.pattern is not None:
        make_plain(module)
        become_block_sparse(module, fold.weight, fold.pattern, tied.get(id(fold.parameter)))
        tied[id(fold.parameter)] = module.values  # type: ignore[assignment]
    elif own_block_shape(module):
        make_plain(module)
        with torch.no_grad():
            module.weight.copy_(layer_weight(fold.weight, module))  # type: ignore[operator,union-attr,arg-type]
