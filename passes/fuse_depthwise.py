"""Runs sparse 1x1 convolutions in one kernel with the depthwise convolutions behind them.

conv → relu6 → depthwise      three tensors in memory
pointwise_depthwise           two: the wide one between the layers stays in the cache

For layers that lie channels first (choose_layouts), where nothing but an activation stands between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from ..cpu_spmm import SPMM
from ..depthwise import DEPTHWISE
from ..layouts import CHANNELS_FIRST, Layouts
from ..plan import Decision, Plan
from ..pointwise_depthwise import FUSE, Activation, is_fused
from ..variants import KernelConfig
from .calls import op_name
from .static_values import set_constant


def choose_fusions(gm: GraphModule, plan: Plan) -> Plan:
    """`plan`, in which the layers that run in one kernel with the next one say so. Changes nothing else."""
    changed: dict[str, Decision] = {}
    for first, second in fusible_layers(gm, plan):
        if first.kernel != SPMM.name or second.kernel != DEPTHWISE.name:
            continue
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
    """Layers between which nothing but an activation stands, of whatever kinds."""
    layers = {decision.site.node: decision for decision in plan}
    for node in gm.graph.nodes:
        behind = _behind(node) if node.name in layers else None
        if behind is not None and behind.depthwise.name in layers:
            yield layers[node.name], layers[behind.depthwise.name]


class _Behind(NamedTuple):
    """What follows a 1x1 convolution: its only user, or that user's."""

    activation: Activation
    depthwise: Node


def _behind(node: Node) -> _Behind | None:
    """What a 1x1 convolution could share a kernel with, were its reader a depthwise convolution."""
    user = _only_user(node)
    activation = _activation(user) if user is not None else None
    if activation is None:
        return _Behind(Activation("identity"), user) if user is not None else None
    depthwise = _only_user(user) if user is not None else None
    return _Behind(activation, depthwise) if depthwise is not None else None


def _only_user(node: Node) -> Node | None:
    """The node that reads this one alone, and as its first operand."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user is not None and user.args[:1] == (node,) and user.op != "output" else None


_PLAIN = {"relu", "hardswish", "silu"}
_BOUNDS: dict[str, tuple[Any, Any]] = {"relu6": (0.0, 6.0), "hardtanh": (-1.0, 1.0), "clamp": (None, None)}


def _activation(node: Node) -> Activation | None:
    """The activation that `node` computes, in whatever dialect; its in-place forms, too."""
    name = op_name(node).rstrip("_")
    if name in _PLAIN:
        return Activation(name)
    if name not in _BOUNDS or node.op not in ("call_function", "call_method"):
        return None
    low, high = _BOUNDS[name]
    given: list[Any] = [*node.args[1:3], *(None,) * (3 - len(node.args[:3]))]
    if name != "relu6":
        low = _first(given[0], node.kwargs.get("min_val"), node.kwargs.get("min"), low)
        high = _first(given[1], node.kwargs.get("max_val"), node.kwargs.get("max"), high)
    if not _is_number(low) or not _is_number(high):
        return None
    return Activation("clamp", float(low), float(high))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _is_channels_first(decision: Decision) -> bool:
    return Layouts.of(decision.config) == CHANNELS_FIRST


def _said(decision: Decision, what: str) -> Decision:
    config = {**decision.config, FUSE: "depthwise"}
    return replace(decision, reason=f"{decision.reason}; {what}", config=config)


def _pairs(gm: GraphModule) -> Iterator[tuple[Node, _Behind]]:
    ops = torch.ops.blocksparse
    for node in gm.graph.find_nodes(op="call_function", target=ops.conv.default):
        config = KernelConfig.decode(node.args[-1])
        behind = _behind(node) if is_fused(config.parameters) else None
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
