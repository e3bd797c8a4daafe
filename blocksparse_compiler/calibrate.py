"""Measures the present machine, so that estimates are about it. Once; the figures are kept on disk.

The quick part (about five seconds, run by itself at the first plan for this machine) times memory, torch's
operators in every dtype, and what our kernels have in common. The thorough part (`blocksparse calibrate`)
compiles and times every kernel in every tile as well. What the machine lacks is not measured.
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
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import cpu_fit, cpu_probes, disk_cache, tune
from .busy import Busy, alone
from .chain_probe import chain_probe
from .devices import MIB, DeviceSpec
from .errors import OptionError
from .layer_chain import CHAIN

log = logging.getLogger("blocksparse_compiler")

KIND = "calibration"
VERSION = 4
"""Of what is measured and how; figures of another version are measured anew."""

SECONDS = 0.8
_EMPTY = "empty"
_MAX_UNREST = 1.4  # median over minimum of a layer's times
_TRUST_BANDWIDTH = 2.5


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
        thorough: compile and measure our kernels in every tile too (nine C++ compilations for each dtype).
        seconds: time to spend on measuring layers, each of the two parts.

    Raises:
        Busy: if the times vary too much to mean anything. Nothing is stored then.
    """
    spec = DeviceSpec.host()
    probes = {**cpu_probes.call_probes(), **cpu_probes.dense_probes(spec), **cpu_probes.kernel_probes(spec)}
    probes[CHAIN] = chain_probe(spec)
    tiles = (
        {**cpu_probes.dense_probes(spec, ("float16",)), **cpu_probes.tile_probes(spec)} if thorough else {}
    )
    with _progress("measuring this machine and our kernels" if thorough else "measuring this machine, once"):
        times = {**_measure(tiles, 2 * seconds), **_measure(probes, seconds)}
        known = spec.with_figures(cpu_fit.SOURCE, **_bandwidths(spec, seconds / 4))
    measured = cpu_fit.fitted(known, {**tiles, **probes}, times)
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
    if stored.get("thorough"):
        return "torch's operators and our kernels in every tile"
    return "torch's operators, memory and what our kernels share (quick)"


def _key(spec: DeviceSpec) -> list[Any]:
    return [VERSION, spec.threads, spec.isa, *disk_cache.versions()]


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


# ---- measuring -----------------------------------------------------------------------------------------


def _measure(probes: cpu_probes.Probes, seconds: float) -> dict[str, float]:
    """Median seconds of each layer, net of the cost of calling a compiled graph; warm, as in a network.

    A layer that this machine cannot compile is logged and left out.
    """
    if not probes:
        return {}
    calls: dict[str, Callable[[], Any]] = {_EMPTY: tune.call_cost()}
    for name, probe in probes.items():
        try:
            run, x = probe.compiled()
        except Exception as error:
            log.info("%s keeps its default: %s", name, error)
        else:
            calls[name] = functools.partial(run, x)
    # glibc keeps blocks up to this size once one was freed; else some layers would page-fault at every call.
    torch.empty(30 * MIB, dtype=torch.uint8)
    with torch.no_grad(), alone():
        times = tune.interleave(calls, seconds, warm=True)
    empty = times.pop(_EMPTY).median
    unrest = statistics.median(timing.median / timing.minimum for timing in times.values())
    if unrest > _MAX_UNREST:
        raise Busy(f"the machine is busy: times vary by {unrest:.1f}x")
    return {name: max(timing.median - empty, 1e-7) for name, timing in times.items()}


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
    return bandwidth_figures(
        spec, {name: 3 * size * repeats / times[name].median for name, (size, repeats) in levels.items()}
    )


def bandwidth_figures(spec: DeviceSpec, rates: Mapping[str, float]) -> dict[str, float]:
    """Fields of `DeviceSpec` from the rates of all threads together, nearest level first."""
    found, fastest = {}, float("inf")
    for name, rate in rates.items():
        fastest = min(fastest, rate)
        default = getattr(spec, name)
        figure = fastest / spec.threads if name.endswith("per_thread") else fastest
        found[name] = min(max(figure, default / _TRUST_BANDWIDTH), default * _TRUST_BANDWIDTH)
    return found


def _copy(size: int, repeats: int) -> Callable[[], None]:
    """Reads, fetches before it writes, and writes: three times `size` bytes move."""
    source, target = torch.ones(size // 4), torch.zeros(size // 4)

    def copy() -> None:
        for _ in range(repeats):
            torch.add(source, 1.0, out=target)

    return copy
