"""GPU specs: figures in range, each with a source; JSON; lookup by name, by torch device, by properties."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from blocksparse_compiler import devices
from blocksparse_compiler.errors import OptionError
from blocksparse_compiler.gpu_devices import NUMBERS, SPECS, GpuSpec, spec_of
from blocksparse_compiler.gpu_spec import PRECISIONS
from blocksparse_compiler.variants import VARIANTS

# Field: (lowest, highest) over every GPU that can run this package; a figure outside has a wrong unit.
RANGES = {
    "multiprocessors": (10, 512),
    "clock_hertz": (0.5e9, 3.5e9),
    "peak_flops_per_second": (5e12, 5e15),
    "l2_bytes": (2 * 2**20, 512 * 2**20),
    "l2_bytes_per_second": (0.5e12, 5e13),
    "l2_bytes_per_clock_per_multiprocessor": (32, 256),
    "dram_bytes_per_second": (1e11, 2e13),
    "shared_bytes_per_block": (48 * 2**10, 512 * 2**10),
    "shared_bytes_per_multiprocessor": (48 * 2**10, 512 * 2**10),
    "shared_bytes_per_clock_per_multiprocessor": (64, 512),
    "l1_bytes_per_multiprocessor": (16 * 2**10, 512 * 2**10),
    "registers_per_multiprocessor": (32768, 262144),
    "threads_per_multiprocessor": (1024, 2048),
    "warp_threads": (32, 64),
    "load_latency_seconds": (1e-7, 3e-6),
    "program_seconds": (1e-7, 1e-5),
    "launch_seconds": (5e-7, 2e-5),
    "graph_launch_seconds": (3e-7, 1e-5),
}
FRACTIONS = {
    *(f"dense/{kind}" for kind in ("linear", "spatial", "pointwise", "grouped", "depthwise")),
    *("dense/template", "dense/few_rows", "dram", "l2", "l1"),
    *(name for name, row in VARIANTS.items() if row.device == "cuda"),
}


@pytest.fixture(params=SPECS.values(), ids=lambda s: s.name)
def spec(request) -> GpuSpec:
    return request.param


def test_figures_are_in_range_and_have_sources(spec):
    assert set(RANGES) == set(NUMBERS)
    for name, (low, high) in RANGES.items():
        value = getattr(spec, name)
        for number in value.values() if isinstance(value, dict) else (value,):
            assert low <= number <= high, name
        assert spec.sources[name], name
    assert spec.sources["arch"]
    assert set(spec.efficiency) == FRACTIONS
    assert all(0 < fraction <= 1 for fraction in spec.efficiency.values())


def test_figures_fit_each_other(spec):
    peak = spec.peak_flops_per_second
    assert set(peak) == set(PRECISIONS)
    assert peak["bfloat16"] == peak["float16"] >= peak["tf32"] >= peak["float32"]
    assert spec.dram_bytes_per_second < spec.l2_bytes_per_second
    taken = spec.multiprocessors * spec.clock_hertz * spec.l2_bytes_per_clock_per_multiprocessor
    assert spec.l2_bytes_per_second <= taken
    assert spec.shared_bytes_per_block <= spec.shared_bytes_per_multiprocessor
    assert spec.graph_launch_seconds < spec.launch_seconds
    assert spec.efficiency["dense/linear"] >= spec.efficiency["dense/template"]
    # Peak per multiprocessor and clock is a power of two, give or take the clock under load.
    per_clock = peak["bfloat16"] / spec.multiprocessors / spec.clock_hertz
    assert 400 <= per_clock <= 6000


def test_names_are_keys():
    assert list(SPECS) == ["a100", "h100", "h200", "l4", "rtx4090", "mi300x"]
    assert all(spec.name == name for name, spec in SPECS.items())
    assert not set(SPECS) & set(devices.SPECS)


def test_json_and_pickle_round_trip(spec, tmp_path):
    assert GpuSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(spec.to_json()))
    assert devices.device(path) == spec
    assert hash(spec) == hash(devices.device(path))


def test_lookup(spec):
    assert devices.device(spec.name) is devices.device(spec.name.upper()) is devices.device(spec) is spec
    assert spec.type == "cuda"
    assert spec.target == {"a100": "sm_80", "mi300x": "gfx942"}.get(spec.name, spec.target)
    assert spec.summary == f"{spec.multiprocessors} multiprocessors, {spec.target}"


def test_a_spec_of_another_type_is_refused():
    with pytest.raises(OptionError, match="a spec of type 'cpu'"):
        GpuSpec.from_json(devices.SPECS["avx2-4core"].to_json())
    with pytest.raises(OptionError, match="a spec of type 'cuda'"):
        devices.DeviceSpec.from_json(SPECS["h200"].to_json())


@pytest.mark.parametrize(
    "figures",
    [
        {"multiprocessors": 0},
        {"launch_seconds": True},
        {"peak_flops_per_second": dict.fromkeys(PRECISIONS, -1.0)},
        {"peak_flops_per_second": {"bfloat16": 1e12}},
        {"backend": "hip"},
        {"arch": "gfx942"},
    ],
)
def test_impossible_figures_are_refused(figures):
    with pytest.raises(OptionError, match=next(iter(figures))):
        SPECS["h200"].with_figures("test", **figures)


def test_graphs_change_the_launch_alone():
    spec = SPECS["h200"].with_graphs()
    assert spec.launch_seconds == spec.graph_launch_seconds == SPECS["h200"].graph_launch_seconds
    assert spec.with_figures("", launch_seconds=SPECS["h200"].launch_seconds) != spec
    assert spec.name == "h200" and spec.digest != SPECS["h200"].digest


# ---- the page about them -------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")


def test_the_page_has_these_figures():
    rows = re.findall(r"^\| `(\w+)` \|([ \d.|]+)\|$", PAGE, re.MULTILINE)
    assert [name for name, _ in rows] == list(SPECS)
    for name, cells in rows:
        spec, peak = SPECS[name], SPECS[name].peak_flops_per_second
        assert [float(cell) for cell in cells.split("|")] == [
            spec.multiprocessors,
            round(peak["bfloat16"] / 1e12),
            peak["float32"] / 1e12,
            spec.l2_bytes / 2**20,
            spec.l2_bytes_per_second / 1e12,
            spec.dram_bytes_per_second / 1e12,
        ]


def test_the_page_names_the_kernels():
    named = re.findall(r"^\| `(triton_\w+)` \|", PAGE, re.MULTILINE)
    assert set(named) == {name for name, row in VARIANTS.items() if row.device == "cuda"}


def test_the_page_counts_products_per_byte_correctly():
    rows = re.findall(
        r"^\| (.*?)of (\d+)(.*?), (\d+) pixels \| (\d+) \| (\d+) TFLOP/s \|$", PAGE, re.MULTILINE
    )
    assert len(rows) == 5
    for head, height, shared, pixels, per_byte, cap in rows:
        bh, px, bw = int(height), int(pixels), 64
        rows_, loads = (2, 1.5) if "two" in head and "half" in shared else (1, 1)
        found = rows_ * 2 * px * bh * bw / (2 * bw * (loads * px + rows_ * bh))
        assert round(found) == int(per_byte)
        assert found * SPECS["h200"].l2_bytes_per_second / 1e12 == pytest.approx(int(cap), abs=1)


def test_examples_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/gpu.md", "exec"), namespace)
    assert len(blocks) >= 4 and namespace["mine"].name == "mine"


# ---- the present GPU -------------------------------------------------------------------------------


def properties(name="NVIDIA H200", count=132, major=9, minor=0, **kwargs):
    return SimpleNamespace(name=name, multi_processor_count=count, major=major, minor=minor, **kwargs)


@pytest.mark.parametrize(
    "found, expected",
    [
        (properties(), "h200"),
        (properties("NVIDIA H100 80GB HBM3"), "h100"),
        (properties("NVIDIA A100-SXM4-80GB", 108, 8), "a100"),
        (properties("NVIDIA L4", 58, 8, 9), "l4"),
        (properties("NVIDIA GeForce RTX 4090", 128, 8, 9), "rtx4090"),
    ],
)
def test_known_gpus_are_recognised(monkeypatch, found, expected):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    for which in ("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0)):
        assert devices.device(which) is SPECS[expected]


def test_index_is_passed_on(monkeypatch):
    names = {0: "NVIDIA H200", 1: "NVIDIA L4"}
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda i: properties(names[i], *(((132, 9, 0), (58, 8, 9))[i])),
    )
    assert devices.device("cuda:1").name == "l4"
    assert devices.device(torch.device("cuda", 1)).name == "l4"


def test_unknown_gpus_are_scaled_from_the_closest():
    l40s = spec_of(
        properties(
            "NVIDIA L40S",
            142,
            8,
            9,
            L2_cache_size=96 * 2**20,
            clock_rate=2520000,
            memory_clock_rate=9001000,
            memory_bus_width=384,
            shared_memory_per_block_optin=101376,
        )
    )
    base = SPECS["rtx4090"]
    assert l40s.name == "nvidia-l40s" and l40s.arch == 89 and l40s.multiprocessors == 142
    assert l40s.l2_bytes == 96 * 2**20 and l40s.shared_bytes_per_block == 101376
    assert l40s.dram_bytes_per_second == pytest.approx(864e9, rel=0.01)
    assert l40s.peak_flops_per_second["bfloat16"] == pytest.approx(
        base.peak_flops_per_second["bfloat16"] * 142 / 128
    )
    assert "scaled" in l40s.sources["peak_flops_per_second"] and l40s.obstacle is None
    assert all(l40s.sources[name] for name in NUMBERS)


def test_a_slice_of_a_known_gpu_is_scaled():
    spec = spec_of(properties(count=16))
    assert spec.multiprocessors == 16 and spec != SPECS["h200"]
    assert spec.dram_bytes_per_second == pytest.approx(SPECS["h200"].dram_bytes_per_second * 16 / 132)


def test_newer_gpus_count_as_the_newest():
    spec = spec_of(properties("NVIDIA B200", 148, 10, 0))
    assert spec.arch == 100 and spec.obstacle is None
    assert "h100" in spec.sources["peak_flops_per_second"]


def test_gpus_of_amd(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert spec_of(properties("AMD Instinct MI300X VF", 304, 9, 4)) is SPECS["mi300x"]
    other = spec_of(properties("AMD Instinct MI250X", 104, 9, 0, gcnArchName="gfx90a:sramecc+:xnack-"))
    assert other.backend == "hip" and other.arch == other.target == "gfx90a" and other.obstacle is None


def test_old_gpus_have_an_obstacle():
    spec = spec_of(properties("Tesla T4", 40, 7, 5))
    assert spec.obstacle == "block-sparse kernels need compute capability 8.0, this GPU has 7.5"
    assert SPECS["a100"].obstacle is None


def test_without_a_gpu_the_names_are_listed(monkeypatch):
    def none(index):
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch.cuda, "get_device_properties", none)
    with pytest.raises(OptionError, match="a GPU that torch can use") as caught:
        devices.device("cuda")
    assert all(name in str(caught.value) for name in SPECS)
