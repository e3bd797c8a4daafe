"""One fixed device and one fixed kernel table: nothing here depends on a machine."""

from __future__ import annotations

import pytest
from layer_cases import FIXED, AnyLayer

from blocksparse_compiler.devices import DeviceSpec


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    monkeypatch.setenv("BLOCKSPARSE_CALIBRATE", "0")


@pytest.fixture
def spec() -> DeviceSpec:
    return FIXED


@pytest.fixture
def table(monkeypatch) -> dict[str, AnyLayer]:
    """The kernel table, replaced by one row."""
    from blocksparse_compiler import variants

    rows = {"any": AnyLayer()}
    monkeypatch.setattr(variants, "VARIANTS", rows)
    return rows
