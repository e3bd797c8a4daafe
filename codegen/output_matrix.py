"""The output of a C++ kernel: a matrix in memory, of which one tile at a time is stored."""

from __future__ import annotations

from typing import Any

from .epilogue import (
    FusedEpilogue,
    as_matrix,
    clamp_natively,
    flipped,
    flipped_index,
    move_parts_natively,
    reindexer,
    round_natively,
    unroll,
)

Span = tuple[str, str]
"""Begin and end, as C++."""


class OutputMatrix:
    """Gives C++ that runs the epilogue on a tile of sums, the kernel's local buffer `acc`, and stores it.

    Args:
        kernel: Inductor's.
        fused: the epilogue.
        rows, columns: of the matrix.
    """

    def __init__(self, kernel: Any, fused: FusedEpilogue, rows: Any, columns: Any) -> None:
        self.rows, self.columns = rows, columns
        self._kernel, self._fused = kernel, fused
        self._matrix = as_matrix(fused.result, rows, columns)
        self._reindexers = [reindexer(node, rows, columns) for node in fused.nodes]

    def store_tile(self, rows: int | str, columns: int | str) -> str:
        """Stores the first so many rows and columns of `acc`, as those from `m_start` and `c_start` on."""
        whole = [rows, columns] == list(self._kernel.local_buffers["acc"].get_size())
        part = None if whole else (("0", str(rows)), ("0", str(columns)))
        target = ("m_start", f"m_start + {rows}"), ("c_start", f"c_start + {columns}")
        return self.store(*target, part)

    def store(self, rows: Span, columns: Span, part: tuple[Span, Span] | None = None) -> str:
        """Stores `acc`, or rows and columns of it, as these rows and columns."""
        kernel, reindexers = self._kernel, self._reindexers
        source = kernel.local_buffers["acc"]
        if part:
            source = kernel.slice_nd(source, list(part))
        target, offsets = kernel.slice_nd(self._matrix, [rows, columns]), (rows[0], columns[0])
        if source.get_size()[0] == 1:  # a column of the transposed matrix is vectorised
            target, source, offsets = flipped(target), flipped(source), offsets[::-1]
            reindexers = [flipped_index(reindex) for reindex in reindexers]
        code = kernel.store_output(
            target, source, self._fused.raw, self._fused.nodes, offsets=offsets, reindexers=reindexers
        )
        return unroll(move_parts_natively(clamp_natively(round_natively(code))))
