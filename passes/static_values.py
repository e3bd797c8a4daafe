"""The value of a node that depends on parameters, buffers and constants alone.

A weight may be a parameter, a folded layer's scattered tiles, a parametrization (`S * W`) or a
pruning mask (`weight_orig * weight_mask`): one evaluator serves them all.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode

from .calls import tensor_meta
from .writes import written_nodes, written_operands


class NotStatic(Exception):
    """The node depends on an input, on randomness or on memory that the graph writes to."""


class _Deterministic(TorchDispatchMode):
    """Stops at operators that draw random numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotStatic
        return func(*args, **(kwargs or {}))


class StaticValues:
    """Evaluates static nodes of one graph, each once.

    Values are detached and must not be written to: they may be the model's own parameters.
    """

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._values: dict[Node, Any] = {}
        self._written = written_nodes(gm)

    def get(self, node: Any) -> Any | None:
        """The node's value, or None if it is not static (an argument that is None is None as well)."""
        try:
            return self._evaluate(node) if isinstance(node, Node) else None
        except NotStatic:
            return None

    def is_static(self, node: Node) -> bool:
        return self.get(node) is not None

    @torch.no_grad()
    def _evaluate(self, root: Node) -> Any:
        # An explicit stack: chains of scatter and mask ops may be deeper than Python's recursion limit.
        stack = [root]
        while stack:
            node = stack[-1]
            if node in self._values:
                stack.pop()
                continue
            if not is_pure(node) or node in self._written:
                raise NotStatic
            missing = [n for n in node.all_input_nodes if n not in self._values]
            if missing:
                stack.extend(missing)
                continue
            self._values[node] = self._checked(node, self._run(node))
            stack.pop()
        return self._values[root]

    def _run(self, node: Node) -> Any:
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self._gm)
            return value.detach() if isinstance(value, torch.Tensor) else value
        args = map_arg(node.args, lambda n: self._values[n])
        kwargs = map_arg(node.kwargs, lambda n: self._values[n])
        with _Deterministic():
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            function: Any = node.target
            return function(*args, **kwargs)

    def _checked(self, node: Node, value: Any) -> Any:
        # The surroundings of a call, such as autocast, are not part of its node.
        traced = tensor_meta(node)
        if isinstance(value, torch.Tensor) and traced is not None and value.dtype != traced.dtype:
            raise NotStatic
        return value


def is_pure(node: Node) -> bool:
    """Whether `node` is an attribute, or a call that does not write to its operands."""
    return node.op == "get_attr" or (
        node.op in ("call_function", "call_method") and not written_operands(node)
    )


def erase_unused(gm: GraphModule, operands: Iterable[Node | None]) -> None:
    """Erases operands that lost their last user, and what only they needed.

    Narrower than `Graph.eliminate_dead_code`, which would also drop in-place method calls.
    """
    pending = [node for node in operands if node is not None]
    while pending:
        node = pending.pop()
        if node.users or node._erased or not is_pure(node):
            continue
        pending.extend(node.all_input_nodes)
        gm.graph.erase_node(node)


def set_constant(gm: GraphModule, stem: str, value: torch.Tensor) -> Node:
    """Registers `value` as a buffer with a fresh name and returns a `get_attr` node at the insert point."""
    name, i = f"_blocksparse_{stem}", 0
    while hasattr(gm, name):
        i += 1
        name = f"_blocksparse_{stem}_{i}"
    gm.register_buffer(name, value, persistent=False)
    node = gm.graph.get_attr(name)
    node.meta["example_value"] = node.meta["val"] = value
    return node
