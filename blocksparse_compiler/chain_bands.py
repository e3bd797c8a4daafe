"""How a chain of layers runs on bands of image rows: what each band computes, holds, and takes from others.

A band owns the same share of rows of every tensor. Depthwise layers read rows around their own: those of the
input's border are loaded with it, those that another band computes are copied once it is done. A 1x1
convolution with a depthwise one behind it is one step, whose rows in between are computed where they are
read, twice at borders, some rows and channels at a time, so that they stay in L1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from .cpu_spmm import HEIGHTS, SIDE
from .layer_chain import Chain, Depthwise, Pointwise

INNER_BYTES = 24 << 10
"""Of the rows between the two layers of a step: three quarters of the smallest L1 there is."""

MOST_ROWS = 8
"""Output rows of a depthwise layer's register tile."""

Rows = tuple[int, int]
"""Image rows, from the first to behind the last."""


@dataclass(frozen=True)
class Step:
    """One layer, or a 1x1 convolution and the depthwise one behind it.

    Args:
        layers: their numbers in the chain.
        reads, writes: numbers of tensors, as in `layer_chain.Pointwise`.
        strip: output rows computed at a time.
        inner_rows: most rows of the tensor between the layers that a strip needs.
        inner_pitch: floats of one of its channels.
        exchanges: whether bands take rows of what the step reads from each other.
    """

    layers: tuple[int, ...]
    pointwise: Pointwise | None
    depthwise: Depthwise | None
    strip: int = 0
    inner_rows: int = 0
    inner_pitch: int = 0
    exchanges: bool = False

    @property
    def reads(self) -> int:
        return self.layers[0]

    @property
    def writes(self) -> int:
        return self.layers[-1] + 1


@dataclass(frozen=True)
class BandTensor:
    """A tensor, cut into bands.

    Args:
        rows: that a band owns; the last band may own fewer.
        first: for each band, the image row that its memory begins with.
        count: most rows in the memory of a band.
        pitch: floats between two channels there; 0 for a tensor that is never there as a whole.
        offset: of the tensor in the band's memory, in floats.
    """

    channels: int
    height: int
    width: int
    rows: int
    first: tuple[int, ...]
    count: int
    pitch: int = 0
    offset: int = 0

    def own(self, band: int) -> Rows:
        return min(self.height, band * self.rows), min(self.height, (band + 1) * self.rows)


