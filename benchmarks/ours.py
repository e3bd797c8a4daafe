"""A layer compiled by this package, once as the cost model decides and once with the sparse kernel forced."""

from __future__ import annotations

from dataclasses import dataclass

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


def compile_layer(layer: nn.Module, x: Tensor, relu: bool, block_shape: tuple[int, int]) -> Ours:
    """Compiles and calls once; `kernel` is what `auto` chose."""
    function = baselines.with_relu(layer) if relu else layer
    calls = {"auto": _call(function, x, {})}
    (decision,) = newest_plan()
    if decision.is_dense:
        calls["forced"] = _call(function, x, {"dense": "never", "block_shape": block_shape})
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return Ours(calls, decision.kernel, float(weight.ne(0).float().mean()))


def newest_plan() -> Plan:
    """What the backend decided about the graph that it compiled last."""
    return compiled_graphs()[-1].plan


def _call(function: object, x: Tensor, options: dict[str, object]) -> Call:
    assert callable(function)
    fast = baselines.compiled(function, backend="blocksparse", options=options)
    with torch.no_grad():
        fast(x)
    return lambda: fast(x)
