"""The tools that every benchmark stands on: turns, baselines, masks, ratios."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import baselines, layers, masks, pictures, readme, report, shapes, timing, zoo
from benchmarks.break_even import break_even, pointwise_sites
from blocksparse_compiler import busy
from blocksparse_compiler.codegen import inductor_api

ROOT = Path(__file__).parents[2]


def test_interleave_takes_turns_and_counts_rounds() -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = timing.interleave(calls, budget=0, rounds=(4, 9), warmup=2)
    assert order == ["a", "a", "b", "b"] + ["a", "b"] * 4
    assert [(t.rounds, t.in_a_row) for t in times.values()] == [(4, 1), (4, 1)]
    assert all(0 <= t.minimum <= t.median for t in times.values())


def test_long_turns_leave_out_the_call_that_finds_the_caches_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a clock of its own: a call takes 10 ms after itself, and 30 ms more after another one."""
    order: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def work(name: str, seconds: float) -> None:
        clock[0] += seconds if order[-1:] == [name] else seconds + 0.03
        order.append(name)

    calls = {"a": lambda: work("a", 0.01), "b": lambda: work("b", 0.1)}
    times = timing.interleave(calls, budget=0, rounds=(2, 2), warmup=2, turn=0.045)
    assert order == ["a"] * 2 + ["b"] * 2 + (["a"] * 4 + ["b"] * 2) * 2
    assert [(t.median, t.minimum) for t in times.values()] == [
        pytest.approx((0.01, 0.01)),
        pytest.approx((0.1, 0.1)),
    ]
    assert [t.to_json()["in_a_row"] for t in times.values()] == [3, 1]
    one_call = timing.interleave(calls, budget=0, rounds=(2, 2), warmup=2)
    assert one_call["a"].median == pytest.approx(0.04)


@pytest.mark.parametrize(("others", "warnings"), [(0.0, 0), (0.04, 0), (0.3, 1)])
def test_load_of_other_processes_is_written_down(
    others: float, warnings: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    processors = os.cpu_count() or 1
    # On the clock, all processors, this process: it works for 2 of 5 seconds.
    clocks = iter([(0.0, 100.0, 1.0), (5.0, 100.0 + 2.0 + others * 5.0 * processors, 3.0)])
    monkeypatch.setattr(timing.OtherLoad, "_clocks", lambda self: next(clocks))
    times = timing.interleave({"a": lambda: None, "b": lambda: None}, budget=0)
    assert [t.to_json()["other_load"] for t in times.values()] == pytest.approx([others, others])
    assert len(caplog.records) == warnings
    assert not warnings or "took 30% of the machine" in caplog.text


def test_own_work_and_unknown_work_are_no_load_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "_busy_seconds", lambda: 0.0)  # not known
    with timing.OtherLoad() as others:
        sum(range(1_000_000))
    assert others.fraction == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_this_process_is_part_of_the_work_of_all_processors() -> None:
    _, busy_seconds, own = timing.OtherLoad._clocks()
    assert busy_seconds >= own > 0


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_is_kept() -> None:
    code = "import resource, torch; from benchmarks.timing import keep_freed_memory; keep_freed_memory()\n"
    code += "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
    code += "for _ in range(20): before = faults(); torch.ones(1 << 24); after = faults()\n"
    code += "print(after - before)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(run.stdout) < 1000  # 16384 pages of 4 KiB without it


def test_fresh_code_is_the_same_function_with_another_code_object() -> None:
    def add(x: int, step: int = 2) -> int:
        return x + step

    copy = timing.fresh_code(add)
    assert copy(1) == 3
    assert copy.__code__ is not add.__code__


@pytest.mark.parametrize("relu", [True, False])
def test_every_dense_baseline_computes_the_layer(relu: bool) -> None:
    torch.manual_seed(0)
    shape = shapes.ConvShape(16, 9, 32, 3, 2)
    layer = shape.layer().eval().to(memory_format=torch.channels_last)
    x = shape.input(2)
    with torch.no_grad():
        expected = layer(x).relu() if relu else layer(x)
        for name, call in baselines.dense_convolutions([layer], x, relu).items():
            torch.testing.assert_close(call(), [expected], msg=name)