@dataclass
class ChainBands:
    """The steps of a chain on images of one size, and the tensors between them.

    Args:
        size: channels, rows and columns of the input.
        bands: of each image.
        lanes: floats of a vector, of which planes are multiples.

    Attributes:
        floats: memory of one band.
        inner: where in it the rows between the layers of a step lie.
    """

    chain: Chain
    size: tuple[int, int, int]
    bands: int
    lanes: int = 16
    steps: list[Step] = field(init=False)
    tensors: list[BandTensor] = field(init=False)
    floats: int = field(init=False, default=0)
    inner: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.sizes = self.chain.sizes(*self.size)
        self.steps = [self._in_strips(step) for step in _steps(self.chain)]
        self.tensors = [self._tensor(i) for i in range(len(self.sizes))]
        self.steps = [self._exchanging(step) for step in self.steps]
        self._place()

    # ---- rows -------------------------------------------------------------------------------------

    def own(self, tensor: int, band: int) -> Rows:
        height = self.sizes[tensor][1]
        rows = -(-height // self.bands)
        return min(height, band * rows), min(height, (band + 1) * rows)

    def needed(self, step: Step, begin: int, end: int) -> Rows:
        """Rows of its input that output rows `begin` to `end` of a step are computed from; none for none."""
        if step.depthwise is None or begin == end:
            return begin, end
        stride, reach = step.depthwise.stride[0], step.depthwise.reach
        top, height = begin * stride - step.depthwise.padding[0], self.sizes[step.reads][1]
        bottom = (end - 1) * stride - step.depthwise.padding[0] + reach
        return min(height, max(0, top)), max(0, min(height, bottom))

    def strips(self, step: Step, band: int) -> Iterator[Rows]:
        """Output rows computed at a time."""
        begin, end = self.own(step.writes, band)
        for first in range(begin, end, step.strip):
            yield first, min(end, first + step.strip)

    def _in_strips(self, step: Step) -> Step:
        rows = -(-self.sizes[step.writes][1] // self.bands)
        if step.depthwise is None or step.pointwise is None:
            return replace(step, strip=rows)
        row_bytes = 4 * step.pointwise.height * self.sizes[step.reads][2]
        most = max(step.depthwise.reach, INNER_BYTES // row_bytes)
        wanted = max(1, (most - step.depthwise.reach) // step.depthwise.stride[0] + 1)
        parts = -(-rows // wanted)
        step = replace(step, strip=-(-rows // parts))
        inner_rows = max(1, *self._inner_rows(step))  # none where all that is read lies outside of the image
        pitch = _plane(self.vectors(inner_rows, self.sizes[step.reads][2]) * self.lanes)
        return replace(step, inner_rows=inner_rows, inner_pitch=pitch)

    def _inner_rows(self, step: Step) -> Iterator[int]:
        for band in range(self.bands):
            for strip in self.strips(step, band):
                begin, end = self.needed(step, *strip)
                yield end - begin

    def _tensor(self, number: int) -> BandTensor:
        channels, height, width = self.sizes[number]
        windows = [self._window(number, band) for band in range(self.bands)]
        count = max(1, *(end - begin for begin, end in windows))
        first = tuple(begin for begin, _ in windows)
        return BandTensor(channels, height, width, -(-height // self.bands), first, count)

    def _window(self, number: int, band: int) -> Rows:
        """Rows in the memory of a band: its own, and those that its steps read."""
        windows = [self.own(number, band)]
        for step in self.steps:
            if step.reads == number:
                windows.append(self.needed(step, *self.own(step.writes, band)))
        windows = [w for w in windows if w[0] < w[1]] or [(0, 0)]
        return min(begin for begin, _ in windows), max(end for _, end in windows)

    def halo(self, step: Step, band: int) -> list[int]:
        """Rows that a band takes from others before a step."""
        if not step.exchanges:
            return []
        begin, end = self.own(step.reads, band)
        rows = range(*self.needed(step, *self.own(step.writes, band)))
        return [row for row in rows if not begin <= row < end]

    def _exchanging(self, step: Step) -> Step:
        """The chain's input is loaded as needed; nothing is exchanged there."""
        candidate = replace(step, exchanges=True)
        taken = step.reads > 0 and any(self.halo(candidate, band) for band in range(self.bands))
        return candidate if taken else step

    # ---- memory -----------------------------------------------------------------------------------

    def vectors(self, rows: int, width: int) -> int:
        """That cover so many rows."""
        return -(-rows * width // self.lanes)

    def _place(self) -> None:
        """Gives each tensor between steps a pitch, and memory that no live tensor holds."""
        busy: list[tuple[int, int, int]] = []  # offset, end, last step that it lives in
        for number in (0, *(step.writes for step in self.steps)):
            tensor = self.tensors[number]
            pitch = self._pitch(number, tensor)
            # The highest blocks write, and transposes read, whole groups of channels.
            group = SIDE if number == len(self.tensors) - 1 else max(HEIGHTS)
            size = _round(tensor.channels, group) * pitch
            born, dies = number - 1, self._last_use(number)
            busy = [b for b in busy if b[2] >= self._step_of(born)]
            offset = _free(busy, size)
            busy.append((offset, offset + size, dies))
            self.floats = max(self.floats, offset + size)
            self.tensors[number] = replace(tensor, pitch=pitch, offset=offset)
        self.inner = self.floats
        inner = max((s.inner_pitch * s.pointwise.height for s in self.steps if s.pointwise), default=0)
        self.floats = _round(self.inner + inner + max(map(self._beyond, self.steps)), 1024)

    def _beyond(self, step: Step) -> int:
        """Floats behind the last plane that register tiles of several rows read; the sums are dropped."""
        stride = step.depthwise.stride[0] if step.depthwise else 0
        return (MOST_ROWS - 1) * stride * self.sizes[step.reads][2]

    def _step_of(self, layer: int) -> int:
        """The step that runs a layer; -1 for the load of the input."""
        return next((i for i, step in enumerate(self.steps) if layer in step.layers), -1)

    def _last_use(self, number: int) -> int:
        """The last step in which the memory of a tensor must stay as it is.

        Other bands may still be copying from it until all have met again.
        """
        last = self._step_of(number - 1)
        for i, step in enumerate(self.steps):
            reads = step.reads == number or (step.pointwise is not None and step.pointwise.adds == number)
            if reads:
                last = max(last, i)
        if number == len(self.tensors) - 1:
            return len(self.steps)
        if any(step.reads == number and step.exchanges for step in self.steps):
            meetings = (i for i, step in enumerate(self.steps) if step.exchanges and i > last)
            last = max(last, next(meetings, len(self.steps)) - 1)
        return last

    def _pitch(self, number: int, tensor: BandTensor) -> int:
        """Floats of a plane: all that is read and written of it in whole vectors."""
        ends = [tensor.count * tensor.width]
        for band in range(self.bands):
            start = (tensor.own(band)[0] - tensor.first[band]) * tensor.width
            ends.append(start + self.vectors(tensor.rows, tensor.width) * self.lanes)
            for step in self.steps:
                if step.reads != number or step.pointwise is None:
                    continue
                rows = step.inner_rows or tensor.rows
                for strip in self.strips(step, band):
                    start = (self.needed(step, *strip)[0] - tensor.first[band]) * tensor.width
                    ends.append(start + self.vectors(rows, tensor.width) * self.lanes)
        return _plane(max(ends))


def _steps(chain: Chain) -> Iterator[Step]:
    added = {layer.adds for layer in chain.layers if isinstance(layer, Pointwise)}
    skip = False
    for i, layer in enumerate(chain.layers):
        behind = chain.layers[i + 1] if i + 1 < len(chain.layers) else None
        if skip:
            skip = False
        elif isinstance(layer, Depthwise):
            yield Step((i,), None, layer)
        elif isinstance(behind, Depthwise) and layer.adds is None and i + 1 not in added:
            skip = True
            yield Step((i, i + 1), layer, behind)
        else:
            yield Step((i,), layer, None)


def _free(busy: list[tuple[int, int, int]], size: int) -> int:
    """The first gap between what is taken that is large enough."""
    offset = 0
    for begin, end, _ in sorted(busy):
        if offset + size <= begin:
            break
        offset = max(offset, end)
    return offset


def _plane(floats: int) -> int:
    """Such planes apart, channels do not crowd into an eighth of the sets of L1, as 512 bytes apart."""
    pitch = _round(floats, 16)
    return pitch + 16 * (pitch % 128 == 0)


def _round(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
