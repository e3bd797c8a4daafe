"""The gradient of kept weight tiles as an Inductor C++ template.

The output is a matrix `[tiles * bh, bw]` in memory; Inductor's fused epilogue runs on one tile at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sympy
import torch

from .epilogue import FusedEpilogue, as_matrix, reindexer, unroll
from .inductor_api import KERNEL_DESCRIPTION, CppTemplate, V, cexpr_index
from .tiling import ConvGeometry, Size

_HERE = Path(__file__).parent
_HEADERS = tuple(_HERE / "include" / name for name in ("block_sparse.h", "tile_gradient_f32.h"))
_SOURCE = _HERE / "templates" / "cpu_f32_gradient.cpp.jinja"


@dataclass(frozen=True)
class GradientTile:
    """What the inner loop keeps in registers: `vectors` of `lanes` input channels, `rows` output channels."""

    lanes: int
    vectors: int
    rows: int


class TileGradientTemplate(CppTemplate):
    """One gradient `[n, bh, bw]`.

    Args:
        input_nodes: gradient of the output, input, tile_index.
        layout: output, contiguous.
        images: number of images that `conv` speaks of.
        conv: geometry of the layer; a linear layer, or a 1x1 convolution that reads pixel after pixel, is one
            image, one pixel wide.
        channels: (output, input).
        tile: register tile.
        chunk: output rows that are packed at once.
        tile_threads: threads that share the tiles of the same pixels; the others share the pixels.
    """

    def __init__(
        self,
        input_nodes: Sequence[Any],
        layout: Any,
        num_threads: int,
        *,
        images: Size,
        conv: ConvGeometry,
        channels: tuple[int, int],
        tile: GradientTile,
        chunk: int,
        tile_threads: int,
    ) -> None:
        super().__init__("tile_gradient", input_nodes, layout, num_threads)
        self.images, self.conv, self.channels, self.tile = images, conv, channels, tile
        self.chunk, self.tile_threads = chunk, tile_threads

    def render(  # type: ignore[override]
        self,
        kernel: Any,
        template_buffer_node: Any = None,
        flag_template_buffer_has_other_users: bool | None = None,
        epilogue_nodes: Sequence[Any] | None = None,
        **_: Any,
    ) -> str:
        out: Any = self.output_node if template_buffer_node is None else template_buffer_node
        tiles, bh, bw = map(int, out.get_size())
        fused = FusedEpilogue.of(out, epilogue_nodes, flag_template_buffer_has_other_users)

        def cexpr(size: Size) -> str:
            return cexpr_index(kernel.rename_indexing(sympy.sympify(size)))

        def store() -> str:
            target = kernel.slice_nd(
                as_matrix(fused.result, tiles * bh, bw), [("m_start", f"m_start + {bh}"), ("0", f"{bw}")]
            )
            reindexers = [reindexer(node, tiles * bh, bw) for node in fused.nodes]
            source, offsets = kernel.local_buffers["acc"], ("m_start", "0")
            return unroll(
                kernel.store_output(
                    target, source, fused.raw, fused.nodes, offsets=offsets, reindexers=reindexers
                )
            )

        headers = "\n".join(path.read_text() for path in _HEADERS)
        grad, x, _index = self.input_nodes
        options = {
            "prelude": f"{self.header().getvalue()}\n{headers}",
            "kernel": kernel,
            "profile": kernel.maybe_codegen_profile().replace(kernel.kernel_name, KERNEL_DESCRIPTION),
            "inputs": dict(zip(("Grad", "X", "TileIndex"), self.input_nodes, strict=True)),
            "outputs": fused.outputs,
            "aliases": fused.aliases,
            "cexpr": cexpr,
            "dtype": torch.float32,
            "num_threads": self.num_threads,
            "tiles": tiles,
            "bh": bh,
            "bw": bw,
            "grad": f"Grad + {cexpr(grad.get_layout().offset)}",
            "x": f"X + {cexpr(x.get_layout().offset)}",
            "store": store,
            **self._options(bh, bw),
        }
        with patch.object(V.graph, "get_dtype", self._fake_get_dtype(fused.raw)):
            return self._template_from_string(_SOURCE.read_text()).render(**options)

    def _options(self, bh: int, bw: int) -> dict[str, Any]:
        conv, (out_channels, in_channels) = self.conv, self.channels
        image_stride, row_stride, pixel_stride = conv.input_strides
        pointwise = conv.kernel_size == (1, 1)
        native = self.tile.lanes
        return {
            "images": self.images,
            "oh": conv.output_size[0],
            "ow": conv.output_size[1],
            "h": conv.input_size[0],
            "w": conv.input_size[1],
            "image_stride": image_stride,
            "row_stride": row_stride,
            "pixel_stride": pixel_stride,
            "kh": conv.kernel_size[0],
            "kw": conv.kernel_size[1],
            "stride": conv.stride,
            # A single tap reads every stride-th pixel: the others are not packed.
            "step": conv.stride if pointwise else (1, 1),
            "pointwise": pointwise,
            "pad": conv.pad_begin,
            "dilation": conv.dilation,
            "out_blocks": out_channels // bh,
            "in_blocks": in_channels // bw,
            "grad_step": out_channels,
            "lanes": native,
            "vectors": self.tile.vectors,
            "rows": self.tile.rows,
            "x_lanes": native,
            "dy_lanes": max(n for n in (16, 8, 4) if n <= max(native, 4) and bh % n == 0),
            "chunk": self.chunk,
            "tile_threads": self.tile_threads,
        }
