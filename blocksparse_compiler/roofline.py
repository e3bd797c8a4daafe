"""What one way to run a layer costs: a small symbolic record.

The sizes that are unknown until run time stay symbols. The time is a roofline with fixed terms,

    compute = flops / (peak * efficiency),  memory = bytes / bandwidth,
    seconds = max(compute, memory) + (1 - OVERLAP) * min(compute, memory) + call overhead,

after Williams, Waterman, Patterson, "Roofline" (CACM 52(4), 2009), with the part of the smaller roof that
measurements show is not hidden. The efficiency of a block-sparse kernel depends on its block shape and on
how well the layer fills register tiles and threads; a block row pays for its epilogue however few tiles it
keeps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from . import cpu_variants
from .devices import DeviceSpec
from .pattern import BlockPattern, BlockShape
from .plan import Site

OVERLAP = 0.5
"""Part of the smaller of compute and memory time that runs behind the larger; fitted to measurements."""

DEFAULT_HINT = 8
"""Stands in for a symbolic size without a hint."""

FEW_ROWS = 16
"""Linear layers on fewer rows have a dense efficiency of their own."""

_FUNCTIONS = {"floor", "ceiling", "Max", "Min", "Mod", "Piecewise"}

Hints = Mapping[str, int]


# ---- the record ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What one candidate needs; every field is a sympy expression in the layer's symbolic sizes.

    Args:
        flops: multiply and add count as two; kept tiles only.
        bytes: compulsory traffic of input, weight and output.
        compute_seconds, memory_seconds: the two roofs of a CPU.
        overhead_seconds: paid on top.
        l2_seconds: third roof, on GPUs: tiles loaded from L2.
        idle_seconds: part of `compute_seconds` in which multiprocessors wait for the last programs.
        overlap: part of the smaller roofs that runs behind the largest.
    """

    flops: sympy.Expr
    bytes: sympy.Expr
    compute_seconds: sympy.Expr
    memory_seconds: sympy.Expr
    overhead_seconds: sympy.Expr
    l2_seconds: sympy.Expr = sympy.S.Zero
    idle_seconds: sympy.Expr = sympy.S.Zero
    overlap: float = OVERLAP

    @property
    def roofs(self) -> tuple[sympy.Expr, ...]:
        return self.compute_seconds, self.l2_seconds, self.memory_seconds

    @property
    def seconds(self) -> sympy.Expr:
        hidden = self.overlap * sympy.Max(*self.roofs)
        return hidden + (1 - self.overlap) * sympy.Add(*self.roofs) + self.overhead_seconds

    def evaluate(self, hints: Hints | None = None) -> float:
        """Seconds for these sizes; `DEFAULT_HINT` for a symbol without a hint."""
        roofs = [value(roof, hints) for roof in self.roofs]
        return (
            self.overlap * max(roofs) + (1 - self.overlap) * sum(roofs) + value(self.overhead_seconds, hints)
        )

    def limit(self, hints: Hints | None = None) -> str:
        """What bounds the time: `"compute"`, `"L2"`, `"memory"`, `"idle"` or `"overhead"`."""
        idle = value(self.idle_seconds, hints)
        parts = {
            "compute": value(self.compute_seconds, hints) - idle,
            "L2": value(self.l2_seconds, hints),
            "memory": value(self.memory_seconds, hints),
            "idle": idle,
            "overhead": value(self.overhead_seconds, hints),
        }
        return max(parts, key=parts.__getitem__)


def symbolic(size: int | str) -> sympy.Expr:
    """A size of a `Site` as a sympy expression over positive integer symbols."""
    if isinstance(size, int):
        return sympy.Integer(size)
    names = set(re.findall(r"[A-Za-z_]\w*", size)) - _FUNCTIONS
    local = {name: sympy.Symbol(name, integer=True, positive=True) for name in names}
    return sympy.sympify(size, locals=local)


