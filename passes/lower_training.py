"""Replaces each site that the plan gives a kernel by a differentiable block-sparse layer.

conv2d(x, mask * W, b)      →   blocksparse::sparse_conv(x, kept_tiles(mask * W), b, …)
conv2d(x, scatter(V), b)    →   blocksparse::sparse_conv(x, V, b, …)

Unlike in inference, tiles are computed anew on each step, and gradients flow back through them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .. import training_ops as _training_ops  # noqa: F401  registers the operators
from ..devices import AnyDevice
from ..devices import device as present_device
from ..pattern import BlockPattern
from ..plan import Decision, Plan, Site
from ..training_cost import input_grad_sites
from ..training_tables import LayerTables, gather_indices, kernel_texts
from ..variants import VARIANTS, KernelConfig
from .calls import LayerCall, layer_call, tensor_meta
from .fixed_weights import FixedWeight, FixedWeights
from .lower_sites import is_channels_last, is_per_channel
from .static_values import erase_unused, set_constant


def lower_training(
    gm: GraphModule, plan: Plan, weights: FixedWeights, device: AnyDevice | None = None
) -> int:
    """Rewrites `gm` in place; returns the number of sites lowered.

    Args:
        device: that the plan was made for, if it is not the one that each layer is on.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    work = [decision for decision in plan if not decision.is_dense]
    spec_of = functools.cache(present_device)  # which reads files, or measures
    for decision in work:
        call = layer_call(nodes[decision.site.node])
        assert call is not None and decision.pattern is not None
        weight = weights.get(call.weight)
        assert weight is not None
        spec = device or spec_of(decision.site.device)
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
    device: AnyDevice,
) -> None:
    site = decision.site
    padding = [p for pair in site.padding for p in pair]
    tables = LayerTables.of(pattern, site.stride, padding, site.dilation, decision.kernel)
    kernel = KernelConfig(decision.kernel, dict(decision.config)).encode(pattern)
    per_channel = is_per_channel(call.bias, site)
    place, dtype = _place(call), getattr(torch, site.dtype)
    with gm.graph.inserting_before(call.node):
        tiles = _tiles(gm, weights, weight, pattern, place)
        if weight.unused:
            like, tiles = tiles, _call(gm, "with_zero_grad", (tiles, list(weight.unused)))
            tiles.meta = dict(like.meta)
        bias = call.bias if per_channel else None
        inputs = [_converted(gm, operand, dtype) for operand in (call.input, tiles, bias)]
        groups = None if tables.groups is None else set_constant(gm, "groups", tables.groups.to(place))
        constants = (
            set_constant(gm, "tile_index", tables.tile_index.to(place)),
            groups,
            [set_constant(gm, "table", table.to(place)) for table in tables.all],
            kernel,
            kernel_texts(tables, _input_kernels(decision.kernel, site, tables, device)),
        )
        if not site.kernel_size:
            new = _call(gm, "sparse_linear", (*inputs, site.out_channels, *constants))
        else:
            geometry = (list(site.kernel_size), list(site.stride), padding, list(site.dilation))
            last = is_channels_last(call.node)
            new = _call(gm, "sparse_conv", (*inputs, site.out_channels, *geometry, last, *constants))
        if call.bias is not None and not per_channel:
            new = gm.graph.call_function(torch.add, (new, _converted(gm, call.bias, dtype)))
    new.meta = dict(call.node.meta)
    call.node.replace_all_uses_with(new)
    gm.graph.erase_node(call.node)
    erase_unused(gm, [call.weight])


def _call(gm: GraphModule, name: str, args: tuple[Any, ...]) -> Node:
    return gm.graph.call_function(getattr(torch.ops.blocksparse, name).default, args)


def _place(call: LayerCall) -> torch.device:
    value = tensor_meta(call.input)
    assert value is not None  # or it would be no site
    return value.device


def _converted(gm: GraphModule, operand: Node | None, dtype: torch.dtype) -> Node | None:
    """`operand` in the dtype that the layer computes in: autocast passes our operators by."""
    value = tensor_meta(operand) if operand is not None else None
    if operand is None or (value is not None and value.dtype == dtype):
        return operand
    return gm.graph.call_method("to", (operand, dtype))


def _tiles(
    gm: GraphModule, weights: FixedWeights, weight: FixedWeight, pattern: BlockPattern, place: torch.device
) -> Node:
    """The kept tiles `[n, bh, bw]`, by as little work as possible on each step."""
    if weights.holds_tiles(weight, pattern):
        return weight.trained[0]
    factor = weights.factor(weight, pattern)
    source = weight.node if factor is None else weight.trained[0]
    coordinates, position = (index.to(place) for index in gather_indices(pattern))
    constants = set_constant(gm, "coordinates", coordinates), set_constant(gm, "position", position)
    tiles = _call(gm, "kept_tiles", (source, *constants, list(pattern.block_shape)))
    tiles.meta["example_value"] = _like(source, pattern)
    if factor is None or bool(factor.eq(1).all()):
        return tiles
    scaled = gm.graph.call_function(torch.mul, (tiles, set_constant(gm, "factor", factor)))
    scaled.meta["example_value"] = tiles.meta["example_value"]
    return scaled


def _like(source: Node, pattern: BlockPattern) -> torch.Tensor:
    """What tracing would have recorded for the tiles, as far as their dtype goes."""
    value = tensor_meta(source)
    assert value is not None
    return torch.empty(pattern.num_kept, *pattern.block_shape, dtype=value.dtype, device="meta")


def _best_config(kernel: str, site: Site, pattern: BlockPattern, device: AnyDevice) -> dict[str, int | str]:
    configs = VARIANTS[kernel].configs(site, pattern, device)
    return configs[0] if configs else {}


def _input_kernels(kernel: str, site: Site, tables: LayerTables, device: AnyDevice) -> list[KernelConfig]:
    return [
        KernelConfig(kernel, {} if pattern is None else _best_config(kernel, phase, pattern, device))
        for phase, pattern in zip(input_grad_sites(site), tables.phase_patterns, strict=True)
    ]
