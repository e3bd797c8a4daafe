"""What the reports on the cost model compute; nothing is compiled or timed."""

from __future__ import annotations

import pytest
from layer_cases import FIXED, conv_site, even_pattern

from benchmarks import cost_model, sensitivity
from benchmarks.shapes import CONVOLUTIONS, LINEARS
from blocksparse_compiler import cost
from blocksparse_compiler.devices import SPECS


def row(ours: float, dense: float, ours_predicted: float, dense_predicted: float) -> dict[str, float]:
    return {
        "ours_us": ours,
        "dense_us": dense,
        "ours_predicted_us": ours_predicted,
        "dense_predicted_us": dense_predicted,
    }


@pytest.mark.parametrize(
    "found, expected",
    [
        (row(1, 2, 1, 2), 1.0),
        (row(2, 1, 2, 1), 1.0),
        (row(3, 1, 1, 2), 3.0),  # ours was taken, and is slower
        (row(1, 2, 2, 2), 2.0),  # ours was left, and is faster
        (row(1, 2, 0.96, 1), 2.0),  # within the margin, dense is preferred
    ],
)
def test_regret_is_over_the_faster_way(found, expected):
    assert cost_model.regret(found) == expected


def test_summary():
    found = cost_model.summary([row(1, 2, 1.1, 2), row(1, 2, 1.0, 2), row(1, 2, 3.0, 2)])
    assert found["ours"] == [1.0, 1.1, 3.0] and found["dense"] == [1.0, 1.0, 1.0]
    assert found["right"] == pytest.approx(2 / 3) and found["worst_regret"] == 2.0


@pytest.mark.parametrize("kernel", ["cpu_f32", "cpu_bf16", "cpu_int8", "cpu_amx_bf16"])
def test_cases_are_layers_that_the_kernel_runs(kernel):
    device = SPECS["sapphire-rapids"]
    cases = list(cost_model.cases([kernel], [1, 8], device))
    assert len(cases) == 2 * (len(CONVOLUTIONS) + len(LINEARS))
    for case in cases:
        for pattern in case.patterns:
            assert cost.sparse_cost(case.site, pattern, device, kernel).evaluate() > 0
    assert not list(cost_model.cases(["cpu_amx_bf16"], [1], FIXED))


def test_rows_hold_estimates():
    case = next(iter(cost_model.cases(["cpu_f32"], [8], FIXED)))
    seconds = {"dense": 1e-3, **{str(i): 5e-4 for i in range(len(case.patterns))}}
    rows = cost_model.rows_of(case, seconds, FIXED)
    assert len(rows) == len(case.patterns)
    for found, pattern in zip(rows, case.patterns, strict=True):
        predicted = cost.sparse_cost(case.site, pattern, FIXED, "cpu_f32").evaluate()
        assert found["ours_predicted_us"] == pytest.approx(predicted * 1e6, abs=0.01)
        assert found["kept"] == pytest.approx(pattern.density, abs=1e-3)


@pytest.mark.parametrize("density, matters", [(0.1, False), (0.62, True)])
def test_errors_matter_where_choices_are_close(density, matters):
    """At a tenth of the tiles no error of a fifth changes anything; near the break-even some do, and cost."""
    site = conv_site(256, 256, 3, 14, 8)
    pattern = even_pattern(site, density, (8, 8))
    layers = [sensitivity.Layer(site, 3, (("cpu_f32", pattern),))]
    cheap = FIXED.with_figures("test", efficiency={"8x8/spatial": 0.65})
    found = list(sensitivity.rows({"net": layers}, cheap, 0.2, lambda: None))
    assert all(r["changed"] == 3 and r["regret"] >= cost.MARGIN for r in found)
    assert bool(found) == matters


def test_choices_agree_with_the_planner():
    for density in (0.1, 0.4, 0.7, 1.0):
        site = conv_site(256, 256, 3, 14, 8)
        pattern = even_pattern(site, density, (16, 16))
        layer = sensitivity.Layer(site, 1, (("cpu_f32", pattern),))
        planned = cost.choose(site, [pattern], FIXED)
        assert (layer.choice(FIXED) is None) == planned.is_dense


def test_figures_that_cannot_matter_are_left_out():
    site = conv_site(256, 256, 3, 14, 8)
    layers = [sensitivity.Layer(site, 1, (("cpu_f32", even_pattern(site, 0.5)),))]
    concerned = {name for name in sensitivity.figures(FIXED) if sensitivity.concerns(name, layers, FIXED)}
    assert {"dense/spatial", "32x32/spatial", "sparse_call_seconds"} <= concerned
    assert "dense_bf16/linear" not in concerned