def value(expression: sympy.Expr, hints: Hints | None = None) -> float:
    """The number an expression takes for these sizes."""
    if expression.is_number:
        return float(expression)
    known = hints or {}
    return float(expression.subs({s: known.get(s.name, DEFAULT_HINT) for s in expression.free_symbols}))


# ---- geometry --------------------------------------------------------------------------------------


def geometry(site: Site) -> str:
    """The class of a layer: `"linear"`, `"pointwise"`, `"spatial"`, `"grouped"` or `"depthwise"`.

    Groups of at least 16 channels each run like ungrouped layers, in torch too.
    """
    narrow = min(site.in_channels, site.out_channels) // site.groups
    if site.groups > 1 and narrow < 16:
        return "depthwise" if site.groups == site.in_channels else "grouped"
    if not site.kernel_size:
        return "linear"
    return "pointwise" if math.prod(site.kernel_size) == 1 else "spatial"


def kind(site: Site) -> str:
    """The class of a layer on a block-sparse kernel: `"linear"`, `"pointwise"` or `"spatial"`."""
    return "linear" if not site.kernel_size else "spatial" if math.prod(site.kernel_size) > 1 else "pointwise"


def positions(site: Site) -> sympy.Expr:
    """Number of output pixels (rows of a linear layer), all images together."""
    sizes = site.input_shape[:-1] if not site.kernel_size else (site.input_shape[0], *site.output_spatial)
    return sympy.Mul(*(symbolic(size) for size in sizes))


