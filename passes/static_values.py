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

_RANDOM = ("rand", "bernoulli", "dropout", "multinomial", "normal_", "uniform", "poisson")


_IN_PLACE_FUNCTIONS = {"setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ior", "iand", "ixor"}


class NotStatic(Exception):
    """The node depends on an input, on randomness or on an op with side effects."""


class StaticValues:
    """Evaluates static nodes of one graph, each once.

    Values are detached and must not be written to: they may be the model's own parameters.
    """

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._values: dict[Node, Any] = {}

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
            if not is_pure(node):
                raise NotStatic
            missing = [n for n in node.all_input_nodes if n not in self._values]
            if missing:
                stack.extend(missing)
                continue
            self._values[node] = self._run(node)
            stack.pop()
        return self._values[root]

    def _run(self, node: Node) -> Any:
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(self._gm)
            return value.detach() if isinstance(value, torch.Tensor) else value
        args = map_arg(node.args, lambda n: self._values[n])
        kwargs = map_arg(node.kwargs, lambda n: self._values[n])
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)


def is_pure(node: Node) -> bool:
    """Whether `node` is an attribute, or a call that neither writes to its operands nor draws numbers."""
    if node.op == "get_attr":
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if node.op not in ("call_function", "call_method"):
        return False
    return not writes_operand(node) and not any(word in name for word in _RANDOM)


def writes_operand(node: Node) -> bool:
    """Whether `node` writes to its first operand or to `out=`."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    stem = name.split(".")[0]
    in_place = stem.endswith("_") and not stem.endswith("__")
    return in_place or stem in _IN_PLACE_FUNCTIONS or isinstance(node.kwargs.get("out"), Node)


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
