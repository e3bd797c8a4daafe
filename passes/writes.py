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
    written = {operand for node in gm.graph.nodes for operand in written_operands(node)}
    if not written:
        return written
    storages = {storage for node in written if (storage := _storage(node)) is not None}
    return written | {node for node in gm.graph.nodes if _storage(node) in storages}


def written_operands(node: Node) -> list[Node]:
    """The operands that the call `node` writes to."""
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return list(node.all_input_nodes)  # its body is a graph of its own: it may write to any
    if getattr(node.target, "__name__", "") in _IN_PLACE_OPERATORS:
        return _nodes(node.args[0])
    positions, names = _written_arguments(node.target)
    found = [a for i, a in enumerate(node.args) if i in positions]
    found += [a for name, a in node.kwargs.items() if name in names]
    bound = {**dict(zip(_argument_names(node.target), node.args, strict=False)), **node.kwargs}
    for switch, arguments in _SWITCHES.items():
        if bound.get(switch) not in (None, False):
            found += [bound.get(name) for name in arguments]
    return _nodes(found)


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
def _argument_names(target: Any) -> tuple[str, ...]:
    if target in _NAMES:
        return _NAMES[target]
    if isinstance(target, torch._ops.OpOverload):
        return tuple(argument.name for argument in target._schema.arguments)
    try:
        return tuple(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # a method's name, or a function written in C
        return ()


def _nodes(values: Any) -> list[Node]:
    found: list[Node] = []
    map_aggregate(values, lambda value: found.append(value) if isinstance(value, Node) else None)
    return found


def _storage(node: Node) -> int | None:
    """Identifies the memory of the fake tensor that tracing recorded for `node`."""
    value = tensor_meta(node)
    if value is None or value.layout != torch.strided:
        return None
    return value.untyped_storage()._cdata
