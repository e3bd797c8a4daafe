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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy

from . import gpu_variants
from .gpu_devices import GpuSpec
from .pattern import BlockPattern, BlockShape
from .plan import Site
from .roofline import FEW_ROWS, Cost, Hints, geometry, positions, symbolic, weight_elements

OVERLAP = 0.9
"""Part of the smaller roofs that runs behind the largest."""

Config = Mapping[str, "int | str"]
Number = Any  # a float, or a sympy expression in the layer's symbolic sizes


# ---- arithmetic on numbers, symbolic only where sizes are ------------------------------------------


def _number(expression: Number) -> Number:
    if isinstance(expression, sympy.Expr) and expression.is_number:
        return int(expression) if expression.is_integer else float(expression)
    return expression


def _plain(*values: Number) -> bool:
    return not any(isinstance(value, sympy.Basic) for value in values)


def _max(*values: Number) -> Number:
    return max(values) if _plain(*values) else sympy.Max(*values)


def _min(*values: Number) -> Number:
    return min(values) if _plain(*values) else sympy.Min(*values)


def _ceil(value: Number) -> Number:
    return math.ceil(value - 1e-9) if _plain(value) else sympy.ceiling(value)


def _where(condition: Any, yes: Number, no: Number) -> Number:
    if isinstance(condition, bool):
        return yes if condition else no
    return sympy.Piecewise((yes, condition), (no, True))


# ---- traffic that every kernel has -----------------------------------------------------------------


def item_bytes(site: Site) -> int:
    return {"float64": 8, "float32": 4}.get(site.dtype, 2)


def peak_flops_per_second(site: Site, device: GpuSpec, config: Config | None = None) -> float:
    """Of the matrix units for this dtype; fp32 as `config` or torch's setting says."""
    if site.dtype != "float32":
        return device.peak_flops_per_second[site.dtype if site.dtype == "float16" else "bfloat16"]
    precision = (config or {}).get("precision") or gpu_variants.precision(site).get("precision")
    return device.peak_flops_per_second["tf32" if precision == "tf32" else "float32"]


def _input_elements(site: Site) -> Number:
    return _number(sympy.Mul(*(symbolic(size) for size in site.input_shape)))


def _positions(site: Site) -> Number:
    return _number(positions(site))


def _macs(site: Site, elements: float) -> Number:
    """Multiply-adds, those with padding included: GPU kernels compute them."""
    if site.transposed:  # every input pixel meets the whole kernel
        return _input_elements(site) / site.in_channels * elements
    return _positions(site) * elements


def _activation_seconds(traffic: Number, device: GpuSpec) -> Number:
    """Time to move activations: those that fit in half of L2 are still there from the layer before."""
    dram = traffic / (device.dram_bytes_per_second * device.efficiency["dram"])
    return _where(traffic <= device.l2_bytes / 2, _l2_seconds(traffic, device), dram)


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
    """The layer as Inductor runs it dense, with what follows: the cheaper one, for `hints`, of

    - a call of cuDNN or cuBLAS, and one more kernel that adds the bias of a convolution and applies the
      epilogue, which reads and writes the output again;
    - a Triton template of Inductor (`max_autotune`) with the epilogue fused.
    """
    kind = geometry(site)
    usual = device.efficiency.get(f"dense/{kind}", device.efficiency["dense/template"])
    output = item_bytes(site) * _positions(site) * site.out_channels
    followed = bool(site.epilogue) or (site.bias and bool(site.kernel_size))
    library = _dense_kernel(site, device, usual, extra_traffic=2 * output if followed else 0)
    if not followed or kind in ("grouped", "depthwise"):
        return library
    template = _dense_kernel(site, device, min(usual, device.efficiency["dense/template"]))
    return min((library, template), key=lambda cost: cost.evaluate(hints))


