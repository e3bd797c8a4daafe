"""How the output pixels of a layer map to register tiles. Sizes are ints, or sympy expressions of the batch
and, rarely, of the image size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy

Size = Any
"""An int or a sympy expression."""

INSIDE, LEFT, RIGHT, WIDE, PADDED = 0, 1, 2, 4, 8
"""How a tap can leave the image within a segment; the kernel's `Border`."""


@dataclass(frozen=True)
class ConvGeometry:
    """A 2-D convolution as the kernel sees it.

    Args:
        input_size: `(H, W)`; output_size: `(OH, OW)`.
        input_strides: floats between images, rows and pixels.
        kernel_size, stride, pad_begin, dilation: per spatial dimension.
    """

    input_size: tuple[Size, Size]
    output_size: tuple[Size, Size]
    input_strides: tuple[Size, Size, int]
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    pad_begin: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def is_flat(self, images: Size) -> bool:
        """Whether output pixel p reads input pixel p alone, all pixels evenly spaced in memory."""
        (h, w), (image, row, pixel) = self.input_size, self.input_strides
        dense = (h == 1 or equal(row, w * pixel)) and (images == 1 or equal(image, h * w * pixel))
        plain = self.kernel_size == (1, 1) and self.stride == (1, 1) and self.pad_begin == (0, 0)
        return plain and dense and all(map(equal, self.input_size, self.output_size))


@dataclass(frozen=True)
class Tiling:
    """Output pixels per register tile: `segments` runs of `segment` pixels of one output row each.

    Args:
        flat: tiles run over all pixels, rows do not matter.
        ragged: some tiles hold pixels that are not theirs to store.
        overhang: the last tile of a row may reach beyond the row.
        border: how taps leave the image.
    """

    segments: int
    segment: int
    flat: bool = False
    ragged: bool = False
    overhang: bool = False
    border: int = INSIDE


def flat_tiling(pixels: Size, max_pixels: int) -> Tiling | None:
    """Tiles over all pixels; None if there may be fewer pixels than a tile holds."""
    factor = static_factor(pixels)
    if factor == pixels:
        segment = _even_share(factor, max_pixels) if factor else 1
        return Tiling(1, segment, flat=True, ragged=factor % segment != 0)
    exact = [s for s in range(max_pixels, max_pixels // 2, -1) if factor % s == 0]
    if exact:
        return Tiling(1, exact[0], flat=True)
    return Tiling(1, max_pixels, flat=True, ragged=True) if factor >= max_pixels else None


def row_tiling(images: Size, conv: ConvGeometry, max_pixels: int) -> Tiling:
    """Tiles along output rows; narrow rows of several images, or several narrow rows, share a tile."""
    oh, ow = conv.output_size
    if not is_static(ow):
        return Tiling(1, max_pixels, ragged=True, overhang=True, border=WIDE)
    segment = _even_share(ow, max_pixels)
    segments = max_pixels // segment if segment == ow else 1
    whole = static_factor(images) % segments == 0
    if not whole:
        segments = min(segments, oh) if is_static(oh) else 1
    ragged = not whole and oh % segments != 0 if segments > 1 else ow % segment != 0
    return Tiling(segments, segment, ragged=ragged, border=_border(conv, segment))


def even_segment(length: int, most: int) -> int:
    """Pixels of a tile, at most `most`, along a row: a divisor of its length, if one is large enough."""
    whole = [s for s in range(min(most, length), most // 2 - 1, -1) if s and length % s == 0]
    return whole[0] if whole else _even_share(length, most)


def _even_share(count: int, most: int) -> int:
    """The size of equal parts, none above `most`, that cover `count` with as few parts as possible."""
    parts = -(-count // most)
    return -(-count // parts)


def _border(conv: ConvGeometry, segment: int) -> int:
    """Looks at every tap of every tile of a row."""
    (_, width), (_, ow), stride = conv.input_size, conv.output_size, conv.stride[1]
    if not is_static(width):
        return WIDE
    border = INSIDE
    for first in range(0, ow, segment):
        column = min(first, ow - segment)
        for tap in range(conv.kernel_size[1]):
            x = column * stride - conv.pad_begin[1] + tap * conv.dilation[1]
            before = sum(x + i * stride < 0 for i in range(segment))
            after = sum(x + i * stride >= width for i in range(segment))
            if segment > 1 and (before > 1 or after > 1 or before + after > 1):
                return WIDE
            border |= (LEFT if before else 0) | (RIGHT if after else 0)
    return border


def is_static(size: Size) -> bool:
    return isinstance(size, int) or bool(getattr(size, "is_Integer", False))


def as_int(size: Size) -> Size:
    """A size that is known as an int, others as they are."""
    return int(size) if is_static(size) else size


def all_static(sizes: Sequence[Size]) -> bool:
    return all(map(is_static, sizes))


def static_factor(size: Size) -> int:
    """The largest int that is seen to divide a size."""
    if is_static(size):
        return int(size)
    factor = sympy.sympify(size).as_coeff_Mul()[0]
    return int(factor) if factor.is_Integer else 1


def equal(a: Size, b: Size) -> bool:
    """Whether two sizes are the same whatever the symbols stand for."""
    return sympy.expand(sympy.sympify(a) - b) == 0
