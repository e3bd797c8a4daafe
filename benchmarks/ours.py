"""A layer compiled by this package, once as the cost model decides and once with the sparse kernel forced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blocksparse_compiler import Plan
from blocksparse_compiler.backend import compiled_graphs

from . import baselines
from .timing import Call


@dataclass(frozen=True)
class Ours:
    """Calls without arguments: `auto`, and `forced` where the cost model chose the dense layer."""

    calls: dict[str, Call]
    kernel: str
    density: float


def compile_layer(
    layer: nn.Module, inputs: baselines.Inputs, relu: bool, block_shape: tuple[int, int]
) -> Ours:
    """Compiles and calls once; `kernel` is what `auto` chose."""
    function = baselines.repeated(baselines.with_relu(layer) if relu else layer)
    calls = {"auto": _call(function, inputs, {})}
    decision = newest_plan().decisions[0]
    if decision.is_dense:
        calls["forced"] = _call(function, inputs, {"dense": "never", "block_shape": block_shape})
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return Ours(calls, decision.kernel, float(weight.ne(0).float().mean()))


def newest_plan() -> Plan:
    """What the backend decided about the graph that it compiled last."""
    return compiled_graphs()[-1].plan


def _call(function: Callable[..., Any], inputs: baselines.Inputs, options: dict[str, Any]) -> Call:
    fast = baselines.compiled(function, backend="blocksparse", options=options)
    with torch.no_grad():
        fast(*inputs)
    return lambda: fast(*inputs)
