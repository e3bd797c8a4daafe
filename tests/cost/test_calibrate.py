"""Calibration without a clock: figures from given times, fitting, and what is kept on disk."""

from __future__ import annotations

import contextlib
import json
import logging
import os

import pytest
from layer_cases import conv_site

from blocksparse_compiler import busy, calibrate, cpu_fit, cpu_probes, disk_cache
from blocksparse_compiler.devices import NUMBERS, SPECS, DeviceSpec, device
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


def quick_probes(spec: DeviceSpec) -> cpu_probes.Probes:
    return {**cpu_probes.call_probes(), **cpu_probes.dense_probes(spec), **cpu_probes.kernel_probes(spec)}


def all_probes(spec: DeviceSpec) -> cpu_probes.Probes:
    float16 = cpu_probes.dense_probes(spec, ("float16",))
    return {**quick_probes(spec), **float16, **cpu_probes.tile_probes(spec)}


def figure_of(spec: DeviceSpec, name: str) -> float:
    if name.startswith(cpu_probes.EPILOGUE):
        return spec.tile_epilogue_seconds_per_vector[name.removeprefix(cpu_probes.EPILOGUE)]
    return getattr(spec, name) if name in NUMBERS else spec.efficiency[name]


def times_of(truth: DeviceSpec, probes: cpu_probes.Probes) -> dict[str, float]:
    """What a machine with exactly these figures would measure."""
    return {name: probe.predicted(truth) for name, probe in probes.items()}


WITHOUT_AMX, WITH_AMX = SPECS["avx512-2core"], SPECS["sapphire-rapids"]


def changed(spec: DeviceSpec, factor: float) -> DeviceSpec:
    """The same machine with other rates: every figure that is measured, alternately up and down."""
    names = list(all_probes(spec))
    tell_peaks = {f"{prefix}/{kind}" for prefix in cpu_fit.PEAKS for kind in ("spatial", "pointwise")}
    fields = [name for name in names if name in NUMBERS]
    fields += [peak for peak in cpu_fit.PEAKS.values() if getattr(spec, peak)]
    found = spec.with_figures(
        "test", **{n: getattr(spec, n) * factor ** (-1) ** i for i, n in enumerate(fields)}
    )
    for i, name in enumerate(name for name in names if name not in NUMBERS):
        figure = 0.6 + 0.15 * (i % 3)
        if name in tell_peaks:
            figure = spec.efficiency.get(name, 0.9)
        found = cpu_fit.with_figure(
            found, name, 1e-9 * figure if name.startswith(cpu_probes.EPILOGUE) else figure
        )
    return found


@pytest.mark.parametrize("default", [WITHOUT_AMX, WITH_AMX], ids=lambda s: s.name)
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_the_fit_explains_all_times_of_another_machine(default, factor):
    truth, probes = changed(default, factor), all_probes(default)
    times = times_of(truth, probes)
    found = cpu_fit.fitted(default, probes, times)
    for name, probe in probes.items():
        assert probe.predicted(found) == pytest.approx(times[name], rel=0.02), name


@pytest.mark.parametrize(
    "figure",
    [
        "dense_conv_call_seconds",
        "sparse_call_seconds",
        "transpose_seconds_per_vector",
        "l2_read_over_copy",
        "dense_int8_epilogue_seconds_per_vector",
        "cpu_f32_spmm",
        "cpu_f32_depthwise",
        "dense/grouped",
        "dense_bf16/linear",
        "dense_int8/few_rows",
        "cpu_int8/16x16/pointwise",
        "epilogue/cpu_bf16/16x16",
    ],
)
def test_one_changed_figure_is_found(figure):
    probes = {**quick_probes(WITHOUT_AMX), figure: all_probes(WITHOUT_AMX)[figure]}
    default = changed(WITHOUT_AMX, 1.0)  # which knows a fraction of each
    truth = cpu_fit.with_figure(default, figure, 0.8 * figure_of(default, figure))
    found = cpu_fit.fitted(default, probes, times_of(truth, probes))
    assert figure_of(found, figure) == pytest.approx(figure_of(truth, figure), rel=0.03)


@pytest.mark.parametrize(
    "peak, default",
    [
        ("peak_fp32_flops_per_second_per_thread", WITHOUT_AMX),
        ("peak_bf16_flops_per_second_per_thread", WITHOUT_AMX),
        ("peak_int8_ops_per_second_per_thread", WITHOUT_AMX),
        ("peak_amx_flops_per_second_per_thread", WITH_AMX),
    ],
)
def test_peaks_carry_over_to_our_kernels(peak, default):
    """Torch's operators alone tell that a machine is faster: our fractions of its peak stay."""
    probes = {**cpu_probes.call_probes(), **cpu_probes.dense_probes(default)}
    truth = default.with_figures("test", **{peak: 1.5 * getattr(default, peak)})
    found = cpu_fit.fitted(default, probes, times_of(truth, probes))
    assert getattr(found, peak) == pytest.approx(getattr(truth, peak), rel=0.02)
    ours = {n: f for n, f in found.efficiency.items() if not n.startswith("dense")}
    assert ours == {n: default.efficiency[n] for n in ours}


