"""Calibration without a clock: figures from given times, fitting, and what is kept on disk."""

from __future__ import annotations

import dataclasses
import json
import logging
import os

import pytest
from layer_cases import conv_site

from blocksparse_compiler import busy, calibrate, cost, disk_cache
from blocksparse_compiler.devices import DeviceSpec, device
from blocksparse_compiler.errors import OptionError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKSPARSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("BLOCKSPARSE_CALIBRATE", "1")
    return tmp_path


@pytest.fixture
def never_measures(monkeypatch):
    def fail(**_):
        raise AssertionError("measured")

    monkeypatch.setattr(calibrate, "measure_host", fail)


def times_of(spec: DeviceSpec) -> dict[str, float]:
    """What a machine with exactly these figures would measure."""
    calls = {name: getattr(spec, name) for name in calibrate._CALLS}
    layers = {}
    for name, site in calibrate.dense_layers(spec).items():
        record = cost.dense_cost(site, spec)
        layers[name] = cost.value(record.compute_seconds) + cost.value(record.overhead_seconds)
    return {**layers, **calls}


def test_dense_figures_recover_a_machine():
    default = DeviceSpec.host()
    truth = default.with_figures(
        "test",
        peak_fp32_flops_per_second_per_thread=default.peak_fp32_flops_per_second_per_thread / 2,
        peak_bf16_flops_per_second_per_thread=default.peak_bf16_flops_per_second_per_thread * 1.5,
        dense_conv_call_seconds=default.dense_conv_call_seconds * 2,
        efficiency={
            "dense/linear": 0.11,
            "dense/few_rows": 0.07,
            "dense/grouped": 0.33,
            "dense/depthwise": 0.03,
            "dense_bf16/linear": 0.2,
        },
    )
    found = default.with_figures("measured", **calibrate.dense_figures(default, times_of(truth)))
    for dtype in ("float32", "bfloat16"):
        assert found.peak_flops_per_second(dtype) == pytest.approx(truth.peak_flops_per_second(dtype))
    assert found.dense_conv_call_seconds == pytest.approx(truth.dense_conv_call_seconds)
    for name in calibrate.dense_layers(default):
        assert found.efficiency[name] == pytest.approx(truth.efficiency[name]), name


def test_absurd_times_are_cut_off():
    default = DeviceSpec.host()
    for factor in (1e-6, 1e6):
        times = {name: seconds * factor for name, seconds in times_of(default).items()}
        figures = calibrate.dense_figures(default, times)
        for name in (*calibrate.PEAKS.values(), "dense_conv_call_seconds"):
            ratio = figures[name] / getattr(default, name)
            assert 1 / calibrate._TRUST <= ratio <= calibrate._TRUST
        assert all(0 < fraction <= 1 for fraction in figures["efficiency"].values())


@pytest.mark.parametrize("kind", list(calibrate.SPARSE_LAYERS))
@pytest.mark.parametrize("fraction", [0.3, 0.9])
@pytest.mark.parametrize("variant, dtype", [("cpu_f32", "float32"), ("cpu_bf16", "bfloat16")])
def test_fit_inverts_the_cost_model(spec, kind, fraction, variant, dtype):
    site = dataclasses.replace(calibrate.SPARSE_LAYERS[kind], dtype=dtype)
    pattern = calibrate.checkerboard(site, 16)
    truth = spec.with_figures("test", efficiency={f"{variant}/16x16/{kind}": fraction})
    seconds = cost.sparse_cost(site, pattern, truth, variant).evaluate()
    assert calibrate.fit_efficiency(site, pattern, spec, seconds, variant) == pytest.approx(
        fraction, rel=1e-6
    )


@pytest.mark.parametrize("variant, dtype", [("cpu_f32", "float32"), ("cpu_bf16", "bfloat16")])
def test_an_efficiency_above_one_raises_the_peak(spec, variant, dtype):
    sites = {k: dataclasses.replace(site, dtype=dtype) for k, site in calibrate.SPARSE_LAYERS.items()}
    layers = {
        f"{variant}/16x16/{kind}": calibrate.Layer(site, calibrate.checkerboard(site, 16), variant)
        for kind, site in sites.items()
    }
    peak = calibrate._peak_of(variant)
    truth = spec.with_figures(
        "test",
        **{peak: 2 * getattr(spec, peak)},
        efficiency={f"{variant}/16x16/{kind}": 0.8 for kind in sites},
    )
    times = {
        n: cost.sparse_cost(layer.site, layer.pattern, truth, variant).evaluate()
        for n, layer in layers.items()
    }
    found = calibrate.with_sparse_efficiencies(spec, layers, times)
    assert max(found.efficiency[name] for name in layers) == pytest.approx(1.0)
    for layer in layers.values():
        before, after = (cost.dense_cost(layer.site, d).evaluate() for d in (spec, found))
        assert after == pytest.approx(before)  # dense layers are as fast as they were


