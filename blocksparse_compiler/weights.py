"""The weight a layer really uses, whatever it is made of: parameter, scales, masks, kept tiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from .errors import LayerError, PatternError
from .gates import BlockGate
from .layers import KeptTiles
from .layout import canonical_shape, canonical_weight, groups_of
from .pattern import BlockPattern, BlockShape
from .schemes import FixedMask
from .selection import Layer
from .zero_blocks import find_zero_blocks


def effective_weight(layer: Layer) -> Tensor:
    """The weight that `forward` uses, `[O, C/groups, *kernel]`, detached: parametrizations and masks applied.

    Raises:
        LayerError: if it is not finite, not there yet (lazy layers), or computed by a hook we do not know.
    """
    check_weight_known(layer)
    module = layer.module
    if isinstance(module, KeptTiles) or parametrize.is_parametrized(module, "weight"):
        with torch.no_grad(), evaluation_mode(module):
            weight = module.weight.detach()  # type: ignore[operator,union-attr]
    elif is_masked(module):
        weight = module.weight_orig.detach() * module.weight_mask  # type: ignore[operator,union-attr]
    else:
        weight = module.weight.detach()  # type: ignore[operator,union-attr,assignment]
    if weight.device.type != "meta" and not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        fix = "Go back to a checkpoint from before training diverged; nothing was changed."
        raise LayerError(layer.name, "finite weights", f"{bad} that are NaN or infinite", fix)
    return canonical_weight(weight, module)


def kept_pattern(layer: Layer, weight: Tensor, block_shape: BlockShape | None = None) -> BlockPattern | None:
    """The tiles of the layer's effective weight that hold a nonzero.

    In the tiles of a folded layer, the blocks of a scaled or masked one, else in `block_shape`, else in
    the shape that `find_zero_blocks` finds; None if that finds no zero block.
    """
    if isinstance(layer.module, KeptTiles):
        return layer.module.pattern
    shape, groups = own_block_shape(layer.module) or block_shape, groups_of(layer.module)
    return (
        find_zero_blocks(weight, groups) if shape is None else BlockPattern.from_weight(weight, shape, groups)
    )


def own_block_shape(module: nn.Module) -> BlockShape | None:
    """The block shape that a layer's scales or other gate, or its fixed mask, come in."""
    if parametrize.is_parametrized(module, "weight"):
        for parametrization in reversed(module.parametrizations["weight"]):  # type: ignore[index,arg-type]
            if isinstance(parametrization, BlockGate | FixedMask):
                return parametrization.block_shape
    return None


def make_plain(module: nn.Module) -> None:
    """Drops parametrizations and masks: `weight` becomes a plain parameter, whose value is not defined."""
    if parametrize.is_parametrized(module, "weight"):
        # Deep copies share torch's parametrized class, and removing takes the property off that class.
        cls = type(module)
        own = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(cls.__name__, cls.__bases__, own)
        # A tensor that was made of several (weight norm) cannot be restored, only evaluated.
        several = len(weight_parameters(module)) > 1
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=several)
    elif is_masked(module):
        prune.remove(module, "weight")


def is_masked(module: nn.Module) -> bool:
    """Whether torch.nn.utils.prune holds a mask on the weight."""
    return "weight_orig" in module._parameters and "weight_mask" in module._buffers


def weight_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that the weight is made of; those of parametrizations, such as S, not counted."""
    if isinstance(module, KeptTiles):
        return [module.values]
    if parametrize.is_parametrized(module, "weight"):
        return list(module.parametrizations["weight"].parameters(recurse=False))  # type: ignore[index,operator,union-attr]
    found = (module._parameters.get(name) for name in ("weight", "weight_orig"))
    return [p for p in found if p is not None]


def check_weight_known(layer: Layer) -> None:
    """Raises `LayerError` if the weight is lazy, or computed by a hook that we do not know."""
    module = layer.module
    own = module._parameters.get("weight")
    if own is not None and nn.parameter.is_lazy(own):
        raise LayerError(layer.name, "an initialised weight", "a lazy one", "Run the model once first.")
    known = own is not None or isinstance(module, KeptTiles) or is_masked(module)
    if not known and not parametrize.is_parametrized(module, "weight"):
        fix = (
            "Make it a parameter again (for example torch.nn.utils.remove_weight_norm), or exclude the layer."
        )
        raise LayerError(layer.name, "a weight parameter", "a weight that a hook computes", fix)


def check_untied(layer: Layer, layers: list[Layer], users: dict[int, list[nn.Module]]) -> None:
    """Raises `LayerError` if the weight is shared with anything but layers of its kind among `layers`."""
    selected = {other.module for other in layers}
    kind = _kind(layer.module)
    for parameter in weight_parameters(layer.module):
        for other in users[id(parameter)]:
            if other not in selected or _kind(other) != kind:
                fix = "Select all layers that share the weight, or untie them."
                got = f"one shared with another {type(other).__name__}"
                raise LayerError(layer.name, "a weight of its own", got, fix)


def weight_users(model: nn.Module) -> dict[int, list[nn.Module]]:
    """For each parameter's id, the modules that hold it; more than one means tied weights."""
    owner = {
        parametrizations: module
        for module in model.modules()
        if parametrize.is_parametrized(module)
        for parametrizations in module.parametrizations.values()  # type: ignore[operator,union-attr]
    }
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(owner.get(module, module))
    return users


def full_pattern(layer: Layer, block_shape: BlockShape) -> BlockPattern:
    """All blocks of the layer's weight; `PatternError` naming the layer if the block is too large."""
    try:
        return BlockPattern.full(canonical_shape(layer.module), block_shape, groups_of(layer.module))
    except PatternError as error:
        raise PatternError(layer.name, error.expected, error.got, error.fix) from None


def _kind(module: nn.Module) -> tuple[type, int]:
    return parametrize.type_before_parametrizations(module), groups_of(module)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """`module.eval()` for a while: batch norm statistics and spectral norm's iteration stay as they are."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode
