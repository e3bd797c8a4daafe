"""Depthwise convolutions, channels first: vectors of neighbouring pixels, images with channels as planes."""

from __future__ import annotations

import functools
from typing import Any

from ..depthwise import LARGEST_STRIDE
from .kernel_template import KernelTemplate
from .lowering_errors import Unsupported
from .output_matrix import OutputMatrix
from .tiling import ConvGeometry, Size, even_segment

MOST_ROWS = 8
"""Of a register tile: sums and the weights of a 3x3 filter fit 32 registers."""


def vector_of(lanes: int, columns: int) -> int:
    """Floats of a vector: half of AVX-512's for rows that would leave more than half of it empty."""
    return lanes // 2 if lanes == 16 and columns <= lanes // 2 else lanes


class DepthwisePlanesTemplate(KernelTemplate):
    """One depthwise convolution, channels first.

    Args:
        input_nodes: input `[n, c, h, w]`, contiguous, weight `[taps, c]` and, optionally, bias.
        layout: output, `[n, c, oh, ow]`, contiguous.
        images: number of images that `conv` speaks of.
        lanes: floats of a vector of the CPU.

    Raises:
        Unsupported: for a stride beyond `LARGEST_STRIDE`.
    """

    source = "cpu_f32_depthwise_planes.cpp.jinja"
    headers: tuple[str, ...] = ("depthwise_planes_f32.h",)
    operands: tuple[str, ...] = ("X", "Weight", "Bias")

    def __init__(
        self, input_nodes: Any, layout: Any, num_threads: int, *, images: Size, conv: ConvGeometry, lanes: int
    ) -> None:
        if conv.stride[1] > LARGEST_STRIDE:
            raise Unsupported(f"stride {conv.stride[1]} of a channels-first depthwise convolution")
        super().__init__("depthwise", input_nodes, layout, num_threads)
        self.images, self.conv = images, conv
        self.rows = even_segment(int(conv.output_size[0]), MOST_ROWS)
        self.lanes = vector_of(lanes, int(conv.output_size[1]))

    def _options(self, output: OutputMatrix) -> dict[str, Any]:
        g = self.conv
        height, width = g.input_size
        return {
            "lanes": self.lanes,
            "rows": self.rows,
            "filters": int(self.layout.size[1]),
            "images": self.images,
            "oh": g.output_size[0],
            "plane_size": height * width,
            "plane_geometry": (
                *g.kernel_size,
                height,
                width,
                g.output_size[1],
                *g.stride,
                *g.dilation,
                *g.pad_begin,
            ),
            "store": functools.partial(self._store, output),
        }

    def _store(self, output: OutputMatrix) -> str:
        """C++ that runs the epilogue on `acc`: output rows from `m_start` on, columns from `c_start` on.

        Of the last tiles, only what lies in the image.
        """
        height, width = (int(size) for size in self.conv.output_size)

        def store_rows(columns: int) -> str:
            whole = output.store_tile(self.rows, columns)
            if height % self.rows == 0:
                return whole
            rest = height % self.rows
            return f"if (oh + ROWS <= OH) {{ {whole} }} else {{ {output.store_tile(rest, columns)} }}"

        last = store_rows(width % self.lanes or self.lanes)
        if width <= self.lanes or width % self.lanes == 0:
            return last
        whole = store_rows(self.lanes)
        return f"if (tile + 1 < Depthwise::TILES) {{ {whole} }} else {{ {last} }}"
