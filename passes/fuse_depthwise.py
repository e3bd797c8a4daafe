"""Runs sparse 1x1 convolutions in one kernel with the depthwise convolutions behind them.

conv → relu6 → depthwise      three tensors in memory
pointwise_depthwise           two: the wide one between the layers stays in the cache

For layers that lie channels first (choose_layouts), where nothing but an activation stands between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from ..cpu_spmm import SPMM
from ..depthwise import DEPTHWISE
from ..layer_chain import chain_of
from ..layouts import CHANNELS_FIRST, Layouts
from ..plan import Decision, Plan
from ..pointwise_depthwise import FUSE, Activation, is_fused
from ..variants import KernelConfig
from .activations import activation_of, only_user
from .static_values import set_constant


def choose_fusions(gm: GraphModule, plan: Plan) -> Plan:
    """`plan`, in which the layers that run in one kernel with the next one say so. Changes nothing else."""
    changed: dict[str, Decision] = {}
    for first, second in fusible_layers(gm, plan):
        if first.kernel != SPMM.name or second.kernel != DEPTHWISE.name:
            continue
        if chain_of(first.config) is not None or chain_of(second.config) is not None:
            continue  # they share a kernel with more
        if _is_channels_first(first) and _is_channels_first(second):
            changed[first.site.node] = _said(first, f"in one kernel with {second.site.name}")
            changed[second.site.node] = _said(second, f"in one kernel with {first.site.name}")
    return replace(plan, decisions=tuple(changed.get(d.site.node, d) for d in plan))


def fuse_depthwise(gm: GraphModule) -> int:
    """Rewrites `gm`, in which layers are lowered, in place; returns the number of pairs fused."""
    pairs = list(_pairs(gm))
    for conv, behind in pairs:
        _fuse(gm, conv, behind)
    if pairs:
        gm.recompile()
    return len(pairs)


def fusible_layers(gm: GraphModule, plan: Plan) -> Iterator[tuple[Decision, Decision]]:
    """Layers between which nothing but an activation stands, of whatever kinds; the first is not strided."""
    layers = {decision.site.node: decision for decision in plan}
    firsts = {name for name, decision in layers.items() if all(s == 1 for s in decision.site.stride)}
    for node in gm.graph.nodes:
        behind = _behind(node) if node.name in firsts else None
        if behind is not None and behind.depthwise.name in layers:
            yield layers[node.name], layers[behind.depthwise.name]


class _Behind(NamedTuple):
    """What follows a 1x1 convolution: its only user, or that user's."""

    activation: Activation
    depthwise: Node


def _behind(node: Node) -> _Behind | None:
    """What a 1x1 convolution could share a kernel with, were its reader a depthwise convolution."""
    user = only_user(node)
    activation = activation_of(user) if user is not None else None
    if activation is None:
        return _Behind(Activation("identity"), user) if user is not None else None
    depthwise = only_user(user) if user is not None else None
    return _Behind(activation, depthwise) if depthwise is not None else None


def _is_channels_first(decision: Decision) -> bool:
    return Layouts.of(decision.config) == CHANNELS_FIRST


def _said(decision: Decision, what: str) -> Decision:
    config = {**decision.config, FUSE: "depthwise"}
    return replace(decision, reason=f"{decision.reason}; {what}", config=config)


def _pairs(gm: GraphModule) -> Iterator[tuple[Node, _Behind]]:
    ops = torch.ops.blocksparse
    for node in gm.graph.find_nodes(op="call_function", target=ops.conv.default):
        config = KernelConfig.decode(node.args[-1])
        stride: Any = node.args[7]
        behind = _behind(node) if is_fused(config.parameters) and set(stride) == {1} else None
        if behind is not None and behind.depthwise.target == ops.depthwise.default:
            yield node, behind


def _fuse(gm: GraphModule, conv: Node, behind: _Behind) -> None:
    x, values, row_ptr, tile_index, row_bias, hidden, *_, kernel = _arguments(conv)
    _, weight, bias, *geometry = _arguments(behind.depthwise)[:-1]
    with gm.graph.inserting_before(behind.depthwise):
        biases = [
            b or set_constant(gm, "bias", torch.zeros(hidden, dtype=torch.float32)) for b in (row_bias, bias)
        ]
        rows = (values, row_ptr, tile_index, biases[0], str(behind.activation))
        new = gm.graph.call_function(
            torch.ops.blocksparse.pointwise_depthwise.default,
            (x, *rows, weight, biases[1], *geometry, kernel),
        )
    new.meta = dict(behind.depthwise.meta)
    behind.depthwise.replace_all_uses_with(new)
    between = [user for user in conv.users if user is not behind.depthwise]
    for node in (behind.depthwise, *between, conv):
        gm.graph.erase_node(node)


def _arguments(node: Node) -> tuple[Any, ...]:
    return node.args
