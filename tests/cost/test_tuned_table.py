"""Measured kernel parameters are found for layers of nearly the size that was measured, and only those."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from layer_cases import conv_site, even_pattern

from blocksparse_compiler import cost, devices, tuned_table
from blocksparse_compiler.variants import VARIANTS

H200 = devices.device("h200")
MEASURED = {"pixels": 64, "warps": 8, "stages": 3, "step": 1}


def layer(batch=64, size=14, channels=256):
    site = conv_site(channels, channels, 3, size, batch, padding=((1, 1), (1, 1)))
    return replace(site, dtype="bfloat16", device="cuda")


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A table with one layer in it."""
    monkeypatch.setattr(tuned_table, "FOLDER", tmp_path)
    site = layer()
    entry = tuned_table.shape_class("triton_gather", site, even_pattern(site, 0.5, (64, 64)))
    slow = {**entry, "config": {"pixels": 128}, "ms": 2.0}
    fast = {**entry, "config": MEASURED, "ms": 1.0}
    tuned_table.write(tmp_path / "h200.json", "h200", [slow, fast], {"torch": "2.11.0"})
    yield entry
    tuned_table.table.cache_clear()


def configs(site, device=H200, block=(64, 64), density=0.5):
    return VARIANTS["triton_gather"].configs(site, even_pattern(site, density, block), device)


def test_the_file_holds_the_fastest_of_each_class(measured, tmp_path):
    data = json.loads((tmp_path / "h200.json").read_text())
    assert data["measured_with"] == {"torch": "2.11.0"}
    assert data["entries"] == [{**measured, "config": MEASURED, "ms": 1.0}]


@pytest.mark.parametrize("site", [layer(), layer(batch=128), layer(size=16)])
def test_layers_of_nearly_that_size_take_it_first(measured, site):
    assert configs(site)[0] == MEASURED
    assert configs(site).count(MEASURED) == 1
    assert len(configs(site)) > 1


@pytest.mark.parametrize(
    ("site", "options"),
    [
        (layer(batch=1), {}),
        (layer(batch=64, size=56), {}),
        (replace(layer(), dtype="float32"), {}),
        (replace(layer(), stride=(2, 2)), {}),
        (replace(layer(), input_shape=("s0", 256, 14, 14)), {}),
        (layer(), {"block": (32, 32)}),
        (layer(), {"density": 0.05}),
        (layer(), {"device": devices.device("h100")}),
    ],
)
def test_other_layers_do_not(measured, site, options):
    assert MEASURED not in configs(site, **options)


def test_the_cost_model_takes_what_was_measured(measured):
    site = layer()
    decision = cost.choose(site, [even_pattern(site, 0.25, (64, 64))], H200, allow_dense=False)
    if decision.kernel == "triton_gather":
        assert dict(decision.config) == MEASURED
    ranked, _ = cost.candidates(site, [even_pattern(site, 0.25, (64, 64))], H200)
    (gather,) = (c for c in ranked if c.variant == "triton_gather")
    assert dict(gather.config) == MEASURED
