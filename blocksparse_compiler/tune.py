"""Measures the candidates for a layer on this machine, and decides by what it measured.

Each candidate is compiled the way the backend compiles a model (frozen, a ReLU behind the layer) and
called in turn with the others, so that a slow phase of the machine hits all alike. Weights are random
in the kept tiles: the time does not depend on their values. On a GPU the calls run from CUDA graphs on a cold
cache (`gpu_timing`).
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from . import cost, disk_cache, gpu_timing, variants
from .codegen import inductor_api, lowerings
from .codegen.lowerings import source_digest
from .devices import AnyDevice
from .devices import device as present_device
from .passes.choose_kernels import find_patterns, traced_sizes
from .passes.find_sites import sites_with_calls
from .passes.lower_quantized import lower_quantized
from .passes.lower_sites import lower_sites
from .passes.static_values import StaticValues
from .pattern import BlockPattern, BlockShape
from .plan import DENSE, Decision, Plan, Site

log = logging.getLogger("blocksparse_compiler")

SECONDS_PER_LAYER = 0.25
MAX_CANDIDATES = {"cpu": 5, "cuda": 8}
MARGIN = 0.98
"""A kernel must measure below this fraction of the dense time; within noise a layer stays dense."""
_EMPTY = "empty"

Run = Callable[..., Any]


# ---- a layer as a graph ----------------------------------------------------------------------------


def layer_graph(site: Site, weight: Tensor, hints: cost.Hints | None = None) -> tuple[fx.GraphModule, Tensor]:
    """The layer, its bias and a ReLU as an ATen graph; and a random input for it.

    Args:
        site: the layer; symbolic sizes take their hints.
        weight: `[O, C/groups, *kernel]`; the layer's dtype and device are the weight's.
    """
    shape = [int(cost.value(cost.symbolic(size), hints)) for size in site.input_shape]
    placed: Any = {"device": weight.device, "dtype": weight.dtype}
    x = torch.randn(shape, **placed)
    if site.is_quantized:
        x = x.mul(32).to(getattr(torch, site.dtype))
    if len(site.kernel_size) in (2, 3):
        dims = len(site.kernel_size)
        x = x.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    root = torch.nn.Module()
    root.register_buffer("weight", weight)
    root.register_buffer("bias", torch.randn(site.out_channels, **placed))
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = x
    operands = [graph.get_attr("weight"), graph.get_attr("bias")]
    if site.is_quantized:
        node, operands[0] = _dequantized(graph, site, node), _dequantized_weight(root, graph, weight)
    node = graph.call_function(torch.ops.aten.relu.default, (_call(graph, site, node, operands),))
    if site.is_quantized:
        quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
        node = graph.call_function(quantize, (node, *_scale(site)))
    graph.output((node,))
    gm = fx.GraphModule(root, graph)
    record_meta(gm, x)
    return gm, x


def _scale(site: Site) -> tuple[Any, ...]:
    """Scale, zero point, bounds and type of activations; after a ReLU, zero is the smallest number."""
    low = -128 if site.dtype == "int8" else 0
    return 0.03, low, low, low + 255, getattr(torch, site.dtype)


def _dequantized(graph: fx.Graph, site: Site, x: fx.Node) -> fx.Node:
    return graph.call_function(
        torch.ops.quantized_decomposed.dequantize_per_tensor.default, (x, *_scale(site))
    )


def _dequantized_weight(root: torch.nn.Module, graph: fx.Graph, weight: Tensor) -> fx.Node:
    """Replaces the weight by one of bytes."""
    scales = weight.flatten(1).abs().amax(1).clamp(min=1e-6) / 127
    root.weight = (weight / scales.view(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8)
    root.register_buffer("scales", scales)
    root.register_buffer("zero_points", torch.zeros(len(scales), dtype=torch.int64))
    operands = [graph.get_attr(name) for name in ("weight", "scales", "zero_points")]
    return graph.call_function(
        torch.ops.quantized_decomposed.dequantize_per_channel.default,
        (*operands, 0, -128, 127, torch.int8),
    )


def _call(graph: fx.Graph, site: Site, x: fx.Node, operands: list[fx.Node]) -> fx.Node:
    if not site.kernel_size:
        return graph.call_function(torch.ops.aten.linear.default, (x, *operands))
    before = [lo for lo, _ in site.padding]
    if any(lo != hi for lo, hi in site.padding):
        pads = [p for pair in reversed(site.padding) for p in pair]
        x = graph.call_function(torch.ops.aten.constant_pad_nd.default, (x, pads))
        before = [0] * len(before)
    geometry = (list(site.stride), before, list(site.dilation), site.transposed)
    output_padding = list(site.output_padding) or [0] * len(before)
    arguments: Any = (x, *operands, *geometry, output_padding, site.groups)
    return graph.call_function(torch.ops.aten.convolution.default, arguments)


def record_meta(gm: fx.GraphModule, x: Tensor) -> None:
    """Runs the graph once and keeps every node's value, as tracing would."""

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            node.meta["val"] = result = super().run_node(node)
            return result

    with torch.no_grad():
        Recorder(gm).run(x)