def test_checkerboard_is_even():
    pattern = calibrate.checkerboard(conv_site(128, 128, 3), 16)
    assert pattern.density == 0.5 and len(set(pattern.kept.sum((1, 2)).tolist())) == 1


def test_stored_figures_are_used(never_measures):
    host = DeviceSpec.host()
    mine = host.with_figures("test", dram_bytes_per_second=12.5e9)
    disk_cache.store(calibrate.KIND, calibrate._key(host), {"thorough": True, "spec": mine.to_json()})
    assert device(None).dram_bytes_per_second == 12.5e9
    assert "our kernels" in calibrate.describe_state()
    assert calibrate.stored_path().is_file()


@pytest.mark.parametrize("value", [1, [], {}, {"spec": {}}, {"spec": {"name": "x"}}, {"spec": None}])
def test_bad_stored_figures_lead_to_a_measurement(monkeypatch, caplog, value):
    host = DeviceSpec.host()
    disk_cache.store(calibrate.KIND, calibrate._key(host), value)
    measured = host.with_figures("test", dram_bytes_per_second=12.5e9)
    monkeypatch.setattr(calibrate, "measure_host", lambda **_: measured)
    assert device(None) is measured


def test_disabled_means_defaults(monkeypatch, never_measures):
    monkeypatch.setenv("BLOCKSPARSE_CALIBRATE", "0")
    assert device(None) == DeviceSpec.host()
    assert "off" in calibrate.describe_state()
    monkeypatch.setenv("BLOCKSPARSE_CALIBRATE", "yes")
    with pytest.raises(OptionError, match="BLOCKSPARSE_CALIBRATE"):
        calibrate.enabled()


def test_a_failure_to_measure_leaves_the_defaults(monkeypatch, caplog):
    def fail(**_):
        raise calibrate.Busy("the machine is busy")

    monkeypatch.setattr(calibrate, "measure_host", fail)
    with caplog.at_level(logging.WARNING, "blocksparse_compiler"):
        assert device(None) == DeviceSpec.host()
    assert "busy" in caplog.text


def test_measuring_stores_what_it_found(monkeypatch, folder):
    """The whole path, on a clock that shows what a known machine would take."""
    default = DeviceSpec.host()
    truth = default.with_figures("test", dense_conv_call_seconds=default.dense_conv_call_seconds * 1.5)

    def known(layers, seconds):
        sparse = {
            name: cost.sparse_cost(layer.site, layer.pattern, truth, layer.kernel).evaluate()
            for name, layer in layers.items()
            if layer.pattern is not None
        }
        return {**times_of(truth), **sparse}

    monkeypatch.setattr(calibrate, "_measure", known)
    monkeypatch.setattr(calibrate, "_bandwidths", lambda spec, seconds: {})
    found = calibrate.measure_host(thorough=True)
    assert found.dense_conv_call_seconds == pytest.approx(truth.dense_conv_call_seconds)
    (file,) = folder.iterdir()
    assert DeviceSpec.from_json(json.loads(file.read_text())["value"]["spec"]) == found == device(None)


def test_processor_time_is_read_from_proc(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 9999 50 6 7 8 0 0\ncpu0 1 2 3 4\n")
    ticks = os.sysconf("SC_CLK_TCK")
    assert busy._busy_seconds(stat) == pytest.approx((100 + 20 + 30 + 6 + 7 + 8) / ticks)
    assert busy._busy_seconds(tmp_path / "none") == 0


@pytest.mark.parametrize("others", [0.0, 0.5])
def test_other_processes_make_a_machine_busy(monkeypatch, others):
    processors = os.cpu_count() or 1
    clocks = iter([(0.0, 100.0, 3.0), (10.0, 100.0 + 8.0 + others * 10 * processors, 11.0)])
    monkeypatch.setattr(busy.OtherLoad, "_clocks", lambda self: next(clocks))

    def measure():
        with busy.alone():
            pass

    if others:
        with pytest.raises(calibrate.Busy, match="50%"):
            measure()
    else:
        measure()
