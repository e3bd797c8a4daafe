"""What a training step of one layer costs: output, input gradient and weight gradient, dense or sparse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .cost import MARGIN, Hints, best_config, dense_cost, format_seconds, sparse_cost
from .cost import Candidate as _Candidate
from .devices import AnyDevice, DeviceSpec
from .pattern import BlockPattern
from .plan import DENSE, Decision, Site
from .training_tables import phases
from .variants import VARIANTS, output_pixels

KERNELS = {"cpu": "cpu_f32", "cuda": "triton_gather"}
"""The row of the kernel table that trains layers on a device."""
DENSE_WEIGHT_GRAD = 1.2
"""Time of oneDNN's weight gradient over its forward pass; measured at 0.97 to 1.3 for ResNet-50's layers. The
same is assumed of GPUs, where it has not been measured."""
SPARSE_WEIGHT_GRAD = 1.2
"""The same for kept tiles: 1.05 to 1.35 measured on CPUs."""


def kernel_for(site: Site) -> str:
    """The row of the kernel table that trains layers on the device of this one."""
    return KERNELS.get(site.device.partition(":")[0], KERNELS["cpu"])


def choose_training(
    site: Site,
    patterns: Sequence[BlockPattern],
    device: AnyDevice,
    *,
    allow_dense: bool = True,
    hints: Hints | None = None,
) -> Decision:
    """The cheaper way to train a layer whose zeros are fixed, and one sentence saying why.

    Args:
        patterns: the tiles that can be nonzero, in one or more block shapes.
        allow_dense: False takes a kernel wherever one exists.
        hints: numbers for symbolic sizes.
    """
    kernel = kernel_for(site)
    step = dense_cost(site, device, hints).evaluate(hints) * (2 + DENSE_WEIGHT_GRAD)
    estimates = {DENSE: step}
    refusals = [(pattern, _refusal(site, pattern)) for pattern in patterns]
    runnable = [pattern for pattern, refusal in refusals if refusal is None]
    if not runnable:
        reason = next((r for _, r in refusals if r), "no fixed zero blocks in any supported tile shape")
        return Decision(site, DENSE, f"trains dense: {reason}", estimates=estimates)
    seconds = {pattern: _sparse_seconds(site, pattern, device, hints) for pattern in runnable}
    best = min(seconds, key=seconds.__getitem__)
    estimates[kernel] = seconds[best]
    bh, bw = best.block_shape
    times = f"{format_seconds(seconds[best])} against {format_seconds(step)} dense, forward and backward"
    kept = f"{best.density:.0%} of {bh}x{bw} tiles kept"
    if allow_dense and seconds[best] >= MARGIN * step:
        return Decision(site, DENSE, f"trains dense: {kept}: {times}", best, estimates=estimates)
    config = best_config(site, _Candidate(seconds[best], kernel, best), device)
    return Decision(site, kernel, f"{kept}: {times} ({step / seconds[best]:.1f}x)", best, config, estimates)


def input_grad_sites(site: Site) -> list[Site]:
    """The convolutions that the input gradient is made of, one for each phase of the stride."""
    swapped = replace(
        site, out_channels=site.in_channels, in_channels=site.out_channels, groups=1, bias=False, epilogue=()
    )
    if not site.kernel_size:
        return [replace(swapped, input_shape=(*site.input_shape[:-1], site.out_channels))]
    shape = (site.input_shape[0], site.out_channels, *site.output_spatial)
    return [
        replace(
            swapped,
            kernel_size=phase.kernel_size,
            stride=(1,) * len(site.stride),
            padding=tuple((r, r) for r in _reaches(phase.kernel_size, phase.dilation)),
            dilation=phase.dilation,
            input_shape=shape,
        )
        for phase in phases(site.kernel_size, site.stride, _flat(site.padding), site.dilation)
    ]


def _reaches(kernel_size: Sequence[int], dilation: Sequence[int]) -> list[int]:
    return [d * (k - 1) // 2 for k, d in zip(kernel_size, dilation, strict=True)]


def _flat(padding: Sequence[tuple[int, int]]) -> list[int]:
    return [p for pair in padding for p in pair]


def _refusal(site: Site, pattern: BlockPattern) -> str | None:
    """Why the layer cannot train on these tiles, as a phrase."""
    refusal = VARIANTS[kernel_for(site)].unsupported(site, pattern)
    if refusal:
        return refusal
    on_cpu = site.device.partition(":")[0] == "cpu"
    if site.op not in ("linear", "conv1d", "conv2d") and on_cpu:
        return f"no kernel for the gradients of {site.op}"
    (bh, bw), (out_channels, in_channels) = pattern.block_shape, pattern.group_channels
    if (bh % 4 or bw % 4) and on_cpu:
        return f"gradients need blocks of multiples of 4, not {bh}x{bw}"
    if site.groups > 1 and (out_channels % bh or in_channels % bw):
        return f"{bh}x{bw} blocks straddle groups of {out_channels}x{in_channels} channels"
    return None


def _sparse_seconds(site: Site, pattern: BlockPattern, device: AnyDevice, hints: Hints | None) -> float:
    kernel = kernel_for(site)
    forward = sparse_cost(site, pattern, device, kernel, hints=hints).evaluate(hints)
    # The input gradient multiplies the same tiles, transposed; strided layers share them out over phases.
    mirrored = sparse_cost(_mirrored(site), pattern.transpose(), device, kernel, hints=hints)
    backward = mirrored.evaluate(hints)
    rate = device.l3_bytes_per_second if isinstance(device, DeviceSpec) else device.l2_bytes_per_second
    packing = 3 * 2 * 4 * pattern.kept_elements / rate
    return (1 + SPARSE_WEIGHT_GRAD) * forward + backward + packing + _filling(site, pattern, rate)


def _filling(site: Site, pattern: BlockPattern, rate: float) -> float:
    """Seconds to copy activations into channels that whole blocks cover."""
    (bh, bw), pixels = pattern.block_shape, output_pixels(site) or 0
    filled = site.in_channels * bool(site.in_channels % bw) + site.out_channels * bool(site.out_channels % bh)
    return 3 * 4 * pixels * filled / rate


def _mirrored(site: Site) -> Site:
    """A layer that does the input gradient's work: as many products, on tiles of the other shape."""
    sites = input_grad_sites(site)
    if len(sites) == 1:
        return sites[0]
    same = replace(sites[0], kernel_size=site.kernel_size, dilation=site.dilation, groups=site.groups)
    return replace(same, padding=tuple((r, r) for r in _reaches(site.kernel_size, site.dilation)))
