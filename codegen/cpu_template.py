"""The block-sparse CPU kernels as an Inductor C++ template: rows of im2col by block rows of the weight.

The template's output is a matrix `[pixels, out_channels]` in memory. Inductor's fused epilogue runs on one
register tile at a time, with literal trip counts, so that the C++ compiler keeps the tile in registers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sympy
import torch

from ..variants import RegisterTile
from .inductor_api import CppTemplate, FloorDiv, ModularIndexing, V, cexpr_index, ir, ops

_HERE = Path(__file__).parent
_HEADER = _HERE / "include" / "block_sparse_f32.h"
_SOURCE = _HERE / "templates" / "cpu_f32.cpp.jinja"

_COSTLY = ("erf", "exp", "tanh", "log", "sigmoid", "pow", "sin", "cos")
"""Epilogues that call these are loops of their own: unrolled they only cost code."""

Size = "int | sympy.Expr"


@functools.cache
def source_digest() -> str:
    """16 hex digits over every source that the generated code comes from."""
    digest = hashlib.sha256()
    for path in (_HEADER, _SOURCE, *sorted(_HERE.glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class ConvGeometry:
    """What a convolution adds to the matrix product. Sizes and strides are ints but for the batch.

    Args:
        input_size: `(H, W)`; output_size: `(OH, OW)`.
        input_strides: floats between images, rows and pixels.
    """

    input_size: tuple[int, int]
    output_size: tuple[int, int]
    input_strides: tuple[int, int, int]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    pad_begin: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def overhang(self) -> tuple[int, int]:
        """Output columns whose outermost tap lies left, and right, of the image."""
        (_, width), (_, ow) = self.input_size, self.output_size
        left = min(ow, -(-self.pad_begin[1] // self.stride[1]))
        reach = (self.kernel_size[1] - 1) * self.dilation[1] - self.pad_begin[1]
        inside = max(0, -(-(width - reach) // self.stride[1]))
        return left, max(0, ow - inside)


@dataclass(frozen=True)
class Tiling:
    """How output pixels map to register tiles: `segments` runs of `segment` pixels each."""

    segments: int
    segment: int
    ragged: bool


def flat_tiling(pixels: Any, max_pixels: int) -> Tiling | None:
    """Tiles over all pixels in a row; None if fewer pixels than a tile holds may come."""
    factor = _static_factor(pixels)
    if factor == pixels:
        count = -(-factor // max_pixels)
        segment = -(-factor // count)
        return Tiling(1, segment, factor % segment != 0)
    exact = [s for s in range(max_pixels, max_pixels // 2, -1) if factor % s == 0]
    if exact:
        return Tiling(1, exact[0], False)
    return Tiling(1, max_pixels, True) if factor >= max_pixels else None


def row_tiling(images: Any, output_size: tuple[int, int], max_pixels: int) -> Tiling:
    """Tiles along output rows; narrow rows of several images, or several narrow rows, share a tile."""
    oh, ow = output_size
    per_row = -(-ow // max_pixels)
    segment = -(-ow // per_row)
    segments = max_pixels // ow if per_row == 1 else 1
    whole = _static_factor(images) % segments == 0
    if not whole:
        segments = min(segments, oh)
    ragged = segment * per_row != ow or (not whole and oh % segments != 0)
    return Tiling(segments, segment, ragged)


def _static_factor(size: Any) -> int:
    """The largest int known to divide a size."""
    if isinstance(size, int) or getattr(size, "is_Integer", False):
        return int(size)
    return int(sympy.sympify(size).as_coeff_Mul()[0]) or 1


class BlockSparseTemplate(CppTemplate):
    """One block-sparse layer on fp32.

    Args:
        input_nodes: input, values, row_ptr, channel_offset and, optionally, bias.
        layout: output, `[n, oh, ow, out_channels]` or `[rows, out_channels]`, contiguous.
        tile: register tile.
        parameters: of the kernel variant: `chunk`, `row_threads`.
        block_shape: `(bh, bw)`.
        step: floats between two neighbouring input pixels of a flat product.
        conv: geometry, or None if every output pixel reads one input pixel, in order.
    """

    def __init__(
        self,
        input_nodes: Sequence[Any],
        layout: Any,
        num_threads: int,
        tile: RegisterTile,
        tiling: Tiling,
        parameters: dict[str, int | str],
        block_shape: tuple[int, int],
        step: int,
        conv: ConvGeometry | None,
    ) -> None:
        super().__init__("block_sparse", input_nodes, layout, num_threads)
        self.tile, self.tiling, self.parameters = tile, tiling, parameters
        self.block_shape, self.step, self.conv = block_shape, step, conv

    def render(  # type: ignore[override]
        self,
        kernel: Any,
        template_buffer_node: Any = None,
        flag_template_buffer_has_other_users: bool | None = None,
        epilogue_nodes: Sequence[Any] | None = None,
        **_: Any,
    ) -> str:
        out = self.output_node if template_buffer_node is None else template_buffer_node
        *rows, channels = out.get_size()
        pixels = sympy.prod(rows)
        accumulated, copy = _accumulator(out)
        nodes = [copy, *(epilogue_nodes or ())]
        result = nodes[-1] if epilogue_nodes else out
        outputs, aliases = {"Y": result}, {accumulated.get_name(): result.get_name()}
        if epilogue_nodes and flag_template_buffer_has_other_users:
            outputs["Raw"] = out
        elif epilogue_nodes:
            aliases[out.get_name()] = result.get_name()
        x, values, row_ptr, channel_offset, *bias = self.input_nodes
        inputs = {"X": x, "Values": values, "RowPtr": row_ptr, "ChannelOffset": channel_offset}
        inputs.update(zip(("Bias",), bias, strict=False))
        reindexers = [_reindexer(node, pixels, channels) for node in nodes]
        store = functools.partial(
            self._store, kernel, _as_matrix(result, pixels, channels), accumulated, nodes, reindexers
        )
        options = dict(
            prelude=f"{self.header().getvalue()}\n{_HEADER.read_text()}",
            kernel=kernel,
            inputs=inputs,
            outputs=outputs,
            aliases=aliases,
            dtype=torch.float32,
            store=store,
            cexpr=lambda e: cexpr_index(kernel.rename_indexing(sympy.sympify(e))),
            input=_pointer("X", x),
            pixels=pixels,
            num_threads=self.num_threads,
            has_bias=bool(bias),
            out_channels=channels,
            **self._tile_options(int(channels)),
            **self._pixel_options(rows),
        )
        with patch.object(V.graph, "get_dtype", self._fake_get_dtype(accumulated)):
            return self._template_from_string(_SOURCE.read_text()).render(**options)

    def _tile_options(self, channels: int) -> dict[str, Any]:
        (bh, bw), tile = self.block_shape, self.tile
        return {
            "bh": bh,
            "bw": bw,
            "lanes": tile.lanes,
            "vectors": tile.vectors,
            "width": tile.width,
            "tile_groups": bh // tile.width,
            "block_rows": -(-channels // bh),
            "ragged_channels": channels % tile.width != 0,
            "segments": self.tiling.segments,
            "segment": self.tiling.segment,
            "ragged_pixels": self.tiling.ragged,
            "chunk": max(1, int(self.parameters.get("chunk", 4))),
            "row_threads": max(1, int(self.parameters.get("row_threads", 1))),
        }

    def _pixel_options(self, rows: Sequence[Any]) -> dict[str, Any]:
        if self.conv is None:
            return {"flat": True, "step": self.step, "taps": 1}
        g = self.conv
        (h, w), (oh, ow), (kh, kw) = g.input_size, g.output_size, g.kernel_size
        image_stride, row_stride, pixel_stride = g.input_strides
        left, right = g.overhang
        return {
            "flat": False,
            "taps": kh * kw,
            "kh": kh,
            "kw": kw,
            "oh": oh,
            "ow": ow,
            "images": rows[0],
            "tiles_per_row": -(-ow // self.tiling.segment),
            "image_stride": image_stride,
            "geometry": (h, w, row_stride, pixel_stride, *g.stride, *g.pad_begin, *g.dilation),
            "zeros": ((self.tiling.segment - 1) * g.stride[1]) * pixel_stride + self.block_shape[1],
            "left": str(left > 0).lower(),
            "right": str(right > 0).lower(),
        }

    def _store(
        self,
        kernel: Any,
        matrix: Any,
        accumulated: Any,
        nodes: list[Any],
        reindexers: list[Callable[..., Any]],
        start: str,
        at: str,
    ) -> str:
        """Code that runs the epilogue on one segment of the tile: pixels from `start` on, row `at` of acc."""
        length, width = self.tiling.segment, self.tile.width
        ragged_pixels = self.tiling.ragged and self.tiling.segments == 1
        skip = "m_skip" if ragged_pixels else "0"
        c_end = "c_end" if int(nodes[0].get_size()[-1]) % width else f"c_start + {width}"
        source = kernel.local_buffers["acc"]
        if at != "0" or skip != "0" or c_end == "c_end":
            part = [(f"{at} + {skip}", f"{at} + {length}"), ("0", f"{c_end} - c_start")]
            source = kernel.slice_nd(source, part)
        target = kernel.slice_nd(matrix, [(f"{start} + {skip}", f"{start} + {length}"), ("c_start", c_end)])
        code = kernel.store_output(
            target,
            source,
            accumulated,
            nodes,
            offsets=(f"{start} + {skip}", "c_start"),
            reindexers=reindexers,
        )
        return _unroll(code)


def _unroll(code: str) -> str:
    """Unrolls the epilogue's loops over the tile, so that the compiler can keep the tile in registers."""
    if any(name in code for name in _COSTLY):
        return code
    code = code.replace("#pragma GCC ivdep", "#pragma GCC unroll 64")
    return code.replace("for(int64_t x1=", "\n#pragma GCC unroll 4\nfor(int64_t x1=")


