"""What tests on a GPU share: the marks, and the lists of layers that the interpreter's tests have as well."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # A kernel that hangs cannot be interrupted by a signal.
    pytest.mark.timeout(240, method="thread"),
]


def codegen_test(name: str) -> Any:
    """The module `tests/codegen/<name>.py`, for its lists of cases."""
    path = Path(__file__).parents[1] / "codegen" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"cases_of_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
