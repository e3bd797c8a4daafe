"""Holds layers to a fixed sparse structure from the first training step.

Conv2d(weight)  →  Conv2d(weight = mask * W), with the mask of a scheme (`PeriodicKernels`, …)
"""

from __future__ import annotations

import logging

from torch import nn
from torch.nn.utils import parametrize

from ..errors import LayerError, OptionError, PatternError
from ..layers import KeptTiles
from ..layout import canonical_shape, groups_of, is_transposed
from ..pattern import BlockPattern
from ..schemes import FixedMask, Scheme
from ..selection import Filter, Layer, keep_valid, nothing_left, select_layers
from ..weights import check_untied, check_weight_known, effective_weight, is_masked, weight_users

NAME = "apply_pattern"
log = logging.getLogger(__name__)


def apply_pattern(
    model: nn.Module, scheme: Scheme, *, include: Filter = None, exclude: Filter = None
) -> nn.Module:
    """Masks the selected layers of `model` with the pattern that `scheme` gives each; changes it in place.

    Weights outside the pattern are exactly zero and get no gradient; `fold_zero_blocks` drops them after
    training. Layers that the scheme does not fit stay dense with a logged reason.

    Args:
        scheme: `PeriodicKernels`, `StructuredBand`, `RandomBlocks`, or any object with their two members.
        include, exclude: names (with wildcards; a name also stands for what is below it) or module types.

    Raises:
        PatternError: if the scheme does not fit a layer named in `include`, or fits none.
        LayerError: if no layer could be masked, a name matches none, or a weight is not finite.
    """
    if isinstance(scheme, type) or not callable(getattr(scheme, "pattern", None)):
        fix = "Pass for example RandomBlocks((16, 16), density=0.5)."
        got = scheme.__name__ + ", the class" if isinstance(scheme, type) else repr(scheme)
        raise OptionError(NAME, "a scheme", got, fix)
    layers = select_layers(model, NAME, include, exclude, only_called=True)
    users, stem = weight_users(model), _first_convolution(model) if scheme.dense_stem else None
    layers, last_error = keep_valid(
        layers,
        NAME,
        lambda layer: _check_plain(layer, stem),
        check_weight_known,
        lambda layer: check_untied(layer, [layer], users),
        lambda layer: _pattern(layer, scheme),
    )
    if not layers:
        raise nothing_left(NAME, last_error)
    planned = []
    for layer in layers:
        device = effective_weight(layer).device
        planned.append(
            (layer.module, FixedMask(_pattern(layer, scheme), is_transposed(layer.module), device))
        )
    for module, mask in planned:
        parametrize.register_parametrization(module, "weight", mask)
    log.info("%s: %d layers masked by %s", NAME, len(planned), scheme)
    return model


def _pattern(layer: Layer, scheme: Scheme) -> BlockPattern:
    try:
        return scheme.pattern(layer.name, canonical_shape(layer.module), groups_of(layer.module))
    except PatternError as error:
        raise PatternError(layer.name, error.expected, error.got, error.fix) from None


def _first_convolution(model: nn.Module) -> nn.Module | None:
    return next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)


def _check_plain(layer: Layer, stem: nn.Module | None) -> None:
    module = layer.module
    if module is stem:
        raise LayerError(
            layer.name, "a layer after the first convolution", "the first one", "It stays dense."
        )
    if isinstance(module, KeptTiles) or is_masked(module) or parametrize.is_parametrized(module, "weight"):
        fix = "Apply the pattern to a freshly built model."
        raise LayerError(
            layer.name, "a plain dense weight", "one that is folded, masked or parametrized", fix
        )