def _dense_kernel(site: Site, device: GpuSpec, efficiency: float, extra_traffic: Number = 0) -> Cost:
    size = item_bytes(site)
    pixels, weight = _positions(site), weight_elements(site)
    flops = 2 * _macs(site, weight)
    rate = peak_flops_per_second(site, device) * efficiency
    activations = size * (_input_elements(site) + pixels * site.out_channels)
    streaming = device.dram_bytes_per_second * device.efficiency["dram"]
    few = device.dram_bytes_per_second * device.efficiency["dense/few_rows"]
    weights = size * weight / _where(pixels < FEW_ROWS + 1, few, streaming)
    extra = _activation_seconds(extra_traffic, device)
    launches = 1 + (extra_traffic != 0)
    return _record(
        flops=flops,
        bytes=activations + size * weight + extra_traffic,
        compute_seconds=flops / rate / _dense_fill(site, device),
        memory_seconds=_activation_seconds(activations, device) + weights,
        # The second kernel runs after the first: its time adds up, whatever bounds that one.
        overhead_seconds=launches * device.launch_seconds + extra,
    )


def _dense_fill(site: Site, device: GpuSpec) -> Number:
    """Part of the multiprocessors that a library keeps busy with the best of its tiles."""
    length = weight_elements(site) // site.out_channels
    best: Number = 0
    for rows, columns, part in _DENSE_TILES:
        tiles = _ceil(_positions(site) / columns) * math.ceil(site.out_channels / rows)
        used = _positions(site) * site.out_channels / (tiles * rows * columns)
        for split in (1, 2, 4, 8):
            if split == 1 or length >= split * _SPLIT_K:
                programs = tiles * split
                waves = _ceil(programs / device.multiprocessors)
                best = _max(best, part * used * programs / (waves * device.multiprocessors))
    return best


# ---- block-sparse kernels --------------------------------------------------------------------------


@dataclass(frozen=True)
class Programs:
    """The programs of one tile of pixels, one entry per program.

    Args:
        products: tiles that each multiplies.
        loads: activation tiles that each loads; fewer where block rows share them.
        block_rows: block rows of one program.
    """

    products: np.ndarray
    loads: np.ndarray
    block_rows: int = 1

    @classmethod
    def single(cls, tiles: np.ndarray) -> Programs:
        """One program per block row."""
        return cls(tiles, tiles)

    def split(self, parts: int) -> Programs:
        """Every sum shared out over `parts` programs."""
        ceiling = np.ceil(np.repeat(self.products, parts) / parts)
        return Programs(ceiling, np.ceil(np.repeat(self.loads, parts) / parts), self.block_rows)


def programs(
    site: Site, pattern: BlockPattern | BlockShape, variant: str, config: Config, density: float = 1.0
) -> Programs:
    """How a kernel variant shares out the kept tiles.

    Args:
        pattern: the kept tiles; or a block shape, for tiles of that `density` at random.
    """
    if isinstance(pattern, BlockPattern):
        tiles = pattern.kept.sum((1, 2)).double().numpy()
        if variant == "triton_pair":
            both, single = _pairs(pattern)
            return Programs(2 * both + single, both + single, 2)
    else:
        bh, bw = pattern
        per_row = math.prod(site.kernel_size) * math.ceil(site.in_channels / site.groups / bw)
        rows = site.groups * math.ceil(site.out_channels / site.groups / bh)
        tiles = np.full(rows, density * per_row)
        if variant == "triton_pair":
            paired, shared = rows // 2 + rows % 2, density * density * per_row
            loads = np.full(paired, 2 * density * per_row - shared)
            return Programs(np.full(paired, 2 * density * per_row), loads, 2)
    found = Programs.single(tiles)
    parts = int(config.get("split", 1))
    return found.split(parts) if parts > 1 else found


def _pairs(pattern: BlockPattern) -> tuple[np.ndarray, np.ndarray]:
    """Tiles in both, and in only one, of the block rows of each pair (neighbours)."""
    kept = pattern.ungroup().kept.flatten(1).numpy()
    if len(kept) % 2:
        kept = np.concatenate([kept, np.zeros_like(kept[:1])])
    first, second = kept[0::2], kept[1::2]
    return (first & second).sum(1).astype(float), (first ^ second).sum(1).astype(float)


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
    tile = _Tile(site, block, device, variant, config, work.block_rows)
    tiles = _ceil(_positions(site) / tile.pixels)
    throughput, latency = tile.seconds(work)
    compute = _max(
        _makespan(throughput, tiles, device.multiprocessors),
        _makespan(latency, tiles, device.multiprocessors * tile.occupancy),
    )
    output = size * _positions(site) * site.out_channels
    partials = 2 * split * 4 * _positions(site) * site.out_channels if split > 1 else 0  # written, read
    l2 = tiles * float(tile.loaded_bytes(work).sum()) + output + partials
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


