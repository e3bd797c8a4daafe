"""`plan`: the decisions about a graph, made on any machine for any device."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule

from .devices import AnyDevice
from .devices import device as find_device
from .passes.choose_chains import choose_chains
from .passes.choose_kernels import choose_kernels
from .passes.choose_layouts import choose_layouts
from .passes.choose_training import choose_training
from .passes.fixed_weights import FixedWeights
from .passes.fold_batch_norm import fold_batch_norm
from .passes.fold_constants import fold_constants
from .passes.fold_pads import fold_pads
from .passes.fuse_depthwise import choose_fusions
from .passes.permute_channels import permute_channels
from .pattern import BlockShape
from .plan import Plan


def plan(
    gm: GraphModule,
    device: str | torch.device | AnyDevice | None = None,
    *,
    block_shape: BlockShape | None = None,
    allow_dense: bool = True,
    hints: Mapping[str, int] | None = None,
) -> Plan:
    """Finds the sites of `gm` and decides about each; `gm` itself is not changed.

    Args:
        gm: a graph from `trace`, Dynamo or `torch.export`.
        device: plan every layer for this `DeviceSpec`, or known name; by default, each layer for the device
            that it is on.
        block_shape, allow_dense, hints: as in `passes.choose_kernels`.
    """
    spec = None if device is None else find_device(device)
    copied = copy_graph(gm)
    fold_constants(copied)
    fold_pads(copied)
    fold_batch_norm(copied)
    permute_channels(copied)
    chosen = choose_kernels(copied, spec, block_shape=block_shape, allow_dense=allow_dense, hints=hints)
    chained = choose_chains(copied, chosen, spec, hints=hints)
    return choose_fusions(copied, choose_layouts(copied, chained, spec, hints=hints))


def plan_training(
    gm: GraphModule,
    device: str | torch.device | AnyDevice | None = None,
    *,
    block_shape: BlockShape | None = None,
    allow_dense: bool = True,
) -> Plan:
    """The same for training steps of `gm`, a graph from `trace`: what its parameters learn is not fixed."""
    trained = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        value = operator.attrgetter(node.target)(gm)
        if isinstance(value, torch.Tensor) and value.requires_grad:
            trained[node] = value
    spec = None if device is None else find_device(device)
    weights = FixedWeights(gm, trained)
    return choose_training(gm, weights, spec, block_shape=block_shape, allow_dense=allow_dense)


def copy_graph(gm: GraphModule) -> GraphModule:
    """A graph module of its own over the same tensors: passes may rewrite it freely."""
    attributes: dict[str, Any] = {}
    for node in gm.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            value: Any = gm
            for part in node.target.split("."):
                value = getattr(value, part)
            attributes[node.target] = value
    with warnings.catch_warnings():
        # Of torch itself, which copies its own tree specs so.
        warnings.filterwarnings("ignore", message=".*treespec", category=FutureWarning)
        return GraphModule(attributes, copy.deepcopy(gm.graph))