def compile_graph(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> Run:
    """Compiles like the backend does. Safe inside another compilation."""
    lowerings.register()
    config = {
        "freezing": True,
        "post_grad_custom_post_pass": inductor_api.cache_key_pass(source_digest(), {}),
        # As in the backend; on CPUs oneDNN's layers are channels-last anyway.
        "force_layout_optimization": any(x.is_cuda and x.dim() > 3 for x in inputs),
    }
    with inductor_api.tracing(None), torch.no_grad():
        return inductor_api.compile_fx(gm, inputs, config)


def compile_candidate(
    site: Site,
    pattern: BlockPattern | None,
    kernel: str,
    config: Mapping[str, int | str],
    hints: cost.Hints | None = None,
) -> tuple[Run, Tensor]:
    """The layer on one kernel (`"dense"` too), and an input for it."""
    shape = (site.out_channels, site.in_channels // site.groups, *site.kernel_size)
    if site.transposed:  # stored [C, O/groups, *kernel]
        shape = (site.in_channels, site.out_channels // site.groups, *site.kernel_size)
    dtype = torch.float32 if site.is_quantized else getattr(torch, site.dtype)
    weight = torch.randn(shape, device=site.device, dtype=dtype) / max(1, shape[1])
    if pattern is not None and not site.transposed:
        weight = pattern.apply(weight)
    gm, x = layer_graph(site, weight, hints)
    if kernel != DENSE:
        call, found = sites_with_calls(gm)[0]
        here = Decision(replace(found, node=call.node.name), kernel, "measured", pattern, dict(config))
        for lower in (lower_quantized, lower_sites):
            lower(gm, Plan((here,)))
    return compile_graph(gm, [x]), x


# ---- timing ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    minimum: float


def interleave(
    calls: Mapping[str, Callable[[], Any]], seconds: float, *, warm: bool = False
) -> dict[str, Timing]:
    """Times every call in turn, round after round, for about `seconds` in all (at least five rounds).

    Args:
        warm: make every call twice, and time the second: many others have emptied the caches meanwhile.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(), call()
    deadline, rounds = time.perf_counter() + seconds, 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        while rounds < 5 or time.perf_counter() < deadline:
            for name, call in calls.items():
                if warm:
                    call()
                start = time.perf_counter()
                call()
                samples[name].append(time.perf_counter() - start)
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(statistics.median(s), min(s)) for name, s in samples.items()}


def call_cost(device: str = "cpu") -> Callable[[], Any]:
    """A compiled graph that does next to nothing: what every call of a compiled graph costs."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.relu.default, (x,)),))
    one = torch.zeros(8, device=device)
    x.meta["val"] = one
    run = compile_graph(fx.GraphModule(torch.nn.Module(), graph), [one])
    return lambda: run(one)


# ---- decisions -------------------------------------------------------------------------------------


def measure(
    site: Site,
    patterns: Sequence[BlockPattern],
    device: AnyDevice,
    *,
    allow_dense: bool = True,
    hints: cost.Hints | None = None,
    seconds: float = SECONDS_PER_LAYER,
) -> Decision:
    """The decision about one layer by measurement; results are kept on disk.

    Args:
        site: a layer on this machine's CPU or GPU.
        patterns: its weight in one or more block shapes, as for `cost.choose`.
        device: names the machine in the cache; its figures rank the candidates.
        seconds: time to spend on measuring (compilation comes on top).

    Returns:
        A `Decision` with measured estimates; what `cost.choose` says where no kernel can run the layer.
    """
    guess = cost.choose(site, patterns, device, allow_dense=allow_dense, hints=hints)
    ranked, _ = cost.candidates(site, patterns, device, hints)
    if not ranked or guess.pattern is None:
        return guess
    options = _options(site, ranked, device)
    timings = _timings(site, options, device, hints, seconds)
    best = min(options, key=lambda label: timings[label])
    candidate, config = options[best]
    estimates = {DENSE: timings[DENSE], candidate.variant: timings[best]}
    for label, (other, _) in options.items():
        estimates[other.label] = min(timings[label], estimates.get(other.label, timings[label]))
    if allow_dense and timings[best] >= MARGIN * timings[DENSE]:
        kept = f"{candidate.pattern.density:.0%} kept"
        reason = (
            f"stays dense: {cost.format_seconds(timings[DENSE])} dense against "
            f"{cost.format_seconds(timings[best])} with {kept}, measured"
        )
        return Decision(site, DENSE, reason, candidate.pattern, {}, estimates, measured=True)
    reason = cost.why_sparse(
        candidate.pattern, timings[best], timings[DENSE], forced=not allow_dense, measured=True
    )
    return Decision(site, candidate.variant, reason, candidate.pattern, config, estimates, measured=True)


def tune_plan(
    gm: fx.GraphModule,
    plan: Plan,
    device: AnyDevice | None = None,
    *,
    block_shape: BlockShape | None = None,
    allow_dense: bool = True,
    hints: cost.Hints | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Plan:
    """`plan` with every layer that has zero blocks decided by measurement.

    A layer that cannot be measured keeps its decision, and the log says why.

    Args:
        gm: the graph that `plan` was made from.
        device: figures to rank candidates by; by default, those of the device each layer is on.
        block_shape, allow_dense, hints: as in `passes.choose_kernels`.
        progress: called with the layer's name, its number and the number of layers, before each.
    """
    hints = {**traced_sizes(gm), **(hints or {})}
    values, calls = StaticValues(gm), {site.name: (call, site) for call, site in sites_with_calls(gm)}
    work = [d for d in plan if d.pattern is not None and d.site.name in calls]
    spec_of = functools.cache(present_device)  # which reads files, or measures
    decided = {}
    for i, decision in enumerate(work):
        if progress:
            progress(decision.site.name, i, len(work))
        call, site = calls[decision.site.name]
        weight = values.get(call.weight)
        if weight is None:
            continue
        patterns = find_patterns(
            call, site, weight, variants.block_shapes(site.device, block_shape, site.dtype)
        )
        spec = device or spec_of(site.device)
        try:
            decided[site.name] = measure(site, patterns, spec, allow_dense=allow_dense, hints=hints)
        except Exception as error:
            log.warning("%s could not be measured, its estimate decides: %s", site.name, error)
    return replace(plan, decisions=tuple(decided.get(d.site.name, d) for d in plan))


def _options(
    site: Site, ranked: Sequence[cost.Candidate], device: AnyDevice
) -> dict[str, tuple[cost.Candidate, dict[str, int | str]]]:
    """What to measure: the best candidate in several parameters, the runners-up in their first."""
    found: dict[str, tuple[cost.Candidate, dict[str, int | str]]] = {}
    most = MAX_CANDIDATES[device.type]
    for rank, candidate in enumerate(c for c in ranked if c.seconds <= 2 * ranked[0].seconds):
        configs = variants.VARIANTS[candidate.variant].configs(site, candidate.pattern, device)
        estimated = [dict(candidate.config)] if candidate.config else []
        configs = [*estimated, *(config for config in configs if config not in estimated)]
        for i, config in enumerate(configs[: most - 1] if rank == 0 else configs[:1]):
            if len(found) < most:
                found[f"{candidate.label} #{i}"] = (candidate, dict(config))
    return found


def _timings(
    site: Site,
    options: Mapping[str, tuple[cost.Candidate, Mapping[str, int | str]]],
    device: AnyDevice,
    hints: cost.Hints | None,
    seconds: float,
) -> dict[str, float]:
    """Median seconds of dense and of every option, net of the cost of calling a compiled graph.

    Layers of one geometry that keep equally many tiles share their times.
    """
    geometry = {k: v for k, v in site.to_json().items() if k not in ("name", "node", "epilogue")}
    listing = [[label, c.pattern.num_kept, config] for label, (c, config) in options.items()]
    key = [geometry, dict(hints or {}), listing, device.name, device.summary, *_hardware(site)]
    known = disk_cache.load("tuning", key)
    if isinstance(known, dict) and set(known) == {DENSE, *options}:
        return known
    runs = {DENSE: compile_candidate(site, None, DENSE, {}, hints)}
    for label, (candidate, config) in options.items():
        runs[label] = compile_candidate(site, candidate.pattern, candidate.variant, config, hints)
    calls: dict[str, Callable[[], Any]] = {_EMPTY: call_cost(site.device)}
    with torch.no_grad():
        for label, (run, x) in runs.items():
            calls[label] = functools.partial(run, x)
        if site.device.startswith("cuda"):
            measured: Mapping[str, Any] = gpu_timing.interleave(calls, seconds, site.device)
        else:
            measured = interleave(calls, seconds)
    empty = measured[_EMPTY].median
    timings = {label: max(measured[label].median - empty, 1e-7) for label in runs}
    disk_cache.store("tuning", key, timings)
    return timings


def _hardware(site: Site) -> tuple[str, ...]:
    """What a measurement of the layer depends on besides the layer: processors, settings and versions."""
    if not site.device.startswith("cuda"):
        return disk_cache.versions()
    precision = variants.gpu_variants.precision(replace(site, dtype="float32")).get("precision", "")
    return *disk_cache.versions(), torch.cuda.get_device_name(site.device), *gpu_versions(), str(precision)


def gpu_versions() -> tuple[str, ...]:
    """CUDA's (or ROCm's) and Triton's."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return str(torch.version.cuda or torch.version.hip), triton
