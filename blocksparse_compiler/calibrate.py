"""Measures the present machine, so that estimates are about it. Once; the figures are kept on disk.

The quick part (about two seconds, run by itself at the first plan for this machine) times torch's dense
operators and memory. The thorough part (`blocksparse calibrate`) compiles and times our kernels as well.
All samples are taken in turn, so that a busy machine slows all alike: decisions rest on ratios.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import cost, disk_cache
from .devices import DeviceSpec
from .errors import OptionError
from .pattern import BlockPattern
from .plan import DENSE, Site

log = logging.getLogger("blocksparse_compiler")

KIND = "calibration"
SECONDS = 1.2
SOURCE = "measured on this machine"
_PEAK_FRACTION = 0.98  # of the vector units' peak that torch's best dense layer is taken to reach
_BLOCKS = (32, 16, 8)

# Figures outside these factors of the defaults are taken for a disturbed measurement and cut off.
_TRUST = 8.0


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
SPARSE_LAYERS: Mapping[str, Site] = {
    "spatial": _conv(256, 3, 14),
    "pointwise": _conv(512, 1, 28),
    "linear": _linear(128, 768),
}


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
        log.warning("calibration failed (%s); planning with default figures for %s", error, spec.isa)
        return spec


def measure_host(*, thorough: bool = False, seconds: float = SECONDS) -> DeviceSpec:
    """Measures this machine and stores the result.

    Args:
        thorough: compile and measure our kernels too (nine C++ compilations).
        seconds: time to spend on measuring dense layers; as much again on ours.
    """
    spec = DeviceSpec.host()
    figures: dict[str, Any] = {}
    with _progress(
        "measuring this machine, once" if not thorough else "measuring this machine and our kernels"
    ):
        figures = dense_figures(spec, seconds)
        measured = spec.with_figures(SOURCE, **figures)
        if thorough:
            figures["efficiency"] = {**figures["efficiency"], **sparse_efficiencies(measured, seconds)}
            measured = spec.with_figures(SOURCE, **figures)
    measured.sources["efficiency"] = (
        SOURCE if thorough else f"{SOURCE} (dense), {spec.sources['efficiency']} (ours)"
    )
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


def dense_figures(spec: DeviceSpec, seconds: float) -> dict[str, Any]:
    """Peak, dense efficiencies, call overheads and bandwidths of this machine, as `DeviceSpec` fields."""
    layers = {**DENSE_LAYERS, "conv call": _conv(16, 1, 4), "linear call": _linear(4, 16)}
    times = _measure({name: (site, None, DENSE, {}) for name, site in layers.items()}, _copies(spec), seconds)
    figures: dict[str, Any] = {
        "dense_conv_call_seconds": times["conv call"],
        "dense_linear_call_seconds": times["linear call"],
    }
    for name, traffic in _levels(spec).items():
        rate = 3 * traffic / times[name]  # read, fetch before write, write
        figures[name] = rate / spec.threads if name.endswith("per_thread") else rate
    figures["l3_bytes_per_second"] = min(
        figures["l3_bytes_per_second"], spec.threads * figures["l2_bytes_per_second_per_thread"]
    )
    figures["dram_bytes_per_second"] = min(figures["dram_bytes_per_second"], figures["l3_bytes_per_second"])
    figures = {key: _trusted(value, getattr(spec, key)) for key, value in figures.items()}
    rates = {}
    for name, site in DENSE_LAYERS.items():
        overhead = figures["dense_linear_call_seconds" if site.op == "linear" else "dense_conv_call_seconds"]
        record = cost.dense_cost(site, spec)
        rates[name] = cost.value(record.flops) / max(times[name] - overhead, times[name] / 4)
    peak = max(rates.values()) / _PEAK_FRACTION / spec.threads
    peak = _trusted(peak, spec.peak_fp32_flops_per_second_per_thread)
    figures["peak_fp32_flops_per_second_per_thread"] = peak
    figures["efficiency"] = {name: _fraction(rate / peak / spec.threads) for name, rate in rates.items()}
    return figures


def _levels(spec: DeviceSpec) -> dict[str, int]:
    """Bytes of a buffer whose copy runs at the rate of each memory level."""
    l2 = spec.threads * spec.l2_bytes_per_thread
    return {
        "l2_bytes_per_second_per_thread": l2 // 3,
        "l3_bytes_per_second": max(2 * l2, spec.l3_bytes // 4),
        "dram_bytes_per_second": min(4 * spec.l3_bytes, 256 * 2**20),
    }


def _copies(spec: DeviceSpec) -> dict[str, Callable[[], Any]]:
    calls = {}
    for name, size in _levels(spec).items():
        source, target = torch.ones(size // 4), torch.zeros(size // 4)
        calls[name] = lambda target=target, source=source: torch.add(source, 1.0, out=target)
    return calls


# ---- our kernels ---------------------------------------------------------------------------------------


def sparse_efficiencies(spec: DeviceSpec, seconds: float) -> dict[str, float]:
    """`DeviceSpec.efficiency` entries of our kernels, for every kernel variant of the CPU."""
    from .variants import VARIANTS

    layers = {}
    for name, variant in VARIANTS.items():
        for kind, site in SPARSE_LAYERS.items():
            for block in _BLOCKS:
                pattern = checkerboard(site, block)
                if variant.device == "cpu" and variant.unsupported(site, pattern) is None:
                    config = next(iter(variant.configs(site, pattern, spec)), {})
                    layers[f"{name}/{block}x{block}/{kind}"] = (site, pattern, name, config)
    times = _measure(layers, {}, seconds)
    return {
        label: fit_efficiency(site, pattern, spec, times[label])
        for label, (site, pattern, _, _) in layers.items()
    }


def checkerboard(site: Site, block: int) -> BlockPattern:
    """Every other tile kept: the same work in every block row."""
    shape = (site.out_channels, site.in_channels // site.groups, *site.kernel_size)
    full = BlockPattern.full(shape, (block, block), site.groups)
    rows, taps, cols = full.grid_shape
    index = torch.arange(rows)[:, None, None] + torch.arange(taps)[:, None] + torch.arange(cols)
    return full.with_kept(index % 2 == 0)


def fit_efficiency(site: Site, pattern: BlockPattern, spec: DeviceSpec, seconds: float) -> float:
    """The efficiency at which `cost.sparse_cost` predicts `seconds` for this layer."""
    kind = cost.geometry(site)
    bh, bw = pattern.block_shape
    ideal = replace(spec, efficiency={**spec.efficiency, f"{bh}x{bw}/{kind}": 1.0})
    record = cost.sparse_cost(site, pattern, ideal)
    epilogue = cost.value(cost.epilogue_seconds(site, pattern.block_shape, spec))
    work = cost.value(record.compute_seconds) - epilogue
    return _fraction(work / max(seconds - epilogue - cost.value(record.overhead_seconds), 1e-9))


# ---- helpers -------------------------------------------------------------------------------------------


def _measure(
    layers: Mapping[str, tuple[Site, BlockPattern | None, str, Mapping[str, Any]]],
    calls: Mapping[str, Callable[[], Any]],
    seconds: float,
) -> dict[str, float]:
    """Shortest seconds of each layer, net of the cost of calling a compiled graph, and of each call."""
    from . import tune

    compiled = {}
    for name, (site, pattern, kernel, config) in layers.items():
        run, x = tune.compile_candidate(site, pattern, kernel, config)
        compiled[name] = lambda run=run, x=x: run(x)
    with torch.no_grad():
        times = tune.interleave({**compiled, **calls, "empty": tune.call_cost()}, seconds)
    empty = times["empty"].minimum
    return {
        name: max(times[name].minimum - (empty if name in layers else 0.0), 1e-7)
        for name in (*layers, *calls)
    }


def _trusted(measured: float, default: float) -> float:
    return min(max(measured, default / _TRUST), default * _TRUST)


def _fraction(measured: float) -> float:
    return min(max(measured, 0.02), 1.0)
