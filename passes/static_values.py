"""The value of a node that depends on parameters, buffers and constants alone.

A weight may be a parameter, a folded layer's scattered tiles, a parametrization (`S * W`) or a
pruning mask (`weight_orig * weight_mask`): one evaluator serves them all.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

_RANDOM = ("rand", "bernoulli", "dropout", "multinomial", "normal_", "uniform", "poisson")


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
            _check_pure(node)
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


def _check_pure(node: Node) -> None:
    if node.op == "get_attr":
        return
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if node.op not in ("call_function", "call_method"):
        raise NotStatic
    in_place = name.split(".")[0].endswith("_") and not name.endswith("__")
    if in_place or node.target is operator.setitem or any(word in name for word in _RANDOM):
        raise NotStatic


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
