"""The block-sparse CPU kernels as an Inductor C++ template.

The output is a matrix `[pixels, out_channels]` in memory. Inductor's fused epilogue runs on one register tile
at a time, with literal trip counts, so that the C++ compiler keeps the tile in registers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sympy
import torch

from ..cpu_variants import RegisterTile
from .epilogue import FusedEpilogue, as_matrix, clamp_natively, reindexer, round_natively, unroll
from .inductor_api import DTYPE_TO_CPP, KERNEL_DESCRIPTION, CppTemplate, V, cexpr_index
from .tiling import ConvGeometry, Size, Tiling, all_static

_HERE = Path(__file__).parent


class BlockSparseTemplate(CppTemplate):
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
    headers: tuple[str, ...] = ("block_sparse.h",)
    operands: tuple[str, ...] = ("Values", "RowPtr", "TileIndex")
    """Names of the inputs between the activations and the bias."""
    tables: tuple[str, ...] = ("Bias",)
    """Those inputs that hold a number for each output channel; the bias may be missing."""

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

    def render(  # type: ignore[override]
        self,
        kernel: Any,
        template_buffer_node: Any = None,
        flag_template_buffer_has_other_users: bool | None = None,
        epilogue_nodes: Sequence[Any] | None = None,
        **_: Any,
    ) -> str:
        out: Any = self.output_node if template_buffer_node is None else template_buffer_node
        rows, columns = self._matrix_size(out)
        fused = FusedEpilogue.of(out, epilogue_nodes, flag_template_buffer_has_other_users)
        x = self.input_nodes[0]
        inputs = dict(zip(("X", *self.operands, "Bias"), self.input_nodes, strict=False))

        def cexpr(size: Size) -> str:
            return cexpr_index(kernel.rename_indexing(sympy.sympify(size)))

        options = {
            "prelude": "\n".join(
                [self.header().getvalue(), *((_HERE / "include" / h).read_text() for h in self.headers)]
            ),
            "kernel": kernel,
            "profile": kernel.maybe_codegen_profile().replace(kernel.kernel_name, KERNEL_DESCRIPTION),
            "inputs": inputs,
            "outputs": fused.outputs,
            "aliases": fused.aliases,
            "cexpr": cexpr,
            "element": DTYPE_TO_CPP[x.get_dtype()],
            "dtype": torch.float32,
            "flush": self.flush,
            "bias_first": "true" if self.bias_first else "false",
            "num_threads": self.num_threads,
            # The kernel gets the storage of a view: add the view's offset.
            "input": f"X + {cexpr(x.get_layout().offset)}",
            "pixels": rows,
            "channels": int(columns),
            "block_rows": -(-int(columns) // self.block_shape[0]),
            "tables": {
                name: DTYPE_TO_CPP[node.get_dtype()] for name, node in inputs.items() if name in self.tables
            },
            "has_bias": "Bias" in inputs,
            "more": "",
            "fill": 0,
            "store": functools.partial(
                self._store,
                kernel,
                as_matrix(fused.result, rows, columns),
                fused.raw,
                fused.nodes,
                [reindexer(node, rows, columns) for node in fused.nodes],
            ),
            **self._tile_options(),
            **self._conv_options(),
        }
        with patch.object(V.graph, "get_dtype", self._fake_get_dtype(fused.raw)):
            return self._template_from_string((_HERE / "templates" / self.source).read_text()).render(
                **options
            )

    def _matrix_size(self, out: Any) -> tuple[Any, Any]:
        """Rows and columns of the matrix as which the output `out` lies in memory."""
        *rows, columns = out.get_size()
        return sympy.prod(rows), columns

    def _tile_options(self) -> dict[str, Any]:
        (bh, bw), tile, tiling = self.block_shape, self.tile, self.tiling
        return {
            "bh": bh,
            "bw": bw,
            "lanes": tile.lanes,
            "split": tile.split,
            "pack": tile.pack,
            "vectors": tile.vectors,
            "width": tile.width,
            "chunk": max(1, int(self.parameters.get("chunk", 4))),
            "prefetch_output": self.parameters.get("prefetch") == "output",
            "row_threads": max(1, int(self.parameters.get("row_threads", 1))),
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

    def _store(
        self,
        kernel: Any,
        matrix: Any,
        raw: Any,
        nodes: list[Any],
        reindexers: list[Callable[..., Any]],
        row: str,
    ) -> str:
        """C++ that runs the epilogue on one segment: output pixels from `m_start` on, `acc` from `row` on."""
        tiling, width = self.tiling, self.tile.width
        begin, end = "0", str(tiling.segment)
        if tiling.overhang:
            end = "m_end"
        elif tiling.ragged and tiling.segments == 1:
            begin = "m_skip"
        c_end = "c_end" if int(nodes[0].get_size()[-1]) % width else f"c_start + {width}"
        source = kernel.local_buffers["acc"]
        if (row, begin, end) != ("0", "0", str(tiling.segment)) or c_end == "c_end":
            part = [(f"{row} + {begin}", f"{row} + {end}"), ("0", f"{c_end} - c_start")]
            source = kernel.slice_nd(source, part)
        target = kernel.slice_nd(matrix, [(f"m_start + {begin}", f"m_start + {end}"), ("c_start", c_end)])
        offsets = (f"m_start + {begin}", "c_start")
        code = kernel.store_output(target, source, raw, nodes, offsets=offsets, reindexers=reindexers)
        return unroll(clamp_natively(round_natively(code)))
