"""Which way to run a layer, and why: the cheapest candidate by `roofline`, dense included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from . import gpu_roofline, variants
from .candidate_cost import (
    MARGIN,
    Config,
    break_even_density,
    configs,
    dense_cost,
    sparse_cost,
    with_sizes,
)
from .depthwise import DEPTHWISE
from .devices import AnyDevice
from .few_rows import runs_whole
from .gpu_devices import GpuSpec
from .pattern import BlockPattern
from .plan import DENSE, Decision, Site
from .roofline import OVERLAP, Cost, Hints, geometry, symbolic, value


@dataclass(frozen=True)
class Candidate:
    """One block-sparse kernel that can run a layer, and its estimated time.

    Args:
        config: the parameters that the estimate holds for; empty where it does not depend on them.
        limit: what bounds the time, as `Cost.limit` names it.
    """

    seconds: float
    variant: str
    pattern: BlockPattern
    config: Config = field(default_factory=dict)
    limit: str = ""

    @property
    def label(self) -> str:
        """Key of `Decision.estimates`: variant and block shape."""
        bh, bw = self.pattern.block_shape
        return f"{self.variant} {bh}x{bw}"


def candidates(
    site: Site, weight_patterns: Sequence[BlockPattern], device: AnyDevice, hints: Hints | None = None
) -> tuple[list[Candidate], list[str]]:
    """Every kernel variant at every block shape that can run the layer, fastest first; and why others not."""
    found, refusals = [], []
    for pattern in weight_patterns:
        for name, variant in variants.variants_for(site).items():
            refusal = variant.unsupported(site, pattern)
            candidate = None if refusal else _candidate(site, pattern, device, name, hints)
            if candidate:
                found.append(candidate)
            else:
                refusals.append(refusal or f"{name} does not run on {device.name}")
    return sorted(found, key=lambda c: c.seconds), refusals


def _candidate(
    site: Site, pattern: BlockPattern, device: AnyDevice, variant: str, hints: Hints | None
) -> Candidate | None:
    """The variant with its best parameters; None if this device cannot run it."""
    if not isinstance(device, GpuSpec):
        if not configs(site, pattern, device, variant):
            return None
        cost = sparse_cost(site, pattern, device, variant)
        return Candidate(cost.evaluate(hints), variant, pattern)
    best, sized = None, with_sizes(site, hints)
    for config in configs(site, pattern, device, variant):
        cost = gpu_roofline.sparse_cost(sized, pattern, device, variant, config)
        seconds = cost.evaluate()
        if best is None or seconds < best.seconds:
            best = Candidate(seconds, variant, pattern, config, cost.limit())
    return best


def choose(
    site: Site,
    weight_patterns: Sequence[BlockPattern],
    device: AnyDevice,
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
    estimates = {DENSE: dense_cost(site, device, hints).evaluate(hints)}
    obstacle = _structural_obstacle(site, weight_patterns, allow_dense) or getattr(device, "obstacle", None)
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
    config = best_config(site, best, device)
    reason = why_sparse(
        best.pattern, best.seconds, estimates[DENSE], forced=not allow_dense, limit=_limit(best, device)
    )
    how = variants.VARIANTS[best.variant].describe(site, best.pattern, device, config)
    reason = "; ".join(filter(None, (reason, _other_tile(best, ranked), how)))
    return Decision(site, best.variant, reason, best.pattern, config, estimates)


def _other_tile(best: Candidate, ranked: Sequence[Candidate]) -> str:
    """What the best other tile would take, if there is a choice; as a phrase."""
    others = (c for c in ranked if c.pattern.block_shape != best.pattern.block_shape)
    other = next(others, None)
    return f"{_kept(other.pattern)} would take {format_seconds(other.seconds)}" if other else ""


def best_config(site: Site, candidate: Candidate, device: AnyDevice) -> Mapping[str, int | str]:
    """The parameters that the estimate holds for, or those that the variant itself guesses to be best."""
    return candidate.config or next(
        iter(variants.VARIANTS[candidate.variant].configs(site, candidate.pattern, device)), {}
    )


def _structural_obstacle(site: Site, patterns: Sequence[BlockPattern], allow_dense: bool) -> str | None:
    """Why no sparse kernel can serve this layer, whatever its cost."""
    if 0 in site.input_shape:
        return "its input is empty"
    if patterns and all(DEPTHWISE.unsupported(site, pattern) is None for pattern in patterns):
        return None
    if geometry(site) == "depthwise":
        return "depthwise convolution has one input channel per group"
    whole = allow_dense and not runs_whole(site) and all(p.num_kept == p.kept.numel() for p in patterns)
    if not patterns or whole:
        shapes = {p.block_shape for p in patterns}
        if len(shapes) == 1:
            return "no zero blocks found in {}x{} tiles".format(*shapes.pop())
        return "no zero blocks found in any supported tile shape"
    return None


def why_sparse(
    pattern: BlockPattern,
    seconds: float,
    dense_seconds: float,
    *,
    forced: bool = False,
    measured: bool = False,
    limit: str = "",
) -> str:
    """The sentence for a layer that goes sparse; `limit` says what bounds its time."""
    kept = "dense on its own kernel" if pattern.density == 1 else f"{_kept(pattern)} kept"
    reason = (
        f"{kept}: {format_seconds(seconds)} against {format_seconds(dense_seconds)} dense "
        f"({dense_seconds / seconds:.1f}x{', measured' if measured else ''}){limit}"
    )
    return f"{reason}; dense is not allowed here" if forced and seconds >= dense_seconds else reason


def _why_dense(site: Site, best: Candidate, device: AnyDevice, hints: Hints | None) -> str:
    pattern = best.pattern
    if best.variant == DEPTHWISE.name:
        return "stays dense: torch's depthwise convolution is as fast at this size"
    if pattern.density == 1:
        return "stays dense: no zero blocks found, and torch's kernel is as fast at this size"
    limit = break_even_density(
        with_sizes(site, hints) if isinstance(device, GpuSpec) else site,
        pattern.block_shape,
        device,
        variant=best.variant,
        config=best.config,
        hints=hints,
    )
    if limit < 0.01:
        if dense_cost(site, device, hints).limit(hints) == "memory":
            return "stays dense: bound by reading and writing activations, which no zero block spares"
        return "stays dense: too little work at this size for any sparse kernel to pay"
    if pattern.density < limit:
        return f"stays dense: the {_kept(pattern)} kept are too uneven over the output channels to pay"
    needs = f"{pattern.density:.0%} kept needs below {limit:.0%} to pay at this size"
    return f"stays dense: {needs}{_limit(best, device)}"


def _limit(candidate: Candidate, device: AnyDevice) -> str:
    """What bounds a kernel on a GPU, as the end of a sentence."""
    if not isinstance(device, GpuSpec):
        return ""
    return {
        "compute": ", bound by matrix instructions",
        "L2": ", bound by loading tiles from L2",
        "memory": ", bound by device memory",
        "idle": f", with too few programs to fill {device.multiprocessors} multiprocessors",
        "overhead": ", bound by launching it",
    }.get(candidate.limit, "")


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
