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
from ..depthwise import DEPTHWISE, LARGEST_STRIDE
from ..kernel_variant import KernelConfig
from ..layer_chain import (
    CHAIN,
    MEMBER,
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
from ..layouts import CHANNELS_FIRST, Layouts
from .calls import tensor_meta
from .chain_links import Kind, Link, Links, is_closed
from .lower_sites import is_channels_last, remove_unused_constants
from .static_values import StaticValues, erase_unused, set_constant

log = logging.getLogger("blocksparse_compiler")


def fuse_chains(gm: GraphModule) -> int:
    """Rewrites `gm`, in which layers are lowered, in place; returns the number of chains fused."""
    members: dict[int, list[Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        number = chain_of(_config(node).parameters) if lowered_kind(node) else None
        if number is not None:
            members[number].append(node)
    values, fused = StaticValues(gm), 0
    for nodes in members.values():
        links = _chain(gm, nodes, values)
        if links:
            _fuse(gm, links, values)
        else:
            _unchain(nodes)
        fused += bool(links)
    if members:
        remove_unused_constants(gm)
        gm.recompile()
    return fused


def lowered_kind(node: Node) -> Kind | None:
    """Of a lowered layer that a chain may contain."""
    ops, shape = torch.ops.blocksparse, tensor_meta(node)
    if node.op != "call_function" or shape is None or shape.dim() != 4 or shape.dtype != torch.float32:
        return None
    arguments: tuple[Any, ...] = node.args
    if node.target == ops.depthwise.default and _config(node).variant == DEPTHWISE.name:
        return "depthwise" if arguments[4][-1] <= LARGEST_STRIDE else None
    if node.target == ops.conv.default and _config(node).variant == SPMM.name:
        kernel_size, stride, padding = arguments[6:9]
        plain = all(size == 1 for size in (*kernel_size, *stride)) and not any(padding)
        return "pointwise" if plain else None
    return None


def _config(node: Node) -> KernelConfig:
    return KernelConfig.decode(str(node.args[-1]))


def _chain(gm: GraphModule, nodes: Sequence[Node], values: StaticValues) -> list[Link]:
    """These layers as a chain; empty if they are none."""
    links = Links(gm, lambda node: lowered_kind(node) if node in nodes else None).behind(nodes[0])
    constants = all(values.is_static(operand) for node in nodes for operand in _operands(node))
    if len(links) == len(nodes) > 1 and is_closed(links) and constants and _same_bands(nodes):
        return links
    names = ", ".join(str(node.meta.get("blocksparse_layer", node.name)) for node in nodes)
    log.warning("layers that the plan runs as one chain run one by one, as they are none here: %s", names)
    return []


def _same_bands(nodes: Sequence[Node]) -> bool:
    """Whether all layers name the same number of bands: a plan may have been edited."""
    first, *others = (_config(node).parameters.get("bands", 1) for node in nodes)
    return isinstance(first, int) and first > 0 and all(bands == first for bands in others)


def _operands(node: Node) -> list[Node]:
    """Weights, tables and bias."""
    return node.all_input_nodes[1:]


def _unchain(nodes: Sequence[Node]) -> None:
    """Kernels of their own; those of depthwise layers keep a layout."""
    for node in nodes:
        config = _config(node)
        alone = {key: found for key, found in config.parameters.items() if key not in (MEMBER, "bands")}
        if lowered_kind(node) == "depthwise":
            alone |= CHANNELS_FIRST.parameters
        digest = str(node.args[-1]).partition(";pattern=")[1:]
        node.update_arg(len(node.args) - 1, KernelConfig(config.variant, alone).encode() + "".join(digest))


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
        floats, integers = (torch.zeros(0, dtype=dtype) for dtype in (torch.float32, torch.int32))
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

        def value(node: Node | None) -> Any:
            return values.get(node)

        if link.kind == "pointwise":
            _, tiles, row_ptr, tile_index, bias, out_channels, *_ = arguments
            packed = pack_pointwise(value(tiles), value(row_ptr), value(tile_index))
            for operands, part in zip((self.values, self.row_ptr, self.tile_index), packed, strict=True):
                operands.append(part)
            self.biases.append(pack_bias(value(bias), out_channels))
            blocks, *_, height = value(tiles).shape
            return Pointwise(out_channels, height, blocks, link.activation, link.adds)
        _, filters, bias, kernel_size, stride, padding, dilation, *_ = arguments
        self.filters.append(pack_filters(value(filters)))
        self.biases.append(pack_bias(value(bias), value(filters).shape[1]))
        return Depthwise(tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), link.activation)


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
        constants = _operands(link.layer)
        for node in reversed(link.nodes):
            gm.graph.erase_node(node)
        erase_unused(gm, constants)


def _kernel(first: KernelConfig, last: KernelConfig) -> KernelConfig:
    layouts = Layouts(
        Layouts.of(first.parameters).reads_first, Layouts.of(last.parameters).writes_first
    ).parameters
    return KernelConfig(CHAIN, {"bands": first.parameters.get("bands", 1), **layouts})
