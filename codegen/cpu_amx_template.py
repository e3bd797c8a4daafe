"""The block-sparse kernel on AMX tiles as an Inductor C++ template, and its emulation for tests."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..amx_tiling import SIDE, Axis, Panel, Region, panel, regions, wants_panel
from ..amx_variant import product_width
from .inductor_api import inductor_config, pick_vec_isa
from .kernel_template import KernelTemplate
from .output_matrix import OutputMatrix
from .tiling import ConvGeometry, Size, all_static, as_int, is_static

PIXELS_BESIDE = 4
"""Output pixels that are converted and stored while the tiles of one block are multiplied."""

_emulated = False


@contextlib.contextmanager
def emulated_amx() -> Iterator[None]:
    """Compiles AMX kernels with the tile instructions in plain C++. For tests: some 1000 times slower.

    Inductor's caches are off meanwhile: they must not give such code to anyone else.
    """
    global _emulated
    before, _emulated = _emulated, True
    try:
        with inductor_config.patch(force_disable_caches=True):
            yield
    finally:
        _emulated = before


def runs_amx() -> bool:
    """Whether kernels compiled now may use AMX."""
    return _emulated or "amx_tile" in str(pick_vec_isa())


@dataclass(frozen=True)
class Tiles:
    """How a layer maps to tiles: rows of pixels, or an image's regions, or a panel."""

    regions: tuple[Region, ...] = ()
    panel: Panel | None = None

    @property
    def mode(self) -> str:
        return "panel" if self.panel else "direct" if self.regions else "rows"


def tiles_of(conv: ConvGeometry, images: Size, chunk: int, threads: int, wanted: int | None) -> Tiles | None:
    """The tiles of a layer; None for images of symbolic size.

    Args:
        chunk: pairs of tiles in a panel.
        wanted: 1 for a panel, 0 for none, None for the better one.
    """
    if conv.is_flat(images):
        return Tiles()
    sizes = (*conv.input_size, *conv.output_size, *conv.input_strides)
    if not all_static(sizes):
        return None
    rows, columns = (
        Axis(
            as_int(conv.input_size[i]),
            as_int(conv.output_size[i]),
            conv.kernel_size[i],
            conv.stride[i],
            conv.pad_begin[i],
            conv.dilation[i],
        )
        for i in range(2)
    )
    share = -(-as_int(images) // threads) if is_static(images) else chunk
    if wanted or (wanted is None and wants_panel(rows, columns, share, chunk)):
        return Tiles(panel=panel(rows, columns, share, chunk))
    return Tiles(regions(rows, columns))


class AmxTemplate(KernelTemplate):
    """One block-sparse layer on bf16.

    Args:
        tiles: see `tiles_of`.
        in_channels: of the input.
        Others as `BlockSparseTemplate`, which reads the same weights.
    """

    source = "cpu_amx.cpp.jinja"
    operands = ("X", "Values", "RowPtr", "TileIndex", "Bias")

    def __init__(
        self,
        input_nodes: Any,
        layout: Any,
        num_threads: int,
        *,
        images: Size,
        conv: ConvGeometry,
        tiles: Tiles,
        in_channels: int,
        block_shape: tuple[int, int],
        parameters: dict[str, int | str],
    ) -> None:
        super().__init__("block_sparse", input_nodes, layout, num_threads)
        self.images, self.conv, self.tiles, self.in_channels = images, conv, tiles, in_channels
        self.block_shape, self.parameters = block_shape, parameters
        self.width = product_width(block_shape)
        emulation = ("amx_emulation.h",) if _emulated else ()
        self.headers = (*emulation, "block_sparse_amx.h")

    def header(self) -> Any:
        text = super().header()
        if _emulated:
            text.writeline("#define BLOCKSPARSE_EMULATE_AMX")
        return text

    def _options(self, output: OutputMatrix) -> dict[str, Any]:
        (bh, bw), chunk = self.block_shape, int(self.parameters.get("chunk", 4))
        strip, channels = self.tiles.panel, int(output.columns)
        return {
            "pixels": output.rows,
            "channels": channels,
            "block_rows": -(-channels // bh),
            "bh": bh,
            "bw": bw,
            "width": self.width,
            "tiles": int(self.input_nodes[3].get_size()[1]),
            "mode": self.tiles.mode,
            "regions": self.tiles.regions,
            "panel": strip,
            "pairs": -(-strip.tiles() // 2) if strip else max(1, chunk),
            "beside": PIXELS_BESIDE,
            "row_threads": max(1, int(self.parameters.get("row_threads", 1))),
            "in_channels": self.in_channels,
            "in_blocks": -(-self.in_channels // bw),
            "store": functools.partial(self._store, output),
            **self._conv_options(),
        }

    def _conv_options(self) -> dict[str, Any]:
        g = self.conv
        _, row_stride, pixel_stride = g.input_strides
        options = {
            "taps": g.kernel_size[0] * g.kernel_size[1],
            "kh": g.kernel_size[0],
            "kw": g.kernel_size[1],
            "images": self.images,
            "step": pixel_stride,
        }
        if self.tiles.mode == "rows":
            return options
        strides = [*g.input_strides, *g.stride, *g.pad_begin, *g.output_size]
        options["image"] = [int(size) for size in (*g.input_size, *strides)]
        options["tap_offsets"] = [
            int(kh * g.dilation[0] * row_stride + kw * g.dilation[1] * pixel_stride)
            for kh in range(g.kernel_size[0])
            for kw in range(g.kernel_size[1])
        ]
        if self.tiles.panel:
            options["tap_offsets"] = [place * self.block_shape[1] for place in self.tiles.panel.taps]
        return options

    def _store(self, output: OutputMatrix, row: str) -> str:
        """C++ that runs the epilogue on `rows` output pixels from `m_start` on; `row`: of `acc`, the first.

        The kernel passes a literal 1 for `rows`. Inductor must not know: its choice of a loop to vectorize
        goes wrong where an outer loop has one iteration.
        """
        c_end = "c_end" if output.columns % self.width else f"c_start + {self.width}"
        width = f"{c_end} - c_start" if c_end == "c_end" else str(self.width)
        part = (row, f"{row} + rows"), ("0", width)
        return output.store(("m_start", "m_start + rows"), ("c_start", c_end), part)


__all__ = ["SIDE", "AmxTemplate", "Tiles", "emulated_amx", "runs_amx", "tiles_of"]
