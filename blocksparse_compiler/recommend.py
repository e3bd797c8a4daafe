"""`recommend_block_shape`: which block shape pays on a device, said before training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from . import cost, variants
from .devices import AnyDevice, home
from .devices import device as find_device
from .errors import OptionError
from .gpu_devices import GpuSpec
from .pattern import BlockPattern, BlockShape, check_block_shape
from .plan import Site
from .recommendation import LayerAdvice, Recommendation, shape_name

GPU_BLOCK_SHAPES = ((128, 64), (64, 64), (64, 32), (32, 64), (32, 32), (32, 16), (16, 16), (8, 8))
CPU_BLOCK_SHAPES = ((64, 64), (32, 32), (32, 16), (32, 1), (16, 16), (16, 1), (8, 8), (4, 4))
DENSITIES = (0.5, 0.25, 0.1)

NEAR = 0.95
"""The finest shape that reaches this part of the best speed-up is recommended."""
WORTH_IT = 1.05
"""Least speed-up of the whole model, over the densities, that is worth training for."""

_GRID = np.array([0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
_FINE = np.linspace(0.0, 1.0, 101)


def recommend_block_shape(
    model: torch.nn.Module,
    *example_inputs: Any,
    device: str | torch.device | AnyDevice | None = None,
    dtype: torch.dtype | str | None = None,
    block_shapes: Sequence[BlockShape] | None = None,
    densities: Sequence[float] = DENSITIES,
) -> Recommendation:
    """Which block shape to train `model` with for speed on `device`; nothing is run or changed.

    Estimates, with the cost model that also plans, what each layer would gain if a share of its blocks
    were kept, at random and evenly over the output channels. The finest shape within 5 % of the fastest is
    recommended, as finer blocks cost less accuracy.

    Args:
        model: before or after training; its weights do not matter, and may be on the meta device.
        example_inputs: what `model(*example_inputs)` takes. The batch size matters.
        device: as in `explain`; `None` is the device that the model is on.
        dtype: plan for layers of this dtype; by default, that of the model.
        block_shapes: `(bh, bw)` to compare, output by input channels; by default, those that suit `device`.
        densities: shares of kept blocks, in `(0, 1]`.

    Raises:
        OptionError: for an unknown device, an impossible dtype or density, or no block shape.
        PatternError: for an impossible block shape.
        LayerError: if the model cannot be captured as one graph.
    """
    spec = find_device(home(model, example_inputs) if device is None else device)
    shapes = _check_shapes(block_shapes, spec)
    shares = _check_densities(densities)
    layers = [
        _Layer(site, names, spec, shapes)
        for site, names in _distinct_sites(model, example_inputs, spec, _dtype_name(dtype))
    ]
    advice = tuple(layer.advice(shapes, shares) for layer in layers)
    found = Recommendation(spec, shares, shapes, advice)
    best, reason = _choose(found)
    return replace(found, best=best, reason=reason)


# ---- the choice ------------------------------------------------------------------------------------


def _choose(found: Recommendation) -> tuple[BlockShape | None, str]:
    scores = {
        shape: math.prod(found.speedup(shape, d) for d in found.densities) ** (1 / len(found.densities))
        for shape in found.block_shapes
    }
    fastest = max(scores, key=scores.__getitem__)
    if scores[fastest] < WORTH_IT:
        return None, f"No block shape pays on {found.device.name} at these sizes{_why(found)}."
    near = [shape for shape in scores if scores[shape] >= max(WORTH_IT, NEAR * scores[fastest])]
    best = min(near, key=lambda shape: (math.prod(shape), -scores[shape]))
    speedups = {d: found.speedup(best, d) for d in found.densities}
    gains = ", ".join(f"{gain:.1f}x at {d:.0%}" for d, gain in speedups.items() if gain >= WORTH_IT)
    other = (
        "no finer shape comes within 5 %"
        if best == fastest
        else f"the finest within 5 % of the fastest, {shape_name(fastest)}"
    )
    reason = f"Train with {shape_name(best)} blocks: an estimated {gains} of the blocks kept; {other}."
    if found.found_as(best) not in variants.block_shapes(found.device.type):
        reason += f" Compile with options={{'block_shape': {best}}}."
    return best, reason


def _why(found: Recommendation) -> str:
    """The reason that holds for most of the dense time."""
    weights: dict[str, float] = {}
    for layer in found.layers:
        weights[layer.note] = weights.get(layer.note, 0.0) + layer.dense_seconds * len(layer.names)
    note = max(weights, key=weights.__getitem__, default="")
    return f": {note}" if note else ""


# ---- one layer -------------------------------------------------------------------------------------


class _Layer:
    """Estimates for all layers of one geometry."""

    def __init__(
        self, site: Site, names: tuple[str, ...], device: AnyDevice, shapes: Sequence[BlockShape]
    ) -> None:
        self.site, self.names, self.device = site, names, device
        self.dense = cost.dense_cost(site, device).evaluate()
        tiles = [*variants.block_shapes(device.type, None, site.dtype)]
        tiles += [tile for shape in shapes for tile in variants.block_shapes(device.type, shape, site.dtype)]
        self.refusals: list[str] = []
        self.curves = {
            tile: curve for tile in dict.fromkeys(tiles) if (curve := self._curve(tile)) is not None
        }

    def _curve(self, tile: BlockShape) -> np.ndarray | None:
        """Seconds of the best kernel for such tiles, by density."""
        site = self.site
        if (
            cost.geometry(site) == "depthwise"
            or getattr(self.device, "obstacle", None)
            or not self._fits(tile)
        ):
            return None
        shape = (site.out_channels, site.in_channels // site.groups, *site.kernel_size)
        full = BlockPattern.full(shape, tile, site.groups)
        curves = []
        for name, variant in variants.variants_for(site).items():
            refusal = variant.unsupported(site, full)
            if refusal:
                self.refusals.append(refusal)
            else:
                curves += [self._seconds(tile, name, c) for c in variant.configs(site, full, self.device)]
        return np.minimum.reduce(curves) if curves else None

    def _seconds(self, tile: BlockShape, variant: str, config: cost.Config) -> np.ndarray:
        costs = (
            cost.sparse_cost(self.site, tile, self.device, variant, density=density, config=config)
            for density in _GRID.tolist()
        )
        return np.array([record.evaluate() for record in costs])

    def _fits(self, shape: BlockShape) -> bool:
        groups = self.site.groups
        return shape[0] <= self.site.out_channels // groups and shape[1] <= self.site.in_channels // groups

    def seconds(self, shape: BlockShape, densities: np.ndarray) -> np.ndarray | None:
        """With this share of `shape` blocks kept at random, on the best tiles that hold or split them."""
        if not self._fits(shape):
            return None
        looked_for = (
            *variants.block_shapes(self.device.type, None, self.site.dtype),
            *variants.block_shapes(self.device.type, shape, self.site.dtype),
        )
        found = [
            np.interp(merged_density(densities, shape, tile), _GRID, self.curves[tile])
            for tile in dict.fromkeys(looked_for)
            if tile in self.curves
        ]
        return np.minimum.reduce(found) if found else None

    def advice(self, shapes: Sequence[BlockShape], densities: Sequence[float]) -> LayerAdvice:
        speedups, break_even = {}, {}
        for shape in shapes:
            found = self.seconds(shape, np.array(densities))
            curve = self.seconds(shape, _FINE)
            limit = cost.MARGIN * self.dense
            speedups[shape] = {
                d: float(self.dense / s) if s < limit else 1.0
                for d, s in zip(
                    densities, [math.inf] * len(densities) if found is None else found, strict=True
                )
            }
            pays = np.zeros(1, bool) if curve is None else curve < limit
            break_even[shape] = float(_FINE[pays.nonzero()[0].max()]) if pays.any() else 0.0
        note = "" if any(break_even.values()) else self._why_never()
        return LayerAdvice(self.names, self.site, self.dense, speedups, break_even, note)

    def _why_never(self) -> str:
        obstacle: str | None = getattr(self.device, "obstacle", None)
        if obstacle:
            return obstacle
        tile = min(self.curves, key=math.prod, default=None)
        if tile is None and self.refusals:
            return max(self.refusals, key=self.refusals.count)
        site, patterns = self.site, []
        if tile is not None:
            shape = (site.out_channels, site.in_channels // site.groups, *site.kernel_size)
            full = BlockPattern.full(shape, tile, site.groups)
            every_tenth = torch.arange(full.kept.numel()).reshape(full.grid_shape) % 10 == 0
            patterns = [full.with_kept(every_tenth)]
        reason = cost.choose(site, patterns, self.device).reason.removeprefix("stays dense: ")
        return "its weight is smaller than any tile" if "no zero blocks" in reason else reason


def merged_density(density: np.ndarray, block: BlockShape, tile: BlockShape) -> np.ndarray:
    """Share of tiles that hold at least one of the blocks kept at random; blocks larger than it are split."""
    blocks = max(1.0, tile[0] / block[0]) * max(1.0, tile[1] / block[1])
    return 1 - (1 - density) ** blocks


# ---- input -----------------------------------------------------------------------------------------


def _distinct_sites(
    model: torch.nn.Module, inputs: tuple[Any, ...], device: AnyDevice, dtype: str | None
) -> list[tuple[Site, tuple[str, ...]]]:
    """The layers of the model as `device` would run them, equal ones together with their names."""
    from .passes.find_sites import find_sites
    from .passes.fold_batch_norm import fold_batch_norm
    from .passes.fold_constants import fold_constants
    from .passes.fold_pads import fold_pads
    from .planning import copy_graph
    from .trace import trace

    graph = copy_graph(trace(model, *inputs))
    fold_constants(graph)
    fold_pads(graph)
    fold_batch_norm(graph)
    names: dict[Site, list[str]] = {}
    for site in find_sites(graph):
        anonymous = replace(site, name="", node="", device=device.type, dtype=dtype or site.dtype)
        names.setdefault(anonymous, []).append(site.name)
    return [(site, tuple(found)) for site, found in names.items()]


def _dtype_name(dtype: torch.dtype | str | None) -> str | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise OptionError("recommend_block_shape", "a torch dtype", repr(dtype), "For example 'bfloat16'.")
    return name


def _check_shapes(shapes: Sequence[BlockShape] | None, device: AnyDevice) -> tuple[BlockShape, ...]:
    if shapes is None:
        return GPU_BLOCK_SHAPES if isinstance(device, GpuSpec) else CPU_BLOCK_SHAPES
    if not shapes:
        raise OptionError("recommend_block_shape", "at least one block shape", "none", "Leave it out.")
    return tuple(dict.fromkeys(check_block_shape(shape, "recommend_block_shape") for shape in shapes))


def _check_densities(densities: Sequence[float]) -> tuple[float, ...]:
    if not densities or not all(0 < d <= 1 for d in densities):
        raise OptionError(
            "recommend_block_shape", "densities in (0, 1]", repr(densities), "For example (0.5, 0.25)."
        )
    return tuple(sorted(set(map(float, densities)), reverse=True))
