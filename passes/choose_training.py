"""Decides for every site of a training graph whether it runs on kept tiles. Changes nothing.

Only zeros that training cannot change count: those of fixed masks, frozen scales and folded layers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch.fx import GraphModule

from ..devices import AnyDevice
from ..devices import device as present_device
from ..pattern import BlockPattern, BlockShape
from ..plan import DENSE, Decision, Plan, Site
from ..training_cost import choose_training as choose
from ..training_cost import kernel_for
from ..variants import VARIANTS, block_shapes
from ..zero_blocks import zero_block_patterns
from .calls import LayerCall, tensor_meta
from .choose_kernels import obstacle_here, traced_sizes
from .find_sites import sites_with_calls
from .fixed_weights import FixedWeight, FixedWeights


def choose_training(
    gm: GraphModule,
    weights: FixedWeights,
    device: AnyDevice | None = None,
    *,
    block_shape: BlockShape | None = None,
    allow_dense: bool = True,
    hints: Mapping[str, int] | None = None,
    plan: Plan | None = None,
) -> Plan:
    """The `Plan` for a training step of `gm`.

    Args:
        weights: of this graph.
        device: plan for this one; by default, each layer for the device that it is on.
        block_shape, allow_dense, hints: as in `choose_kernels`.
        plan: layers that it leaves dense stay dense.
    """
    hints = {**traced_sizes(gm), **(hints or {})}
    dense = {d.site.name for d in plan or () if d.is_dense}
    decisions = []
    names: dict[str, None] = {}
    spec_of = functools.cache(present_device)  # which reads files, or measures
    for call, site in sites_with_calls(gm):
        obstacle = obstacle_here(site) if device is None else None
        site = replace(site, device=device.type) if device else site
        weight = weights.get(call.weight)
        obstacle = obstacle or ("the plan says so" if site.name in dense else _obstacle(call, site, weight))
        if obstacle or weight is None:
            decisions.append(Decision(site, DENSE, f"trains dense: {obstacle}"))
            continue
        spec = device or spec_of(site.device)
        patterns = _patterns(site, weights, weight, block_shapes(site.device, block_shape, site.dtype))
        decisions.append(choose(site, patterns, spec, allow_dense=allow_dense, hints=hints))
        names.setdefault(spec.name)
    return Plan(tuple(decisions), "+".join(names) or (device or present_device("cpu")).name)


def _obstacle(call: LayerCall, site: Site, weight: FixedWeight | None) -> str | None:
    if site.transposed:
        return "no kernels for transposed convolutions"
    if site.dtype not in VARIANTS[kernel_for(site)].dtypes:
        return f"no kernels for gradients of {site.dtype} on {site.device}{_autocast(call, site)}"
    if 0 in site.input_shape:
        return "its input is empty"
    if weight is None:
        return "all of its weight can change"
    return None


def _autocast(call: LayerCall, site: Site) -> str:
    weight = tensor_meta(call.weight)
    cast = weight is not None and str(weight.dtype) != f"torch.{site.dtype}"
    return ", which autocast computes in" if cast else ""


def _patterns(
    site: Site, weights: FixedWeights, weight: FixedWeight, shapes: Sequence[BlockShape]
) -> list[BlockPattern]:
    patterns = [p for p in zero_block_patterns(weight.probe, site.groups, shapes) if p.num_kept]
    # A folded layer's own tiles need no gathering.
    return [p for p in patterns if weights.holds_tiles(weight, p)] or patterns