def test_every_dense_linear_baseline_computes_the_layer() -> None:
    torch.manual_seed(0)
    linears, x = [nn.Linear(64, 32), nn.Linear(64, 32)], torch.randn(8, 64)
    with torch.no_grad():
        expected = [layer(x) for layer in linears]
        for name, call in baselines.dense_linears(linears, x).items():
            torch.testing.assert_close(call(), expected, msg=name)


@pytest.mark.parametrize(
    ("slow", "operator"), [(True, "mkldnn::_linear_pointwise"), (False, "mkl::_mkl_linear")]
)
def test_frozen_inductor_takes_the_better_library_for_linear_layers(
    slow: bool, operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.backends.mkl.is_available():
        pytest.skip("this torch has oneDNN alone")
    monkeypatch.setattr(inductor_api, "_mkl_is_slow", lambda: slow)
    torch._dynamo.reset()
    layer, x = nn.Linear(64, 48).eval(), torch.randn(40, 64)
    with torch.no_grad(), baselines.frozen_inductor(cpp_wrapper=False, best_linear=True):
        fast = baselines.compiled(layer)
        torch.testing.assert_close(fast(x), layer(x))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            fast(x)
    assert operator in {event.name for event in profile.events()}


def test_torch_bsr_computes_the_layer() -> None:
    torch.manual_seed(0)
    layer = layers.sparse_copy(nn.Linear(64, 64), (16, 16), 0.5)
    assert isinstance(layer, nn.Linear)
    x = torch.randn(4, 64)
    with torch.no_grad():
        torch.testing.assert_close(baselines.torch_bsr_linear([layer], x, (16, 16))(), [layer(x)])


@pytest.mark.parametrize(("density", "blocks"), [(1.0, 8), (0.5, 4), (0.25, 2), (0.01, 1)])
def test_random_mask_keeps_whole_blocks_on_all_taps(density: float, blocks: int) -> None:
    mask = masks.random_mask(torch.empty(64, 32, 3, 3), (16, 16), density)
    assert int(mask.sum()) == blocks * 16 * 16 * 9
    assert bool((mask == mask[:, :, :1, :1]).all())


def test_layer_shapes_are_those_of_resnet50() -> None:
    """Every convolution of the network but the first, shortcuts and the few strided ones, is measured."""
    model = zoo.resnet50().model
    found = set()

    def note(module: nn.Conv2d, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        geometry = (module.in_channels, args[0].shape[-1], module.out_channels)
        found.add(shapes.ConvShape(*geometry, module.kernel_size[0], module.stride[0]))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    assert set(shapes.CONVOLUTIONS) <= found
    assert len(set(shapes.CONVOLUTIONS)) == 12


def test_prune_to_fraction_leaves_that_share_of_all_parameters() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 128, 3), nn.Flatten(), nn.Linear(128, 64))
    kept = zoo.prune_to_fraction(model, (16, 16), 0.6)
    assert kept == pytest.approx(0.6, abs=0.02)
    assert kept == pytest.approx(zoo.kept_parameters(model, (16, 16)))
    assert bool(model[0].weight.ne(0).all())


def test_speedup_is_against_the_fastest_dense_candidate() -> None:
    dense = {"slow": {"median_ms": 8.0}, "fast": {"median_ms": 4.0}}
    assert report.best(dense) == "fast"
    assert report.speedup(dense, {"median_ms": 2.0}) == 2.0


def _row(speedup: float, kept: float = 0.5, **other: object) -> dict[str, object]:
    timings = {"median_ms": 1.0, "minimum_ms": 1.0}
    row = {
        "shape": "3x3 64->64 @56",
        "batch": 8,
        "block": "32x32",
        "epilogue": "relu",
        "density": 0.5,
        "kept": kept,
        "best_dense": "eager",
        "dense": {"eager": timings},
        "ours": {"auto": {"median_ms": 1 / speedup}},
        "threads": 2,
        "speedup": {"auto": speedup, "forced": speedup / 2},
    }
    return row | other


def test_summary_is_the_geometric_mean_over_convolutions() -> None:
    rows = [_row(1.0), _row(4.0, 0.25), _row(100.0, shape="linear 768->768 x128")]
    (mean,) = pictures.summarize(rows)
    assert mean["shapes"] == 2
    assert mean["auto"] == pytest.approx(2.0)
    assert mean["forced"] == pytest.approx(1.0)
    assert mean["ideal"] == pytest.approx(8**0.5)
    assert mean["worst_auto"] == 1.0


