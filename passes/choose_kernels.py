"""Decides for every site whether a block-sparse kernel pays, and which one. Changes nothing.

For each site: evaluate its weight, find the kept tiles in every block shape that a kernel supports, and
ask the cost model. A plan given by the user is checked against the weights and obeyed.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from .. import cost, cpu_spmm
from ..depthwise import depthwise_pattern
from ..devices import AnyDevice
from ..devices import device as present_device
from ..errors import LayerError, PlanError
from ..few_rows import whole_patterns
from ..gpu_devices import GpuSpec
from ..kernel_variant import KernelVariant
from ..layout import swap_channels
from ..pattern import BlockPattern, BlockShape
from ..plan import DENSE, Decision, Plan, Site
from ..variants import VARIANTS, block_shapes
from ..zero_blocks import zero_block_patterns
from .calls import LayerCall
from .find_sites import sites_with_calls
from .permute_channels import NOTE
from .quantized_calls import quantized_call, why_dequantized
from .static_values import StaticValues

MOST_SCATTERED = 0.5
"""Share of nonzeros above which no kernel for single weights beats a dense layer."""


def choose_kernels(
    gm: GraphModule,
    device: AnyDevice | None = None,
    *,
    block_shape: BlockShape | None = None,
    allow_dense: bool = True,
    hints: Mapping[str, int] | None = None,
    plan: Plan | None = None,
    inductor: Mapping[str, Any] | None = None,
    spec_of: Callable[[str], AnyDevice] | None = None,
) -> Plan:
    """The `Plan` for `gm`.

    Args:
        device: plan every layer for this device, wherever its tensors are; by default, each layer for the
            device that it is on.
        block_shape: consider only this tile; by default every supported one.
        allow_dense: False forces a kernel wherever one exists ("never" in the backend's options).
        hints: values for symbolic sizes; by default those seen while tracing.
        plan: obey these decisions for the layers they name.
        inductor: Inductor's options, some of which change what dense layers and launches cost on a GPU.
        spec_of: finds the present device of a layer, where none is given.

    Raises:
        PlanError: if `plan` would drop nonzero weights or names a kernel that does not exist.
        LayerError: if a weight holds NaN or infinity.
    """
    hints = {**traced_sizes(gm), **(hints or {})}
    values = StaticValues(gm)
    given = {d.site.name: d for d in plan} if plan else {}
    decisions: list[Decision] = []
    names: dict[str, None] = {}
    spec_of = functools.cache(spec_of or present_device)  # which reads files, or measures
    for call, site in sites_with_calls(gm):
        obstacle = obstacle_here(site) if device is None else None
        if obstacle:
            decisions.append(Decision(site, DENSE, f"stays dense: {obstacle}"))
            continue
        spec = device or spec_of(site.device)
        if isinstance(spec, GpuSpec):
            spec = spec.as_compiled(inductor or {})
        if device is not None and not site.device.startswith(device.type):
            site = replace(site, device=device.type)
        weight = values.get(call.weight)
        if site.name in given:
            if site.is_quantized:
                site = replace(site, dtype=given[site.name].site.dtype)  # or fp32, which runs it as well
            decisions.append(_obey(given[site.name], site, weight, spec))
        elif weight is None or weight.is_meta or weight.layout != torch.strided:
            decisions.append(Decision(site, DENSE, f"stays dense: {_no_constant(weight)}"))
        else:
            note = None if site.is_quantized else why_dequantized(call.node)
            if site.is_quantized and not _has_symmetric_weight(call, values):
                site = replace(site, dtype="float32")  # as which Inductor runs it, too
                note = "its weights have a zero point"
            choose = _choose_quantized if site.is_quantized else _choose
            decide = functools.partial(choose, call, site, weight, spec, block_shape)
            decision = decide(allow_dense=allow_dense, hints=hints)
            decision = _with_note(decision, call.node.meta.get(NOTE))
            decisions.append(_with_note(decision, note and f"dequantized, as {note}"))
        names.setdefault(spec.name)
    return Plan(tuple(decisions), "+".join(names) or present_device("cpu").name)


def _has_symmetric_weight(call: LayerCall, values: StaticValues) -> bool:
    quantized = quantized_call(call.node)
    return quantized is not None and quantized.weight_scale(values) is not None


def _choose(
    call: LayerCall,
    site: Site,
    weight: Tensor,
    spec: AnyDevice,
    block_shape: BlockShape | None,
    *,
    allow_dense: bool,
    hints: cost.Hints,
) -> Decision:
    patterns = find_patterns(call, site, weight, block_shapes(site.device, block_shape, site.dtype))
    return cost.choose(site, patterns, spec, allow_dense=allow_dense, hints=hints)


def _choose_quantized(
    call: LayerCall,
    site: Site,
    weight: Tensor,
    spec: AnyDevice,
    block_shape: BlockShape | None,
    *,
    allow_dense: bool,
    hints: cost.Hints,
) -> Decision:
    """In integers; in fp32, on the dequantized input, where that is estimated to be faster still."""
    choose = functools.partial(_choose, call, weight=weight, spec=spec, block_shape=block_shape, hints=hints)
    integers = choose(site=site, allow_dense=allow_dense)
    floats = choose(site=replace(site, dtype="float32"), allow_dense=allow_dense)
    if floats.is_dense or floats.pattern is None or (floats.density == 1 and site.groups == 1):
        return integers  # whole layers too: their weights are a quarter of the bytes
    seconds, dense = floats.estimates[floats.kernel], integers.estimates[DENSE]
    best = cost.MARGIN * dense if allow_dense else math.inf
    if seconds >= (best if integers.is_dense else integers.estimates[integers.kernel]):
        return integers
    reason = cost.why_sparse(floats.pattern, seconds, dense, forced=not allow_dense)
    why_not = integers.reason.removeprefix("stays dense: ")
    return replace(
        floats,
        reason=f"{reason}; in fp32, as in integers {why_not}",
        estimates={**floats.estimates, DENSE: dense},
    )


def _with_note(decision: Decision, note: str | None) -> Decision:
    return replace(decision, reason=f"{decision.reason}; {note}") if note else decision


def find_patterns(
    call: LayerCall, site: Site, weight: Tensor, shapes: Sequence[BlockShape]
) -> list[BlockPattern]:
    """The tiles of each block shape that hold a nonzero, for shapes in which at least one tile is zero.

    Also all tiles of a layer that may run whole.
    """
    # The sum says it without a temporary; only if it overflows does it take a closer look.
    if not weight.sum().isfinite() and not torch.isfinite(weight).all():
        raise LayerError(
            site.name,
            "finite weights",
            f"{int((~torch.isfinite(weight)).sum())} NaN or infinite values",
            "Find where training diverged, or load a good checkpoint.",
        )
    if site.device.startswith("cpu") and (whole := depthwise_pattern(site)):
        return whole
    canonical = swap_channels(weight, call.groups) if call.transposed else weight
    if len(shapes) > 1 and not _may_scatter(site, weight):
        shapes = [shape for shape in shapes if shape not in cpu_spmm.BLOCK_SHAPES]
    found = _without_needless_columns(zero_block_patterns(canonical, site.groups, shapes))
    return [*found, *whole_patterns(site)]


def _may_scatter(site: Site, weight: Tensor) -> bool:
    """Whether single weights are worth looking at: only a pointwise layer of mostly zeros runs on those."""
    pointwise = math.prod(site.kernel_size) == 1 and site.groups == 1
    return pointwise and int(weight.count_nonzero()) <= MOST_SCATTERED * weight.numel()


def _without_needless_columns(patterns: list[BlockPattern]) -> list[BlockPattern]:
    """Columns `(bh, 1)` stay where wider tiles of their height keep over 5 % more weights than they do.

    Low ones also must keep as much less than any higher tile, which multiplies faster.
    """
    wide = {p.block_shape[0]: p.kept_elements for p in patterns if p.block_shape[1] > 1}
    found = []
    for pattern in patterns:
        height, width = pattern.block_shape
        others = [wide.get(height, math.inf)]
        if pattern.block_shape in cpu_spmm.BLOCK_SHAPES:
            others += [p.kept_elements for p in patterns if p.block_shape[0] > height]
        if width > 1 or pattern.kept_elements * 1.05 < min(others):
            found.append(pattern)
    return found


def obstacle_here(site: Site) -> str | None:
    """Why kernels for the device of the layer cannot be made on this machine."""
    kind = site.device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        return f"no kernels for {site.device}"
    if kind == "cuda" and importlib.util.find_spec("triton") is None:
        return "GPU kernels need Triton, which is not installed (pip install triton)"
    return None


def _no_constant(weight: Tensor | None) -> str:
    if weight is None:
        return "the weight depends on inputs, on random numbers or on memory that the graph writes to"
    return "the weight is on the meta device" if weight.is_meta else f"the weight is {weight.layout}"


def _obey(decision: Decision, site: Site, weight: Tensor | None, device: AnyDevice) -> Decision:
    if decision.is_dense:
        return replace(decision, site=site)
    pattern = decision.pattern
    if pattern is None or weight is None or pattern.weight_shape != tuple(weight.shape):
        raise PlanError(
            site.name,
            f"a plan for a weight of shape {None if weight is None else list(weight.shape)}",
            f"one for {pattern and list(pattern.weight_shape)}",
            "Make the plan from this model (blocksparse_compiler.plan).",
        )
    if not bool(weight.masked_fill(pattern.mask(weight.device), 0).eq(0).all()):
        raise PlanError(
            site.name,
            "zero weights outside the plan's kept tiles",
            "nonzero ones, which the plan would drop",
            "Make the plan again: the weights have changed since.",
        )
    _check_kernel(decision.kernel, pattern, site, device)
    return replace(decision, site=site)


def _check_kernel(kernel: str, pattern: BlockPattern, site: Site, device: AnyDevice) -> None:
    variant = VARIANTS.get(kernel)
    reason = "there is no such kernel" if variant is None else variant.unsupported(site, pattern)
    if pattern.groups != site.groups:
        reason = f"the plan is for {pattern.groups} groups"
    if not reason and not any(row.configs(site, pattern, device) for row in _able(kernel)):
        reason = f"it does not run on {device.name}"
    if reason:
        raise PlanError(
            site.name,
            f"a layer that the kernel {kernel!r} can run (kernels: {', '.join(VARIANTS)})",
            f"{site.dtype} {site.op} of {site.groups} groups: {reason}",
            "Make the plan from this model (blocksparse_compiler.plan), or choose dense for this layer.",
        )


def _able(kernel: str) -> Iterator[KernelVariant]:
    """The rows that the lowering of a kernel may choose from."""
    yield VARIANTS[kernel]
    if VARIANTS[kernel].stand_in:
        yield VARIANTS[VARIANTS[kernel].stand_in]


def traced_sizes(gm: GraphModule) -> dict[str, int]:
    """The sizes that symbolic dimensions had while tracing."""
    found: dict[str, int] = {}
    for node in gm.graph.nodes:
        value = node.meta.get("val", node.meta.get("example_value"))
        for size in value.shape if isinstance(value, torch.Tensor) else ():
            if isinstance(size, torch.SymInt) and str(size.node.expr) not in found:
                hint = size.node.hint
                if hint is not None:
                    found[str(size.node.expr)] = int(hint)
    return found
