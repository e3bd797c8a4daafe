"""Layers compiled by this package, once as the cost model decides and once with the sparse kernel forced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from blocksparse_compiler import BlockPattern, Plan, cost
from blocksparse_compiler.backend import compiled_graphs
from blocksparse_compiler.devices import device
from blocksparse_compiler.pattern import BlockShape

from . import baselines
from .timing import Call


@dataclass(frozen=True)
class Ours:
    """Calls without arguments: `auto`, and `forced` where the cost model chose dense layers."""

    calls: dict[str, Call]
    kernel: str
    density: float


def compile_layers(
    layers: Sequence[nn.Module], x: Tensor, relu: bool, block_shape: tuple[int, int] | None = None
) -> Ours:
    """Compiles and calls once; `kernel` is what `auto` chose for the first.

    Forces nothing without a block shape.
    """
    function = baselines.several([baselines.with_relu(n) if relu else n for n in layers])
    calls = {"auto": _call(function, x, {})}
    plan = newest_plan()
    if block_shape and any(decision.is_dense for decision in plan):
        calls["forced"] = _call(function, x, {"plan": forced(plan, layers, block_shape)})
    weights = torch.stack([n.weight for n in layers])  # type: ignore[misc]
    return Ours(calls, plan.decisions[0].kernel, float(weights.ne(0).float().mean()))


def forced(plan: Plan, layers: Sequence[nn.Module], block_shape: BlockShape) -> Plan:
    """Every layer on the sparse kernel in these blocks, even a layer without a zero."""
    decisions = []
    for decision, layer in zip(plan, layers, strict=True):
        assert isinstance(layer.weight, Tensor)
        pattern = BlockPattern.from_weight(layer.weight, block_shape)
        best = cost.candidates(decision.site, [pattern], device())[0][0]
        config = cost.best_config(decision.site, best, device())
        decisions.append(replace(decision, kernel=best.variant, pattern=pattern, config=config))
    return replace(plan, decisions=tuple(decisions))


def newest_plan() -> Plan:
    """What the backend decided about the graph that it compiled last."""
    return compiled_graphs()[-1].plan


def _call(function: baselines.Layers, x: Tensor, options: dict[str, Any]) -> Call:
    fast = baselines.compiled(function, backend="blocksparse", options=options)
    with torch.no_grad():
        fast(x)
    return lambda: fast(x)
