"""Tuning without a clock: the graphs it measures, and what it makes of given times."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import conv_site, even_pattern, linear_site
from torch.nn import functional as F

from blocksparse_compiler import tune
from blocksparse_compiler.passes.find_sites import find_sites
from blocksparse_compiler.plan import DENSE, Plan


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKSPARSE_CACHE_DIR", str(tmp_path))
    return tmp_path


# ---- the graph that is measured --------------------------------------------------------------------

SITES = {
    "conv": conv_site(8, 12, 3, 9, 2),
    "strided, dilated": conv_site(8, 12, 3, 9, 2, stride=(2, 1), dilation=(1, 2), padding=((1, 1), (2, 2))),
    "asymmetric padding": conv_site(8, 12, 2, 9, 2, padding=((0, 1), (1, 0))),
    "grouped": conv_site(8, 12, 3, 9, 2, groups=4),
    "1-D": conv_site(
        8, 12, op="conv1d", kernel_size=(3,), stride=(1,), dilation=(1,), padding=((1, 1),),
        input_shape=(2, 12, 9),
    ),
    "3-D": conv_site(
        8, 12, op="conv3d", kernel_size=(1, 2, 3), stride=(1,) * 3, dilation=(1,) * 3, padding=((0, 0),) * 3,
        input_shape=(2, 12, 3, 4, 5),
    ),
    "symbolic batch": conv_site(8, 12, 3, 9, "s0"),
    "linear": linear_site(8, 12, (2, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", SITES)
def test_graph_computes_the_layer(name):
    site = SITES[name]
    weight = torch.randn(site.out_channels, site.in_channels // site.groups, *site.kernel_size)
    gm, x = tune.layer_graph(site, weight, {"s0": 3})
    if not site.kernel_size:
        expected = F.linear(x, weight, gm.bias)
    else:
        conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(site.kernel_size)]
        padded = F.pad(x, [p for pair in reversed(site.padding) for p in pair])
        expected = conv(padded, weight, gm.bias, site.stride, 0, site.dilation, site.groups)
    torch.testing.assert_close(gm(x)[0], expected.relu())
    (found,) = find_sites(gm)
    same = ("op", "out_channels", "in_channels", "kernel_size", "groups", "stride", "dilation")
    assert all(getattr(found, key) == getattr(site, key) for key in same)
    assert x.shape[0] == (3 if site.input_shape[0] == "s0" else site.input_shape[0])


def test_transposed_graph():
    site = conv_site(
        8, 12, 2, 5, 2, op="conv_transpose2d", stride=(2, 2), padding=((0, 0),) * 2, output_padding=(1, 0)
    )
    weight = torch.randn(12, 8, 2, 2)
    gm, x = tune.layer_graph(site, weight)
    expected = F.conv_transpose2d(x, weight, gm.bias, 2, 0, (1, 0)).relu()
    torch.testing.assert_close(gm(x)[0], expected)


def test_candidates_are_compiled_to_the_layer():
    site = conv_site(64, 64, 3, 8, 2)
    pattern = even_pattern(site, 0.5)
    run, x = tune.compile_candidate(site, pattern, "cpu_f32", {})
    out = run(x)[0]
    assert out.shape == (2, 64, 8, 8) and out.min() == 0 < out.max()


# ---- timing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_quantized_candidates_compute_the_same(dtype):
    site = linear_site(64, 32, (8,), dtype=dtype)
    pattern = even_pattern(site, 0.5, (32, 16))
    torch.manual_seed(0)
    dense, x = tune.compile_candidate(site, pattern, DENSE, {})
    torch.manual_seed(0)
    run, same = tune.compile_candidate(site, pattern, "cpu_int8", {})
    torch.testing.assert_close(same, x)
    out, expected = run(x)[0], dense(x)[0]
    assert out.dtype == expected.dtype == getattr(torch, dtype)
    assert (out.int() - expected.int()).abs().max() <= 1 and out.unique().numel() > 8


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(1, 400))
def test_interleave_measures_each_call_in_turn(durations, budget):
    now, order = [0], []

    def call(i):
        order.append(i)
        now[0] += durations[i]

    calls = {str(i): (lambda i=i: call(i)) for i in range(len(durations))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune.time, "perf_counter", lambda: now[0])
        timings = tune.interleave(calls, budget)
    assert {name: t.median for name, t in timings.items()} == {str(i): d for i, d in enumerate(durations)}
    turns = order[2 * len(durations) :]  # after two warm-up calls each
    assert turns == [*range(len(durations))] * (len(turns) // len(durations))
    assert len(turns) >= 5 * len(durations)


# ---- the decision ----------------------------------------------------------------------------------


@pytest.fixture
def timings(monkeypatch):
    """Lets a test say how long dense and each option take, in milliseconds."""
    seen = []

    def say(dense: float, *options: float):
        def fake(site, listing, device, hints, seconds):
            seen.append(list(listing))
            padded = (*options, *([1000] * len(listing)))
            times = dict(zip((DENSE, *listing), (dense, *padded), strict=False))
            return {label: t / 1000 for label, t in times.items()}

        monkeypatch.setattr(tune, "_timings", fake)
        return seen

    return say


def test_the_fastest_option_wins(table, spec, timings):
    timings(100, 60, 40)
    site = conv_site()
    decision = tune.measure(site, [even_pattern(site, 0.25)], spec)
    assert decision.measured and decision.kernel == "any" and decision.config == {"pixels": 7}
    assert decision.estimates == {"dense": 0.1, "any": 0.04, "any 32x32": 0.04}
    assert decision.reason == "26% of 32x32 tiles kept: 40.00 ms against 100.00 ms dense (2.5x, measured)"


def test_a_runner_up_is_measured_too(table, spec, timings):
    seen = timings(100, 60, 60, 30)
    site = conv_site()
    coarse = even_pattern(site, 0.25)
    decision = tune.measure(site, [coarse, coarse.retile((16, 16))], spec)
    assert seen == [["any 32x32 #0", "any 32x32 #1", "any 16x16 #0"]]
    assert decision.pattern.block_shape == (16, 16)


@pytest.mark.parametrize("sparse", [99, 100, 150])
def test_dense_wins_within_noise(table, spec, timings, sparse):
    timings(100, sparse)
    site = conv_site()
    pattern = even_pattern(site, 0.25)
    decision = tune.measure(site, [pattern], spec)
    assert decision.is_dense and decision.measured and decision.pattern == pattern
    assert (
        decision.reason.startswith("stays dense: 100.00 ms dense against ") and "26% kept" in decision.reason
    )
    forced = tune.measure(site, [pattern], spec, allow_dense=False)
    assert forced.kernel == "any" and forced.measured


def test_nothing_to_measure(table, spec, timings):
    seen = timings(100)
    site = conv_site(op="conv_transpose2d", output_padding=(0, 0))
    decision = tune.measure(site, [even_pattern(site, 0.25)], spec)
    assert decision.is_dense and not decision.measured and not seen
    assert tune.measure(conv_site(), [], spec).is_dense and not seen


def test_times_are_kept_on_disk(table, spec, monkeypatch, folder):
    compiled = []

    def compile_candidate(site, pattern, kernel, config, hints=None):
        compiled.append(kernel)
        return (lambda x: x), torch.zeros(1)

    monkeypatch.setattr(tune, "compile_candidate", compile_candidate)
    monkeypatch.setattr(tune, "call_cost", lambda device: lambda: None)
    fixed = lambda calls, seconds: {name: tune.Timing(len(name), len(name)) for name in calls}  # noqa: E731
    monkeypatch.setattr(tune, "interleave", fixed)
    site = conv_site()
    pattern = even_pattern(site, 0.25, seed=1)
    first = tune.measure(site, [pattern], spec)
    assert compiled == [DENSE, "any", "any"]
    again = tune.measure(dataclasses.replace(site, name="other"), [pattern], spec)
    assert len(compiled) == 3 and again.estimates == first.estimates
    tune.measure(conv_site(batch=4), [pattern], spec)
    assert len(compiled) == 6
    for file in folder.iterdir():
        file.write_text("{")
    tune.measure(site, [pattern], spec)
    assert len(compiled) == 9


# ---- whole plans -----------------------------------------------------------------------------------


def _graph_and_plan(spec):
    import blocksparse_compiler as bsc

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64)).eval()
    with torch.no_grad():
        model[0].weight[32:] = 0
    graph = bsc.trace(model, torch.randn(256, 64))
    return graph, bsc.plan(graph, spec)


def test_only_layers_with_zero_blocks_are_measured(spec, timings):
    seen = timings(100, 10)
    graph, plan = _graph_and_plan(spec)
    shown = []
    tuned = tune.tune_plan(graph, plan, spec, progress=lambda *state: shown.append(state))
    assert [d.measured for d in tuned] == [True, False] and len(seen) == 1
    assert shown == [("0", 0, 1)] and isinstance(tuned, Plan)


def test_a_failing_measurement_keeps_the_estimate(spec, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(tune, "_timings", fail)
    graph, plan = _graph_and_plan(spec)
    assert tune.tune_plan(graph, plan, spec).digest == plan.digest
    assert "no compiler" in caplog.text
