"""Which tensors a graph writes to: directly, or through a view that shares their memory."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from .calls import tensor_meta

_IN_PLACE_OPERATORS = {
    "setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul",
    "ior", "iand", "ixor", "ilshift", "irshift",
}  # fmt: skip

# argument that switches it on -> arguments written then, by functions whose schema does not tell
_SWITCHES: dict[str, tuple[str, ...]] = {
    "inplace": ("input",),
    "training": ("running_mean", "running_var"),
    "use_input_stats": ("running_mean", "running_var"),
    "max_norm": ("weight",),
}
_ATEN_NORM = ("input", "weight", "bias", "running_mean", "running_var")
_NAMES: dict[Any, tuple[str, ...]] = {
    torch.batch_norm: (*_ATEN_NORM, "training"),
    torch.instance_norm: (*_ATEN_NORM, "use_input_stats"),
}


def written_nodes(gm: GraphModule) -> set[Node]:
    """Every node whose tensor the graph writes to, or shares memory with one that it writes to."""
    return _sharing_memory(gm, {o for node in gm.graph.nodes for o in written_operands(node)})


def returned_nodes(gm: GraphModule) -> set[Node]:
    """Every node whose tensor the graph returns, or that shares memory with one that it returns."""
    return _sharing_memory(
        gm, {n for output in gm.graph.find_nodes(op="output") for n in output.all_input_nodes}
    )


def written_operands(node: Node) -> list[Node]:
    """The operands that the call `node` writes to."""
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return list(node.all_input_nodes) if _body_writes(node) else []
    if getattr(node.target, "__name__", "") in _IN_PLACE_OPERATORS:
        return _nodes(node.args[0])
    positions, names = _written_arguments(node.target)
    found = [a for i, a in enumerate(node.args) if i in positions]
    found += [a for name, a in node.kwargs.items() if name in names]
    defaults = _defaults(node.target)
    bound = {**defaults, **dict(zip(defaults, node.args, strict=False)), **node.kwargs}
    for switch, arguments in _SWITCHES.items():
        if bound.get(switch) not in (None, False):
            found += [bound.get(name) for name in arguments]
    return _nodes(found)


class Writes:
    """When a graph writes to which memory: positions of nodes, and what is written there."""

    def __init__(self, gm: GraphModule) -> None:
        self._position = {node: i for i, node in enumerate(gm.graph.nodes)}
        self._written = [
            (i, operand, _storage(operand))
            for node, i in self._position.items()
            for operand in written_operands(node)
        ]

    def between(self, tensor: Node, begin: Node, end: Node) -> bool:
        """Whether a node behind `begin` and before `end` writes to the memory of `tensor`."""
        storage, (first, last) = _storage(tensor), (self._position[node] for node in (begin, end))
        return any(
            first < i < last and (operand is tensor or (storage is not None and storage == written))
            for i, operand, written in self._written
        )


def _body_writes(node: Node) -> bool:
    """Whether the graphs that a higher-order operator runs may write to its operands; without graphs, yes."""
    attributes = [n for n in node.all_input_nodes if n.op == "get_attr"]
    values = [getattr(node.graph.owning_module, str(n.target), None) for n in attributes]
    bodies = [value for value in values if isinstance(value, GraphModule)]
    return not bodies or any(n.op == "placeholder" for body in bodies for n in written_nodes(body))


@functools.cache
def _written_arguments(target: Any) -> tuple[frozenset[int], frozenset[str]]:
    """Positions and names of the arguments that any overload of an operator writes to."""
    if isinstance(target, torch._ops.OpOverload):
        overloads = [target]
    else:
        packet = target
        if not isinstance(target, torch._ops.OpOverloadPacket):
            name = target if isinstance(target, str) else getattr(target, "__name__", "")
            packet = getattr(torch.ops.aten, name, None) if name else None
        overloads = [getattr(packet, name) for name in packet.overloads()] if packet is not None else []
    written = [
        (i, argument)
        for overload in overloads
        for i, argument in enumerate(overload._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    positions = frozenset(i for i, argument in written if not argument.kwarg_only)
    return positions, frozenset(argument.name for _, argument in written)


@functools.cache
def _defaults(target: Any) -> dict[str, Any]:
    """The arguments of a function in order, with their default values; None where there is none."""
    if target in _NAMES:
        return dict.fromkeys(_NAMES[target])
    if isinstance(target, torch._ops.OpOverload):
        return {argument.name: argument.default_value for argument in target._schema.arguments}
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # a method's name, or a function written in C
        return {}
    return {p.name: None if p.default is p.empty else p.default for p in parameters}


def _nodes(values: Any) -> list[Node]:
    found: list[Node] = []
    map_aggregate(values, lambda value: found.append(value) if isinstance(value, Node) else None)
    return found


def _sharing_memory(gm: GraphModule, chosen: set[Node]) -> set[Node]:
    storages = {storage for node in chosen if (storage := _storage(node)) is not None}
    return chosen | {node for node in gm.graph.nodes if _storage(node) in storages} if storages else chosen


def _storage(node: Node) -> int | None:
    """Identifies the memory of the fake tensor that tracing recorded for `node`."""
    value = tensor_meta(node)
    if value is None or value.layout != torch.strided:
        return None
    return value.untyped_storage()._cdata
