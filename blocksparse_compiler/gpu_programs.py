"""The programs of a block-sparse GPU kernel: what each multiplies and loads, and how long it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from . import gpu_variants
from .gpu_devices import GpuSpec
from .pair_packing import pair_rows
from .pattern import BlockPattern, BlockShape
from .plan import Site
from .roofline import positions, symbolic
from .sizes import Number, ceiling, maximum, number

Config = Mapping[str, "int | str"]


def item_bytes(site: Site) -> int:
    return {"float64": 8, "float32": 4}.get(site.dtype, 2)


def peak_flops_per_second(site: Site, device: GpuSpec, config: Config | None = None) -> float:
    """Of the matrix units for this dtype; fp32 as `config` or torch's setting says."""
    if site.dtype != "float32":
        return device.peak_flops_per_second[site.dtype if site.dtype == "float16" else "bfloat16"]
    precision = (config or {}).get("precision") or gpu_variants.precision(site).get("precision")
    return device.peak_flops_per_second["tf32" if precision == "tf32" else "float32"]


@dataclass(frozen=True)
class Programs:
    """The programs of one tile of pixels, one entry per program.

    Args:
        products: tiles that each multiplies.
        loads: activation tiles that each loads; fewer where block rows share them.
        block_rows: block rows of one program.
        loops: loops of one program, each of which fills the software pipeline anew.
    """

    products: np.ndarray
    loads: np.ndarray
    block_rows: int = 1
    loops: int | np.ndarray = 1

    @classmethod
    def single(cls, tiles: np.ndarray) -> Programs:
        """One program per block row."""
        return cls(tiles, tiles)

    def split(self, parts: int, step: int = 1) -> Programs:
        """Every sum shared out over `parts` programs, in runs of whole steps, the last may be shorter."""
        share = np.arange(parts)

        def shared(tiles: np.ndarray) -> np.ndarray:
            run = np.ceil(tiles / (parts * step))[:, None] * step
            return np.clip(tiles[:, None] - share * run, 0, run).ravel()

        return Programs(shared(self.products), shared(self.loads), self.block_rows, self.loops)


def programs(
    site: Site, pattern: BlockPattern | BlockShape, variant: str, config: Config, density: float = 1.0
) -> Programs:
    """How a kernel variant shares out the kept tiles.

    Args:
        pattern: the kept tiles; or a block shape, for tiles of that `density` at random.
    """
    step, parts = int(config.get("step", 1)), int(config.get("split", 1))
    if isinstance(pattern, BlockPattern):
        if variant == "triton_pair":
            pairs = pair_rows(pattern)
            products, loads, loops = (
                np.array([getattr(p, n) for p in pairs], float) for n in ("products", "loads", "loops")
            )
            return Programs(products, loads, block_rows=2, loops=loops)
        tiles = pattern.kept.sum((1, 2)).double().numpy()
        tiles = np.ceil(tiles / step) * step  # block rows are filled up to whole steps
    else:
        bh, bw = pattern
        per_row = math.prod(site.kernel_size) * math.ceil(site.in_channels / site.groups / bw)
        rows = site.groups * math.ceil(site.out_channels / site.groups / bh)
        kept = density * per_row
        if variant == "triton_pair":
            count, shared = (rows + 1) // 2, density * kept
            return Programs(np.full(count, 2 * kept), np.full(count, 2 * kept - shared), 2, 3)
        tiles = np.full(rows, kept + (step - 1) / 2)
    found = Programs.single(tiles)
    return found.split(parts, step) if parts > 1 else found