def _accumulator(out: Any) -> tuple[Any, Any]:
    """The raw tile under a name of its own, and the node that copies it to the template's buffer.

    The raw tile is never materialised: the kernel's local buffer stands for it.
    """
    raw = ir.Buffer(name=f"{out.get_name()}_acc", layout=out.get_layout())
    data = ir.Pointwise(
        device=out.get_device(),
        dtype=out.get_dtype(),
        inner_fn=raw.make_loader(),
        ranges=out.get_size(),
    )
    return raw, ir.ComputedBuffer(name=out.get_name(), layout=out.get_layout(), data=data)


def _as_matrix(buffer: Any, pixels: Any, channels: Any) -> Any:
    layout = ir.FixedLayout(buffer.get_device(), buffer.get_dtype(), [pixels, channels], [channels, 1])
    return ir.ReinterpretView(data=buffer, layout=layout)


def _pointer(name: str, node: Any) -> str:
    """The kernel gets the storage of a view: add the view's offset."""
    offset = node.get_layout().offset
    return name if offset == 0 else f"{name} + {cexpr_index(sympy.sympify(offset))}"


def _reindexer(node: Any, pixels: Any, channels: Any) -> Callable[[Sequence[Any]], list[Any]]:
    """Maps `[pixel, channel]` to the index of an epilogue node that lies in memory as that matrix."""
    sizes, strides = node.get_size(), node.get_layout().stride
    hints = V.graph.sizevars.optimization_hints(strides) if strides else ()
    order = sorted((d for d in range(len(sizes)) if sizes[d] != 1), key=lambda d: -hints[d])
    split = next(
        (i for i in range(len(order) + 1) if sympy.prod(sizes[d] for d in order[i:]) == channels),
        None,
    )

    def reindex(index: Sequence[Any]) -> list[Any]:
        pixel, channel = index
        if split is None:
            parts = _unflatten(pixel * channels + channel, [sizes[d] for d in order])
        else:
            parts = _unflatten(pixel, [sizes[d] for d in order[:split]])
            parts += _unflatten(channel, [sizes[d] for d in order[split:]])
        result = [sympy.Integer(0)] * len(sizes)
        for d, part in zip(order, parts, strict=True):
            result[d] = part
        return result

    return reindex


def _unflatten(index: Any, sizes: Sequence[Any]) -> list[Any]:
    """The index into a contiguous array of these sizes."""
    result = []
    for i in range(len(sizes)):
        inner = sympy.prod(sizes[i + 1 :])
        result.append(FloorDiv(index, inner) if i == 0 else ModularIndexing(index, inner, sizes[i]))
    return result


__all__ = [
    "BlockSparseTemplate",
    "ConvGeometry",
    "Tiling",
    "flat_tiling",
    "row_tiling",
    "source_digest",
]
_ = (math, contextlib, ops)
