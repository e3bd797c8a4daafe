"""What one way to run a layer on a GPU costs, as a `roofline.Cost`.

Four roofs, after Williams, Waterman, Patterson, "Roofline" (CACM 52(4), 2009):

    compute   programs on multiprocessors, each as long as its matrix instructions, its shared memory and
              the arrival of its tiles allow; whole waves, the heaviest block row
    L2        the tiles that all programs load: activations once per kept tile (or once for the block rows
              of one program that share it), weights once per tile of pixels
    memory    input, kept weights and output, once each
    overhead  launches

A block-sparse kernel does less arithmetic per byte that it loads than a dense one: its activation tiles
serve one block row. That is why L2 traffic, which dense kernels hide, decides here.
"""

from __future__ import annotations

import math

import sympy

from .gpu_devices import GpuSpec
from .gpu_programs import Config, Programs, Tile, item_bytes, makespan, peak_flops_per_second, programs
from .pattern import BlockPattern, BlockShape
from .plan import Site
from .roofline import FEW_ROWS, Cost, Hints, geometry, positions, symbolic, weight_elements
from .sizes import Number, ceiling, maximum, number, where

OVERLAP = 0.95
"""Part of the smaller roofs that runs behind the largest; the rest is in the efficiencies."""

# ---- traffic that every kernel has -----------------------------------------------------------------


def _input_elements(site: Site) -> Number:
    return number(sympy.Mul(*(symbolic(size) for size in site.input_shape)))


def _positions(site: Site) -> Number:
    return number(positions(site))


def _macs(site: Site, elements: float) -> Number:
    """Multiply-adds, those with padding included: GPU kernels compute them."""
    if site.transposed:  # every input pixel meets the whole kernel
        return _input_elements(site) / site.in_channels * elements
    return _positions(site) * elements


def _activation_seconds(traffic: Number, device: GpuSpec) -> Number:
    """Time to move activations: those that fit in half of L2 are still there from the layer before."""
    dram = traffic / (device.dram_bytes_per_second * device.efficiency["dram"])
    return where(traffic <= device.l2_bytes / 2, _l2_seconds(traffic, device), dram)


def _l2_seconds(traffic: Number, device: GpuSpec) -> Number:
    return traffic / (device.l2_bytes_per_second * device.efficiency["l2"])


def _record(**parts: Number) -> Cost:
    return Cost(**{key: sympy.sympify(part) for key, part in parts.items()}, overlap=OVERLAP)


# ---- the dense candidate ---------------------------------------------------------------------------

# (out-channels, pixels, part of the usual efficiency) of the tiles that libraries choose among.
_DENSE_TILES = ((128, 256, 1.0), (128, 128, 0.95), (64, 128, 0.8), (64, 64, 0.65))
_SPLIT_K = 1024
"""Libraries split sums of at least twice this length when tiles are few."""


def dense_cost(site: Site, device: GpuSpec, hints: Hints | None = None) -> Cost:
    """The layer as Inductor runs it dense, with what follows.

    That is a call of cuDNN or cuBLAS, and one more kernel that adds the bias of a convolution and applies
    the epilogue, which reads and writes the output again. If the device has `templates` (`max_autotune`),
    a Triton template of Inductor with the epilogue fused is taken where that is cheaper, for `hints`.
    """
    kind, usual = geometry(site), _library_efficiency(site, device)
    output = item_bytes(site) * _positions(site) * site.out_channels
    followed = bool(site.epilogue) or (site.bias and bool(site.kernel_size))
    library = _dense_kernel(site, device, usual, extra_traffic=2 * output if followed else 0)
    if not followed or not device.templates or kind in ("grouped", "depthwise"):
        return library
    template = _dense_kernel(site, device, min(usual, device.efficiency["dense/template"]))
    return min((library, template), key=lambda cost: cost.evaluate(hints))


def _library_efficiency(site: Site, device: GpuSpec) -> float:
    """Of cuDNN and cuBLAS, as a fraction of peak; the figure for grouped layers is that of 8 channels."""
    kind = geometry(site)
    if site.groups == 1 or kind == "depthwise":
        return device.efficiency[f"dense/{kind}"]
    narrow = min(site.in_channels, site.out_channels) // site.groups
    return min(device.efficiency["dense/spatial"], device.efficiency["dense/grouped"] * narrow / 8)


