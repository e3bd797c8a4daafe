"""C++ kernel texts as Inductor templates, with the epilogue that Inductor fuses behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sympy
import torch

from .epilogue import FusedEpilogue
from .inductor_api import DTYPE_TO_CPP, KERNEL_DESCRIPTION, CppTemplate, V, cexpr_index
from .output_matrix import OutputMatrix
from .tiling import Size

_HERE = Path(__file__).parent


class KernelTemplate(CppTemplate):
    """One kernel, whose output lies in memory as a matrix; subclasses say what its text needs to know.

    The text stores one tile of the matrix at a time, with what `store` of the options makes for it.
    """

    source: str
    """The text, in `templates/`."""
    headers: tuple[str, ...]
    """What is pasted in front of it, from `include/`, besides what all need."""
    operands: tuple[str, ...]
    """What the text calls the inputs; the last one, the bias, may be missing."""

    def render(  # type: ignore[override]
        self,
        kernel: Any,
        template_buffer_node: Any = None,
        flag_template_buffer_has_other_users: bool | None = None,
        epilogue_nodes: Sequence[Any] | None = None,
        **_: Any,
    ) -> str:
        out: Any = self.output_node if template_buffer_node is None else template_buffer_node
        fused = FusedEpilogue.of(out, epilogue_nodes, flag_template_buffer_has_other_users)
        inputs = dict(zip(self.operands, self.input_nodes, strict=False))

        def cexpr(size: Size) -> str:
            return cexpr_index(kernel.rename_indexing(sympy.sympify(size)))

        def begin(name: str) -> str:
            """Of an input: the kernel gets the storage of a view, without the view's offset."""
            return f"{name} + {cexpr(inputs[name].get_layout().offset)}"

        options = {
            "prelude": self._prelude(),
            "kernel": kernel,
            "profile": kernel.maybe_codegen_profile().replace(kernel.kernel_name, KERNEL_DESCRIPTION),
            "inputs": inputs,
            "outputs": fused.outputs,
            "aliases": fused.aliases,
            "types": {name: DTYPE_TO_CPP[node.get_dtype()] for name, node in inputs.items()},
            "has_bias": "Bias" in inputs,
            "cexpr": cexpr,
            "begin": begin,
            "dtype": torch.float32,
            "num_threads": self.num_threads,
            **self._options(OutputMatrix(kernel, fused, *self._matrix_size(out))),
        }
        text = (_HERE / "templates" / self.source).read_text()
        with patch.object(V.graph, "get_dtype", self._fake_get_dtype(fused.raw)):
            return self._template_from_string(text).render(**options)

    def _prelude(self) -> str:
        names = ("lanes.h", "threads.h", *self.headers, "epilogue.h")
        texts = [(_HERE / "include" / name).read_text() for name in names]
        return "\n".join([self.header().getvalue(), *texts])

    def _options(self, output: OutputMatrix) -> dict[str, Any]:
        """What else the text needs: sizes, and `store`, which gives C++ that stores a tile."""
        raise NotImplementedError

    def _matrix_size(self, out: Any) -> tuple[Any, Any]:
        """Rows and columns of the matrix as which the output `out` lies in memory."""
        *rows, columns = out.get_size()
        return sympy.prod(rows), columns
