"""Figures of a CPU from the times of `cpu_probes`: those at which the cost model predicts these times."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from .cpu_probes import EPILOGUE, Probe, Probes
from .devices import NUMBERS, DeviceSpec

SOURCE = "measured on this machine"

PEAKS = {
    "dense": "peak_fp32_flops_per_second_per_thread",
    "dense_bf16": "peak_bf16_flops_per_second_per_thread",
    "dense_int8": "peak_int8_ops_per_second_per_thread",
    "dense_amx": "peak_amx_flops_per_second_per_thread",
}
"""The peaks, by the prefix of torch's efficiencies."""

TRUST = 4.0
"""Figures outside this factor of the defaults are taken for a disturbed measurement and cut off."""
LEAST, MOST = 0.02, 4.0
"""Of peak; fractions above 1 say that the peak was taken too low."""

_STEPS = 18  # of bisection: to four digits
_ROUNDS = 3  # several figures have a part in one time


def fitted(spec: DeviceSpec, probes: Probes, times: Mapping[str, float]) -> DeviceSpec:
    """`spec` with the figures that explain the times of these probes; those without a time stay.

    A peak is the one at which torch's ungrouped convolutions reach the fractions known so far, so that the
    fractions of our kernels keep their ratio to it.
    """
    measured = {name: (probe, times[name]) for name, probe in probes.items() if name in times}
    found = spec
    for _ in range(_ROUNDS):
        for name, (probe, seconds) in measured.items():
            if name in NUMBERS:
                found = with_figure(found, name, solve(found, name, probe, seconds, default=spec))
        for prefix, name in PEAKS.items():
            convs = [measured.get(f"{prefix}/{kind}") for kind in ("spatial", "pointwise")]
            peaks = [solve(found, name, *conv, default=spec) for conv in convs if conv]
            if len(peaks) == len(convs):
                found = with_figure(found, name, statistics.geometric_mean(peaks))
        for name, (probe, seconds) in measured.items():
            if name not in NUMBERS:
                found = with_figure(found, name, solve(found, name, probe, seconds))
    return with_higher_peaks(found)


def solve(
    spec: DeviceSpec, name: str, probe: Probe, seconds: float, default: DeviceSpec | None = None
) -> float:
    """The figure at which the cost model predicts `seconds`; the nearest that is trusted, if none does.

    Args:
        default: where trust in a field of the spec centers.
    """
    low, high = LEAST, MOST
    if name in NUMBERS or name.startswith(EPILOGUE):
        center = getattr(default or spec, name, spec.epilogue_seconds_per_vector)
        low, high = center / TRUST, center * TRUST

    def predicted(figure: float) -> float:
        return probe.predicted(with_figure(spec, name, figure))

    rises = predicted(high) > predicted(low)
    for _ in range(_STEPS):
        middle = math.sqrt(low * high)
        if (predicted(middle) < seconds) == rises:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def with_figure(spec: DeviceSpec, name: str, figure: float) -> DeviceSpec:
    """`spec` with one field, one entry of the epilogues, or one efficiency replaced."""
    if name.startswith(EPILOGUE):
        epilogues = {**spec.tile_epilogue_seconds_per_vector, name.removeprefix(EPILOGUE): figure}
        return spec.with_figures(SOURCE, tile_epilogue_seconds_per_vector=epilogues)
    return spec.with_figures(
        SOURCE, **({name: figure} if name in NUMBERS else {"efficiency": {name: figure}})
    )


def with_higher_peaks(spec: DeviceSpec) -> DeviceSpec:
    """Where one of our kernels runs above its peak, that was taken too low: all of its fractions become those
    of a higher one. Torch's operators above it are bound by something else, and count as 1."""
    scales = dict.fromkeys(PEAKS.values(), 1.0)
    for name, fraction in spec.efficiency.items():
        if not name.startswith("dense"):
            scales[peak_of(name)] = max(scales[peak_of(name)], fraction)
    fractions = {
        name: min(1.0, fraction / scales[peak_of(name)]) for name, fraction in spec.efficiency.items()
    }
    changed = {name: fraction for name, fraction in fractions.items() if fraction != spec.efficiency[name]}
    peaks = {peak: getattr(spec, peak) * scale for peak, scale in scales.items() if scale > 1}
    return spec.with_figures(SOURCE, efficiency=changed, **peaks)


def peak_of(name: str) -> str:
    """The peak that an efficiency is a fraction of."""
    kernel = name.partition("/")[0]
    kind = next((kind for kind in ("amx", "bf16", "int8") if kind in kernel), "")
    return PEAKS[f"dense_{kind}" if kind else "dense"]
