"""Reads nodes that kernels of ours compute along with a layer: activations."""

from __future__ import annotations

import math
from typing import Any

from torch.fx import Node

from ..pointwise_depthwise import Activation
from .calls import op_name

_PLAIN = {"relu", "hardswish", "silu"}
_BOUNDS: dict[str, tuple[Any, Any]] = {"relu6": (0.0, 6.0), "hardtanh": (-1.0, 1.0), "clamp": (None, None)}


def activation_of(node: Node) -> Activation | None:
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


def only_user(node: Node) -> Node | None:
    """The node that reads this one alone, and as its first operand."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user is not None and user.args[:1] == (node,) and user.op != "output" else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
