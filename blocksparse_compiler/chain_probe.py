"""A chain of layers whose time tells how fast chains run on this machine (see `cpu_probes`)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from .chain_cost import ChainCost, ChainLayer
from .cpu_probes import Probe, conv, scattered
from .cpu_spmm import SPMM
from .depthwise import DEPTHWISE, depthwise_pattern
from .devices import DeviceSpec
from .layer_chain import MEMBER, Chain, Depthwise, Pointwise
from .layouts import Layouts
from .pattern import BlockPattern
from .plan import Decision, Plan
from .pointwise_depthwise import Activation

RELU = Activation("relu")


@dataclass(frozen=True)
class ChainProbe(Probe):
    """An inverted residual of MobileNet-v2, an image for each thread; `site` is its first layer.

    Args:
        layers: their weights in blocks.
        chain: the same layers as the kernel has them.
    """

    layers: tuple[ChainLayer, ...] = ()
    chain: Chain = field(default_factory=lambda: Chain(()))

    def predicted(self, spec: DeviceSpec) -> float:
        cost = ChainCost(self.layers, self.chain, spec, int(self.site.input_shape[0]), bands=1)
        return cost.seconds(0, len(cost.cut.steps))

    def compiled(self) -> tuple[Any, Tensor]:
        from . import tune
        from .passes import fuse_chains, lower_sites
        from .passes.find_sites import sites_with_calls

        gm, x = self._graph()
        tune.record_meta(gm, x)
        decisions = []
        for i, (call, site) in enumerate(sites_with_calls(gm)):
            config = {**Layouts(i > 0, i < 2).parameters, MEMBER: 0, "bands": 1}
            here, kernel = replace(site, node=call.node.name), DEPTHWISE.name if i == 1 else SPMM.name
            decisions.append(Decision(here, kernel, "measured", self.layers[i].pattern, config))
        lower_sites(gm, Plan(tuple(decisions)))
        if not fuse_chains(gm):
            raise RuntimeError("a chain that is measured was not fused")
        return tune.compile_graph(gm, [x]), x

    def _graph(self) -> tuple[fx.GraphModule, Tensor]:
        x = torch.randn([int(size) for size in self.site.input_shape])
        x = x.to(memory_format=torch.channels_last)
        root, graph = torch.nn.Module(), fx.Graph()
        node = graph.placeholder("x")
        node.meta["val"] = x
        for i, layer in enumerate(self.layers):
            site = layer.site
            shape = (site.out_channels, site.in_channels // site.groups, *site.kernel_size)
            root.register_buffer(f"weight{i}", layer.pattern.apply(torch.randn(shape)))
            root.register_buffer(f"bias{i}", torch.randn(site.out_channels))
            operands = node, graph.get_attr(f"weight{i}"), graph.get_attr(f"bias{i}")
            padding = [before for before, _ in site.padding]
            convolution = torch.ops.aten.conv2d.default
            node = graph.call_function(convolution, (*operands, [1, 1], padding, [1, 1], site.groups))
            node = graph.call_function(torch.ops.aten.relu.default, (node,))
        graph.output((node,))
        return fx.GraphModule(root, graph), x


def chain_probe(spec: DeviceSpec) -> ChainProbe:
    expand, project = conv(64, 1, 28, out_channels=384), conv(384, 1, 28, out_channels=64)
    sites = [
        replace(site, input_shape=(spec.threads, *site.input_shape[1:]))
        for site in (expand, conv(384, 3, 28, groups=384), project)
    ]
    patterns: list[BlockPattern] = [
        scattered(expand, (4, 1), 0.2),
        depthwise_pattern(sites[1])[0],
        scattered(project, (4, 1), 0.2),
    ]
    chain = Chain(
        (
            Pointwise(384, 4, patterns[0].num_kept, RELU),
            Depthwise((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), RELU),
            Pointwise(64, 4, patterns[2].num_kept, RELU),
        )
    )
    layers = tuple(ChainLayer(site, pattern) for site, pattern in zip(sites, patterns, strict=True))
    return ChainProbe(sites[0], patterns[0], SPMM.name, layers=layers, chain=chain)
