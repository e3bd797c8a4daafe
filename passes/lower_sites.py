"""Replaces each site that the plan gives a kernel by a `blocksparse::*` op with packed weights.

conv2d(x, W, b)   →   blocksparse::conv(x, tiles(W), row_ptr, tile_index, b, …, "kernel;…")
linear(x, W, b)   →   blocksparse::linear(…)
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from .. import ops as _ops  # noqa: F401  registers the operators that are put into the graph
from ..depthwise import DEPTHWISE
from ..errors import PlanError
from ..plan import Decision, Plan, Site
from ..variants import VARIANTS, KernelConfig
from .calls import LayerCall, layer_call, tensor_meta
from .static_values import StaticValues, erase_unused, set_constant


def lower_sites(gm: GraphModule, plan: Plan) -> int:
    """Rewrites `gm` in place; returns the number of sites lowered, quantized ones apart.

    Raises:
        PlanError: if a decision names a node that is not in the graph. Nothing is changed then.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    work = [(_call(nodes, decision).node, decision) for decision in plan if _is_ours(decision)]
    values = StaticValues(gm)
    for node, decision in work:
        call = layer_call(node)  # read again: the layer before it may have been replaced
        assert call is not None
        _lower(gm, call, decision, values)
    if work:
        remove_unused_constants(gm)
        gm.recompile()
    return len(work)


def _is_ours(decision: Decision) -> bool:
    return not decision.is_dense and not decision.site.is_quantized  # those are for lower_quantized


def _call(nodes: dict[str, Node], decision: Decision) -> LayerCall:
    node = nodes.get(decision.site.node)
    call = layer_call(node) if node is not None else None
    if call is None or decision.pattern is None:
        raise PlanError(
            decision.site.name,
            "a decision about a layer of this graph, with its pattern",
            f"node {decision.site.node!r}, pattern {decision.pattern}",
            "Make the plan from this graph (blocksparse_compiler.plan).",
        )
    return call


def _lower(gm: GraphModule, call: LayerCall, decision: Decision, values: StaticValues) -> None:
    site, pattern = decision.site, decision.pattern
    assert pattern is not None
    weight = values.get(call.weight)
    assert weight is not None
    dtype = getattr(torch, site.dtype)
    packed = VARIANTS[decision.kernel].pack(weight.to(dtype), pattern)
    kernel = KernelConfig(decision.kernel, dict(decision.config)).encode(pattern)
    bias = call.bias if is_per_channel(call.bias, site) else None
    with gm.graph.inserting_before(call.node):
        x, tiles = _converted(gm, call.input, dtype), set_constant(gm, "tiles", packed.values)
        added = None if bias is None else _converted(gm, bias, dtype)
        padding = [p for pair in site.padding for p in pair]
        geometry = (list(site.kernel_size), list(site.stride), padding, list(site.dilation))
        last = is_channels_last(call.node)
        ops, arguments = torch.ops.blocksparse, (*geometry, last, kernel)
        if decision.kernel == DEPTHWISE.name:
            new = gm.graph.call_function(ops.depthwise.default, (x, tiles, added, *arguments))
        else:
            operands = (
                x,
                tiles,
                set_constant(gm, "row_ptr", packed.row_ptr),
                set_constant(gm, "tile_index", packed.tile_index),
                added,
                site.out_channels,
            )
            if call.spatial_dims:
                new = gm.graph.call_function(ops.conv.default, (*operands, *arguments))
            else:
                new = gm.graph.call_function(ops.linear.default, (*operands, kernel))
        op = new
        if bias is not call.bias:
            assert call.bias is not None
            new = gm.graph.call_function(torch.add, (new, _converted(gm, call.bias, dtype)))
    new.meta = dict(call.node.meta)
    op.meta = {**call.node.meta, "blocksparse_layer": site.name}  # names generated kernels (codegen.offline)
    call.node.replace_all_uses_with(new)
    gm.graph.erase_node(call.node)
    erase_unused(gm, [call.weight])


def _converted(gm: GraphModule, operand: Node, dtype: torch.dtype) -> Node:
    """`operand` in the dtype that the layer computes in: autocast is no node, and passes our operators by."""
    value = tensor_meta(operand)
    if value is None or value.dtype == dtype:
        return operand
    return gm.graph.call_function(torch.ops.prims.convert_element_type.default, (operand, dtype))


def is_per_channel(bias: Node | None, site: Site) -> bool:
    """Whether the kernel can add the bias: linear layers also broadcast other shapes."""
    value = tensor_meta(bias) if bias is not None else None
    return value is not None and tuple(value.shape) == (site.out_channels,)


def is_channels_last(node: Node) -> bool:
    """Whether the dense layer's output is laid out channels-last (as tracing found it)."""
    out = tensor_meta(node)
    return out is not None and out.dim() > 3 and out.stride(-1) == out.shape[1] and out.shape[1] > 1


def remove_unused_constants(gm: GraphModule) -> int:
    """Drops buffers and parameters that no node reads, so that dense originals free their memory."""
    used = {node.target for node in gm.graph.nodes if node.op == "get_attr"}
    removed = 0
    for store in (gm._buffers, gm._parameters):
        for name in [n for n in store if n not in used]:
            del store[name]
            removed += 1
    return removed
