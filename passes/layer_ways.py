"""The ways to run each layer of a graph, in either layout: what choose_chains and choose_layouts weigh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from .. import cost
from ..cpu_spmm import BLOCK_SHAPES, SPMM
from ..depthwise import DEPTHWISE, depthwise_pattern
from ..devices import AnyDevice, DeviceSpec
from ..layout_ways import Way, as_decided, channels_first_ways, may_run_channels_first
from ..pattern import BlockPattern
from ..plan import DENSE, Decision, Plan
from ..zero_blocks import zero_block_patterns
from .calls import LayerCall, layer_call, size_of, tensor_meta
from .fuse_depthwise import fusible_layers
from .static_values import StaticValues


class LayerWays:
    """Of one graph and the plan that `choose_kernels` made for it."""

    def __init__(
        self,
        gm: GraphModule,
        plan: Plan,
        device: AnyDevice | None,
        spec_of: Callable[[str], AnyDevice],
        hints: Mapping[str, int],
    ) -> None:
        self.hints, self.values = hints, StaticValues(gm)
        self.decisions = {decision.site.node: decision for decision in plan}
        self.spec = functools.cache(lambda where: device or spec_of(where))
        self._is_planned_elsewhere = device is not None
        self._fusible = set(_fusible_layers(gm, plan))

    def of(self, node: Node, decision: Decision) -> list[Way]:
        """As decided, then those that may be cheaper channels first."""
        call, ways = layer_call(node), [as_decided(decision)]
        assert call is not None
        pattern = self.pattern(call, decision)
        spec = self.spec(decision.site.device)
        if pattern is not None and isinstance(spec, DeviceSpec):
            fusible = node.name in self._fusible
            ways += channels_first_ways(decision, pattern, spec, self.hints, fusible)
        return ways

    def pattern(self, call: LayerCall, decision: Decision) -> BlockPattern | None:
        """The weight in the blocks of the best kernel that runs channels first: transposes cost all alike.

        None where no such kernel runs the layer.
        """
        sides = (call.input, call.node)
        if not may_run_channels_first(decision) or not all(map(self.may_lie_first, sides)):
            return None
        if decision.kernel in (SPMM.name, DEPTHWISE.name):
            return decision.pattern
        if whole := depthwise_pattern(decision.site):
            return whole[0]
        shapes = {f"{SPMM.name} {h}x{w}": (h, w) for h, w in BLOCK_SHAPES}
        labels = (label for label in decision.estimates if label in shapes)
        label = min(labels, key=decision.estimates.__getitem__, default=None)
        weight = self.values.get(call.weight) if label else None
        if label is None or weight is None:
            return None
        found = zero_block_patterns(weight, decision.site.groups, [shapes[label]])
        return found[0] if found else None

    def may_lie_first(self, node: Node) -> bool:
        """Whether both layouts are open to a tensor: kernels that run channels first are for such."""
        tensor = tensor_meta(node)
        return (
            tensor is not None
            and has_layout(node)
            and tensor.dtype == torch.float32
            and (self._is_planned_elsewhere or tensor.device.type == "cpu")
            and all(isinstance(size, int) for size in tensor.shape[1:])
        )


def has_layout(node: Node) -> bool:
    """Whether it is a tensor for which channels last and channels first differ."""
    tensor = tensor_meta(node)
    if tensor is None or tensor.dim() not in (3, 4):
        return False
    _, channels, *pixels = map(size_of, tensor.shape)
    return channels != 1 and any(size != 1 for size in pixels)


def _fusible_layers(gm: GraphModule, plan: Plan) -> Iterator[str]:
    """Names of 1x1 and depthwise convolutions that could share a kernel."""
    for first, second in fusible_layers(gm, plan):
        if SPMM.name in _kernels(first) and DEPTHWISE.name in _kernels(second):
            yield from (first.site.node, second.site.node)


def _kernels(decision: Decision) -> set[str]:
    """Of all candidates."""
    return {label.partition(" ")[0] for label in decision.estimates}


def carried_out(old: Decision, way: Way, why: str, note: str | None) -> Decision:
    """The decision for this way.

    Args:
        why: the end of its sentence.
        note: what else is known of the layer.
    """
    assert way.pattern is not None
    # Of the same kernel, all but the first part of the sentence still holds, which is about seconds.
    further = old.reason.split("; ")[1:] if way.kernel == old.kernel else [note] if note else []
    seconds = cost.why_sparse(way.pattern, way.seconds, old.estimates[DENSE], measured=old.measured)
    return replace(
        old,
        kernel=way.kernel,
        reason="; ".join([seconds, *further, why]),
        pattern=way.pattern,
        config=way.config,
        estimates={**old.estimates, way.kernel: way.seconds},
    )
