"""Decides which regions of a graph lie channels first, and which kernels run there. Changes nothing.

spmm → depthwise → spmm     channels last     transposes in and out of each 1x1 convolution
spmm ⇒ depthwise ⇒ spmm     channels first    none; the region's borders transpose, or copy

Every tensor with channels and pixels gets one of the two layouts. A layer costs what its best kernel costs
between the layouts of its input and output, any other node copies operands that lie otherwise than its
result, and the caller gets the strides of the model without us. A minimum cut finds the labels of least cost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import networkx
import torch
from torch.fx import GraphModule, Node

from .. import cost
from ..candidate_cost import MARGIN
from ..cpu_spmm import BLOCK_SHAPES, SPMM
from ..depthwise import DEPTHWISE, depthwise_pattern
from ..devices import AnyDevice, DeviceSpec
from ..devices import device as present_device
from ..gpu_devices import GpuSpec
from ..layout_ways import Way, as_decided, channels_first_ways, copy_seconds, may_run_channels_first
from ..layouts import CHANNELS_LAST, Layouts
from ..minimum_cut import LabelCosts, Table, units
from ..pattern import BlockPattern
from ..plan import DENSE, Decision, Plan
from ..roofline import symbolic, value
from ..zero_blocks import zero_block_patterns
from .calls import layer_call, norm_call, op_name, size_of, tensor_meta
from .channel_axes import MEANS, POINTWISE, POOLS
from .choose_kernels import traced_sizes
from .fuse_depthwise import fusible_layers
from .lower_sites import is_channels_last
from .permute_channels import NOTE
from .static_values import StaticValues

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
        self.hints = hints
        self._is_planned_elsewhere = device is not None
        self._spec = functools.cache(lambda where: device or spec_of(where))
        self._values = StaticValues(gm)
        self._layers = {decision.site.node: decision for decision in plan}
        self._ways: dict[str, list[Way]] = {}
        self._sides: dict[str, tuple[Node, Node]] = {}
        self._fusible = set(self._fusible_layers(gm, plan))
        for node in gm.graph.nodes:
            self._visit(node)

    def _fusible_layers(self, gm: GraphModule, plan: Plan) -> Iterator[str]:
        """Names of 1x1 and depthwise convolutions that could share a kernel."""
        for first, second in fusible_layers(gm, plan):
            if SPMM.name in _kernels(first) and DEPTHWISE.name in _kernels(second):
                yield from (first.site.node, second.site.node)

    # ---- what nodes cost --------------------------------------------------------------------------

    def _visit(self, node: Node) -> None:
        decision = self._layers.get(node.name)
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
        if not self._may_lie_first(node):
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
        self._sides[name], self._ways[name] = (x, node), [as_decided(decision)]
        if may_run_channels_first(decision) and self._may_lie_first(x) and self._may_lie_first(node):
            pattern, spec = self._pattern(decision, call.weight), self._spec(decision.site.device)
            if pattern is not None and isinstance(spec, DeviceSpec):
                fusible = name in self._fusible
                self._ways[name] += channels_first_ways(decision, pattern, spec, self.hints, fusible)
        elif not self._may_lie_first(node):
            self._fix(node, False, NEVER)
        table = _table(*(self.units(name, Layouts(i, o)) for i in (False, True) for o in (False, True)))
        if has_layout(x) and has_layout(node) and x.op != "get_attr":
            self.costs.add_pair(x, node, table)
        elif has_layout(node):
            self.costs.add(node, table[0])
        elif has_layout(x) and x.op != "get_attr":
            self.costs.add(x, (table[0][0], table[1][0]))

    def _pattern(self, decision: Decision, weight_node: Node) -> BlockPattern | None:
        """The weight in the blocks of the best kernel that runs channels first: transposes cost all alike."""
        if decision.kernel in (SPMM.name, DEPTHWISE.name):
            return decision.pattern
        if whole := depthwise_pattern(decision.site):
            return whole[0]
        shapes = {f"{SPMM.name} {h}x{w}": (h, w) for h, w in BLOCK_SHAPES}
        labels = (label for label in decision.estimates if label in shapes)
        label = min(labels, key=decision.estimates.__getitem__, default=None)
        weight = self._values.get(weight_node) if label else None
        if label is None or weight is None:
            return None
        found = zero_block_patterns(weight, decision.site.groups, [shapes[label]])
        return found[0] if found else None

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
        if tensor is None or not self._may_lie_first(node):
            return 0.0
        shape = [int(value(symbolic(size_of(n)), self.hints)) for n in tensor.shape]
        spec = self._spec("cpu")
        assert isinstance(spec, DeviceSpec)
        return copy_seconds(shape, spec)

    def _may_lie_first(self, node: Node) -> bool:
        """Whether both layouts are open to a tensor: kernels that run channels first are for such."""
        tensor = tensor_meta(node)
        return (
            tensor is not None
            and has_layout(node)
            and tensor.dtype == torch.float32
            and (self._is_planned_elsewhere or tensor.device.type == "cpu")
            and all(isinstance(size, int) for size in tensor.shape[1:])
        )

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
        if layer not in self._ways:
            return old
        x, node = self._sides[layer]
        _, way = self.best(layer, Layouts(x in first, node in first))
        return old if way is self._ways[layer][0] else _carried_out(old, way, node.meta.get(NOTE))


def _kernels(decision: Decision) -> set[str]:
    """Of all candidates."""
    return {label.partition(" ")[0] for label in decision.estimates}


def _carried_out(old: Decision, way: Way, note: str | None) -> Decision:
    assert way.pattern is not None
    label = cost.Candidate(0.0, way.kernel, way.pattern).label
    dense, last = old.estimates[DENSE], old.estimates[label]
    # Of the same kernel, all but the first part of the sentence still holds, which is about seconds.
    further = old.reason.split("; ")[1:] if way.kernel == old.kernel else [note] if note else []
    why = cost.why_sparse(way.pattern, way.seconds, dense, measured=old.measured)
    reason = "; ".join([why, *further, _why_first(way.layouts, last - way.seconds)])
    estimates = {**old.estimates, way.kernel: way.seconds}
    return replace(
        old, kernel=way.kernel, reason=reason, pattern=way.pattern, config=way.config, estimates=estimates
    )


def _why_first(layouts: Layouts, saved: float) -> str:
    side = (
        "" if layouts.reads_first and layouts.writes_first else "reads " if layouts.reads_first else "writes "
    )
    gain = f": saves {cost.format_seconds(saved)} of transposes" if saved > 0 else ""
    return f"{side}channels first, as its neighbours{gain}"


def has_layout(node: Node) -> bool:
    """Whether it is a tensor for which channels last and channels first differ."""
    tensor = tensor_meta(node)
    if tensor is None or tensor.dim() not in (3, 4):
        return False
    _, channels, *pixels = map(size_of, tensor.shape)
    return channels != 1 and any(size != 1 for size in pixels)


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
