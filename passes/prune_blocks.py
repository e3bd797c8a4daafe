"""Zeroes the weakest weight blocks, once, to an exact density.

weight [O, C/groups, *kernel]  →  the same with all but a fraction `density` of its blocks zero

A block's strength is its L2 norm over all taps divided by the square root of its number of elements, so
that ragged blocks at the edge compete fairly.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import LayerError, OptionError, PatternError, check_number
from ..importance import block_strength
from ..layers import KeptTiles
from ..layout import layer_weight
from ..pattern import BlockPattern, BlockShape, check_block_shape
from ..scales import BlockScale, block_scale_of
from ..selection import Filter, Layer, keep_valid, nothing_left, select_layers
from ..weights import (
    check_untied,
    check_weight_known,
    effective_weight,
    full_pattern,
    weight_parameters,
    weight_users,
)

NAME = "prune_blocks"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Target:
    """One weight to prune: `full` has all of its blocks, `strength` is `[out-blocks, in-blocks]`."""

    module: nn.Module
    full: BlockPattern
    strength: Tensor


def prune_blocks(
    model: nn.Module,
    block_shape: BlockShape | None,
    density: float,
    *,
    include: Filter = None,
    exclude: Filter = None,
    scope: Literal["layer", "global"] = "layer",
) -> nn.Module:
    """One-shot magnitude pruning: keeps the fraction `density` of the blocks and zeroes the rest, in place.

    Keeps `round(density * blocks)` blocks, and at least one in every layer: an empty one would cut the
    network in two.
    Layers with block scales are pruned by setting S to zero in their own blocks (and may come back in
    training unless `freeze_scales` is called); in other layers the weights themselves are zeroed, and
    `fold_zero_blocks` makes that last. Layers smaller than a block stay as they are, with a logged reason.

    Args:
        block_shape: (output, input) channels of a block; None to prune the scaled layers only.
        density: fraction of blocks to keep, in (0, 1].
        include, exclude: names (with wildcards; a name also stands for what is below it) or module types.
        scope: `"layer"` keeps the fraction in every layer, `"global"` in the model as a whole.

    Raises:
        OptionError: if `density` or `scope` is not one of the above.
        PatternError: if the block is not two positive integers, or larger than every layer's weight (or
            than that of a layer named in `include`).
        LayerError: if no layer could be pruned, a name matches none, or a weight is not finite.
    """
    check_number(NAME, "density", density, fix="Use for example 0.5 to keep half.", share=True)
    if scope not in ("layer", "global"):
        raise OptionError(NAME, 'scope "layer" or "global"', repr(scope), "Use one of the two.")
    if block_shape is not None:
        check_block_shape(block_shape, NAME)
    layers = select_layers(model, NAME, include, exclude)
    users = weight_users(model)
    layers, last_error = keep_valid(
        layers,
        NAME,
        check_weight_known,
        lambda layer: check_untied(layer, layers, users),
        lambda layer: _blocks(layer, block_shape),
    )
    if not layers:
        raise nothing_left(NAME, last_error)
    targets = _targets(layers, block_shape)
    for target, kept in zip(targets, _choose([t.strength for t in targets], density, scope), strict=True):
        _zero(target, kept)
    log.info("%s: %d layers pruned to %g of their blocks", NAME, len(targets), density)
    return model


def _targets(layers: list[Layer], block_shape: BlockShape | None) -> list[_Target]:
    """One per weight: tied layers are pruned once."""
    targets: dict[int, _Target] = {}
    for layer in layers:
        key = id(weight_parameters(layer.module)[0])
        if key not in targets:
            full = _blocks(layer, block_shape)
            targets[key] = _Target(layer.module, full, block_strength(effective_weight(layer), full))
    return list(targets.values())


def _blocks(layer: Layer, block_shape: BlockShape | None) -> BlockPattern:
    """All blocks of the layer; raises the reason if it cannot be pruned in them."""
    module, scale = layer.module, block_scale_of(layer.module)
    if isinstance(module, KeptTiles):
        fix = "Prune before fold_zero_blocks."
        raise LayerError(layer.name, "a layer with a dense weight", "a folded layer", fix)
    if scale is not None:
        if block_shape not in (None, scale.block_shape):
            got, fix = f"block_shape={block_shape}", "Pass None to prune each scaled layer in its own blocks."
            raise PatternError(layer.name, f"the block shape of its scales, {scale.block_shape}", got, fix)
        return full_pattern(layer, scale.block_shape)
    if block_shape is None:
        fix = "Pass a block_shape, or call insert_block_scales first."
        raise LayerError(layer.name, "a layer with block scales, as block_shape is None", "one without", fix)
    if parametrize.is_parametrized(module, "weight"):
        fix = "Remove the parametrization first (torch.nn.utils.parametrize.remove_parametrizations)."
        raise LayerError(layer.name, "a weight that can be set to zero", "a parametrized one", fix)
    return full_pattern(layer, block_shape)


def _choose(strengths: list[Tensor], density: float, scope: str) -> list[Tensor]:
    """bool masks of the strongest blocks; exact counts, ties broken by position."""
    if scope == "layer":
        return [_strongest(s.flatten(), _count(density, s.numel())).reshape(s.shape) for s in strengths]
    device = strengths[0].device
    # The best block of each layer comes first, so that no layer ends up empty.
    flat = [s.flatten().to(device).index_fill(0, s.argmax().to(device), torch.inf) for s in strengths]
    total = sum(s.numel() for s in strengths)
    kept = _strongest(torch.cat(flat), max(_count(density, total), len(strengths)))
    parts = kept.split([s.numel() for s in strengths])
    return [part.reshape(s.shape).to(s.device) for part, s in zip(parts, strengths, strict=True)]


def _count(density: float, blocks: int) -> int:
    return max(1, math.floor(density * blocks + 0.5))


def _strongest(strength: Tensor, count: int) -> Tensor:
    order = strength.sort(descending=True, stable=True).indices
    return torch.zeros_like(strength, dtype=torch.bool).index_fill(0, order[:count], True)


@torch.no_grad()
def _zero(target: _Target, kept: Tensor) -> None:
    module, scale = target.module, block_scale_of(target.module)
    if isinstance(scale, BlockScale):
        scale.scale.masked_fill_(~kept, 0)
        return
    pattern = target.full.with_kept(kept[:, None].expand(target.full.grid_shape))
    for parameter in weight_parameters(module):
        parameter.masked_fill_(~layer_weight(pattern.mask(parameter.device), module), 0)
