"""What a chain of layers costs in one kernel (`layer_chain`): steps on a band of rows, and what bands share.

Each thread computes alone, from memory of its own; so a layer costs what it costs one thread, on fewer
rows. What share of peak that reaches is a figure of its own: what `cpu_spmm` and `depthwise` lose on other
layouts, or to other cores, is not lost here. On top come meetings of the threads, rows taken from each
other, and the chain's ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .chain_bands import ChainBands, Step
from .cpu_spmm import SPMM
from .depthwise import DEPTHWISE, depthwise_cost
from .devices import DeviceSpec
from .layer_chain import CHAIN, Chain
from .layouts import CHANNELS_FIRST
from .pattern import BlockPattern
from .plan import Site
from .roofline import OVERLAP, memory_seconds, value
from .spmm_roofline import OTHER_CORE_BYTES_PER_SECOND, sparse_rows_cost

BARRIER_SECONDS = 1e-6
"""For threads to meet: a line of memory goes from core to core and back, and the slowest is waited for."""

RATE = 0.8
"""Of peak, at which 1x1 convolutions multiply; a device's `efficiency` may know better."""

DEPTHWISE_SHARE = 0.7
"""The rate of depthwise layers over that of 1x1 convolutions; both fitted to MobileNet-v2 on Zen 5."""

_FLOAT = 4


@dataclass(frozen=True)
class ChainLayer:
    """A layer, its weight in the blocks that the chain runs it in, and its measured time over an estimate."""

    site: Site
    pattern: BlockPattern
    scale: float = 1.0


@dataclass(frozen=True)
class ChainCost:
    """The time of a chain, or of some steps of it, on images cut into `bands`."""

    layers: Sequence[ChainLayer]
    chain: Chain
    device: DeviceSpec
    images: int
    bands: int

    @cached_property
    def cut(self) -> ChainBands:
        site = self.layers[0].site
        channels, height, width = (int(size) for size in site.input_shape[1:])
        return ChainBands(self.chain, (channels, height, width), self.bands, self.device.vector_lanes)

    def seconds(self, begin: int, end: int) -> float:
        """Steps `begin` to `end` as a kernel of their own, between tensors that lie channels last."""
        steps = self.cut.steps
        ends = [self._end(steps[begin].reads), self._end(steps[end - 1].writes)]
        met = sum(self.exchanges[begin + 1 : end])  # the first step's rows come with the input
        busy = sum(sum(seconds) for seconds in self.computed[begin:end])
        return self.turns * (busy + met + sum(ends)) + self.device.sparse_call_seconds

    def shares(self, begin: int, end: int) -> list[float]:
        """What each layer of these steps has of their time."""
        own = [seconds for step in self.computed[begin:end] for seconds in step]
        total = self.seconds(begin, end)
        return [total * seconds / sum(own) for seconds in own]

    @property
    def turns(self) -> int:
        return turns(self.device, self.images, self.bands)

    # ---- one band of one image --------------------------------------------------------------------

    @cached_property
    def computed(self) -> list[list[float]]:
        """Seconds of each layer of each step, on the busiest band."""
        return [
            [max(times) for times in zip(*(self._step(s, band) for band in self._busiest), strict=True)]
            for s in self.cut.steps
        ]

    @cached_property
    def exchanges(self) -> list[float]:
        """Seconds that a thread waits for others before each step."""
        return [self._exchange(step) for step in self.cut.steps]

    @property
    def _busiest(self) -> list[int]:
        """Bands that may be the busiest: at an end of the image, or between others."""
        return [0, 1][: self.bands]

    def _step(self, step: Step, band: int) -> Iterator[float]:
        rows = self.cut.own(step.writes, band)
        if step.pointwise is not None:
            inner = [self.cut.needed(step, *strip) for strip in self.cut.strips(step, band)]
            yield self._pointwise(step, [end - begin for begin, end in inner])
        if step.depthwise is not None:
            yield self._depthwise(step, rows[1] - rows[0])

    def _pointwise(self, step: Step, strips: Sequence[int]) -> float:
        layer, lanes = self.layers[step.layers[0]], self.device.vector_lanes
        width = self.cut.sizes[step.reads][2]
        pixels = sum(self.cut.vectors(rows, width) for rows in strips) * lanes
        if not pixels:
            return 0.0
        site = replace(layer.site, input_shape=(1, layer.site.in_channels, 1, pixels))
        cost = sparse_rows_cost(site, layer.pattern, self._thread, CHANNELS_FIRST)
        assert step.pointwise is not None
        written = 0 if step.depthwise is not None else 2  # fetched, as caches do, and written
        written += step.pointwise.adds is not None
        floats = pixels * (site.in_channels + written * site.out_channels) + layer.pattern.kept_elements
        return layer.scale * self._roofs(value(cost.compute_seconds), _FLOAT * floats)

    def _depthwise(self, step: Step, rows: int) -> float:
        layer = self.layers[step.layers[-1]]
        site = replace(layer.site, input_shape=(1, *layer.site.input_shape[1:]))
        # Planes of a thread's own begin with a line of memory, as those in the cache of a fused kernel.
        cost = depthwise_cost(site, self._thread, CHANNELS_FIRST, fused=True)
        channels, height, width = self.cut.sizes[step.writes]
        floats = 2 * channels * rows * width
        if step.pointwise is None:
            floats += math.prod(self.cut.sizes[step.reads]) * rows // height
        return layer.scale * self._roofs(value(cost.compute_seconds) * rows / height, _FLOAT * floats)

    def _exchange(self, step: Step) -> float:
        if not step.exchanges:
            return 0.0
        channels, _, width = self.cut.sizes[step.reads]
        rows = max(len(self.cut.halo(step, band)) for band in range(self.bands))
        return BARRIER_SECONDS + _FLOAT * rows * channels * width / OTHER_CORE_BYTES_PER_SECOND

    def _end(self, tensor: int) -> float:
        held = self.cut.tensors[tensor]
        size = held.channels, held.count, held.width
        return band_copy_seconds(size, False, self._thread)

    @cached_property
    def _thread(self) -> DeviceSpec:
        return one_thread(self.device, self.images, self.bands)

    def _roofs(self, compute: float, traffic: int) -> float:
        """As `roofline.Cost`, for numbers."""
        roofs = compute, value(memory_seconds(traffic, self._thread))
        return max(roofs) + (1 - OVERLAP) * min(roofs)


