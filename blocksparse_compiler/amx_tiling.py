"""How the output pixels of a convolution map to AMX tiles: 16 pixels whose inputs lie evenly spaced.

Three ways, by what the kernel reads:

- rows: linear layers and plain 1x1 convolutions, 16 pixels after another whatever their image;
- direct: the input itself. Pixels of a tile must have the same taps inside the image, so the output is cut
  into rectangles (interior, edges, corners), and those into runs along rows or columns;
- panel: a copy of a strip of the input with its padding. Pixels follow each other across rows and images,
  which fills the tiles of small images.

Arithmetic only: planning needs neither Inductor nor the target machine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

SIDE = 16
"""Pixels of a tile."""

PANEL_GAIN = 1.2
"""A panel must save this factor in tiles: filling it takes time, too."""


@dataclass(frozen=True)
class Axis:
    """One spatial dimension of a convolution, sizes in pixels."""

    size: int
    out: int
    kernel: int = 1
    stride: int = 1
    pad: int = 0
    dilation: int = 1

    def taps(self, position: int) -> tuple[int, int]:
        """Taps [begin, end) that read inside the image for an output position."""
        first = position * self.stride - self.pad
        inside = [t for t in range(self.kernel) if 0 <= first + t * self.dilation < self.size]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)

    def runs(self) -> Iterator[tuple[int, int, tuple[int, int]]]:
        """Neighbouring output positions with equal taps: first position, count, taps."""
        first = 0
        for position in range(1, self.out + 1):
            if position == self.out or self.taps(position) != self.taps(first):
                yield first, position - first, self.taps(first)
                first = position

    def phase(self, tap: int) -> tuple[int, int]:
        """Where a tap reads: every `stride`-th pixel from the first number on, the second number ahead."""
        ahead, phase = divmod(tap * self.dilation, self.stride)
        return phase, ahead

    @functools.cached_property
    def phases(self) -> tuple[int, ...]:
        return tuple(sorted({self.phase(tap)[0] for tap in range(self.kernel)}))

    def reach(self, phase: int | None = None) -> int:
        """How far ahead taps read, those of one phase or all."""
        found = (self.phase(tap) for tap in range(self.kernel))
        return max(ahead for p, ahead in found if phase is None or p == phase)

    def shared_padding(self) -> int:
        """Places of padding that end a row of a panel and may as well begin the next one."""
        reach = self.reach()
        offsets = [phase - self.pad for phase in self.phases]

        def outside(place: int) -> bool:
            return not any(0 <= place * self.stride + offset < self.size for offset in offsets)

        last = self.out + reach - 1
        both = (outside(i) and outside(last - i) for i in range(reach))
        return next((i for i, zero in enumerate(both) if not zero), reach)


@dataclass(frozen=True)
class Region:
    """A rectangle of output pixels with equal taps, cut into runs along rows or columns."""

    row: int
    rows: int
    column: int
    columns: int
    along_columns: bool
    row_taps: tuple[int, int]
    column_taps: tuple[int, int]

    @property
    def tiles(self) -> int:
        runs, length = (self.columns, self.rows) if self.along_columns else (self.rows, self.columns)
        return runs * -(-length // SIDE)

    @property
    def pairs(self) -> int:
        return -(-self.tiles // 2)


@functools.lru_cache(maxsize=256)
def regions(rows: Axis, columns: Axis) -> tuple[Region, ...]:
    """Every output pixel once, in as few tiles as possible."""
    found: list[Region] = []
    for row, height, row_taps in rows.runs():
        for column, width, column_taps in columns.runs():
            rectangle = Region(row, height, column, width, False, row_taps, column_taps)
            found += min(_cuts(rectangle), key=lambda parts: sum(part.tiles for part in parts))
    return tuple(sorted(found, key=_length, reverse=True))


def _length(region: Region) -> int:
    """Pixels of a run, up to a full tile: regions alike follow each other, since a change costs time."""
    return min(SIDE, region.rows if region.along_columns else region.columns)


def _cuts(whole: Region) -> Iterator[list[Region]]:
    """Runs along rows; along columns; or whole tiles along one, and what is left along the other."""
    at = whole.__dict__
    yield [whole]
    yield [Region(**{**at, "along_columns": True})]
    full = whole.columns // SIDE * SIDE
    if 0 < full < whole.columns:
        rest = {"column": whole.column + full, "columns": whole.columns - full, "along_columns": True}
        yield [Region(**{**at, "columns": full}), Region(**{**at, **rest})]
    full = whole.rows // SIDE * SIDE
    if 0 < full < whole.rows:
        rest = {"row": whole.row + full, "rows": whole.rows - full}
        yield [Region(**{**at, "rows": full, "along_columns": True}), Region(**{**at, **rest})]


@dataclass(frozen=True)
class Panel:
    """A strip of `rows` output rows of `images` images side by side, `pitch` places apart.

    Args:
        phases: what is copied, `(row phase, column phase)`: lines, first place and places of each.
        taps: where each tap reads, in places from that of an output pixel.
    """

    images: int
    rows: int
    pitch: int
    phases: dict[tuple[int, int], tuple[int, int, int]]
    taps: tuple[int, ...]
    width: int

    @property
    def places(self) -> int:
        """Of one channel block."""
        return sum(places for _, _, places in self.phases.values())

    def tiles(self, rows: int | None = None) -> int:
        """Of a strip of this many rows."""
        rows = self.rows if rows is None else rows
        return -(-((rows * self.images - 1) * self.pitch + self.width) // SIDE)


@functools.lru_cache(maxsize=256)
def panel(rows: Axis, columns: Axis, images: int, pairs: int) -> Panel:
    """A panel of about `pairs` pairs of tiles, and no more than this many images."""
    pitch = columns.out + columns.reach() - columns.shared_padding()
    room = max(1, 2 * SIDE * pairs // pitch)  # output rows of one image
    if room >= rows.out:
        images, strip = max(1, min(images, room // rows.out)), rows.out
    else:
        images, strips = 1, -(-rows.out // room)
        strip = -(-rows.out // strips)
    line = images * pitch
    touched = max(SIDE, strip * line - pitch + columns.out)
    phases: dict[tuple[int, int], tuple[int, int, int]] = {}
    begin = 0
    for ph in rows.phases:
        for pw in columns.phases:
            lines = strip + rows.reach(ph)
            places = max(lines * line, touched + rows.reach(ph) * line + columns.reach(pw))
            phases[ph, pw] = (lines, begin, places)
            begin += places
    taps = []
    for kh in range(rows.kernel):
        for kw in range(columns.kernel):
            (ph, down), (pw, right) = rows.phase(kh), columns.phase(kw)
            taps.append(phases[ph, pw][1] + down * line + right)
    return Panel(images, strip, pitch, phases, tuple(taps), columns.out)


def wants_panel(rows: Axis, columns: Axis, images: int, pairs: int) -> bool:
    """Whether a panel saves enough tiles to be worth its filling."""
    direct = sum(2 * region.pairs for region in regions(rows, columns))
    return direct > PANEL_GAIN * panel_tiles(rows, columns, images, pairs)


def panel_tiles(rows: Axis, columns: Axis, images: int, pairs: int) -> float:
    """Tiles for an image, on average over those of a panel."""
    best = panel(rows, columns, images, pairs)
    whole, rest = divmod(rows.out, best.rows)
    return (whole * best.tiles() + (best.tiles(rest) if rest else 0)) / best.images
