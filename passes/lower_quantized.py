"""Replaces each quantized site that the plan gives a kernel by an op on the quantized tensors themselves.

conv2d(dequantize(x, s, z), dequantize(W, s_W), b)   →   quantized_conv(x, tiles(W), …, b, s * s_W, …)
linear(dequantize(x, s, z), dequantize(W, s_W), b)   →   quantized_linear(…)           of `blocksparse::`

What follows a layer, another layer's quantize among it, is left to Inductor, which fuses it into the kernel.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from .. import quantized_ops as _ops  # noqa: F401  registers the operators that are put into the graph
from ..errors import PlanError
from ..plan import Decision, Plan
from ..quantized_ops import weight_sums
from ..variants import VARIANTS, KernelConfig
from .lower_sites import is_channels_last, is_per_channel, remove_unused_constants
from .quantized_calls import QuantizedCall, quantized_call
from .static_values import StaticValues, erase_unused, set_constant


def lower_quantized(gm: GraphModule, plan: Plan) -> int:
    """Rewrites `gm` in place; returns the number of sites lowered.

    Raises:
        PlanError: if a decision names a node that is no quantized layer of the graph. Nothing is changed
            then.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    work = [(_call(nodes, d), d) for d in plan if d.site.is_quantized and not d.is_dense]
    values = StaticValues(gm)
    for call, decision in work:
        _lower(gm, call, decision, values)
    if work:
        remove_unused_constants(gm)
        gm.recompile()
    return len(work)


def _call(nodes: dict[str, Node], decision: Decision) -> QuantizedCall:
    node = nodes.get(decision.site.node)
    call = quantized_call(node) if node is not None else None
    if call is None or decision.pattern is None:
        raise PlanError(
            decision.site.name,
            f"a layer of this graph with {decision.site.dtype} input and int8 weights, and its pattern",
            f"node {decision.site.node!r}, pattern {decision.pattern}",
            "Make the plan from this graph (blocksparse_compiler.plan).",
        )
    return call


def _lower(gm: GraphModule, call: QuantizedCall, decision: Decision, values: StaticValues) -> None:
    site, pattern, layer = decision.site, decision.pattern, call.layer
    weight, weight_scale = values.get(call.weight), call.weight_scale(values)
    assert pattern is not None and weight is not None and weight_scale is not None
    packed = VARIANTS[decision.kernel].pack(weight, pattern)
    kernel = KernelConfig(decision.kernel, dict(decision.config)).encode(pattern)
    bias = layer.bias if is_per_channel(layer.bias, site) else None
    with gm.graph.inserting_before(layer.node):
        operands = (
            call.input,
            set_constant(gm, "tiles", packed.values),
            set_constant(gm, "row_ptr", packed.row_ptr),
            set_constant(gm, "tile_index", packed.tile_index),
            bias,
            set_constant(gm, "scale", (call.scale * weight_scale).float()),
            set_constant(gm, "weight_sums", weight_sums(weight)),
            call.zero_point,
            site.out_channels,
        )
        if not layer.spatial_dims:
            new = gm.graph.call_function(torch.ops.blocksparse.quantized_linear.default, (*operands, kernel))
        else:
            padding = [p for pair in site.padding for p in pair]
            geometry = (list(site.kernel_size), list(site.stride), padding, list(site.dilation))
            last = is_channels_last(layer.node)
            new = gm.graph.call_function(
                torch.ops.blocksparse.quantized_conv.default, (*operands, *geometry, last, kernel)
            )
        op = new
        if bias is not layer.bias:
            new = gm.graph.call_function(torch.add, (new, layer.bias))
    new.meta = dict(layer.node.meta)
    op.meta = {**layer.node.meta, "blocksparse_layer": site.name}
    layer.node.replace_all_uses_with(new)
    gm.graph.erase_node(layer.node)
    erase_unused(gm, [layer.input, layer.weight])
