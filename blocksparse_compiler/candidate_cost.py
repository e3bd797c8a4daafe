"""Costs on any device: the roofline of CPUs or that of GPUs, by the kind of spec."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

from . import (
    amx_roofline,
    amx_variant,
    cpu_spmm,
    depthwise,
    gpu_roofline,
    roofline,
    spmm_roofline,
    tuned_table,
    variants,
)
from .devices import AnyDevice
from .errors import OptionError
from .gpu_devices import GpuSpec
from .layouts import Layouts
from .pattern import BlockPattern, BlockShape
from .plan import Site
from .pointwise_depthwise import is_fused
from .roofline import Cost, Hints, symbolic, value

MARGIN = 0.95
"""A sparse kernel must be estimated below this fraction of the dense time to be chosen."""

Config = Mapping[str, "int | str"]


def dense_cost(site: Site, device: AnyDevice, hints: Hints | None = None) -> Cost:
    """The layer as torch and Inductor run it dense; on GPUs the cheaper of two ways, for `hints`."""
    if isinstance(device, GpuSpec):
        return gpu_roofline.dense_cost(site, device, hints)
    return roofline.dense_cost(site, device)


def sparse_cost(
    site: Site,
    pattern: BlockPattern | BlockShape,
    device: AnyDevice,
    variant: str = "",
    *,
    density: float = 1.0,
    config: Config | None = None,
    hints: Hints | None = None,
) -> Cost:
    """The layer on a block-sparse kernel.

    Args:
        pattern: the kept tiles; or a block shape, for tiles of that `density` spread evenly.
        variant: name of the kernel variant; by default, on GPUs, the best one.
        config: the kernel's parameters; by default, on GPUs, the best of those that the variant offers. On
            CPUs only layouts count, and whether it is fused with the depthwise layer behind.

    Raises:
        OptionError: if no such kernel runs on this GPU.
    """
    if not isinstance(device, GpuSpec):
        if variant == cpu_spmm.SPMM.name:
            layouts, fused = Layouts.of(config or {}), is_fused(config or {})
            return spmm_roofline.sparse_rows_cost(
                site, pattern, device, layouts, density=density, fused=fused
            )
        if variant == depthwise.DEPTHWISE.name:
            return depthwise.depthwise_cost(site, device, Layouts.of(config or {}), is_fused(config or {}))
        if variant == amx_variant.AMX.name:
            return amx_roofline.amx_cost(site, pattern, device, variant, density=density)
        return roofline.sparse_cost(site, pattern, device, variant, density=density)
    if config is not None:
        choices = [(variant, config)]
    else:
        names = [variant] if variant else _supporting(site, pattern, device)
        choices = [(name, c) for name in names for c in configs(site, pattern, device, name)]
    if not choices:
        bh, bw = pattern.block_shape if isinstance(pattern, BlockPattern) else pattern
        raise OptionError(
            f"sparse_cost({site.name!r})",
            f"a kernel that runs this layer in {bh}x{bw} tiles on {device.name}",
            variant or "none",
            f"Kernels: {', '.join(variants.VARIANTS)}.",
        )
    costs = (gpu_roofline.sparse_cost(site, pattern, device, v, c, density=density) for v, c in choices)
    return min(costs, key=lambda cost: cost.evaluate(hints))


def _supporting(site: Site, pattern: BlockPattern | BlockShape, device: AnyDevice) -> list[str]:
    pattern = _as_pattern(site, pattern)
    rows = variants.VARIANTS.items()
    return [n for n, v in rows if v.device == device.type and v.unsupported(site, pattern) is None]


def configs(
    site: Site, pattern: BlockPattern | BlockShape, device: AnyDevice, variant: str
) -> list[variants.Parameters]:
    """Parameters to choose from: those that the variant offers, or the ones measured to be best."""
    pattern = _as_pattern(site, pattern)
    offered = variants.VARIANTS[variant].configs(site, pattern, device)
    return offered[:1] if tuned_table.best(variant, site, pattern, device.name) else offered


def _as_pattern(site: Site, pattern: BlockPattern | BlockShape) -> BlockPattern:
    if isinstance(pattern, BlockPattern):
        return pattern
    shape = (site.out_channels, site.in_channels // site.groups, *site.kernel_size)
    return _full(shape, pattern, site.groups)


@functools.lru_cache(maxsize=256)
def _full(shape: tuple[int, ...], block_shape: BlockShape, groups: int) -> BlockPattern:
    return BlockPattern.full(shape, block_shape, groups)


def break_even_density(
    site: Site,
    block_shape: BlockShape,
    device: AnyDevice,
    *,
    variant: str = "",
    config: Config | None = None,
    hints: Hints | None = None,
    margin: float = MARGIN,
) -> float:
    """Largest kept fraction, in `[0, 1]`, at which the sparse kernel still beats `margin` x dense."""
    target = margin * dense_cost(site, device, hints).evaluate(hints)

    def pays(density: float) -> bool:
        cost = sparse_cost(site, block_shape, device, variant, density=density, config=config, hints=hints)
        return cost.evaluate(hints) < target

    if pays(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if pays(middle) else (low, middle)
    return low


def with_sizes(site: Site, hints: Hints | None) -> Site:
    """The site with numbers for its symbolic sizes: symbolic costs are a hundred times slower to evaluate."""
    if all(isinstance(size, int) for size in site.input_shape):
        return site
    return replace(site, input_shape=tuple(int(value(symbolic(s), hints)) for s in site.input_shape))
