"""Replaces the static subgraphs behind weights and biases by their values.

    scatter(values, index) ─ permute ─ reshape ─┐                      buffer ─┐
    x ──────────────────────────────────────── conv2d      →      x ──────── conv2d

Folded layers, parametrizations and pruning masks all become plain dense weights, in which zero blocks
can be found.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from .calls import layer_call, norm_call
from .quantized_calls import quantized_call
from .static_values import StaticValues, erase_unused, set_constant


def fold_constants(gm: GraphModule) -> int:
    """Folds in place; returns the number of tensors that became buffers."""
    values, folded = StaticValues(gm), 0
    for node in list(gm.graph.nodes):
        call = layer_call(node) or norm_call(node)
        if call is None:
            continue
        # Who runs a quantized layer needs its weight in integers: Inductor too, where it stays dense.
        weight = None if quantized_call(node) else call.weight
        for operand in (weight, call.bias):
            if isinstance(operand, Node) and operand.op != "get_attr" and values.is_static(operand):
                folded += _replace(gm, node, operand, values)
    if folded:
        gm.recompile()
    return folded


def _replace(gm: GraphModule, user: Node, operand: Node, values: StaticValues) -> int:
    value = values.get(operand)
    assert value is not None  # the caller has asked is_static
    with gm.graph.inserting_before(user):
        constant = set_constant(gm, "folded", value.clone())
    user.replace_input_with(operand, constant)
    erase_unused(gm, [operand])
    return 1