def end_seconds(
    size: tuple[int, int, int], is_first: bool, device: DeviceSpec, images: int, bands: int
) -> float:
    """To load a chain's input, or to store its output, of this size, which lies so."""
    channels, height, width = size
    band = channels, -(-height // bands), width
    others = device.threads if images < device.threads else 1
    copy = band_copy_seconds(band, is_first, one_thread(device, images, bands), others)
    return turns(device, images, bands) * copy


def band_copy_seconds(
    size: tuple[int, int, int], is_first: bool, thread: DeviceSpec, threads: int = 1
) -> float:
    """To copy rows in or out: pixels of channels-last tensors are transposed.

    Args:
        threads: that share out an image, by channels where these lie first: other cores hold most of them.
    """
    floats = math.prod(size)
    moved = value(memory_seconds(3 * _FLOAT * floats, thread))
    if not is_first:
        return moved + floats / thread.vector_lanes * thread.transpose_seconds_per_vector
    return moved + _FLOAT * floats * (1 - 1 / threads) / OTHER_CORE_BYTES_PER_SECOND


def turns(device: DeviceSpec, images: int, bands: int) -> int:
    """Images that the busiest thread works on."""
    return -(-images // max(1, device.threads // bands))


def one_thread(device: DeviceSpec, images: int, bands: int) -> DeviceSpec:
    """The device as one thread has it, while others work on their bands."""
    busy = max(1, min(device.threads, images * bands))
    rate = device.efficiency.get(CHAIN, RATE)
    return replace(
        device,
        efficiency={**device.efficiency, SPMM.name: rate, DEPTHWISE.name: rate * DEPTHWISE_SHARE},
        threads=1,
        l3_bytes=max(1, device.l3_bytes // busy),
        l3_bytes_per_second=device.l3_bytes_per_second / busy,
        dram_bytes_per_second=device.dram_bytes_per_second / busy,
    )


def possible_bands(images: int, threads: int) -> list[int]:
    """Numbers of bands that keep threads busy: images are shared out first."""
    most = max(1, threads // images)
    return sorted({1, most, *(2**i for i in range(1, most.bit_length()) if 2**i <= most)})
