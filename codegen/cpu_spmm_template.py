"""Layers of scattered weights: vectors of pixels, one multiply-add per vector and weight.

The output still is a matrix `[pixels, out_channels]`, and Inductor's epilogue runs on 16x16 tiles of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..cpu_spmm import SIDE, PixelTile
from .cpu_template import BlockSparseTemplate
from .epilogue import unroll
from .tiling import Size


class SparseRowsTemplate(BlockSparseTemplate):
    """One pointwise or linear layer in blocks of one input channel.

    Args:
        step: floats between two pixels of the input.
        Others as `BlockSparseTemplate`.
    """

    source = "cpu_f32_spmm.cpp.jinja"
    headers = ("block_sparse.h", "sparse_rows_f32.h")

    def __init__(
        self,
        input_nodes: Any,
        layout: Any,
        num_threads: int,
        *,
        tile: PixelTile,
        height: int,
        in_channels: int,
        step: Size,
        parameters: dict[str, int | str],
        flush: int,
    ) -> None:
        super(BlockSparseTemplate, self).__init__("block_sparse", input_nodes, layout, num_threads)
        self.tile, self.in_channels, self.step = tile, in_channels, step  # type: ignore[assignment]
        self.block_shape, self.parameters = (height, 1), parameters
        self.flush, self.bias_first = flush, False
        self.groups = -(-int(layout.size[-1]) // SIDE)

    def _tile_options(self) -> dict[str, Any]:
        return {
            "bh": self.block_shape[0],
            "lanes": self.tile.lanes,
            "vectors": self.tile.vectors,
            "groups": self.groups,
            "row_threads": max(1, int(self.parameters.get("row_threads", 1))),
        }

    def _conv_options(self) -> dict[str, Any]:
        return {"in_channels": self.in_channels, "step": self.step}

    def _store(
        self,
        kernel: Any,
        matrix: Any,
        raw: Any,
        nodes: list[Any],
        reindexers: list[Callable[..., Any]],
        end: str,
    ) -> str:
        """C++ that runs the epilogue on `acc`: pixels `m_start` to `m_start + end`."""
        c_end = "c_end" if int(nodes[0].get_size()[-1]) % SIDE else f"c_start + {SIDE}"
        source = kernel.local_buffers["acc"]
        if end != str(SIDE) or c_end == "c_end":
            source = kernel.slice_nd(source, [("0", end), ("0", f"{c_end} - c_start")])
        target = kernel.slice_nd(matrix, [("m_start", f"m_start + {end}"), ("c_start", c_end)])
        offsets = ("m_start", "c_start")
        return unroll(kernel.store_output(target, source, raw, nodes, offsets=offsets, reindexers=reindexers))
