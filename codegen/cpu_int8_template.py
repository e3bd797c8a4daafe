"""Block-sparse layers on quantized inputs: exact sums of 8-bit products, scaled to fp32 for the epilogue."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .cpu_template import BlockSparseTemplate
from .tiling import PADDED, WIDE


class IntegerTemplate(BlockSparseTemplate):
    """One block-sparse layer on uint8 or int8 inputs.

    Args:
        input_nodes: input, values `[n, bw / 4, bh, 4]`, row_ptr, tile_index, scale, weight_sums and,
            optionally, bias.
        zero_point: of the input, and of the pixels beyond its border.
        signed: whether inputs are int8.
        Others as `BlockSparseTemplate`.
    """

    headers = (*BlockSparseTemplate.headers, "block_sparse_int8.h")
    operands = ("X", "Values", "RowPtr", "TileIndex", "Scale", "WeightSums", "Bias")
    tables = ("Scale", "WeightSums", "Bias")

    def __init__(self, *args: Any, zero_point: int, signed: bool, **options: Any) -> None:
        # As unsigned numbers, which the kernel makes of signed ones: what it skips counts as zero.
        skips_padding = zero_point + 128 * signed == 0
        super().__init__(*args, flush=0, bias_first=not skips_padding, **options)
        self.zero_point = zero_point
        if not skips_padding and not self.tiling.flat:
            self.tiling = replace(self.tiling, border=WIDE | PADDED)

    def _tile_options(self) -> dict[str, Any]:
        return {**super()._tile_options(), "more": f", scale, weightsums, {self.zero_point}"}

    def _conv_options(self) -> dict[str, Any]:
        options = super()._conv_options()
        if self.tiling.border & PADDED:
            options["zeros"] = self.block_shape[1]
        return {**options, "fill": self.zero_point}
