"""Puts a trainable scale on every weight block (DBSR).

Conv2d(weight)  →  Conv2d(weight = clamp(S, 0, 1) * W), S [groups * ceil(O/groups/bh), ceil(C/groups/bw)]

Handles 1-D, 2-D and 3-D convolutions, transposed ones, groups, and linear layers, with channels that
need not divide by the block. S starts at 1, so the model computes what it did before.
"""

from __future__ import annotations

import logging

from torch import nn
from torch.nn.utils import parametrize

from ..errors import LayerError
from ..gates import BlockGate, block_gate_of
from ..layers import KeptTiles
from ..layout import is_transposed
from ..pattern import BlockShape, check_block_shape
from ..scales import BlockScale
from ..selection import Filter, Layer, keep_valid, nothing_left, select_layers
from ..weights import (
    check_untied,
    check_weight_known,
    effective_weight,
    full_pattern,
    is_masked,
    weight_parameters,
    weight_users,
)

NAME = "insert_block_scales"
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
        PatternError: if the block is not two positive integers, or larger than every layer's weight (or
            than that of a layer named in `include`).
        LayerError: if no layer could be scaled, a name matches none, or a weight is not finite.
    """
    planned = plan_gates(model, block_shape, BlockScale, NAME, include, exclude)
    register_gates(planned)
    log.info("%s: %d layers scaled in blocks of %s", NAME, len(planned), tuple(block_shape))
    return model


def plan_gates(
    model: nn.Module,
    block_shape: BlockShape,
    gate_type: type[BlockGate],
    function: str,
    include: Filter = None,
    exclude: Filter = None,
) -> list[tuple[Layer, BlockGate]]:
    """The layers to gate, and their gates; layers with tied weights share one. Changes nothing.

    `function` is the name for messages. Raises as `insert_block_scales` does.
    """
    check_block_shape(block_shape, function)
    layers = select_layers(model, function, include, exclude, only_called=True)
    users = weight_users(model)
    layers, last_error = keep_valid(
        layers,
        function,
        _check_dense,
        check_weight_known,
        lambda layer: check_untied(layer, layers, users),
        lambda layer: full_pattern(layer, block_shape),
    )
    if not layers:
        raise nothing_left(function, last_error)

    tied: dict[int, BlockGate] = {}  # by weight parameter
    planned: list[tuple[Layer, BlockGate]] = []
    for layer in layers:
        weight, full = effective_weight(layer), full_pattern(layer, block_shape)
        parameter = weight_parameters(layer.module)[0]
        gate = gate_type(full, is_transposed(layer.module), weight.dtype, weight.device)
        planned.append((layer, tied.setdefault(id(parameter), gate)))
    return planned


def register_gates(planned: list[tuple[Layer, BlockGate]]) -> None:
    for layer, gate in planned:
        parametrize.register_parametrization(layer.module, "weight", gate)


def _check_dense(layer: Layer) -> None:
    module = layer.module
    if isinstance(module, KeptTiles):
        fix = "Insert scales before fold_zero_blocks."
        raise LayerError(layer.name, "a layer with a dense weight", "a folded layer", fix)
    if is_masked(module):
        fix = "Call torch.nn.utils.prune.remove(layer, 'weight') first."
        raise LayerError(layer.name, "a weight parameter", "a mask of torch.nn.utils.prune", fix)
    gate = block_gate_of(module)
    if gate is not None:
        fix = "Fold it first (fold_zero_blocks), or exclude it."
        got = "one that has them" if isinstance(gate, BlockScale) else f"one that has {type(gate).__name__}"
        raise LayerError(layer.name, "a layer without block scales", got, fix)