def test_tables_of_threads_and_engines() -> None:
    engines = {"onnxruntime": {"median_ms": 3.0}}
    rows = [_row(2.0, engines=engines), _row(4.0, threads=1, dense={"eager": {"median_ms": 2.0}}, engines={})]
    data = {"summary": pictures.summarize(rows)}
    assert "| batch 8 | 50% | 4.00× | 2.00× | 2.00× | 0.50× |" in readme.scaling(data)
    assert "| 32x32 | 8 | 2.00× |" in readme.layers(data)
    assert "| batch 8 | 50% | 2.00× | 6.00× |" in readme.engines(data)


def test_merging_replaces_equal_rows_and_keeps_the_others(tmp_path: Path) -> None:
    path = report.save("layers", [_row(1.0), _row(2.0, batch=1)], tmp_path)
    rows = report.merge(path, [_row(3.0), _row(4.0, batch=2)], ("shape", "batch"))
    assert [(r["batch"], r["speedup"]["auto"]) for r in rows] == [(8, 3.0), (1, 2.0), (2, 4.0)]
    assert report.merge(tmp_path / "none.json", rows, ("shape", "batch")) == rows
    data = json.loads(path.read_text())
    data["machine"]["torch"] = "1.0"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="another machine"):
        report.merge(path, rows, ("shape", "batch"))
    data["machine"] |= {"torch": torch.__version__, "threads": 99}
    path.write_text(json.dumps(data))
    assert len(report.merge(path, rows, ("shape", "batch", "threads"))) == 3


@pytest.mark.parametrize("merged", [False, True])
def test_a_run_replaces_the_file_or_its_own_rows_in_it(merged: bool, tmp_path: Path) -> None:
    report.save("decode", [_row(1.0), _row(2.0, batch=1)], tmp_path)
    written = report.publish("decode", [_row(3.0)], ("shape", "batch"), merged=merged, folder=tmp_path)
    assert [r["speedup"]["auto"] for r in written] == ([3.0, 2.0] if merged else [3.0])
    assert report.load(report.path_of("decode", tmp_path))["rows"] == written


def test_readme_sections_are_rewritten_from_results(tmp_path: Path) -> None:
    rows = [_row(2.0)]
    path = report.save("layers", rows, tmp_path, summary=pictures.summarize(rows))
    assert json.loads(path.read_text())["machine"]["threads"] == torch.get_num_threads()
    text = readme.fill("before\n<!-- measured: layers -->\nold 9.99×\n<!-- end -->\nafter", tmp_path)
    assert "| 32x32 | 8 | 2.00× |" in text
    assert "9.99" not in text
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter")
    assert readme.fill(text, tmp_path) == text


@pytest.mark.parametrize(
    ("name", "parameters", "layers"), [("mobilenet_v3", 5_483_032, 30), ("efficientnet_b0", 5_288_548, 32)]
)
def test_mobile_networks_are_those_published(name: str, parameters: int, layers: int) -> None:
    """By their parameters; the gates' convolutions on one pixel are not counted among those on images."""
    network = zoo.NETWORKS[name]()
    assert sum(p.numel() for p in network.model.parameters()) == parameters
    assert len(zoo.pointwise(network.model)) == layers
    with torch.no_grad():
        small = network.forward(zoo.image(2, 32))
    assert small.shape == (2, 1000) and bool(small.isfinite().all())


@pytest.mark.parametrize(
    "seconds, dense, expected",
    [
        ([9.0, 5.0, 3.0], 10.0, 1.0),  # pays even with every weight
        ([9.0, 5.0, 3.0], 7.0, 0.75),
        ([9.0, 5.0, 3.0], 4.0, 0.375),
        ([9.0, 5.0, 3.0], 2.0, 0.0),  # never
    ],
)
def test_break_even_is_where_the_times_cross(seconds: list[float], dense: float, expected: float) -> None:
    assert break_even([1.0, 0.5, 0.25], seconds, dense) == pytest.approx(expected)


def test_distinct_pointwise_layers_of_a_network() -> None:
    sites = pointwise_sites("mobilenet_v1")
    assert len(sites) == 9 and sites["512→512 @14x14"].out_channels == 512
    assert all(site.input_shape[0] == 1 for site in sites.values())