def test_only_what_the_machine_has_is_measured():
    names = {spec.name: set(all_probes(spec)) for spec in SPECS.values()}
    for name in (
        "amx_tile_seconds",
        "cpu_amx_bf16/32x32/linear",
        "dense_amx/spatial",
        "dense_amx_int8/linear",
    ):
        assert name in names["sapphire-rapids"] and name not in names["avx512-2core"]
    assert {"dense_bf16/spatial", "dense_int8/linear", "cpu_int8/32x32/linear"} <= names["avx512-2core"]


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_absurd_times_are_cut_off(factor):
    default, probes = WITHOUT_AMX, all_probes(WITHOUT_AMX)
    times = {name: seconds * factor for name, seconds in times_of(default, probes).items()}
    found = cpu_fit.fitted(default, probes, times)
    for name in (*cpu_fit.PEAKS.values(), *(name for name in probes if name in NUMBERS)):
        if getattr(default, name) and name not in cpu_fit.PEAKS.values():
            assert (
                0.99 / cpu_fit.TRUST <= getattr(found, name) / getattr(default, name) <= 1.01 * cpu_fit.TRUST
            )
    assert all(0 < fraction <= 1 for fraction in found.efficiency.values())


def test_a_layer_without_a_time_keeps_its_default():
    default, probes = WITHOUT_AMX, all_probes(WITHOUT_AMX)
    found = cpu_fit.fitted(default, probes, {})
    assert found == default


@pytest.mark.parametrize("kernel, kind", [("cpu_f32", "spatial"), ("cpu_bf16", "linear")])
def test_an_efficiency_above_one_raises_the_peak(kernel, kind):
    default = WITHOUT_AMX
    probes = {n: p for n, p in all_probes(default).items() if n.startswith(("dense/", "dense_bf16/", kernel))}
    peak = cpu_fit.peak_of(kernel)
    truth = default.with_figures("test", efficiency={f"{kernel}/32x32/{kind}": 1.4})
    found = cpu_fit.fitted(default, probes, times_of(truth, probes))
    assert getattr(found, peak) == pytest.approx(1.4 * getattr(default, peak), rel=0.05)
    assert max(found.efficiency.values()) <= 1
    for name, probe in probes.items():  # others are as fast as they were
        assert probe.predicted(found) == pytest.approx(probe.predicted(truth), rel=0.02), name


def test_tiles_are_even():
    pattern = cpu_probes.tiles(conv_site(128, 128, 3), (16, 16), 2)
    assert pattern.density == 0.5 and len(set(pattern.kept.sum((1, 2)).tolist())) == 1


def test_a_farther_memory_is_never_faster():
    default = WITHOUT_AMX
    rates = {
        "l2_bytes_per_second_per_thread": 2e11,
        "l3_bytes_per_second": 3e11,
        "dram_bytes_per_second": 1e9,
    }
    found = calibrate.bandwidth_figures(default, rates)
    assert found["l2_bytes_per_second_per_thread"] * default.threads == found["l3_bytes_per_second"] == 2e11
    assert found["dram_bytes_per_second"] == default.dram_bytes_per_second / calibrate._TRUST_BANDWIDTH


def test_stored_figures_are_used(never_measures):
    host = DeviceSpec.host()
    mine = host.with_figures("test", dram_bytes_per_second=12.5e9)
    disk_cache.store(calibrate.KIND, calibrate._key(host), {"thorough": True, "spec": mine.to_json()})
    assert device(None).dram_bytes_per_second == 12.5e9
    assert "in every tile" in calibrate.describe_state()
    assert calibrate.stored_path().is_file()


def test_figures_of_an_older_version_are_measured_anew(monkeypatch):
    host = DeviceSpec.host()
    mine = host.with_figures("test", dram_bytes_per_second=12.5e9)
    with monkeypatch.context() as older:
        older.setattr(calibrate, "VERSION", calibrate.VERSION - 1)
        disk_cache.store(calibrate.KIND, calibrate._key(host), {"thorough": True, "spec": mine.to_json()})
    monkeypatch.setattr(calibrate, "measure_host", lambda **_: host)
    assert device(None) is host


def test_a_layer_that_does_not_compile_is_left_out(monkeypatch):
    def compile_candidate(site, *_):
        if site.dtype == "bfloat16":
            raise RuntimeError("no such instructions")
        return (lambda x: x), None

    monkeypatch.setattr(calibrate.tune, "compile_candidate", compile_candidate)
    monkeypatch.setattr(calibrate.tune, "call_cost", lambda: lambda: None)
    monkeypatch.setattr(calibrate, "alone", contextlib.nullcontext)  # however busy this machine is
    monkeypatch.setattr(
        calibrate.tune,
        "interleave",
        lambda calls, *_, **__: dict.fromkeys(calls, calibrate.tune.Timing(1.0, 1.0)),
    )
    probes = cpu_probes.dense_probes(WITHOUT_AMX)
    times = calibrate._measure(probes, 0.1)
    assert set(times) == {name for name, probe in probes.items() if probe.site.dtype != "bfloat16"}


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
    monkeypatch.setattr(calibrate, "_measure", lambda probes, seconds: times_of(truth, probes))
    monkeypatch.setattr(calibrate, "_bandwidths", lambda spec, seconds: {})
    found = calibrate.measure_host(thorough=True)
    assert found.dense_conv_call_seconds == pytest.approx(truth.dense_conv_call_seconds, rel=1e-3)
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
