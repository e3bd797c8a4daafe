"""Which way to run a layer, and why: the cheapest candidate by `roofline`, dense included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import variants
from .devices import DeviceSpec
from .pattern import BlockPattern, BlockShape
from .plan import DENSE, Decision, Site
from .roofline import OVERLAP, Cost, Hints, dense_cost, geometry, sparse_cost, symbolic, value

MARGIN = 0.95
"""A sparse kernel must be estimated below this fraction of the dense time to be chosen."""


# ---- break-even ------------------------------------------------------------------------------------


def break_even_density(
    site: Site,
    block_shape: BlockShape,
    device: DeviceSpec,
    *,
    variant: str = "",
    hints: Hints | None = None,
    margin: float = MARGIN,
) -> float:
    """Largest kept fraction, in `[0, 1]`, at which the sparse kernel still beats `margin` x dense."""
    target = margin * dense_cost(site, device).evaluate(hints)

    def pays(density: float) -> bool:
        return sparse_cost(site, block_shape, device, variant, density=density).evaluate(hints) < target

    if pays(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if pays(middle) else (low, middle)
    return low


# ---- the decision ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """One block-sparse kernel that can run a layer, and its estimated time."""

    seconds: float
    variant: str
    pattern: BlockPattern

    @property
    def label(self) -> str:
        """Key of `Decision.estimates`: variant and block shape."""
        bh, bw = self.pattern.block_shape
        return f"{self.variant} {bh}x{bw}"


def candidates(
    site: Site, weight_patterns: Sequence[BlockPattern], device: DeviceSpec, hints: Hints | None = None
) -> tuple[list[Candidate], list[str]]:
    """Every kernel variant at every block shape that can run the layer, fastest first; and why others not."""
    found, refusals = [], []
    for pattern in weight_patterns:
        for name, variant in variants.VARIANTS.items():
            if variant.device != site.device.partition(":")[0]:
                continue
            refusal = variant.unsupported(site, pattern)
            if refusal:
                refusals.append(refusal)
            else:
                seconds = sparse_cost(site, pattern, device, name).evaluate(hints)
                found.append(Candidate(seconds, name, pattern))
    return sorted(found, key=lambda c: c.seconds), refusals


def choose(
    site: Site,
    weight_patterns: Sequence[BlockPattern],
    device: DeviceSpec,
    *,
    allow_dense: bool = True,
    hints: Hints | None = None,
) -> Decision:
    """The cheapest way to run a layer, and one sentence saying why.

    Args:
        site: the layer.
        weight_patterns: its weight, tiled by one or more block shapes; each covers every nonzero.
        device: the machine to plan for.
        allow_dense: `False` takes the best sparse kernel that can run the layer, even if it does not pay.
        hints: numbers for symbolic sizes.
    """
    if not site.input_shape:
        return Decision(site, DENSE, "stays dense: its input shape is unknown")
    estimates = {DENSE: dense_cost(site, device).evaluate(hints)}
    obstacle = _structural_obstacle(site, weight_patterns, allow_dense)
    if obstacle:
        return Decision(site, DENSE, f"stays dense: {obstacle}", estimates=estimates)
    ranked, refusals = candidates(site, weight_patterns, device, hints)
    if not ranked:
        return Decision(site, DENSE, f"stays dense: {_most_common(refusals)}", estimates=estimates)
    for candidate in reversed(ranked):  # the fastest of a variant gives the variant's own entry
        estimates[candidate.label] = estimates[candidate.variant] = candidate.seconds
    best = ranked[0]
    if allow_dense and best.seconds >= MARGIN * estimates[DENSE]:
        reason = _why_dense(site, best, device, hints)
        return Decision(site, DENSE, reason, best.pattern, estimates=estimates)
    return Decision(
        site,
        best.variant,
        why_sparse(best.pattern, best.seconds, estimates[DENSE], forced=not allow_dense),
        best.pattern,
        best_config(site, best, device),
        estimates,
    )


def best_config(site: Site, candidate: Candidate, device: DeviceSpec) -> Mapping[str, int | str]:
    """The parameters that the kernel variant itself guesses to be best."""
    return next(iter(variants.VARIANTS[candidate.variant].configs(site, candidate.pattern, device)), {})


def _structural_obstacle(site: Site, patterns: Sequence[BlockPattern], allow_dense: bool) -> str | None:
    """Why no sparse kernel can serve this layer, whatever its cost."""
    if 0 in site.input_shape:
        return "its input is empty"
    if geometry(site) == "depthwise":
        return "depthwise convolution has one input channel per group"
    if not patterns or (allow_dense and all(p.num_kept == p.kept.numel() for p in patterns)):
        return "no zero blocks found in any supported tile shape"
    return None


def why_sparse(
    pattern: BlockPattern,
    seconds: float,
    dense_seconds: float,
    *,
    forced: bool = False,
    measured: bool = False,
) -> str:
    """The sentence for a layer that goes sparse."""
    reason = (
        f"{_kept(pattern)} kept: {format_seconds(seconds)} against {format_seconds(dense_seconds)} dense "
        f"({dense_seconds / seconds:.1f}x{', measured' if measured else ''})"
    )
    return f"{reason}; dense is not allowed here" if forced and seconds >= dense_seconds else reason


def _why_dense(site: Site, best: Candidate, device: DeviceSpec, hints: Hints | None) -> str:
    pattern = best.pattern
    limit = break_even_density(site, pattern.block_shape, device, variant=best.variant, hints=hints)
    if limit < 0.01:
        if dense_cost(site, device).limit(hints) == "memory":
            return "stays dense: bound by reading and writing activations, which no zero block spares"
        return "stays dense: too little work at this size for any sparse kernel to pay"
    if pattern.density < limit:
        return f"stays dense: the {_kept(pattern)} kept are too uneven over the output channels to pay"
    return f"stays dense: {pattern.density:.0%} kept needs below {limit:.0%} to pay at this size"


def _kept(pattern: BlockPattern) -> str:
    bh, bw = pattern.block_shape
    return f"{pattern.density:.0%} of {bh}x{bw} tiles"


def _most_common(refusals: Sequence[str]) -> str:
    return max(refusals, key=refusals.count) if refusals else "no kernel supports this layer"


def format_seconds(seconds: float) -> str:
    """Three significant digits in the unit that suits: `"0.41 ms"`, `"12.3 us"`, `"1.20 s"`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size * (1.0 if unit == "s" else 0.1):
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds * 1e6:.1f} us"


__all__ = [
    "MARGIN",
    "OVERLAP",
    "Candidate",
    "Cost",
    "Hints",
    "best_config",
    "break_even_density",
    "candidates",
    "choose",
    "dense_cost",
    "format_seconds",
    "geometry",
    "sparse_cost",
    "symbolic",
    "value",
    "why_sparse",
]
