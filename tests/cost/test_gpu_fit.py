"""Fitting a GPU's figures: made-up measurements of another GPU are found again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from layer_cases import conv_site, even_pattern, linear_site

from benchmarks import fit_gpu
from benchmarks.gpu_cases import Cell
from benchmarks.shapes import ConvShape
from blocksparse_compiler import gpu_devices, gpu_fit
from blocksparse_compiler.gpu_devices import SPECS
from blocksparse_compiler.gpu_fit import Measurement, errors, fit, loss

H200 = SPECS["h200"]


def measurements(truth, noise=0.0):
    sites = [
        conv_site(256, 256, 3, 14, 256),
        conv_site(64, 64, 3, 56, 64),
        conv_site(1024, 256, 1, 14, 64),
        linear_site(4096, 4096, (1,)),
        linear_site(4096, 4096, (2048,)),
        linear_site(768, 768, (16, 197)),
    ]
    config = {"pixels": 128, "warps": 4, "stages": 4}
    found = []
    for i, site in enumerate(
        replace(s, device="cuda", dtype="bfloat16", name=str(i)) for i, s in enumerate(sites)
    ):
        made = [Measurement(site, 1.0)]
        for density in (0.25, 0.5):
            for variant in ("triton_gather", "triton_box"):
                made.append(Measurement(site, 1.0, variant, even_pattern(site, density, (64, 64)), config))
        for j, m in enumerate(made):
            wobble = 1 + noise * (-1) ** (i + j)
            found.append(replace(m, seconds=wobble * m.estimate(truth)))
    return found


TRUTH = H200.with_figures(
    "truth",
    launch_seconds=1.2e-6,
    program_seconds=1.5e-6,
    efficiency={"l2": 0.6, "dense/spatial": 0.75, "dram": 0.8, "triton_gather": 0.4, "triton_box": 0.5},
)


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_figures_are_found_again(noise):
    measured = measurements(TRUTH, noise)
    fitted = fit(H200, measured)
    assert loss(fitted, measured) < 0.1 * loss(H200, measured)
    assert all(factor < 1.06 + noise for _, _, factor in errors(fitted, measured).values())
    assert fitted.efficiency["l2"] == pytest.approx(0.6, rel=0.15)
    assert fitted.sources["efficiency l2"] == "fitted to measurements"
    assert fitted.dram_bytes_per_second == H200.dram_bytes_per_second
    assert fitted.efficiency["dense/depthwise"] == H200.efficiency["dense/depthwise"]  # nothing measured


def test_a_spec_that_fits_stays():
    assert fit(H200, measurements(H200)) == H200
    assert fit(H200, []) is H200


def test_errors_by_variant():
    found = errors(H200, [replace(m, seconds=2 * m.seconds) for m in measurements(H200)])
    assert set(found) == {"dense", "triton_gather", "triton_box"}
    for count, ratio, factor in found.values():
        assert count in (6, 12) and ratio == pytest.approx(0.5) and factor == pytest.approx(2)


def test_one_outlier_does_not_spoil_the_fit():
    measured = measurements(TRUTH)
    measured[3] = replace(measured[3], seconds=100 * measured[3].seconds)
    assert fit(H200, measured).efficiency["l2"] == pytest.approx(0.6, rel=0.2)


def test_written_figures_are_those_of_the_spec(tmp_path, monkeypatch):
    path = gpu_fit.write(TRUTH, "fitted to 30 kernels", tmp_path)
    assert path.name == "h200.figures.json"
    monkeypatch.setattr(gpu_devices, "MEASURED_FOLDER", tmp_path)
    spec = gpu_devices.with_measured(H200)
    assert spec.efficiency == TRUTH.efficiency
    assert spec.graph_launch_seconds == TRUTH.launch_seconds and spec.launch_seconds == H200.launch_seconds
    assert spec.sources["efficiency l2"] == "fitted to 30 kernels"
    assert gpu_devices.with_measured(SPECS["a100"]) is SPECS["a100"]


def test_the_command_reads_what_the_benchmark_writes(tmp_path):
    cell = Cell(ConvShape(64, 14, 64, 3), 64, "64x64", 0.5)
    config = {"pixels": 128, "warps": 4, "stages": 4, "step": 1}
    row = {
        "cell": json.loads(json.dumps(cell.to_json())),
        "shape": str(cell.shape),
        "batch": 64,
        "dense": {"eager": {"median_ms": 0.02}, "inductor": {"median_ms": 0.01}},
        "candidates": [{"variant": "triton_gather", "tile": "64x64", "config": config, "median_ms": 0.006}],
    }
    machine = {"spec": "h200", "gpu": "NVIDIA H200", "torch": "2.11.0"}
    results = tmp_path / "gpu_layers.json"
    results.write_text(json.dumps({"machine": machine, "rows": [row]}))
    found = fit_gpu.measurements([row])
    assert [(m.variant, m.seconds) for m in found] == [("dense", 1e-5), ("triton_gather", 6e-6)]
    fit_gpu.run(results, write=True, folder=tmp_path)
    data = json.loads((tmp_path / "h200.figures.json").read_text())
    assert data["source"] == "fitted to 2 kernels on NVIDIA H200, torch 2.11.0"
    assert set(data["figures"]) == {
        "load_latency_seconds",
        "program_seconds",
        "graph_launch_seconds",
        "efficiency",
    }
