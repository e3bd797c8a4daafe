"""Folds inference-mode batch norm into the convolution or linear layer before it.

    batch_norm(conv(x, W, b))   →   conv(x, W * s, (b - mean) * s + beta),   s = gamma / sqrt(var + eps)

Zero tiles stay zero: a row is only scaled. A layer whose raw output is used elsewhere is left alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .calls import LayerCall, NormCall, layer_call, norm_call, tensor_meta
from .static_values import StaticValues, erase_unused, set_constant


def fold_batch_norm(gm: GraphModule) -> int:
    """Folds in place; returns the number of batch norms removed."""
    values, folded = StaticValues(gm), 0
    for node in list(gm.graph.nodes):
        norm = norm_call(node)
        layer = layer_call(norm.input) if norm else None
        if norm and layer and _can_fold(layer, norm, values):
            _fold(gm, layer, norm, values)
            folded += 1
    if folded:
        gm.recompile()
    return folded


def _can_fold(layer: LayerCall, norm: NormCall, values: StaticValues) -> bool:
    result, weight = tensor_meta(layer.node), tensor_meta(layer.weight)
    if result is None or weight is None or result.dtype != weight.dtype:  # autocast computes in another dtype
        return False
    # Batch norm's channel axis is 1: not that of unbatched convolutions, nor of linear layers beyond 2-D.
    if result.dim() != layer.spatial_dims + 2:
        return False
    tensors = [layer.weight, norm.mean, norm.var]
    tensors += [t for t in (layer.bias, norm.weight, norm.bias) if t is not None]
    return len(layer.node.users) == 1 and all(values.is_static(t) for t in tensors)


@torch.no_grad()
def _fold(gm: GraphModule, layer: LayerCall, norm: NormCall, values: StaticValues) -> None:
    def value(node: Node) -> Tensor:
        found = values.get(node)
        assert found is not None  # _can_fold has asked is_static
        return found

    weight = value(layer.weight)
    # In double: the one rounding left is that of the folded weight itself.
    mean, var = value(norm.mean).double(), value(norm.var).double()
    scale = torch.rsqrt(var + norm.eps)
    if norm.weight is not None:
        scale = scale * value(norm.weight).double()
    bias = -mean * scale
    if layer.bias is not None:
        bias = bias + value(layer.bias).double() * scale
    if norm.bias is not None:
        bias = bias + value(norm.bias).double()
    folded = _scaled(weight, _per_output_channel(scale, layer, weight))
    if layer.spatial_dims and weight.is_contiguous(memory_format=torch.channels_last) and weight.dim() == 4:
        folded = folded.contiguous(memory_format=torch.channels_last)

    with gm.graph.inserting_before(layer.node):
        weight_node = set_constant(gm, "weight", folded)
        bias_node = set_constant(gm, "bias", bias.to(weight.dtype))
    _set_operands(layer, weight_node, bias_node)
    norm.node.replace_all_uses_with(layer.node)
    gm.graph.erase_node(norm.node)
    erase_unused(gm, (layer.weight, layer.bias, norm.mean, norm.var, norm.weight, norm.bias))


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """`weight * scale`, in double.

    A few rows at a time: the first touch of large temporaries would cost more than the arithmetic.
    """
    scaled = torch.empty_like(weight)
    rows = max(1, 2**16 * len(weight) // max(1, weight.numel()))
    for out, part, factor in zip(scaled.split(rows), weight.split(rows), scale.split(rows), strict=True):
        out.copy_(part * factor)
        out.masked_fill_(part == 0, 0)  # keeps -0.0 and 0 * inf from filling a zero tile
    return scaled


def _per_output_channel(scale: Tensor, layer: LayerCall, weight: Tensor) -> Tensor:
    """`scale` [O] shaped to multiply the layer's weight."""
    if not layer.transposed:
        return scale.reshape(-1, *[1] * (weight.dim() - 1))
    # transposed weights are [C, O/groups, *kernel]: each group of input channels has its own outputs
    per_group = scale.reshape(layer.groups, 1, -1)
    per_group = per_group.expand(-1, weight.shape[0] // layer.groups, -1)
    return per_group.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))


def _set_operands(layer: LayerCall, weight: torch.fx.Node, bias: torch.fx.Node) -> None:
    node = layer.node
    kwargs = {k: v for k, v in node.kwargs.items() if k not in ("weight", "bias")}
    if "input" in kwargs:
        node.kwargs = {**kwargs, "weight": weight, "bias": bias}
        return
    node.args = (node.args[0], weight, bias, *node.args[3:])
    node.kwargs = kwargs
