"""Device specs: figures in range, each with a source; JSON; lookup."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from blocksparse_compiler import devices
from blocksparse_compiler.devices import NUMBERS, SPECS, DeviceSpec, device
from blocksparse_compiler.errors import OptionError
from blocksparse_compiler.gpu_devices import SPECS as GPU_SPECS

# Field: (lowest, highest) over every CPU that can run this package; a figure outside has a wrong unit.
RANGES = {
    "threads": (1, 1024),
    "vector_bits": (128, 2048),
    "vector_registers": (8, 64),
    "peak_fp32_flops_per_second_per_thread": (1e9, 1e12),
    "peak_bf16_flops_per_second_per_thread": (1e9, 1e13),
    "peak_int8_ops_per_second_per_thread": (1e9, 1e13),
    "peak_amx_flops_per_second_per_thread": (1e11, 1e14),
    "l1_bytes_per_thread": (8 * 2**10, 512 * 2**10),
    "l2_bytes_per_thread": (64 * 2**10, 32 * 2**20),
    "l3_bytes": (1 * 2**20, 2 * 2**30),
    "l2_bytes_per_second_per_thread": (5e9, 1e12),
    "l3_bytes_per_second": (5e9, 1e13),
    "dram_bytes_per_second": (2e9, 2e12),
    "dense_conv_call_seconds": (1e-7, 1e-3),
    "dense_linear_call_seconds": (1e-7, 1e-3),
    "sparse_call_seconds": (1e-8, 1e-3),
    "epilogue_seconds_per_vector": (1e-11, 1e-7),
    "amx_tile_seconds": (1e-9, 1e-6),
    "transpose_seconds_per_vector": (1e-11, 1e-7),
    "l2_read_over_copy": (0.1, 10),
    "dense_int8_epilogue_seconds_per_vector": (1e-11, 1e-7),
}
ALL = [*SPECS.values(), DeviceSpec.host()]


@pytest.mark.parametrize("spec", ALL, ids=lambda s: s.name)
def test_figures_are_in_range_and_have_sources(spec):
    assert {*RANGES, "tile_epilogue_seconds_per_vector"} == set(NUMBERS)
    assert all(1e-11 < seconds < 1e-7 for seconds in spec.tile_epilogue_seconds_per_vector.values())
    for name, (low, high) in RANGES.items():
        value = getattr(spec, name)
        assert low <= value <= high or (value == 0 and name in DeviceSpec.optional), name
        assert spec.sources[name] or not value, name
    assert all(0 < fraction <= 1 for fraction in spec.efficiency.values())
    assert spec.isa in ("avx512", "avx2", "portable")
    assert spec.l1_bytes_per_thread <= spec.l2_bytes_per_thread <= spec.l3_bytes
    assert spec.dram_bytes_per_second <= spec.l3_bytes_per_second
    assert spec.l3_bytes_per_second <= spec.threads * spec.l2_bytes_per_second_per_thread


def test_names_are_keys():
    assert all(spec.name == name for name, spec in SPECS.items())


@pytest.mark.parametrize("spec", ALL, ids=lambda s: s.name)
def test_json_and_pickle_round_trip(spec):
    assert DeviceSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_host_has_this_machine():
    host = DeviceSpec.host()
    assert host.threads == torch.get_num_threads()
    assert host.isa == devices.detect_isa()


def test_host_with_amx(monkeypatch):
    monkeypatch.setattr(devices, "detect_isa", lambda: "avx512")
    for found in (True, False):
        monkeypatch.setattr(devices, "detect_amx", lambda found=found: found)
        host = DeviceSpec.host()
        assert host.has_amx == found and ("AMX" in host.summary) == found
    monkeypatch.setattr(devices, "detect_amx", lambda: True)
    monkeypatch.setattr(devices, "detect_isa", lambda: "avx2")  # as ATEN_CPU_CAPABILITY asks for
    assert not DeviceSpec.host().has_amx


def test_caches_are_read_from_sysfs(tmp_path):
    for i, (level, kind, size) in enumerate(
        [
            ("1", "Data", "48K"),
            ("1", "Instruction", "32K"),
            ("2", "Unified", "2048K"),
            ("3", "Unified", "bad"),
        ]
    ):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(text + "\n")
    found = devices._detect_caches(tmp_path)
    assert found == {"l1_bytes_per_thread": 48 * 1024, "l2_bytes_per_thread": 2048 * 1024}
    assert devices._detect_caches(tmp_path / "none") == {}


def test_lookup(tmp_path):
    spec = SPECS["avx2-4core"]
    assert device("avx2-4core") is spec
    assert device(spec) is spec
    for host in (None, "cpu", "host", torch.device("cpu")):
        assert device(host).name == "host"
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(spec.to_json()))
    assert device(path) == device(str(path)) == spec


@pytest.mark.parametrize("which", ["h300", "missing.json", "cudax", ""])
def test_unknown_device_lists_the_known_ones(which):
    with pytest.raises(OptionError) as caught:
        device(which)
    assert all(name in str(caught.value) for name in (*SPECS, *GPU_SPECS))


def test_inputs_in_place_of_a_device_are_told_so_without_printing_them():
    with pytest.raises(OptionError, match="got a tuple") as caught:
        device((torch.randn(8, 8),))  # type: ignore[arg-type]
    assert "tensor" not in str(caught.value)


@pytest.mark.parametrize("text", ["not json", "{}", "[]", '{"name": "x"}'])
def test_bad_file_is_one_clear_error(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(OptionError):
        device(path)


@pytest.mark.parametrize(
    "figures", [{"threads": 0}, {"l3_bytes": -1}, {"dram_bytes_per_second": float("inf")}]
)
def test_impossible_figures_are_refused(figures):
    with pytest.raises(OptionError, match=next(iter(figures))):
        SPECS["avx512-2core"].with_figures("test", **figures)


def test_digest_is_of_the_figures():
    spec = SPECS["avx512-2core"]
    assert spec.with_figures("test", name="other").digest == spec.digest
    assert spec.with_figures("test", threads=3).digest != spec.digest
    assert spec.with_figures("test", efficiency={"dense/linear": 0.5}).digest != spec.digest
    assert hash(spec) == hash(DeviceSpec.from_json(spec.to_json()))