def _dense_kernel(site: Site, device: GpuSpec, efficiency: float, extra_traffic: Number = 0) -> Cost:
    size = item_bytes(site)
    pixels, weight = _positions(site), weight_elements(site)
    flops = 2 * _macs(site, weight)
    rate = peak_flops_per_second(site, device) * efficiency
    activations = size * (_input_elements(site) + pixels * site.out_channels)
    streaming = device.dram_bytes_per_second * device.efficiency["dram"]
    few = device.dram_bytes_per_second * device.efficiency["dense/few_rows"]
    weights = size * weight / (streaming if site.kernel_size else few)
    extra = _activation_seconds(extra_traffic, device)
    launches = 1 + (extra_traffic != 0)
    return _record(
        flops=flops,
        bytes=activations + size * weight + extra_traffic,
        compute_seconds=flops / rate / _dense_fill(site, device),
        memory_seconds=_activation_seconds(activations, device) + weights,
        # The second kernel runs after the first: its time adds up, whatever bounds that one.
        overhead_seconds=launches * device.launch_seconds + device.program_seconds + extra,
    )


def _dense_fill(site: Site, device: GpuSpec) -> Number:
    """Part of the multiprocessors that a library keeps busy with the best of its tiles."""
    length = weight_elements(site) // site.out_channels
    best: Number = 0
    for rows, columns, part in _DENSE_TILES:
        tiles = maximum(1, ceiling(_positions(site) / columns)) * math.ceil(site.out_channels / rows)
        used = _positions(site) * site.out_channels / (tiles * rows * columns)
        for split in (1, 2, 4, 8):
            if split == 1 or length >= split * _SPLIT_K:
                programs = tiles * split
                waves = ceiling(programs / device.multiprocessors)
                best = maximum(best, part * used * programs / (waves * device.multiprocessors))
    return where(_positions(site) < FEW_ROWS + 1, 1, best)  # products of few rows have kernels of their own


# ---- block-sparse kernels --------------------------------------------------------------------------


def sparse_cost(
    site: Site,
    pattern: BlockPattern | BlockShape,
    device: GpuSpec,
    variant: str,
    config: Config,
    *,
    density: float = 1.0,
) -> Cost:
    """The layer on a block-sparse kernel with these parameters.

    Args:
        pattern: the kept tiles; or a block shape, for tiles of that `density` spread evenly.
        variant: name of the kernel variant.
        config: its parameters: `pixels`, `warps`, `stages`, perhaps `split`, `precision`.
    """
    work = programs(site, pattern, variant, config, density)
    if isinstance(pattern, BlockPattern):
        return kernel_cost(site, device, variant, config, work, pattern.block_shape, pattern.kept_elements)
    kept = density * weight_elements(site)
    return kernel_cost(site, device, variant, config, work, pattern, kept)


def kernel_cost(
    site: Site,
    device: GpuSpec,
    variant: str,
    config: Config,
    work: Programs,
    block: BlockShape,
    kept: float,
) -> Cost:
    """The cost of a kernel that runs `work` for every tile of pixels.

    Args:
        block: shape of a tile.
        kept: elements of the weight that are stored.
    """
    size, split = item_bytes(site), int(config.get("split", 1))
    tile = Tile(site, block, device, variant, config, work.block_rows)
    tiles = tile.count
    once = isinstance(tiles, int) and tiles == 1  # each weight tile is read by one program, from memory
    throughput, latency = tile.seconds(work, far=once)
    compute = maximum(
        makespan(throughput, tiles, device.multiprocessors),
        makespan(latency, tiles, device.multiprocessors * tile.occupancy),
    )
    output = size * _positions(site) * site.out_channels
    partials = 2 * split * 4 * _positions(site) * site.out_channels if split > 1 else 0  # written, read
    l2 = tiles * tile.l2_bytes(work) + output + partials
    streaming = device.dram_bytes_per_second * device.efficiency["dram"]
    activations = size * _input_elements(site) + output
    return _record(
        flops=2 * _macs(site, kept),
        bytes=activations + size * kept,
        compute_seconds=compute,
        idle_seconds=compute - tiles * float(throughput.sum()) / device.multiprocessors,
        l2_seconds=_l2_seconds(l2, device),
        memory_seconds=_activation_seconds(activations, device) + size * kept / streaming,
        overhead_seconds=device.launch_seconds * (2 if split > 1 else 1),
    )
