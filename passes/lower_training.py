"""Replaces each site that the plan gives a kernel by a differentiable block-sparse layer.

conv2d(x, mask * W, b)      →   blocksparse::sparse_conv(x, kept_tiles(mask * W), b, …)
conv2d(x, scatter(V), b)    →   blocksparse::sparse_conv(x, V, b, …)

Unlike in inference, tiles are computed anew on each step, and gradients flow back through them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from .. import training_ops as _training_ops  # noqa: F401  registers the operators
from ..devices import AnyDevice
from ..devices import device as present_device
from ..pattern import BlockPattern
from ..plan import Decision, Plan, Site
from ..training_cost import KERNEL, input_grad_sites
from ..training_tables import LayerTables, gather_indices, kernel_texts
from ..variants import VARIANTS, KernelConfig
from .calls import LayerCall, layer_call
from .fixed_weights import FixedWeight, FixedWeights
from .lower_sites import is_channels_last, is_per_channel
from .static_values import erase_unused, set_constant


def lower_training(gm: GraphModule, plan: Plan, weights: FixedWeights) -> int:
    """Rewrites `gm` in place; returns the number of sites lowered."""
    nodes = {node.name: node for node in gm.graph.nodes}
    work = [decision for decision in plan if not decision.is_dense]
    spec = present_device("cpu") if work else None  # reads files, or measures: once for all layers
    for decision in work:
        call = layer_call(nodes[decision.site.node])
        assert call is not None and decision.pattern is not None
        weight = weights.get(call.weight)
        assert weight is not None
        _lower(gm, call, decision, decision.pattern, weights, weight, spec)
    if work:
        gm.recompile()
    return len(work)


def _lower(
    gm: GraphModule,
    call: LayerCall,
    decision: Decision,
    pattern: BlockPattern,
    weights: FixedWeights,
    weight: FixedWeight,
    device: AnyDevice | None,
) -> None:
    site = decision.site
    padding = [p for pair in site.padding for p in pair]
    tables = LayerTables.of(pattern, site.stride, padding, site.dilation)
    kernel = KernelConfig(decision.kernel, dict(decision.config)).encode(pattern)
    per_channel = is_per_channel(call.bias, site)
    with gm.graph.inserting_before(call.node):
        tiles = _tiles(gm, weights, weight, pattern)
        operands = (call.input, tiles, call.bias if per_channel else None, site.out_channels)
        constants = (
            set_constant(gm, "row_ptr", tables.row_ptr),
            set_constant(gm, "tile_index", tables.tile_index),
            [set_constant(gm, "input_table", table) for table in tables.input_tables],
            kernel,
            kernel_texts(tables, _input_kernels(site, tables, device)),
        )
        if not site.kernel_size:
            new = _call(gm, "sparse_linear", (*operands, *constants))
        else:
            geometry = (list(site.kernel_size), list(site.stride), padding, list(site.dilation))
            last = is_channels_last(call.node)
            new = _call(gm, "sparse_conv", (*operands, *geometry, last, *constants))
        if call.bias is not None and not per_channel:
            new = gm.graph.call_function(torch.add, (new, call.bias))
    new.meta = dict(call.node.meta)
    call.node.replace_all_uses_with(new)
    gm.graph.erase_node(call.node)
    erase_unused(gm, [call.weight])


def _call(gm: GraphModule, name: str, args: tuple[Any, ...]) -> Node:
    return gm.graph.call_function(getattr(torch.ops.blocksparse, name).default, args)


def _tiles(gm: GraphModule, weights: FixedWeights, weight: FixedWeight, pattern: BlockPattern) -> Node:
    """The kept tiles `[n, bh, bw]`, by as little work as possible on each step."""
    if weights.holds_tiles(weight, pattern):
        return weight.trained[0]
    factor = weights.factor(weight, pattern)
    source = weight.node if factor is None else weight.trained[0]
    coordinates, position = gather_indices(pattern)
    constants = set_constant(gm, "coordinates", coordinates), set_constant(gm, "position", position)
    tiles = _call(gm, "kept_tiles", (source, *constants, list(pattern.block_shape)))
    if factor is None or bool(factor.eq(1).all()):
        return tiles
    return gm.graph.call_function(torch.mul, (tiles, set_constant(gm, "factor", factor)))


def _best_config(site: Site, pattern: BlockPattern, device: AnyDevice | None) -> dict[str, int | str]:
    configs = VARIANTS[KERNEL].configs(site, pattern, device)
    return configs[0] if configs else {}


def _input_kernels(site: Site, tables: LayerTables, device: AnyDevice | None) -> list[KernelConfig]:
    return [
        KernelConfig(KERNEL, {} if pattern is None else _best_config(phase, pattern, device))
        for phase, pattern in zip(input_grad_sites(site), tables.phase_patterns, strict=True)
    ]
