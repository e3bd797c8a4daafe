"""Finds every convolution and linear layer of a graph and describes it as a `Site`."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ..plan import Site
from .calls import LayerCall, layer_call, layer_name, op_name, size_of, tensor_meta
from .quantized_calls import quantized_call

_POINTWISE = {
    "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "silu", "silu_", "gelu", "hardswish", "hardswish_",
    "sigmoid", "tanh", "add", "add_", "iadd", "mul", "mul_", "imul", "batch_norm", "leaky_relu", "clamp",
}  # fmt: skip


def find_sites(gm: GraphModule) -> tuple[Site, ...]:
    """The sites of `gm` in graph order. Changes nothing.

    The graph must carry fake tensors in `node.meta` (`blocksparse_compiler.trace`, Dynamo and
    torch.export all record them); a layer without them is skipped.
    """
    return tuple(site for _, site in sites_with_calls(gm))


def sites_with_calls(gm: GraphModule) -> list[tuple[LayerCall, Site]]:
    """`find_sites` together with the FX nodes each site stands for."""
    found = []
    for node in gm.graph.nodes:
        call = layer_call(node)
        site = _site(call) if call else None
        if call and site:
            found.append((call, site))
    return found


def _site(call: LayerCall) -> Site | None:
    x, weight, out = tensor_meta(call.input), tensor_meta(call.weight), tensor_meta(call.node)
    if x is None or weight is None or out is None:
        return None
    shape = tuple(weight.shape)
    if any(isinstance(size, torch.SymInt) for size in shape) or weight.dim() != call.spatial_dims + 2:
        return None
    if call.spatial_dims and x.dim() != call.spatial_dims + 2:
        return None  # an unbatched convolution
    out_channels, in_channels = shape[0], shape[1] * call.groups
    if call.transposed:
        out_channels, in_channels = shape[1] * call.groups, shape[0]
    quantized = quantized_call(call.node)
    return Site(
        name=layer_name(call.node),
        node=call.node.name,
        op=call.op,
        out_channels=out_channels,
        in_channels=in_channels,
        kernel_size=shape[2:],
        groups=call.groups,
        stride=call.stride,
        padding=call.padding,
        dilation=call.dilation,
        output_padding=call.output_padding if call.transposed else (),
        input_shape=tuple(size_of(s) for s in x.shape),
        dtype=str(quantized.dtype if quantized else out.dtype).removeprefix("torch."),
        device=str(x.device),
        bias=call.bias is not None,
        epilogue=_epilogue(call.node),
    )


def _epilogue(node: Node, limit: int = 4) -> tuple[str, ...]:
    """Names of the chain of pointwise ops behind `node`, as far as each has a single user."""
    names: list[str] = []
    while len(node.users) == 1 and len(names) < limit:
        node = next(iter(node.users))
        name = op_name(node)
        if name not in _POINTWISE:
            break
        names.append(name.rstrip("_"))
    return tuple(names)
