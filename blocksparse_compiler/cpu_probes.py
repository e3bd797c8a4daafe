"""Layers that tell the figures of a CPU: at each, one figure decides how long it takes.

Names of probes are names of figures: fields of `DeviceSpec`, entries of its `efficiency`, or, after
`EPILOGUE`, of its `tile_epilogue_seconds_per_vector`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import cost, roofline, tune, variants
from .amx_variant import AMX
from .cpu_spmm import SPMM
from .depthwise import DEPTHWISE, depthwise_pattern
from .devices import DeviceSpec
from .pattern import BlockPattern, BlockShape
from .plan import DENSE, Site

EPILOGUE = "epilogue/"


@dataclass(frozen=True)
class Probe:
    """A layer on one kernel."""

    site: Site
    pattern: BlockPattern | None = None
    kernel: str = DENSE
    config: Mapping[str, int | str] = field(default_factory=dict)

    def predicted(self, spec: DeviceSpec) -> float:
        """Seconds by the cost model."""
        if self.pattern is None:
            return cost.dense_cost(self.site, spec).evaluate()
        return cost.sparse_cost(self.site, self.pattern, spec, self.kernel).evaluate()

    def compiled(self) -> tuple[Callable[[Tensor], Any], Tensor]:
        """What runs it, and an input for that."""
        return tune.compile_candidate(self.site, self.pattern, self.kernel, self.config)


Probes = dict[str, Probe]


def conv(channels: int, kernel: int, size: int, groups: int = 1, out_channels: int = 0) -> Site:
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


# ---- torch's operators ---------------------------------------------------------------------------------

# One layer per class of dense efficiency; each takes some tenths of a millisecond.
LAYERS: Mapping[str, Site] = {
    "spatial": conv(256, 3, 14),
    "pointwise": conv(512, 1, 28),
    "linear": _linear(128, 768),
    "few_rows": _linear(8, 768),
    "grouped": conv(256, 3, 28, groups=32),
    "depthwise": conv(256, 3, 28, groups=256),
}
LOW_PRECISION = ("spatial", "pointwise", "linear", "few_rows")
"""The classes that are measured in other dtypes than fp32, too."""


def call_probes() -> Probes:
    """Layers that take no time but that of the call."""
    small = conv(32, 1, 4)
    return {
        "dense_conv_call_seconds": Probe(conv(16, 1, 4)),
        "dense_linear_call_seconds": Probe(_linear(4, 16)),
        "sparse_call_seconds": Probe(small, tiles(small, (16, 16), 2), "cpu_f32"),
    }


def dense_probes(spec: DeviceSpec, dtypes: tuple[str, ...] = ("float32", "bfloat16", "uint8")) -> Probes:
    """A layer for every efficiency of torch's operators, named by the instructions it runs on."""
    probes = {}
    for dtype in dtypes:
        for kind in LAYERS if dtype == "float32" else LOW_PRECISION:
            prefix, _ = roofline.dense_instructions(dtype, kind, spec)
            probes[f"{prefix}/{kind}"] = Probe(replace(LAYERS[kind], dtype=dtype))
    wide = replace(conv(64, 1, 56, out_channels=256), dtype="uint8")
    if "uint8" in dtypes:
        probes["dense_int8_epilogue_seconds_per_vector"] = Probe(wide)
    return probes


# ---- our kernels ---------------------------------------------------------------------------------------


def kernel_probes(spec: DeviceSpec) -> Probes:
    """A layer for every figure of our kernels that does not depend on the tile."""
    narrow, wide = conv(128, 1, 28), conv(64, 1, 28, out_channels=256)
    deep = conv(1024, 1, 14, out_channels=512)
    layer = LAYERS["depthwise"]
    probes = {
        "transpose_seconds_per_vector": Probe(narrow, scattered(narrow, (4, 1), 0.03), SPMM.name),
        SPMM.name: Probe(wide, scattered(wide, (4, 1), 0.5), SPMM.name),
        "l2_read_over_copy": Probe(deep, scattered(deep, (1, 1), 0.1), SPMM.name),
        DEPTHWISE.name: Probe(layer, depthwise_pattern(layer)[0], DEPTHWISE.name),
    }
    return _runnable(probes, spec)


def tile_probes(spec: DeviceSpec) -> Probes:
    """Layers for every efficiency and epilogue of our kernels, by tile; and for AMX tiles as such."""
    probes = {}
    for name, variant in variants.VARIANTS.items():
        if variant.device != "cpu" or name in (SPMM.name, DEPTHWISE.name):
            continue
        for block in (32, 16, 8):
            tile, shape = f"{name}/{block}x{block}", (block, block)
            for kind in ("spatial", "pointwise", "linear"):
                site = replace(LAYERS[kind], dtype=variant.dtypes[0])
                probes[f"{tile}/{kind}"] = Probe(site, tiles(site, shape, 2), name)
            if name != AMX.name:
                wide = replace(conv(64, 1, 56, out_channels=256), dtype=variant.dtypes[0])
                probes[EPILOGUE + tile] = Probe(wide, scattered(wide, shape, 0.25), name)
    layer = replace(LAYERS["linear"], dtype="bfloat16")
    probes["amx_tile_seconds"] = Probe(layer, tiles(layer, (32, 32), 12), AMX.name)
    return _runnable(probes, spec)


def tiles(site: Site, block_shape: BlockShape, every: int) -> BlockPattern:
    """One in `every` tiles kept, on diagonals: the same work in every block row."""
    shape = (site.out_channels, site.in_channels // site.groups, *site.kernel_size)
    full = BlockPattern.full(shape, block_shape, site.groups)
    rows, taps, columns = full.grid_shape
    index = torch.arange(rows)[:, None, None] + torch.arange(taps)[:, None] + torch.arange(columns)
    return full.with_kept(index % every == 0)


def scattered(site: Site, block_shape: BlockShape, density: float) -> BlockPattern:
    """Random tiles, always the same: caches would learn a regular pattern, or suffer from it."""
    full = BlockPattern.full((site.out_channels, site.in_channels, *site.kernel_size), block_shape)
    draw = torch.rand(full.grid_shape, generator=torch.Generator().manual_seed(0))
    return full.with_kept(draw < density)


def _runnable(probes: Probes, spec: DeviceSpec) -> Probes:
    """Those whose kernel this machine has, with its first parameters."""
    found = {}
    for name, probe in probes.items():
        variant, pattern = variants.VARIANTS[probe.kernel], probe.pattern
        assert pattern is not None
        if not variant.unsupported(probe.site, pattern):
            configs = variant.configs(probe.site, pattern, spec)
            if configs:
                found[name] = replace(probe, config=configs[0])
    return found