@dataclass(frozen=True)
class _Tile:
    """One kept tile times one tile of pixels, on one multiprocessor."""

    site: Site
    block: BlockShape
    device: GpuSpec
    variant: str
    config: Config
    block_rows: int

    @property
    def pixels(self) -> int:
        return int(self.config["pixels"])

    @property
    def occupancy(self) -> int:
        """Programs that one multiprocessor runs at a time."""
        device, (bh, bw) = self.device, self.block
        warps = int(self.config["warps"])
        stage = (self.pixels + bh * self.block_rows) * bw * item_bytes(self.site)
        shared = int(self.config["stages"]) * stage
        threads = warps * device.warp_threads
        accumulators = self.pixels * bh * self.block_rows / threads
        registers = threads * min(255, accumulators + 56)  # 56: addresses, masks, operands
        by_shared = device.shared_bytes_per_multiprocessor // shared
        by_registers = int(device.registers_per_multiprocessor // registers)
        return max(1, min(by_shared, by_registers, device.threads_per_multiprocessor // threads))

    def loaded_bytes(self, work: Programs) -> np.ndarray:
        """What each program loads."""
        bh, bw = self.block
        return item_bytes(self.site) * bw * (work.loads * self.pixels + work.products * bh)

    def seconds(self, work: Programs) -> tuple[np.ndarray, np.ndarray]:
        """Of each program: with a multiprocessor's rates to itself; and from its start to its end."""
        device, (bh, bw) = self.device, self.block
        flops = 2 * self.pixels * bh * bw * work.products
        rate = peak_flops_per_second(self.site, device, self.config) * self._efficiency()
        clock, loaded = device.clock_hertz, self.loaded_bytes(work)
        throughput = np.maximum.reduce(
            [
                flops * device.multiprocessors / rate,
                (loaded + flops / self._flops_per_shared_byte())
                / (device.shared_bytes_per_clock_per_multiprocessor * clock),
                loaded / (device.l2_bytes_per_clock_per_multiprocessor * clock),
            ]
        )
        # Little's law: all stages but the one in use are on their way.
        in_flight = max(1, int(self.config["stages"]) - 1)
        far = 2 if self.variant == "triton_decode" else 1  # weights come from memory, read once
        arrival = work.products * device.load_latency_seconds * far / in_flight
        return throughput, np.maximum(throughput, arrival) + device.program_seconds

    def _efficiency(self) -> float:
        table = self.device.efficiency
        bh, bw = self.block
        usual = table.get(self.variant, table["triton_gather"])
        return usual * min(1.0, bh / 16) * min(1.0, bw / 16)  # matrix instructions of 16 at least

    def _flops_per_shared_byte(self) -> float:
        """Of matrix instructions 64 x n x 16 that read both operands from shared memory (`wgmma`)."""
        columns = min(256, self.pixels) if self._weights_are_rows() else self.block[0]
        size = item_bytes(self.site)
        return 2 * 64 * columns * 16 / (size * 16 * (64 + columns))

    def _weights_are_rows(self) -> bool:
        return self.variant != "triton_gather" and self.block[0] >= 64


def _makespan(seconds: np.ndarray, tiles: Number, slots: int) -> Number:
    """Time until the last of `tiles` x `seconds` programs ends on `slots`, the longest first.

    Equal programs run in whole waves; unequal ones end within the shortest of each other (Graham's bound
    for list scheduling).
    """
    if not len(seconds):
        return 0.0
    count = tiles * len(seconds)
    total = tiles * float(seconds.sum())
    waves = float(seconds.mean()) * _ceil(count / slots)
    return _max(float(seconds.max()), _min(waves, total / slots + float(seconds.min())))
