"""How pixels map to AMX tiles: every output once, every tap right."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from blocksparse_compiler.amx_tiling import SIDE, Axis, panel, panel_tiles, regions, wants_panel


@st.composite
def axes(draw, most=40):
    kernel, stride, dilation = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    before, after = draw(st.integers(0, 6)), draw(st.integers(0, 6))
    size = draw(st.integers(1, most))
    room = size + before + after - dilation * (kernel - 1) - 1
    assume(room >= 0)
    return Axis(size, room // stride + 1, kernel, stride, before, dilation)


@given(axes(), axes())
def test_regions_cover_every_output_once(rows, columns):
    covered = {}
    for region in regions(rows, columns):
        for row in range(region.row, region.row + region.rows):
            for column in range(region.column, region.column + region.columns):
                assert (row, column) not in covered
                covered[row, column] = region.row_taps, region.column_taps
    assert len(covered) == rows.out * columns.out
    for (row, column), taps in covered.items():
        assert taps == (rows.taps(row), columns.taps(column))


@given(axes())
def test_taps_are_those_inside(axis):
    for position in range(axis.out):
        begin, end = axis.taps(position)
        for tap in range(axis.kernel):
            inside = 0 <= position * axis.stride - axis.pad + tap * axis.dilation < axis.size
            assert inside == (begin <= tap < end)


@given(axes(20), axes(20), st.integers(1, 5), st.integers(1, 9))
def test_panels_hold_what_every_tap_reads(rows, columns, images, pairs):
    """Reads a panel as the kernel does; `None` stands for padding."""
    p = panel(rows, columns, images, pairs)
    assert 1 <= p.images <= images and 1 <= p.rows <= rows.out
    for first in range(0, rows.out, p.rows):
        contents = filled(p, rows, columns, first)
        for line in range(min(p.rows, rows.out - first)):
            for image in range(p.images):
                for column in range(columns.out):
                    place = (line * p.images + image) * p.pitch + column
                    for tap, ahead in enumerate(p.taps):
                        kh, kw = divmod(tap, columns.kernel)
                        h = (first + line) * rows.stride - rows.pad + kh * rows.dilation
                        w = column * columns.stride - columns.pad + kw * columns.dilation
                        inside = 0 <= h < rows.size and 0 <= w < columns.size
                        assert contents[place + ahead] == ((image, h, w) if inside else None)


def filled(p, rows, columns, first):
    """The places of a panel, as `pack_panel` fills them."""
    contents = []
    for (row, column), (lines, begin, places) in p.phases.items():
        assert len(contents) == begin
        for line in range(lines):
            h = (first + line) * rows.stride + row - rows.pad
            for image in range(p.images):
                for i in range(p.pitch):
                    w = i * columns.stride + column - columns.pad
                    inside = 0 <= h < rows.size and 0 <= w < columns.size
                    contents.append((image, h, w) if inside else None)
        contents += [None] * (begin + places - len(contents))
    assert len(contents) == p.places
    return contents


@given(axes(20), axes(20), st.integers(1, 5), st.integers(1, 9))
def test_tiles_of_panels_stay_inside(rows, columns, images, pairs):
    p = panel(rows, columns, images, pairs)
    last = max(SIDE, (p.rows * p.images - 1) * p.pitch + columns.out) - 1
    for tap in p.taps:
        begin, places = next((b, n) for _, b, n in p.phases.values() if b <= tap < b + n)
        assert tap + last < begin + places


def same(size, stride=1):
    """3x3, padded to keep the size."""
    return Axis(size, -(-size // stride), 3, stride, 1)


@pytest.mark.parametrize(
    "size, images, uses_panel, tiles",
    [
        (56, 8, False, 206),  # of 196 at least: 54 x 54 inside, 6 columns of those as columns
        (28, 8, False, 58),  # of 49
        (14, 8, True, 14),  # of 12.25; one place of padding between rows
        (7, 8, True, 3.5),  # of 3.0625; four images side by side
        (7, 1, True, 4),
    ],
)
def test_tiles_of_resnet(size, images, uses_panel, tiles):
    axis = same(size)
    assert wants_panel(axis, axis, images, 8) == uses_panel
    found = panel_tiles(axis, axis, images, 8) if uses_panel else sum(r.tiles for r in regions(axis, axis))
    assert found == tiles