def weight_elements(site: Site) -> int:
    return site.out_channels * (site.in_channels // site.groups) * math.prod(site.kernel_size)


def inside_fraction(site: Site) -> float:
    """Fraction of (output pixel, tap) pairs that read inside the image: kernels skip the others.

    Taken as 1 along dimensions of symbolic size, and for transposed convolutions.
    """
    fraction = 1.0
    for i, k in enumerate(site.kernel_size if not site.transposed else ()):
        size, out = site.input_shape[2 + i], site.output_spatial[i]
        if isinstance(size, str) or isinstance(out, str) or out < 1:
            continue
        first = range(-site.padding[i][0], out * site.stride[i] - site.padding[i][0], site.stride[i])
        fraction *= sum(0 <= o + t * site.dilation[i] < size for o in first for t in range(k)) / (out * k)
    return fraction


def _macs(site: Site, elements: float) -> sympy.Expr:
    """Multiply-adds of a weight with this many elements."""
    if site.transposed:  # every input pixel meets the whole kernel
        pixels = sympy.Mul(*(symbolic(s) for s in (site.input_shape[0], *site.input_shape[2:])))
        return pixels * elements
    return positions(site) * elements * inside_fraction(site)


def activation_bytes(site: Site) -> sympy.Expr:
    """Input read once, output written once (and fetched first, as caches do)."""
    read = sympy.Mul(*(symbolic(size) for size in site.input_shape))
    return cpu_variants.item_bytes(site) * (read + 2 * positions(site) * site.out_channels)


def memory_seconds(traffic: sympy.Expr, device: DeviceSpec) -> sympy.Expr:
    """Time to move `traffic` bytes at the rate of the smallest cache that holds them."""
    l2 = device.threads * device.l2_bytes_per_thread
    return sympy.Piecewise(
        (traffic / (device.threads * device.l2_bytes_per_second_per_thread), traffic <= l2),
        (traffic / device.l3_bytes_per_second, traffic <= device.l3_bytes),
        (traffic / device.dram_bytes_per_second, True),
    )


# ---- candidates ------------------------------------------------------------------------------------


def dense_cost(site: Site, device: DeviceSpec) -> Cost:
    """The layer as a dense operator of torch."""
    flops = 2 * _macs(site, weight_elements(site))
    traffic = activation_bytes(site) + cpu_variants.item_bytes(site) * weight_elements(site)
    linear = not site.kernel_size
    return Cost(
        flops,
        traffic,
        flops / _dense_rate(site, device) + _dense_epilogue_seconds(site, device),
        memory_seconds(traffic, device),
        sympy.Float(device.dense_linear_call_seconds if linear else device.dense_conv_call_seconds),
    )


def dense_instructions(dtype: str, class_: str, device: DeviceSpec) -> tuple[str, float]:
    """What torch's operator runs on: the prefix of its efficiencies, and the peak of one thread."""
    if dtype in ("uint8", "int8"):
        on_amx = device.has_amx and class_ != "depthwise"  # which is twice as fast on bytes as on bf16
        twice = 2 * device.peak_amx_flops_per_second_per_thread
        peak = device.peak_int8_ops_per_second_per_thread
        return ("dense_amx_int8", twice) if on_amx else ("dense_int8", peak)
    if dtype != "bfloat16":
        prefix = "dense_f16" if dtype == "float16" else "dense"
        return prefix, device.peak_fp32_flops_per_second_per_thread
    if device.has_amx and class_ != "depthwise":
        return "dense_amx", device.peak_amx_flops_per_second_per_thread
    return "dense_bf16", device.peak_bf16_flops_per_second_per_thread


def _dense_epilogue_seconds(site: Site, device: DeviceSpec) -> sympy.Expr:
    """What torch's operators on integers take beyond their products."""
    if not site.is_quantized:
        return sympy.S.Zero
    vectors = positions(site) * site.out_channels / device.vector_lanes
    return vectors * device.dense_int8_epilogue_seconds_per_vector / device.threads


def _dense_rate(site: Site, device: DeviceSpec) -> sympy.Expr:
    """Flops per second of torch's operator, on all threads."""
    class_ = geometry(site)
    prefix, peak = dense_instructions(site.dtype, class_, device)
    peak *= device.threads

    def fraction(name: str, default: float) -> float:
        usual = "dense_amx" if "amx" in prefix else "dense"
        others = device.efficiency.get(f"{usual}/{name}", default)
        return device.efficiency.get(f"{prefix}/{name}", others)

    usual = sympy.Float(peak * fraction(class_, 0.5))
    if class_ != "linear":
        return usual
    few = sympy.Float(peak * fraction("few_rows", fraction("linear", 0.5)))
    return sympy.Piecewise((few, positions(site) < FEW_ROWS), (usual, True))


def sparse_cost(
    site: Site,
    pattern: BlockPattern | BlockShape,
    device: DeviceSpec,
    variant: str = "",
    *,
    density: float = 1.0,
) -> Cost:
    """The layer on a block-sparse kernel.

    Args:
        pattern: the kept tiles; or a block shape, for tiles of that `density` spread evenly.
        variant: name of the kernel variant, for figures measured for it alone.
    """
    if isinstance(pattern, BlockPattern):
        block, kept, skew = pattern.block_shape, float(pattern.kept_elements), row_skew(pattern, device)
    else:
        block, kept, skew = pattern, density * weight_elements(site), 1.0
    pixels = positions(site)
    flops = 2 * _macs(site, kept)
    traffic = activation_bytes(site) + cpu_variants.item_bytes(site) * sympy.sympify(kept)
    rate = device.peak_flops_per_second(site.dtype) * efficiency(site, block, device, variant)
    tile_pixels, _ = _register_tile(site, block, device)
    # Either pixels or block rows are split over the threads, whichever divides better.
    chunks = sympy.ceiling(pixels / tile_pixels)
    turns = sympy.ceiling(chunks / device.threads) * device.threads / chunks
    return Cost(
        flops,
        traffic,
        flops
        * sympy.Min(turns, skew)
        / (rate * _tile_fill(site, tile_pixels) * _sums_in_flight(site, block, device))
        + epilogue_seconds(site, block, device, variant),
        memory_seconds(traffic, device),
        sympy.Float(device.sparse_call_seconds),
    )


def _register_tile(site: Site, block: BlockShape, device: DeviceSpec) -> tuple[int, int]:
    """(pixels, vector lanes) that the inner loop works on."""
    tile = cpu_variants.device_tile(site.dtype, block, device)
    return (
        (min(tile.pixels, cpu_variants.cache_friendly_pixels(site, device)), tile.lanes // tile.split)
        if tile
        else (1, 1)
    )


def epilogue_seconds(site: Site, block: BlockShape, device: DeviceSpec, variant: str = "") -> sympy.Expr:
    """Time of bias, activation and stores, however many tiles are kept."""
    vectors = positions(site) * -(-site.out_channels // _register_tile(site, block, device)[1])
    square = _square(block[0])
    known = device.tile_epilogue_seconds_per_vector.get(f"{variant}/{square}x{square}")
    return vectors * (known or device.epilogue_seconds_per_vector) / device.threads


def _square(height: int) -> int:
    """Side of the highest measured square tile that is no higher."""
    return max((side for side in (32, 16, 8) if side <= height), default=8)


def _tile_fill(site: Site, tile_pixels: int) -> sympy.Expr:
    """Part of the pixels in register tiles that is not computed twice.

    Pointwise layers tile all pixels in a row; others tile each output row, or the same row of several
    images, in segments of equal length.
    """
    if not site.kernel_size or geometry(site) == "pointwise":
        total, length = positions(site), tile_pixels
        count = sympy.ceiling(total / length)
        return total / (count * sympy.ceiling(total / count))
    width = symbolic(site.output_spatial[-1])
    count = sympy.ceiling(width / tile_pixels)
    return width / (count * sympy.ceiling(width / count))


_PRODUCTS_IN_FLIGHT = 8
"""Sums that keep multipliers busy: two products start in each cycle, and take four."""

_PACKED_PRODUCTS_IN_FLIGHT = 12
"""The same of instructions that add up several products; measured on Zen 5."""


def _sums_in_flight(site: Site, block: BlockShape, device: DeviceSpec) -> float | sympy.Expr:
    """Part of the time in which narrow images keep multipliers busy.

    A tile covers whole rows as far as they fit; a product waits for the last one of the same sum. Elsewhere
    tiles have sums enough, or so few rows that their weights take longer to read.
    """
    tile = cpu_variants.device_tile(site.dtype, block, device)
    if kind(site) != "spatial" or tile is None:
        return 1.0
    most, width = _register_tile(site, block, device)[0], symbolic(site.output_spatial[-1])
    segment = sympy.ceiling(width / sympy.ceiling(width / most))
    pixels = sympy.Piecewise((segment * sympy.floor(most / segment), width <= most), (segment, True))
    wanted = _PACKED_PRODUCTS_IN_FLIGHT if device.multiplies(site.dtype) else _PRODUCTS_IN_FLIGHT
    return sympy.Min(1, pixels * tile.vectors / wanted)


LOW_COLUMNS = 0.85
"""Rate of columns lower than 32 against wider tiles: the loop over tiles starts anew after few products."""


def efficiency(site: Site, block_shape: BlockShape, device: DeviceSpec, variant: str = "") -> float:
    """Fraction of peak that kept tiles run at.

    The block's height decides: it fills vectors and register tiles. Widths run alike (measured from 1 to
    64), but for columns lower than 32, so a shape without a figure takes that of the highest square that
    is no higher.
    """
    height, width = block_shape
    square = _square(height)
    shapes = (f"{height}x{width}", f"{square}x{square}")
    names = (
        name for shape in shapes for name in (f"{variant}/{shape}/{kind(site)}", f"{shape}/{kind(site)}")
    )
    known = next((device.efficiency[name] for name in names if name in device.efficiency), 0.3)
    if width == 1 and height < 32:
        known *= LOW_COLUMNS
    return known * min(1.0, height / 8)  # lower than a vector of 8: lanes go unused in proportion


def row_skew(pattern: BlockPattern, device: DeviceSpec) -> float:
    """Time of the slowest thread over the mean, with whole block rows shared out by kept tiles."""
    tiles = pattern.kept.sum((1, 2)).tolist()
    total = sum(tiles)
    return max(1.0, device.threads * max(tiles) / total) if total else 1.0