@dataclass(frozen=True)
class Tile:
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
    def step(self) -> int:
        """Kept tiles that one turn of the loop multiplies."""
        return int(self.config.get("step", 1))

    @property
    def count(self) -> Number:
        """How many cover all output pixels; boxes cover images, others all pixels in a row."""
        sides = [int(self.config[f"box_{axis}"]) for axis in "ndhw" if f"box_{axis}" in self.config]
        if not sides:
            return ceiling(number(positions(self.site)) / self.pixels)
        images, *_ = self.site.input_shape
        extent = (images, *self.site.output_spatial)
        counts = (ceiling(number(symbolic(n)) / side) for n, side in zip(extent, sides, strict=True))
        return math.prod(counts)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one program."""
        bh, bw = self.block
        stage = (self.pixels + bh * self.block_rows) * bw * self.step * item_bytes(self.site)
        return int(self.config["stages"]) * stage

    @property
    def occupancy(self) -> int:
        """Programs that one multiprocessor runs at a time."""
        device, bh = self.device, self.block[0]
        warps = int(self.config["warps"])
        threads = warps * device.warp_threads
        accumulators = self.pixels * bh * self.block_rows / threads
        registers = threads * min(255, accumulators + 56)  # 56: addresses, masks, operands
        by_shared = device.shared_bytes_per_multiprocessor // self.shared_bytes
        by_registers = int(device.registers_per_multiprocessor // registers)
        return max(1, min(by_shared, by_registers, device.threads_per_multiprocessor // threads))

    def loaded_bytes(self, work: Programs) -> np.ndarray:
        """What each program loads."""
        bh, bw = self.block
        total = number(positions(self.site))
        pixels = min(self.pixels, total) if isinstance(total, int) else self.pixels
        return item_bytes(self.site) * bw * (work.loads * pixels + work.products * bh)

    def l2_bytes(self, work: Programs) -> float:
        """What all programs of a tile of pixels load from L2."""
        loaded = float(self.loaded_bytes(work).sum())
        activations = loaded - float(work.products.sum()) * self.block[0] * self.block[1] * item_bytes(
            self.site
        )
        return loaded - activations * self._found_in_l1(work)

    def _found_in_l1(self, work: Programs) -> float:
        """Part of the activations that other taps have left in L1: all but the pixels around, if they fit."""
        taps = math.prod(self.site.kernel_size)
        if not self.config.get("l1") or taps == 1 or not work.loads.any():
            return 0.0
        width = self.site.output_spatial[-1]
        rows = max(1.0, self.pixels / width) if isinstance(width, int) else 1.0
        around = 1 + (math.prod(self.site.kernel_size[:-1]) - 1) / rows
        between = float(work.loads.mean()) / taps * self.pixels * self.block[1] * item_bytes(self.site)
        room = self.device.l1_bytes_per_multiprocessor / self.occupancy - self.shared_bytes
        fitting = min(1.0, max(0.0, room / between))
        return self.device.efficiency["l1"] * fitting * max(0.0, 1 - around / taps)

    def seconds(self, work: Programs, *, far: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Of each program: with a multiprocessor's rates to itself; and from its start to its end.

        Args:
            far: the tiles come from memory, not from L2.
        """
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
        latency = device.load_latency_seconds * (2 if far else 1)
        arrival = work.products / self.step * latency / in_flight
        fixed = device.program_seconds + work.loops * latency
        return throughput, np.maximum(throughput, arrival) + fixed

    def _efficiency(self) -> float:
        table = self.device.efficiency
        bh, bw = self.block
        usual = table.get(self.variant, table["triton_gather"])
        return usual * min(1.0, bh / 16) * min(1.0, bw / 16)  # matrix instructions of 16 at least

    def _flops_per_shared_byte(self) -> float:
        """Of matrix instructions 64 x n x 16 that read both operands from shared memory (`wgmma`)."""
        swapped = any(key.startswith(("box_", "swapped")) for key in self.config)
        swapped |= self.variant in ("triton_box", "triton_decode")  # the weights are the rows
        columns = min(256, self.pixels) if swapped else self.block[0]
        size = item_bytes(self.site)
        return 2 * 64 * columns * 16 / (size * 16 * (64 + columns))


def makespan(seconds: np.ndarray, tiles: Number, slots: int) -> Number:
    """Time until the last of `tiles` x `seconds` programs ends on `slots`, the longest started first."""
    if not len(seconds):
        return 0.0
    waves = ceiling(tiles * len(seconds) / slots)
    return maximum(float(seconds.max()), float(seconds.mean()) * waves)
