"""Networks of layers that run in chains, and a way to do without chains."""

from __future__ import annotations

import importlib

import pytest

# The function of this name hides its module.
CHOOSE = importlib.import_module("blocksparse_compiler.passes.choose_chains")


@pytest.fixture
def no_chains(monkeypatch):
    """Plans as if no layers could share one kernel in a chain."""
    monkeypatch.setattr(CHOOSE, "paths", lambda *_: iter(()))
