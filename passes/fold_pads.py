"""Takes zeros that are padded in front of a convolution into the convolution.

    conv2d(pad(x, [l, r, t, b]), W)   →   padded_conv2d(x, W, padding=[t, b, l, r])

Networks from TensorFlow pad so: what it calls "same" is more on one side for strided convolutions.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from .calls import LayerCall, layer_call, op_name, tensor_meta
from .writes import Writes

Padding = tuple[int, int, int, int]
"""Top, bottom, left, right."""


def fold_pads(gm: GraphModule) -> int:
    """Rewrites `gm` in place; returns the number of convolutions that pad by themselves now."""
    writes, folded = Writes(gm), 0
    for node in list(gm.graph.nodes):
        call = layer_call(node)
        pad = _zeros_around(call.input) if call is not None and call.op == "conv2d" else None
        if call is None or pad is None:
            continue
        x = call.input.args[0]
        if isinstance(x, Node) and not writes.between(x, call.input, node):
            _fold(call, x, pad)
            folded += 1
            if not call.input.users:
                gm.graph.erase_node(call.input)
    if folded:
        gm.recompile()
    return folded


def _zeros_around(node: Node) -> Padding | None:
    """What the node pads images with, if that is zeros; None for other nodes."""
    if node.op != "call_function" or op_name(node) not in ("pad", "constant_pad_nd"):
        return None
    names = ("x", "pad", "mode", "value") if op_name(node) == "pad" else ("x", "pad", "value")
    known = {"mode": "constant", "value": 0, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    x, pad = tensor_meta(node), known.get("pad")
    if x is None or x.dim() != 4 or known["mode"] != "constant" or known["value"] not in (None, 0):
        return None
    if not isinstance(pad, list | tuple) or not all(isinstance(p, int) and p >= 0 for p in pad):
        return None
    left, right, top, bottom, *others = [*tuple(pad), 0, 0, 0, 0][: max(4, len(pad))]
    return None if any(others) else (top, bottom, left, right)


def _fold(call: LayerCall, x: Node, pad: Padding) -> None:
    own = [size for pair in call.padding for size in pair]
    padding = [size + more for size, more in zip(own, pad, strict=True)]
    call.node.target = torch.ops.blocksparse.padded_conv2d.default
    call.node.kwargs = {}
    geometry = (list(call.stride), padding, list(call.dilation), call.groups)
    call.node.args = (x, call.weight, call.bias, *geometry)
