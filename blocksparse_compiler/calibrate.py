"""Measures the present machine, so that estimates are about it. Once; the figures are kept on disk.

The quick part (about two seconds, run by itself at the first plan for this machine) times torch's dense
operators and memory. The thorough part (`blocksparse calibrate`) compiles and times our kernels as well.
All samples are taken in turn, so that a busy machine slows all alike: decisions rest on ratios.
"""

from __future__ import annotations

import functools
import logging
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import cost, disk_cache, roofline, tune, variants
from .busy import Busy, alone
from .devices import MIB, DeviceSpec
from .errors import OptionError
from .pattern import BlockPattern
from .plan import DENSE, Site

log = logging.getLogger("blocksparse_compiler")

KIND = "calibration"
SOURCE = "measured on this machine"
_BLOCKS = (32, 16, 8)
_EMPTY = "empty"

SECONDS = 0.6
_MAX_UNREST = 1.4  # median over minimum of a layer's times

PEAKS = {
    "dense": "peak_fp32_flops_per_second_per_thread",
    "dense_bf16": "peak_bf16_flops_per_second_per_thread",
}
"""The peaks that are measured, by the prefix of torch's efficiencies."""

# Figures outside these factors of the defaults are taken for a disturbed measurement and cut off.
_TRUST = 4.0
_TRUST_BANDWIDTH = 2.5


# ---- what is measured --------------------------------------------------------------------------------


