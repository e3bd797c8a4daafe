"""Puts a trainable scale on every weight block (DBSR).

Conv2d(weight)  →  Conv2d(weight = clamp(S, 0, 1) * W), S [groups * ceil(O/groups/bh), ceil(C/groups/bw)]

Handles 1-D, 2-D and 3-D convolutions, transposed ones, groups, and linear layers, with channels that
need not divide by the block. S starts at 1, so the model computes what it did before.
"""

from __future__ import annotations

import logging

from torch import nn
from torch.nn.utils import parametrize

from ..errors import LayerError, PatternError
from ..layers import KeptTiles, canonical_shape, groups_of, is_transposed
from ..pattern import BlockPattern, BlockShape, check_block_shape
from ..scales import BlockScale, block_scale_of
from ..selection import Filter, Layer, effective_weight, select_layers, weight_parameters, weight_users

log = logging.getLogger(__name__)


def insert_block_scales(
    model: nn.Module,
    block_shape: BlockShape = (32, 32),
    *,
    include: Filter = None,
    exclude: Filter = None,
) -> nn.Module:
    """Gives each selected layer of `model` one trainable scale per weight block; changes it in place.

    The layers are those that `forward` calls, found with torch.fx (or every layer, with a logged warning,
    if torch.fx cannot trace the model). A layer that cannot be scaled, such as a first convolution whose
    three input channels are fewer than a block has, stays as it is and the reason is logged; if `include`
    names that very layer, it is an error. Call again with a smaller block for the layers left over.

    Args:
        model: any module; its parameters keep their identity, so an optimizer made before stays valid
            (but knows nothing of the new scales).
        block_shape: (output, input) channels of a block.
        include, exclude: names (with wildcards; a name also stands for what is below it) or module types.

    Raises:
        PatternError: if the block is not two positive integers, or larger than a named layer's weight.
        LayerError: if no layer could be scaled, a name matches none, or a weight is not finite.
    """
    check_block_shape(block_shape, "insert_block_scales")
    layers = select_layers(model, "insert_block_scales", include, exclude, only_called=True)
    users = weight_users(model)
    planned: dict[nn.Module, BlockScale] = {}
    shared: dict[int, BlockScale] = {}  # by weight parameter
    last_error: Exception | None = None
    for layer in layers:
        try:
            _check_scalable(layer, layers, users)
            full = _full_pattern(layer, block_shape)
        except ValueError as error:
            last_error = error
            layer.skip("insert_block_scales", error)
            continue
        weight = effective_weight(layer)
        (parameter, *_) = weight_parameters(layer.module)
        fresh = BlockScale(full, is_transposed(layer.module), weight.dtype, weight.device)
        planned[layer.module] = shared.setdefault(id(parameter), fresh)
    if not planned:
        raise _nothing_to_scale(last_error)
    for module, scale in planned.items():
        parametrize.register_parametrization(module, "weight", scale)
    log.info("insert_block_scales: %d layers scaled in blocks of %s", len(planned), block_shape)
    return model


def _full_pattern(layer: Layer, block_shape: BlockShape) -> BlockPattern:
    shape, groups = canonical_shape(layer.module), groups_of(layer.module)
    try:
        return BlockPattern.full(shape, block_shape, groups)
    except PatternError as error:
        raise PatternError(layer.name, error.expected, error.got, error.fix) from None


def _check_scalable(layer: Layer, layers: list[Layer], users: dict[int, list[nn.Module]]) -> None:
    """Raises `LayerError` for layers whose weight is not theirs alone, or already something else."""
    module = layer.module
    if isinstance(module, KeptTiles):
        fix = "Insert scales before fold_zero_blocks."
        raise LayerError(layer.name, "a layer with a dense weight", "a folded layer", fix)
    if block_scale_of(module) is not None:
        fix = "Fold it first (fold_zero_blocks), or exclude it."
        raise LayerError(layer.name, "a layer without block scales", "one that has them", fix)
    if "weight" not in module._parameters and not parametrize.is_parametrized(module, "weight"):
        fix = "Make it a parameter first (for example torch.nn.utils.prune.remove)."
        raise LayerError(layer.name, "a weight parameter", "a weight that a hook computes", fix)
    selected = {other.module for other in layers}
    for parameter in weight_parameters(module):
        for other in users[id(parameter)]:
            same = type(other) is type(module) and groups_of(other) == groups_of(module)
            if other not in selected or not same:
                fix = "Select all layers that share the weight, or untie them."
                got = f"one shared with another {type(other).__name__}"
                raise LayerError(layer.name, "a weight of its own", got, fix)


def _nothing_to_scale(last_error: Exception | None) -> Exception:
    if isinstance(last_error, PatternError):
        fix = f"{last_error.fix} No layer of the model could be scaled."
        return PatternError(last_error.where, last_error.expected, last_error.got, fix)
    got = "none" if last_error is None else f"none; the last one: {last_error}"
    fix = "Check include, exclude and the block shape."
    return LayerError("insert_block_scales", "at least one layer to scale", got, fix)
