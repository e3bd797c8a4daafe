"""The ways to run one layer, by the layouts of its input and output; what each costs, copies included."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from . import cost, variants
from .candidate_cost import MARGIN
from .cpu_spmm import SPMM
from .depthwise import DEPTHWISE, LARGEST_STRIDE
from .devices import DeviceSpec
from .layer_chain import MEMBER
from .layouts import CHANNELS_FIRST, CHANNELS_LAST, Layouts
from .pattern import BlockPattern
from .plan import DENSE, Decision, Site
from .pointwise_depthwise import FUSE
from .roofline import Hints, memory_seconds, value

ALL_LAYOUTS = tuple(Layouts(reads, writes) for reads in (False, True) for writes in (False, True))


@dataclass(frozen=True)
class Way:
    """A kernel with the layouts that it reads and writes without a copy.

    Args:
        seconds: estimated, or scaled to a measurement where the decision was measured.
    """

    kernel: str
    layouts: Layouts
    seconds: float
    pattern: BlockPattern | None = None
    config: Mapping[str, int | str] = field(default_factory=dict)

    def seconds_between(self, layouts: Layouts, copy_in: float, copy_out: float) -> float:
        """Its time where its input and output lie so, copies that cost so much included.

        As everywhere, a dense layer that is almost as fast as a sparse one is preferred.
        """
        seconds = self.seconds * (MARGIN if self.kernel == DENSE else 1.0)
        seconds += copy_in * (self.layouts.reads_first != layouts.reads_first)
        return seconds + copy_out * (self.layouts.writes_first != layouts.writes_first)


def as_decided(decision: Decision) -> Way:
    seconds = decision.estimates.get(decision.kernel, 0.0)
    return Way(decision.kernel, CHANNELS_LAST, seconds, decision.pattern, decision.config)


def may_run_channels_first(decision: Decision) -> bool:
    """Whether one of its candidates is a kernel that runs channels first."""
    site = decision.site
    floats = site.device.startswith("cpu") and site.dtype == "float32"
    return floats and len(site.kernel_size) > 0 and bool({SPMM.name, DEPTHWISE.name} & {*decision.estimates})


def channels_first_ways(
    decision: Decision,
    pattern: BlockPattern,
    device: DeviceSpec,
    hints: Hints | None = None,
    fusible: bool = False,
) -> Iterator[Way]:
    """What may be cheaper than the decision where neighbours lie channels first.

    Args:
        pattern: the layer's weight in the blocks of such a kernel. Its time channels last is known; those in
            other layouts keep its scale to the estimate.
        fusible: a 1x1 convolution and a depthwise one that run in one kernel if both lie channels first.
    """
    site = decision.site
    kernel = SPMM.name if SPMM.unsupported(site, pattern) is None else DEPTHWISE.name
    if kernel == DEPTHWISE.name and site.stride[-1] > LARGEST_STRIDE:
        return
    decided = decision.kernel == kernel
    config = decision.config if decided else variants.VARIANTS[kernel].configs(site, pattern, device)[0]

    def estimate(layouts: Layouts) -> float:
        config = layouts.parameters
        if fusible and layouts == CHANNELS_FIRST:
            config[FUSE] = "depthwise"
        return cost.sparse_cost(site, pattern, device, kernel, config=config).evaluate(hints)

    def parameters(layouts: Layouts) -> Mapping[str, int | str]:
        if kernel == SPMM.name and layouts != CHANNELS_LAST:
            return SPMM.configs(site, pattern, device, layouts)[0]
        return {**config, **layouts.parameters}

    known = decision.estimates[cost.Candidate(0.0, kernel, pattern).label]
    scale = known / estimate(CHANNELS_LAST)
    for layouts in ALL_LAYOUTS if kernel == SPMM.name else (CHANNELS_LAST, CHANNELS_FIRST):
        if not (decided and layouts == CHANNELS_LAST):
            seconds = scale * estimate(layouts)
            yield Way(kernel, layouts, seconds, pattern, parameters(layouts))


def chained_config(
    site: Site, pattern: BlockPattern, device: DeviceSpec, layouts: Layouts, *, number: int, bands: int
) -> Mapping[str, int | str]:
    """Parameters of a layer in a chain; with those that it would run with alone, should there be none."""
    pointwise = SPMM.unsupported(site, pattern) is None
    alone = SPMM.configs(site, pattern, device, layouts)[0] if pointwise else layouts.parameters
    return {**alone, MEMBER: number, "bands": bands}


def copy_seconds(shape: Sequence[int], device: DeviceSpec) -> float:
    """To lay out a tensor of this shape anew: a kernel of its own, which transposes tiles."""
    elements = math.prod(shape)
    vectors = elements / device.vector_lanes / device.threads
    transposes = vectors * device.transpose_seconds_per_vector
    # Read once, fetched and written once.
    return transposes + value(memory_seconds(3 * 4 * elements, device)) + device.sparse_call_seconds