def _conv(channels: int, kernel: int, size: int, groups: int = 1, out_channels: int = 0) -> Site:
    return Site(
        "calibration",
        "conv",
        "conv2d",
        out_channels or channels,
        channels,
        (kernel, kernel),
        groups,
        (1, 1),
        ((kernel // 2, kernel // 2),) * 2,
        (1, 1),
        (0, 0),
        (1, channels, size, size),
        bias=True,
    )


def _linear(rows: int, channels: int) -> Site:
    return Site("calibration", "fc", "linear", channels, channels, input_shape=(rows, channels), bias=True)


# One layer per class of dense efficiency; each takes some tenths of a millisecond.
DENSE_LAYERS: Mapping[str, Site] = {
    "dense/spatial": _conv(256, 3, 14),
    "dense/pointwise": _conv(512, 1, 28),
    "dense/linear": _linear(128, 768),
    "dense/few_rows": _linear(8, 768),
    "dense/grouped": _conv(256, 3, 28, groups=32),
    "dense/depthwise": _conv(256, 3, 28, groups=256),
}
LOW_PRECISION = ("spatial", "pointwise", "linear", "few_rows")
"""The classes that are measured in bf16, too."""


def dense_layers(spec: DeviceSpec) -> dict[str, Site]:
    """A layer for every efficiency of torch's operators; those in bf16 by the instructions they run on."""
    layers = dict(DENSE_LAYERS)
    for kind in LOW_PRECISION:
        prefix, _ = roofline.dense_instructions("bfloat16", kind, spec)
        layers[f"{prefix}/{kind}"] = replace(DENSE_LAYERS[f"dense/{kind}"], dtype="bfloat16")
    return layers


SPARSE_LAYERS: Mapping[str, Site] = {
    "spatial": _conv(256, 3, 14),
    "pointwise": _conv(512, 1, 28),
    "linear": _linear(128, 768),
}


# Layers that take no time but that of the call, by the figure they give.
_CALLS: Mapping[str, Site] = {
    "dense_conv_call_seconds": _conv(16, 1, 4),
    "dense_linear_call_seconds": _linear(4, 16),
}


@dataclass(frozen=True)
class Layer:
    """A layer to measure, on one kernel."""

    site: Site
    pattern: BlockPattern | None = None
    kernel: str = DENSE
    config: Mapping[str, int | str] = field(default_factory=dict)


# ---- entry points ------------------------------------------------------------------------------------


def enabled() -> bool:
    """Whether measuring is allowed: `BLOCKSPARSE_CALIBRATE` is not `0`.

    Raises:
        OptionError: if the variable is neither `0` nor `1`.
    """
    text = os.environ.get("BLOCKSPARSE_CALIBRATE", "1")
    if text not in ("0", "1"):
        raise OptionError("BLOCKSPARSE_CALIBRATE", "0 or 1", repr(text), "0 plans with default figures.")
    return text == "1"


def calibrated(spec: DeviceSpec) -> DeviceSpec:
    """`spec`, the host, with this machine's measured figures: stored ones, or measured now.

    Any failure to measure is logged and leaves the defaults.
    """
    if not enabled():
        return spec
    known = _load(spec)
    if known is not None:
        return known
    try:
        return measure_host()
    except Exception as error:
        log.warning("not calibrated: %s. Planning with default figures for %s", error, spec.isa)
        return spec


def measure_host(*, thorough: bool = False, seconds: float = SECONDS) -> DeviceSpec:
    """Measures this machine and stores the result.

    Args:
        thorough: compile and measure our kernels too (nine C++ compilations for each dtype).
        seconds: time to spend on measuring dense layers; as much again on ours.

    Raises:
        Busy: if the times vary too much to mean anything. Nothing is stored then.
    """
    spec = DeviceSpec.host()
    with _progress("measuring this machine and our kernels" if thorough else "measuring this machine, once"):
        ours = sparse_layers(spec) if thorough else {}
        dense = {name: Layer(site) for name, site in {**dense_layers(spec), **_CALLS}.items()}
        times = _measure({**dense, **ours}, seconds)
        measured = spec.with_figures(SOURCE, **_bandwidths(spec, seconds / 4), **dense_figures(spec, times))
        if thorough:
            measured = with_sparse_efficiencies(measured, ours, times)
    disk_cache.store(KIND, _key(spec), {"thorough": thorough, "spec": measured.to_json()})
    return measured


def stored_path() -> Path:
    """Where this machine's figures are kept."""
    return disk_cache.cache_path(KIND, _key(DeviceSpec.host()))


def describe_state() -> str:
    """One phrase for `blocksparse info`."""
    if not enabled():
        return "off (BLOCKSPARSE_CALIBRATE=0): default figures"
    stored = disk_cache.load(KIND, _key(DeviceSpec.host()))
    if not stored:
        return "not measured yet: at the first plan, or by `blocksparse calibrate`"
    return "torch's operators and our kernels" if stored.get("thorough") else "torch's operators (quick)"


def _key(spec: DeviceSpec) -> list[Any]:
    return [spec.threads, spec.isa, *disk_cache.versions()]


def _load(spec: DeviceSpec) -> DeviceSpec | None:
    stored = disk_cache.load(KIND, _key(spec))
    try:
        return DeviceSpec.from_json(stored["spec"]) if stored else None
    except (OptionError, KeyError, TypeError) as error:
        log.warning("ignoring stored calibration figures that make no sense (%s)", error)
        return None


@contextmanager
def _progress(text: str) -> Iterator[None]:
    """One line on a terminal; nothing elsewhere."""
    if sys.stderr.isatty():
        Console(stderr=True).print(f"blocksparse: {text} …", style="dim")
    yield


# ---- dense layers and memory ---------------------------------------------------------------------------


def dense_figures(spec: DeviceSpec, times: Mapping[str, float]) -> dict[str, Any]:
    """Peaks, dense efficiencies and call overheads of this machine, as `DeviceSpec` fields.

    A peak is the one at which torch's ungrouped convolutions reach the default fractions, so that the
    default fractions of our kernels keep their ratio to it. That of AMX stays as it is.
    """
    figures: dict[str, Any] = {name: _trusted(times[name], getattr(spec, name)) for name in _CALLS}
    rates = {}
    for name, site in dense_layers(spec).items():
        overhead = figures[f"dense_{'linear' if site.op == 'linear' else 'conv'}_call_seconds"]
        flops = cost.value(cost.dense_cost(site, spec).flops)
        rates[name] = flops / max(times[name] - overhead, times[name] / 4) / spec.threads
    peaks = {"dense_amx": spec.peak_amx_flops_per_second_per_thread}
    for prefix, peak_name in PEAKS.items():
        convs = [f"{prefix}/{kind}" for kind in ("spatial", "pointwise")]
        if set(convs) <= set(rates):
            peak = statistics.geometric_mean(rates[name] / spec.efficiency[name] for name in convs)
            figures[peak_name] = peaks[prefix] = _trusted(peak, getattr(spec, peak_name))
    figures["efficiency"] = {name: _fraction(r / peaks[name.split("/")[0]]) for name, r in rates.items()}
    return figures


def _bandwidths(spec: DeviceSpec, seconds: float) -> dict[str, float]:
    """Bytes per second of each memory level; a farther level is never taken to be faster."""
    l2 = spec.threads * spec.l2_bytes_per_thread
    levels = {  # bytes of a buffer whose copy runs at the rate of the level, and copies to time at once
        "l2_bytes_per_second_per_thread": (l2 // 4, 40),
        "l3_bytes_per_second": (max(2 * l2, spec.l3_bytes // 8), 4),
        "dram_bytes_per_second": (min(4 * spec.l3_bytes, 256 * MIB), 1),
    }
    with alone():
        times = tune.interleave({name: _copy(*level) for name, level in levels.items()}, seconds)
    rates, fastest = {}, float("inf")
    for name, (size, repeats) in levels.items():
        # A copy reads, fetches before it writes, and writes.
        fastest = rate = min(fastest, 3 * size * repeats / times[name].median)
        rates[name] = _trusted(
            rate / spec.threads if name.endswith("per_thread") else rate, getattr(spec, name)
        )
    return rates


def _copy(size: int, repeats: int) -> Callable[[], None]:
    source, target = torch.ones(size // 4), torch.zeros(size // 4)

    def copy() -> None:
        for _ in range(repeats):
            torch.add(source, 1.0, out=target)

    return copy


# ---- our kernels ---------------------------------------------------------------------------------------


def _cpu_variants() -> dict[str, variants.KernelVariant]:
    return {name: variant for name, variant in variants.VARIANTS.items() if variant.device == "cpu"}


def sparse_layers(spec: DeviceSpec) -> dict[str, Layer]:
    """A layer for every `DeviceSpec.efficiency` entry of our CPU kernels."""
    layers = {}
    for name, variant in _cpu_variants().items():
        for kind, fp32_site in SPARSE_LAYERS.items():
            site = replace(fp32_site, dtype=variant.dtypes[0])
            for block in _BLOCKS:
                pattern = checkerboard(site, block)
                configs = [] if variant.unsupported(site, pattern) else variant.configs(site, pattern, spec)
                if configs:
                    layers[f"{name}/{block}x{block}/{kind}"] = Layer(site, pattern, name, configs[0])
    return layers


def with_sparse_efficiencies(
    spec: DeviceSpec, layers: Mapping[str, Layer], times: Mapping[str, float]
) -> DeviceSpec:
    """`spec` with the efficiencies that explain these times.

    Where one is above 1, the peak was taken too low: all of its fractions become those of a higher one.
    """
    ours = {
        name: fit_efficiency(layer.site, layer.pattern, spec, times[name], layer.kernel)
        for name, layer in layers.items()
        if layer.pattern is not None
    }
    scales = {
        peak: max((1.0, *(f for name, f in ours.items() if _peak_of(name) == peak)))
        for peak in PEAKS.values()
    }
    fractions = {
        name: _fraction(fraction / scales.get(_peak_of(name), 1.0))
        for name, fraction in {**spec.efficiency, **ours}.items()
    }
    peaks = {peak: getattr(spec, peak) * scale for peak, scale in scales.items()}
    return spec.with_figures(SOURCE, efficiency=fractions, **peaks)


def _peak_of(name: str) -> str:
    """The figure that an efficiency is a fraction of."""
    kernel = name.partition("/")[0]
    kind = "amx" if "amx" in kernel else "bf16" if "bf16" in kernel else "fp32"
    return f"peak_{kind}_flops_per_second_per_thread"


def checkerboard(site: Site, block: int) -> BlockPattern:
    """Every other tile kept: the same work in every block row."""
    shape = (site.out_channels, site.in_channels // site.groups, *site.kernel_size)
    full = BlockPattern.full(shape, (block, block), site.groups)
    rows, taps, cols = full.grid_shape
    index = torch.arange(rows)[:, None, None] + torch.arange(taps)[:, None] + torch.arange(cols)
    return full.with_kept(index % 2 == 0)


def fit_efficiency(
    site: Site, pattern: BlockPattern, spec: DeviceSpec, seconds: float, variant: str = ""
) -> float:
    """The efficiency at which `cost.sparse_cost` predicts `seconds` for this layer."""
    kind = cost.geometry(site)
    bh, bw = pattern.block_shape
    names = (f"{bh}x{bw}/{kind}", f"{variant}/{bh}x{bw}/{kind}")
    ideal = replace(spec, efficiency={**spec.efficiency, **dict.fromkeys(names, 1.0)})
    record = cost.sparse_cost(site, pattern, ideal, variant)
    epilogue = cost.value(roofline.epilogue_seconds(site, pattern.block_shape, spec))
    work = cost.value(record.compute_seconds) - epilogue
    exposed = (1 - cost.OVERLAP) * cost.value(record.memory_seconds)  # these layers are bound by compute
    return max(work / max(seconds - epilogue - exposed - cost.value(record.overhead_seconds), 1e-9), 0.02)


# ---- helpers -------------------------------------------------------------------------------------------


def _measure(layers: Mapping[str, Layer], seconds: float) -> dict[str, float]:
    """Median seconds of each layer, net of the cost of calling a compiled graph."""
    calls: dict[str, Callable[[], Any]] = {_EMPTY: tune.call_cost()}
    for name, layer in layers.items():
        run, x = tune.compile_candidate(layer.site, layer.pattern, layer.kernel, layer.config)
        calls[name] = functools.partial(run, x)
    with torch.no_grad(), alone():
        times = tune.interleave(calls, seconds)
    unrest = statistics.median(times[name].median / times[name].minimum for name in layers)
    if unrest > _MAX_UNREST:
        raise Busy(f"the machine is busy: times vary by {unrest:.1f}x")
    return {name: max(times[name].median - times[_EMPTY].median, 1e-7) for name in layers}


def _trusted(measured: float, default: float, factor: float = _TRUST) -> float:
    return min(max(measured, default / factor), default * factor)


def _fraction(measured: float) -> float:
    return min(max(measured, 0.02), 1.0)
