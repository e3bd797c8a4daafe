"""Decides which regions of a graph lie channels first, and which kernels run there. Changes nothing.

spmm → depthwise → spmm     channels last     transposes in and out of each 1x1 convolution
spmm ⇒ depthwise ⇒ spmm     channels first    none; the region's borders transpose, or copy

Every tensor with channels and pixels gets one of the two layouts. A layer costs what its best kernel costs
between the layouts of its input and output, any other node copies operands that lie otherwise than its
result, and the caller gets the strides of the model without us. A minimum cut finds the labels of least cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import networkx
from torch.fx import GraphModule, Node

from .. import cost
from ..candidate_cost import MARGIN
from ..chain_cost import end_seconds
from ..devices import AnyDevice, DeviceSpec
from ..devices import device as present_device
from ..gpu_devices import GpuSpec
from ..layer_chain import chain_of
from ..layout_ways import Way, chained_config, copy_seconds, may_run_channels_first
from ..layouts import CHANNELS_LAST, Layouts
from ..minimum_cut import LabelCosts, Table, units
from ..plan import Decision, Plan
from ..roofline import symbolic, value
from .calls import layer_call, norm_call, op_name, size_of, tensor_meta
from .chain_links import Link, ends, planned_chains
from .channel_axes import MEANS, POINTWISE, POOLS
from .choose_kernels import traced_sizes
from .layer_ways import LayerWays, carried_out, has_layout
from .lower_sites import is_channels_last
from .permute_channels import NOTE

NEVER = units(1e3)
"""What a layout costs that a tensor cannot have."""

_LAYOUT_KEEPING = {*POINTWISE, *POOLS, "cat", "concat", "pad", "constant_pad_nd"}


def choose_layouts(
    gm: GraphModule,
    plan: Plan,
    device: AnyDevice | None = None,
    *,
    hints: Mapping[str, int] | None = None,
    spec_of: Callable[[str], AnyDevice] = present_device,
) -> Plan:
    """`plan` with the layouts of its layers, and kernels that suit them, where that is cheaper.

    Args:
        gm: the graph that `plan` was made from, by `choose_kernels`.
        device, hints, spec_of: as there.
    """
    if isinstance(device, GpuSpec) or not any(map(may_run_channels_first, plan)):
        return plan
    choice = _Choice(gm, plan, device, spec_of, {**traced_sizes(gm), **(hints or {})})
    first = choice.costs.cheapest()
    for region in choice.regions(first):
        if not choice.pays(region, first):
            first -= region
    return replace(plan, decisions=tuple(choice.decision(d, first) for d in plan)) if first else plan


class _Choice:
    """The costs of one graph's labels: 1 is channels first. Nodes without a layout have none."""

    def __init__(
        self,
        gm: GraphModule,
        plan: Plan,
        device: AnyDevice | None,
        spec_of: Callable[[str], AnyDevice],
        hints: Mapping[str, int],
    ) -> None:
        self.costs: LabelCosts[Node] = LabelCosts()
        self._layers = LayerWays(gm, plan, device, spec_of, hints)
        self._ways: dict[str, list[Way]] = {}
        self._sides: dict[str, tuple[Node, Node]] = {}
        chains = planned_chains(gm, plan).values()
        self._chains = {link.layer.name: links for links in chains for link in links}
        inside = {node for links in chains for link in links for node in link.nodes}
        for node in gm.graph.nodes:
            if node not in inside:
                self._visit(node)
        for links in chains:
            self._chain(links)

    # ---- what nodes cost --------------------------------------------------------------------------

    def _visit(self, node: Node) -> None:
        decision = self._layers.decisions.get(node.name)
        if node.op == "output":
            for returned in node.all_input_nodes:
                self._fix(returned, is_channels_first(returned), self.copy(returned))
        elif node.op == "placeholder":
            self._fix(node, is_channels_first(node), NEVER)
        elif node.op == "get_attr":
            pass  # constants are laid out at compile time
        elif decision is not None and decision.site.kernel_size:
            self._layer(node, decision)
        elif norm_call(node) or op_name(node).rstrip("_") in _LAYOUT_KEEPING:
            self._keeping(node)
        else:
            self._stranger(node)

    def _fix(self, node: Node, is_first: bool, cost_of_other: int) -> None:
        if has_layout(node):
            self.costs.add(node, (cost_of_other, 0) if is_first else (0, cost_of_other))

    def _keeping(self, node: Node) -> None:
        """A result lies as most operands do; a mean over pixels, without a layout, reads either."""
        for operand in node.all_input_nodes if has_layout(node) else ():
            if has_layout(operand) and operand.op != "get_attr":
                copy = self.copy(operand)
                self.costs.add_pair(operand, node, ((0, copy), (copy, 0)))
        if not self._layers.may_lie_first(node):
            self._fix(node, False, NEVER)

    def _stranger(self, node: Node) -> None:
        """What we know nothing of reads and writes channels last, as it does without regions."""
        self._fix(node, False, NEVER)
        for operand in node.all_input_nodes if op_name(node) not in MEANS else ():
            self._fix(operand, False, self.copy(operand))

    def _layer(self, node: Node, decision: Decision) -> None:
        call = layer_call(node)
        assert call is not None
        x, name = call.input, node.name
        self._sides[name], self._ways[name] = (x, node), self._layers.of(node, decision)
        if not self._layers.may_lie_first(node):
            self._fix(node, False, NEVER)
        table = _table(*(self.units(name, Layouts(i, o)) for i in (False, True) for o in (False, True)))
        if has_layout(x) and has_layout(node) and x.op != "get_attr":
            self.costs.add_pair(x, node, table)
        elif has_layout(node):
            self.costs.add(node, table[0])
        elif has_layout(x) and x.op != "get_attr":
            self.costs.add(x, (table[0][0], table[1][0]))

    def _chain(self, links: Sequence[Link]) -> None:
        """What is between the layers has no layout; both ends may have either."""
        for tensor in ends(links):
            if tensor.op != "get_attr":
                last, first = self._end_seconds(links, tensor)
                self.costs.add(tensor, (units(last), units(first)))

    # ---- figures ----------------------------------------------------------------------------------

    def units(self, layer: str, layouts: Layouts) -> int:
        return units(self.best(layer, layouts)[0])

    def best(self, layer: str, layouts: Layouts) -> tuple[float, Way]:
        """The cheapest way to run a layer between neighbours of these layouts; the first of equals."""
        copies = tuple(self.copy_seconds(side) for side in self._sides[layer])
        priced = [(way.seconds_between(layouts, *copies), way) for way in self._ways[layer]]
        return min(priced, key=lambda pair: pair[0])

    def copy(self, node: Node) -> int:
        return units(self.copy_seconds(node))

    def copy_seconds(self, node: Node) -> float:
        tensor = tensor_meta(node)
        if tensor is None or not self._layers.may_lie_first(node):
            return 0.0
        shape = [int(value(symbolic(size_of(n)), self._layers.hints)) for n in tensor.shape]
        spec = self._layers.spec("cpu")
        assert isinstance(spec, DeviceSpec)
        return copy_seconds(shape, spec)

    def _end_seconds(self, links: Sequence[Link], tensor: Node) -> tuple[float, float]:
        """For a chain to read or write a tensor that lies channels last, or first."""
        decision = self._layers.decisions[links[0].layer.name]
        device, known = self._layers.spec(decision.site.device), tensor_meta(tensor)
        assert isinstance(device, DeviceSpec) and known is not None
        sizes = (int(value(symbolic(size_of(n)), self._layers.hints)) for n in known.shape)
        images, channels, height, width = sizes
        size, bands = (channels, height, width), int(decision.config["bands"])
        return end_seconds(size, False, device, images, bands), end_seconds(size, True, device, images, bands)

    # ---- regions ----------------------------------------------------------------------------------

    def regions(self, first: set[Node]) -> Iterator[set[Node]]:
        """Tensors that lie channels first and meet; not those that come so from outside."""
        graph = networkx.Graph()
        graph.add_nodes_from(node for node in first if node.op != "placeholder")
        graph.add_edges_from(pair for pair in self.costs.pairs if graph.nodes.keys() >= {*pair})
        yield from networkx.connected_components(graph)

    def pays(self, region: set[Node], first: set[Node]) -> bool:
        """Whether a region makes its layers faster by more than estimates err."""
        layers = (layer for layer, sides in self._sides.items() if not region.isdisjoint(sides))
        seconds = sum(self.units(layer, CHANNELS_LAST) for layer in layers)
        return self.costs.total(first - region) - self.costs.total(first) >= (1 - MARGIN) * seconds

    def decision(self, old: Decision, first: set[Node]) -> Decision:
        """What is decided about a layer with these tensors channels first."""
        layer = old.site.node
        if layer in self._chains:
            return self._in_chain(old, self._chains[layer], first)
        if layer not in self._ways:
            return old
        x, node = self._sides[layer]
        _, way = self.best(layer, Layouts(x in first, node in first))
        if way is self._ways[layer][0]:
            return old
        assert way.pattern is not None
        label = cost.Candidate(0.0, way.kernel, way.pattern).label
        why = _why_first(way.layouts, old.estimates[label] - way.seconds)
        return carried_out(old, way, why, node.meta.get(NOTE))

    def _in_chain(self, old: Decision, links: Sequence[Link], first: set[Node]) -> Decision:
        """What its end reads or writes may lie channels first; inside, everything does."""
        (x, out), nodes = ends(links), [link.layer.name for link in (links[0], links[-1])]
        sides = [old.site.node != node or end in first for node, end in zip(nodes, (x, out), strict=True)]
        seconds = old.estimates[old.kernel]
        for node, end in zip(nodes, (x, out), strict=True):
            if old.site.node == node and end in first:
                last, other = self._end_seconds(links, end)
                seconds += other - last
        device, number = self._layers.spec(old.site.device), chain_of(old.config)
        assert isinstance(device, DeviceSpec) and old.pattern is not None and number is not None
        config = chained_config(
            old.site, old.pattern, device, Layouts(*sides), number=number, bands=int(old.config["bands"])
        )
        return replace(old, config=config, estimates={**old.estimates, old.kernel: seconds})


def _why_first(layouts: Layouts, saved: float) -> str:
    side = (
        "" if layouts.reads_first and layouts.writes_first else "reads " if layouts.reads_first else "writes "
    )
    gain = f": saves {cost.format_seconds(saved)} of transposes" if saved > 0 else ""
    return f"{side}channels first, as its neighbours{gain}"


def is_channels_first(node: Node) -> bool:
    return not is_channels_last(node)


def _table(*entries: int) -> Table:
    """Costs by layouts of input and output.

    A border inside a layer costs at least the mean of both layouts. All costs are so but for one thing:
    kernels tile pixels of whole batches or of single images, and one that does both may fit threads better.
    """
    last, mixed, other, first = entries
    missing = max(0, last + first - mixed - other)
    return (last, mixed + missing - missing // 2), (other + missing // 2, first)
