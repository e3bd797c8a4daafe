"""Decides which layers run in one kernel, each thread on rows of an image (`layer_chain`). Changes nothing.

Candidates are layers that follow each other with nothing but activations and residual sums between them, and
which nobody else reads in between. Of each such path, the parts are taken that save most against what their
layers would cost without chains, each region in the layout that suits it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch.fx import GraphModule, Node

from .. import cost
from ..candidate_cost import MARGIN
from ..chain_cost import ChainCost, ChainLayer, possible_bands
from ..cpu_spmm import SPMM
from ..depthwise import DEPTHWISE, LARGEST_STRIDE
from ..devices import AnyDevice, DeviceSpec
from ..devices import device as present_device
from ..gpu_devices import GpuSpec
from ..layer_chain import Chain, Depthwise, Pointwise
from ..layout_ways import Way, chained_config, may_run_channels_first
from ..layouts import Layouts
from ..pattern import BlockPattern
from ..plan import Decision, Plan
from ..roofline import symbolic, value
from .calls import LayerCall, layer_call
from .chain_links import Kind, Link, is_closed, part, paths
from .choose_kernels import traced_sizes
from .choose_layouts import choose_layouts
from .layer_ways import LayerWays, carried_out
from .permute_channels import NOTE


def choose_chains(
    gm: GraphModule,
    plan: Plan,
    device: AnyDevice | None = None,
    *,
    hints: Mapping[str, int] | None = None,
    spec_of: Callable[[str], AnyDevice] = present_device,
) -> Plan:
    """`plan` with the layers that run in chains, where that is cheaper.

    Args:
        gm: the graph that `plan` was made from, by `choose_kernels`.
        device, hints, spec_of: as there.
    """
    if isinstance(device, GpuSpec) or not any(map(may_run_channels_first, plan)):
        return plan
    ways = LayerWays(gm, plan, device, spec_of, {**traced_sizes(gm), **(hints or {})})
    apart = {d.site.node: d for d in choose_layouts(gm, plan, device, hints=hints, spec_of=spec_of)}
    members = {node: member for node in gm.graph.nodes if (member := _member(ways, node, apart))}
    changed: dict[str, Decision] = {}
    number = 0
    for path in paths(gm, lambda node: members[node].kind if node in members else None):
        for chosen in _Path(path, [members[link.layer] for link in path]).best():
            changed.update((d.site.node, d) for d in chosen.decisions(number))
            number += 1
    return replace(plan, decisions=tuple(changed.get(d.site.node, d) for d in plan))


@dataclass(frozen=True)
class _Member:
    """A layer that a chain may contain.

    Args:
        images: of a batch.
        alone: seconds without chains, in the layout that suits its region.
    """

    node: Node
    kind: Kind
    decision: Decision
    layer: ChainLayer
    device: DeviceSpec
    images: int
    alone: float

    def layer_of_chain(self, link: Link) -> Pointwise | Depthwise:
        site, pattern = self.layer.site, self.layer.pattern
        if self.kind == "pointwise":
            height, blocks = pattern.block_shape[0], pattern.num_kept
            return Pointwise(site.out_channels, height, blocks, link.activation, link.adds)
        padding = tuple(size for pair in site.padding for size in pair)
        return Depthwise(site.kernel_size, site.stride, padding, site.dilation, link.activation)  # type: ignore[arg-type]


def _member(ways: LayerWays, node: Node, apart: Mapping[str, Decision]) -> _Member | None:
    decision, call = ways.decisions.get(node.name), layer_call(node)
    if decision is None or call is None or call.op != "conv2d" or node.args[:1] != (call.input,):
        return None
    if call.bias is not None and not ways.values.is_static(call.bias):
        return None
    pattern, device = ways.pattern(call, decision), ways.spec(decision.site.device)
    kind = _kind(call, decision, pattern)
    if pattern is None or kind is None or not isinstance(device, DeviceSpec):
        return None
    site = decision.site
    kernel = _KERNELS[kind]
    known = decision.estimates[cost.Candidate(0.0, kernel, pattern).label]
    scale = known / cost.sparse_cost(site, pattern, device, kernel).evaluate(ways.hints)
    alone = apart[node.name].estimates[apart[node.name].kernel]
    images = int(value(symbolic(site.input_shape[0]), ways.hints))
    return _Member(node, kind, decision, ChainLayer(site, pattern, scale), device, images, alone)


_KERNELS: Mapping[Kind, str] = {"pointwise": SPMM.name, "depthwise": DEPTHWISE.name}


def _kind(call: LayerCall, decision: Decision, pattern: BlockPattern | None) -> Kind | None:
    if pattern is None or len(decision.site.input_shape) != 4:
        return None
    if SPMM.unsupported(decision.site, pattern) is None:
        return "pointwise" if set(call.stride) == {1} else None
    return "depthwise" if call.stride[-1] <= LARGEST_STRIDE else None


@dataclass(frozen=True)
class _Part:
    """Some steps of a path, as one kernel."""

    links: Sequence[Link]
    members: Sequence[_Member]
    shares: Sequence[float]
    bands: int

    @property
    def saved(self) -> float:
        """Seconds; none where estimates err by more."""
        alone, together = sum(member.alone for member in self.members), sum(self.shares)
        return alone - together if len(self.links) > 1 and together < MARGIN * alone else 0.0

    def decisions(self, number: int) -> Iterator[Decision]:
        last = len(self.members) - 1
        for i, (member, seconds) in enumerate(zip(self.members, self.shares, strict=True)):
            layouts, pattern = Layouts(i > 0, i < last), member.layer.pattern
            config = chained_config(
                member.layer.site, pattern, member.device, layouts, number=number, bands=self.bands
            )
            way = Way(_KERNELS[member.kind], layouts, seconds, pattern, config)
            yield carried_out(member.decision, way, self._why(), member.node.meta.get(NOTE))

    def _why(self) -> str:
        first, last = self.members[0].decision.site.name, self.members[-1].decision.site.name
        others = len(self.members) - 1
        rows = f"each of {self.bands} threads runs a band of rows" if self.bands > 1 else ""
        how = rows or "each thread runs whole images"
        return f"in one kernel with {others} other{'s' * (others > 1)}, {first} to {last}: {how}"


class _Path:
    """Layers of which any part that nobody else looks into may be a chain."""

    def __init__(self, links: Sequence[Link], members: Sequence[_Member]) -> None:
        self._links, self._members = links, members
        first = members[0]
        chain = Chain(tuple(member.layer_of_chain(link) for link, member in zip(links, members, strict=True)))
        layers = [member.layer for member in members]
        self._costs = [
            ChainCost(layers, chain, first.device, first.images, bands)
            for bands in possible_bands(first.images, first.device.threads)
        ]
        self._begins = [step.layers[0] for step in self._costs[0].cut.steps] + [len(links)]

    def best(self) -> list[_Part]:
        """The parts that save most in sum."""
        if len(self._links) < 2:
            return []
        best: list[tuple[float, list[_Part]]] = [(0.0, [])]
        for end in range(1, len(self._begins)):
            options = [best[end - 1]]
            for begin in range(end):
                part = self._part(begin, end)
                saved, before = best[begin]
                if part is not None and part.saved > 0:
                    options.append((saved + part.saved, [*before, part]))
            best.append(max(options, key=lambda option: option[0]))
        return best[-1][1]

    def _part(self, begin: int, end: int) -> _Part | None:
        first, behind = self._begins[begin], self._begins[end]
        links = part(self._links, first, behind)
        if not is_closed(links):
            return None
        cost = min(self._costs, key=lambda cost: cost.seconds(begin, end))
        return _Part(links, self._members[first:behind], cost.shares(begin, end), cost.bands)
