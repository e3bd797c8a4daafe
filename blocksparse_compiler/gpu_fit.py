"""Fits the figures of a GPU that no data sheet gives to measured times of layers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

from .candidate_cost import Config, dense_cost
from .gpu_devices import MEASURED_FOLDER, GpuSpec
from .gpu_roofline import sparse_cost
from .pattern import BlockPattern
from .plan import DENSE, Site

SECONDS = ("load_latency_seconds", "program_seconds", "launch_seconds")
"""Fields that are fitted, besides the efficiencies that the measurements depend on."""

STEPS = (1.3, 1.1, 1.03)
"""Factors by which figures move, coarse ones first."""

REACH = 5.0
"""Figures stay within this factor of where they began."""

OUTLIER = 0.5
"""Errors of more than this, as a logarithm, count in proportion, smaller ones by their square."""


@dataclass(frozen=True)
class Measurement:
    """The time of one layer on a GPU.

    Args:
        variant: `"dense"`, or the kernel variant.
        pattern, config: of the block-sparse kernel.
    """

    site: Site
    seconds: float
    variant: str = DENSE
    pattern: BlockPattern | None = None
    config: Config = field(default_factory=dict)

    def estimate(self, spec: GpuSpec) -> float:
        if self.pattern is None:
            return dense_cost(self.site, spec).evaluate()
        return sparse_cost(self.site, self.pattern, spec, self.variant, self.config).evaluate()


def fit(
    spec: GpuSpec, measurements: Sequence[Measurement], source: str = "fitted to measurements"
) -> GpuSpec:
    """`spec` with efficiencies, latencies and the launch cost that explain the measurements best.

    Coordinate descent on the logarithms of the figures. Peaks, bandwidths and sizes stay; what a figure does
    not influence leaves it alone.

    Args:
        measurements: of kernels launched as `spec` says (`GpuSpec.with_graphs` for CUDA graphs).
    """
    if not measurements:
        return spec
    best, least = spec, loss(spec, measurements)
    names = [*SECONDS, *(f"efficiency {name}" for name in spec.efficiency)]
    for step in STEPS:
        moved = True
        while moved:
            moved = False
            for name in names:
                for factor in (step, 1 / step):
                    tried = _scaled(best, name, factor, spec, source)
                    error = loss(tried, measurements) if tried else math.inf
                    if tried and error < least * (1 - 1e-4):
                        best, least, moved = tried, error, True
                        break
    return best


def loss(spec: GpuSpec, measurements: Sequence[Measurement]) -> float:
    """Mean error of the estimates' logarithms: squared while small, linear beyond."""
    return mean(_huber(math.log(m.estimate(spec) / m.seconds)) for m in measurements)


def errors(spec: GpuSpec, measurements: Sequence[Measurement]) -> Mapping[str, tuple[int, float, float]]:
    """By variant: how many, the median of estimate over measurement, and the median factor of error."""
    found: dict[str, list[float]] = {}
    for m in measurements:
        found.setdefault(m.variant, []).append(math.log(m.estimate(spec) / m.seconds))
    return {
        variant: (len(logs), math.exp(median(logs)), math.exp(median(abs(x) for x in logs)))
        for variant, logs in found.items()
    }


def write(fitted: GpuSpec, source: str, folder: Path = MEASURED_FOLDER) -> Path:
    """Writes the fitted figures of this GPU, which its spec has from then on (`gpu_devices.with_measured`).

    The launch cost counts as that inside a CUDA graph.
    """
    figures = {
        "load_latency_seconds": fitted.load_latency_seconds,
        "program_seconds": fitted.program_seconds,
        "graph_launch_seconds": fitted.launch_seconds,
        "efficiency": dict(fitted.efficiency),
    }
    path = folder / f"{fitted.name}.figures.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"source": source, "figures": figures}, indent=1) + "\n")
    return path


def _huber(error: float) -> float:
    size = abs(error)
    return size**2 if size <= OUTLIER else OUTLIER * (2 * size - OUTLIER)


def _scaled(spec: GpuSpec, name: str, factor: float, start: GpuSpec, source: str) -> GpuSpec | None:
    """`spec` with one figure moved; None where that leaves its range."""
    _, _, key = name.partition(" ")
    before = spec.efficiency[key] if key else getattr(spec, name)
    first = start.efficiency[key] if key else getattr(start, name)
    value = before * factor
    if not first / REACH <= value <= first * REACH or (key and value > 1):
        return None
    return spec.with_figures(source, **({"efficiency": {key: value}} if key else {name: value}))
