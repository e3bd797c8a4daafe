"""The block-sparse CPU kernels of register tiles.

The output is a matrix `[pixels, out_channels]` in memory. Inductor's fused epilogue runs on one register tile
at a time, with literal trip counts, so that the C++ compiler keeps the tile in registers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from ..cpu_variants import RegisterTile
from .kernel_template import KernelTemplate
from .output_matrix import OutputMatrix
from .tiling import ConvGeometry, Size, Tiling, all_static


class BlockSparseTemplate(KernelTemplate):
    """One block-sparse layer: fp32, or bf16 summed up in fp32.

    Args:
        input_nodes: input, values, row_ptr, tile_index and, optionally, bias; values are `[n, bw, bh]`, or
            `[n, bw / 2, bh, 2]` for dtypes that are multiplied in pairs.
        layout: output, `[n, oh, ow, out_channels]` or `[rows, out_channels]`, contiguous.
        images: number of images that `conv` speaks of.
        conv: geometry; a linear layer is a 1x1 convolution of one image, one pixel high.
        tile, tiling: register tile, and how pixels map to it.
        block_shape: `(bh, bw)`.
        parameters: of the kernel variant: `chunk`, `row_threads`, `prefetch`.
        flush: kept tiles after which a sum starts anew; 0 for never.
        bias_first: sums start from the bias; it is added to them otherwise.
    """

    source = "cpu_block_sparse.cpp.jinja"
    headers: tuple[str, ...] = ("geometry.h", "operands.h", "block_sparse.h")
    operands: tuple[str, ...] = ("X", "Values", "RowPtr", "TileIndex", "Bias")
    tables: tuple[str, ...] = ("Bias",)
    """Those that hold a number for each output channel."""

    def __init__(
        self,
        input_nodes: Sequence[Any],
        layout: Any,
        num_threads: int,
        *,
        images: Size,
        conv: ConvGeometry,
        tile: RegisterTile,
        tiling: Tiling,
        block_shape: tuple[int, int],
        parameters: dict[str, int | str],
        flush: int,
        bias_first: bool,
    ) -> None:
        super().__init__("block_sparse", input_nodes, layout, num_threads)
        self.images, self.conv, self.tile, self.tiling = images, conv, tile, tiling
        self.block_shape, self.parameters = block_shape, parameters
        self.flush, self.bias_first = flush, bias_first

    def _options(self, output: OutputMatrix) -> dict[str, Any]:
        channels = int(output.columns)
        return {
            "pixels": output.rows,
            "channels": channels,
            "block_rows": -(-channels // self.block_shape[0]),
            "tables": [name for name in self.tables if name in self.operands[: len(self.input_nodes)]],
            "flush": self.flush,
            "bias_first": "true" if self.bias_first else "false",
            "more": "",
            "fill": 0,
            "store": functools.partial(self._store, output),
            **self._tile_options(),
            **self._conv_options(),
        }

    def _tile_options(self) -> dict[str, Any]:
        (bh, bw), tile, tiling = self.block_shape, self.tile, self.tiling
        row_threads = max(1, int(self.parameters.get("row_threads", 1)))
        return {
            "bh": bh,
            "bw": bw,
            "lanes": tile.lanes,
            "split": tile.split,
            "pack": tile.pack,
            "vectors": tile.vectors,
            "width": tile.width,
            "chunk": max(1, int(self.parameters.get("chunk", 4))),
            "row_threads": row_threads,
            "prefetch_output": self.parameters.get("prefetch") == "output" and row_threads == 1,
            "flat": tiling.flat,
            "segments": tiling.segments,
            "segment": tiling.segment,
            "ragged": tiling.ragged,
            "overhang": tiling.overhang,
            "border": tiling.border,
        }

    def _conv_options(self) -> dict[str, Any]:
        g = self.conv
        image_stride, row_stride, pixel_stride = g.input_strides
        step = g.stride[1] * pixel_stride
        geometry = (*g.input_size, row_stride, pixel_stride, *g.stride, *g.pad_begin, *g.dilation)
        return {
            "taps": g.kernel_size[0] * g.kernel_size[1],
            "kh": g.kernel_size[0],
            "kw": g.kernel_size[1],
            "images": self.images,
            "oh": g.output_size[0],
            "ow": g.output_size[1],
            "image_stride": image_stride,
            "step": step,
            "geometry": geometry,
            "static_geometry": all_static(geometry),
            "zeros": self.block_shape[1] + (self.tiling.segment - 1) * step * (self.tiling.segments > 1),
        }

    def _store(self, output: OutputMatrix, row: str) -> str:
        """C++ that runs the epilogue on one segment: output pixels from `m_start` on, `acc` from `row` on."""
        tiling, width = self.tiling, self.tile.width
        begin, end = "0", str(tiling.segment)
        if tiling.overhang:
            end = "m_end"
        elif tiling.ragged and tiling.segments == 1:
            begin = "m_skip"
        c_end = "c_end" if output.columns % width else f"c_start + {width}"
        part = None
        if (row, begin, end) != ("0", "0", str(tiling.segment)) or c_end == "c_end":
            part = (f"{row} + {begin}", f"{row} + {end}"), ("0", f"{c_end} - c_start")
        return output.store((f"m_start + {begin}", f"m_start + {end}"), ("c_start", c_end), part)
