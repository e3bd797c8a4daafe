"""Runs chains of lowered 1x1 and depthwise convolutions in one kernel, as their plan says.

conv → relu6 → depthwise → relu6 → conv → add      six tensors in memory
layer_chain                                        one: each thread keeps its rows of the others to itself

Layers whose kernels name the same chain, with activations and sums of tensors of the chain between them. What
is no such chain, as a plan for another graph may say, is left as it is: its layers run one by one.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..cpu_spmm import SPMM
from ..depthwise import DEPTHWISE
from ..kernel_variant import KernelConfig
from ..layer_chain import (
    CHAIN,
    Chain,
    Depthwise,
    Layer,
    Pointwise,
    chain_of,
    concatenated,
    pack_bias,
    pack_filters,
    pack_pointwise,
)
from ..layouts import Layouts
from .calls import tensor_meta
from .chain_links import Kind, Link, Links, is_closed
from .lower_sites import is_channels_last, remove_unused_constants
from .static_values import StaticValues, set_constant

log = logging.getLogger("blocksparse_compiler")


def fuse_chains(gm: GraphModule) -> int:
    """Rewrites `gm`, in which layers are lowered, in place; returns the number of chains fused."""
    members: dict[int, list[Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        number = chain_of(_config(node).parameters) if lowered_kind(node) else None
        if number is not None:
            members[number].append(node)
    found = [links for nodes in members.values() if (links := _chain(gm, nodes))]
    values = StaticValues(gm)
    for links in found:
        _fuse(gm, links, values)
    if found:
        remove_unused_constants(gm)
        gm.recompile()
    return len(found)


def lowered_kind(node: Node) -> Kind | None:
    """Of a lowered layer that a chain may contain."""
    ops, shape = torch.ops.blocksparse, tensor_meta(node)
    if node.op != "call_function" or shape is None or shape.dim() != 4 or shape.dtype != torch.float32:
        return None
    if node.target == ops.depthwise.default and _config(node).variant == DEPTHWISE.name:
        return "depthwise"
    if node.target == ops.conv.default and _config(node).variant == SPMM.name:
        kernel_size, stride, padding = node.args[6:9]
        plain = all(size == 1 for size in (*kernel_size, *stride)) and not any(padding)
        return "pointwise" if plain else None
    return None


def _config(node: Node) -> KernelConfig:
    return KernelConfig.decode(str(node.args[-1]))


def _chain(gm: GraphModule, nodes: Sequence[Node]) -> list[Link]:
    """These layers as a chain; empty if they are none."""
    links = Links(gm, lambda node: lowered_kind(node) if node in nodes else None).behind(nodes[0])
    if len(links) == len(nodes) > 1 and is_closed(links):
        return links
    names = ", ".join(str(node.meta.get("blocksparse_layer", node.name)) for node in nodes)
    log.warning("layers that the plan runs as one chain run one by one, as they are none here: %s", names)
    return []


@dataclass
class _Operands:
    """Those of all layers, in order."""

    values: list[Tensor] = field(default_factory=list)
    row_ptr: list[Tensor] = field(default_factory=list)
    tile_index: list[Tensor] = field(default_factory=list)
    filters: list[Tensor] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)

    def constants(self, gm: GraphModule) -> list[Node]:
        """The weights as the operator takes them: `[1, n]` each."""
        floats, integers = torch.zeros(0), torch.zeros(0, dtype=torch.int32)
        return [
            set_constant(gm, "chain_values", concatenated(self.values, floats)),
            set_constant(gm, "chain_row_ptr", concatenated(self.row_ptr, integers)),
            set_constant(gm, "chain_tile_index", concatenated(self.tile_index, integers)),
            set_constant(gm, "chain_filters", concatenated(self.filters, floats)),
            set_constant(gm, "chain_biases", concatenated(self.biases, floats)),
        ]

    def add(self, link: Link, values: StaticValues) -> Layer:
        """Packs the weights of one more layer."""
        arguments: tuple[Any, ...] = link.layer.args
        if link.kind == "pointwise":
            _, tiles, row_ptr, tile_index, bias, out_channels, *_ = arguments
            weight = values.get(tiles)
            packed = pack_pointwise(weight, values.get(row_ptr), values.get(tile_index))
            for operands, part in zip((self.values, self.row_ptr, self.tile_index), packed, strict=True):
                operands.append(part)
            self.biases.append(pack_bias(values.get(bias), out_channels))
            return Pointwise(out_channels, weight.shape[-1], weight.shape[0], link.activation, link.adds)
        _, filters, bias, kernel_size, stride, padding, dilation, *_ = arguments
        weight = values.get(filters)
        self.filters.append(pack_filters(weight))
        self.biases.append(pack_bias(values.get(bias), weight.shape[1]))
        geometry = (tuple(numbers) for numbers in (kernel_size, stride, padding, dilation))
        return Depthwise(*geometry, link.activation)


def _fuse(gm: GraphModule, links: Sequence[Link], values: StaticValues) -> None:
    first, last = links[0].layer, links[-1].layer
    operands = _Operands()
    chain = Chain(tuple(operands.add(link, values) for link in links))
    with gm.graph.inserting_before(first):  # where its input is read, whoever writes to that later
        new = gm.graph.call_function(
            torch.ops.blocksparse.layer_chain.default,
            (
                first.args[0],
                *operands.constants(gm),
                chain.encode(),
                is_channels_last(links[-1].result),
                _kernel(_config(first), _config(last)).encode(),
            ),
        )
    new.meta = {**links[-1].result.meta, "blocksparse_layer": first.meta.get("blocksparse_layer", first.name)}
    links[-1].result.replace_all_uses_with(new)
    for link in reversed(links):
        for node in reversed(link.nodes):
            gm.graph.erase_node(node)


def _kernel(first: KernelConfig, last: KernelConfig) -> KernelConfig:
    layouts = Layouts(
        Layouts.of(first.parameters).reads_first, Layouts.of(last.parameters).writes_first
    ).parameters
    return KernelConfig(CHAIN, {"bands": first.parameters.get("bands", 1), **layouts})
