"""Which layers run in one kernel: what it is estimated to save, and what the plan says about it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json

import pytest
import torch
from chain_models import CHOOSE, DEAR_CALLS, Block, deep, planned, point, residuals, separable
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import FIXED
from torch import nn

import blocksparse_compiler as bsc
from blocksparse_compiler import Plan, trace
from blocksparse_compiler.backend import compiled_graphs
from blocksparse_compiler.candidate_cost import MARGIN
from blocksparse_compiler.chain_cost import ChainCost, ChainLayer, possible_bands
from blocksparse_compiler.layer_chain import Chain
from blocksparse_compiler.layouts import Layouts
from blocksparse_compiler.passes.choose_chains import choose_chains
from blocksparse_compiler.passes.choose_kernels import choose_kernels
from blocksparse_compiler.passes.choose_layouts import choose_layouts
from blocksparse_compiler.sources import kernel_sources
from blocksparse_compiler.tables import Totals

NHWC = torch.channels_last


def network() -> nn.Module:
    """A dense stem, blocks with residuals, a dense head."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU6())
    return nn.Sequential(stem, *residuals(), nn.Conv2d(48, 16, 3), nn.ReLU()).eval()


def plan_of(model: nn.Module, x: torch.Tensor, device=FIXED) -> Plan:
    return bsc.plan(trace(model, x), device)


def test_blocks_of_one_image_run_in_bands():
    plan = plan_of(network(), torch.randn(1, 3, 56, 56).to(memory_format=NHWC))
    (names,) = planned(plan)
    assert names[0] == "1.body.0" and names[-1] == "3.body.4" and len(names) == 9
    for name in names:
        decision = plan[name]
        assert decision.config["bands"] == 2 and "fuse" not in decision.config
        assert decision.reason.endswith(
            "in one kernel with 8 others, 1.body.0 to 3.body.4: each of 2 threads runs a band of rows"
        )
    assert [str(Layouts.of(plan[name].config)) for name in names] == [
        "last → first", *["first"] * 7, "first → last",
    ]  # fmt: skip
    assert "last → first" in str(plan)


def test_layers_share_what_their_kernel_takes():
    model, x = network(), torch.randn(1, 3, 56, 56)
    gm = trace(model, x)
    before = choose_kernels(gm, FIXED)
    after = choose_chains(gm, before, FIXED)
    (names,) = planned(after)
    shares = [after[name].estimates[after[name].kernel] for name in names]
    apart = sum(before[name].estimates[before[name].kernel] for name in names)
    assert all(share > 0 for share in shares) and sum(shares) < MARGIN * apart
    saved = Totals.of(before).chosen - Totals.of(after).chosen
    assert saved == pytest.approx(apart - sum(shares))
    assert f"{bsc.cost.format_seconds(shares[0])} against" in after[names[0]].reason


def test_chains_end_where_threads_would_meet_too_dearly(monkeypatch):
    model, x = residuals(), torch.randn(1, 32, 28, 28)
    assert [len(names) for names in planned(plan_of(model, x))] == [9]
    monkeypatch.setattr("blocksparse_compiler.chain_cost.BARRIER_SECONDS", 1e-3)
    assert [len(names) for names in planned(plan_of(model, x))] == [3, 3, 3], "what a chain reads is loaded"


def test_no_chain_where_its_ends_cost_more_than_calls():
    dear = dataclasses.replace(FIXED, transpose_seconds_per_vector=1e-6)
    assert not planned(plan_of(residuals(), torch.randn(1, 32, 28, 28), dear))


@pytest.mark.parametrize(
    "images, threads, expected",
    [
        (1, 1, [1]),
        (1, 2, [1, 2]),
        (1, 6, [1, 2, 4, 6]),
        (2, 2, [1]),
        (3, 8, [1, 2]),
        (2, 16, [1, 2, 4, 8]),
        (9, 4, [1]),
    ],
)
def test_images_are_shared_out_before_rows(images, threads, expected):
    assert possible_bands(images, threads) == expected


@pytest.mark.parametrize("images, threads, bands", [(1, 2, 2), (2, 2, 1), (1, 4, 4), (2, 4, 2), (8, 2, 1)])
def test_every_thread_has_rows(images, threads, bands):
    device = dataclasses.replace(FIXED, threads=threads)
    plan = plan_of(residuals(), torch.randn(images, 32, 64, 64), device)
    assert {d.config.get("bands") for d in plan} == {bands}
    rows = f"each of {bands} threads runs a band of rows" if bands > 1 else "each thread runs whole images"
    assert all(d.reason.endswith(rows) for d in plan)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, NHWC])
def test_ends_lie_as_their_neighbours(memory_format):
    model, x = residuals(), torch.randn(1, 32, 28, 28).to(memory_format=memory_format)
    plan = plan_of(model, x, DEAR_CALLS)
    ends = [plan[name].config for name in (planned(plan)[0][0], planned(plan)[0][-1])]
    first = memory_format == torch.contiguous_format
    assert Layouts.of(ends[0]).reads_first == Layouts.of(ends[1]).writes_first == first


def test_an_end_that_lies_otherwise_costs_otherwise():
    model, x = residuals(), torch.randn(1, 32, 28, 28)
    gm = trace(model, x)
    before = choose_chains(gm, choose_kernels(gm, DEAR_CALLS), DEAR_CALLS)
    after = choose_layouts(gm, before, DEAR_CALLS)
    changed = [a.site.name for a, b in zip(after, before, strict=True) if a.estimates != b.estimates]
    assert changed == [planned(before)[0][0], planned(before)[0][-1]]


def test_measured_layers_keep_their_scale():
    gm = trace(residuals(), torch.randn(1, 32, 28, 28))
    before = choose_kernels(gm, FIXED)
    double = tuple(
        dataclasses.replace(d, measured=True, estimates={k: 2 * s for k, s in d.estimates.items()})
        for d in before
    )
    once = choose_chains(gm, before, FIXED)
    twice = choose_chains(gm, dataclasses.replace(before, decisions=double), FIXED)
    assert planned(once) == planned(twice) and planned(once)
    for one, two in zip(once, twice, strict=True):
        assert one.config == two.config
        assert two.estimates[two.kernel] > one.estimates[one.kernel]
    assert "measured" in next(iter(twice)).reason


@pytest.mark.parametrize("what", ["bf16", "dynamic pixels", "GPU", "dense"])
def test_elsewhere_there_are_no_chains(what):
    model, x, device = residuals(), torch.randn(1, 32, 28, 28), DEAR_CALLS
    if what == "bf16":
        model, x = model.bfloat16(), x.bfloat16()
    if what == "GPU":
        device = "h200"
    if what == "dense":
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    gm = trace(model, x)
    if what == "dynamic pixels":
        dim = torch.export.Dim
        pixels = {2: dim("h", min=8, max=512), 3: dim("w", min=8, max=512)}
        gm = torch.export.export(model, (x,), dynamic_shapes=(pixels,)).module()
    assert not planned(bsc.plan(gm, device))


def test_a_dynamic_batch_may_run_in_chains():
    batch = {0: torch.export.Dim("n", min=1, max=64)}
    x = torch.randn(2, 32, 28, 28)
    gm = torch.export.export(residuals(), (x,), dynamic_shapes=(batch,)).module()
    plan = bsc.plan(gm, DEAR_CALLS)
    assert planned(plan) and {d.config["bands"] for d in plan} == {1}


# ---- the best parts ---------------------------------------------------------------------------------

DEVICES = st.builds(
    dataclasses.replace,
    st.just(FIXED),
    transpose_seconds_per_vector=st.floats(1e-10, 2e-8),
    sparse_call_seconds=st.floats(1e-7, 1e-5),
    threads=st.sampled_from((1, 2, 4)),
)


@settings(deadline=None, max_examples=25)
@given(DEVICES, st.integers(6, 40), st.lists(st.booleans(), min_size=1, max_size=3))
def test_no_other_parts_save_more(device, size, skips):
    torch.manual_seed(0)
    blocks = [Block(32, 32, 48) if skip else nn.Sequential(deep(32), point(32, 32)) for skip in skips]
    gm = trace(nn.Sequential(*blocks).eval(), torch.randn(1, 32, size, size))
    seen = []
    original = CHOOSE._Path.best
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CHOOSE._Path, "best", lambda path: seen.append(path) or original(path))
        choose_chains(gm, choose_kernels(gm, device), device)
    for path in seen:
        chosen = sum(part.saved for part in original(path))
        assert chosen == pytest.approx(max(every_saving(path)), abs=1e-15)


def every_saving(path) -> list[float]:
    """Of all ways to cut a path."""
    last = len(path._begins) - 1
    totals = []
    for cuts in itertools.chain.from_iterable(itertools.combinations(range(1, last), n) for n in range(last)):
        parts = [path._part(a, b) for a, b in itertools.pairwise((0, *cuts, last))]
        totals.append(sum(max(0.0, part.saved) for part in parts if part is not None))
    return totals


def layers_of(model: nn.Module, x: torch.Tensor, device) -> tuple[list[ChainLayer], Chain]:
    gm = trace(model, x)
    paths = []
    original = CHOOSE._Path.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CHOOSE._Path, "__init__", lambda p, *args: (original(p, *args), paths.append(p))[0])
        choose_chains(gm, choose_kernels(gm, device), device)
    cost = paths[0]._costs[0]
    return list(cost.layers), cost.chain


def test_bands_compute_less_and_exchange():
    layers, chain = layers_of(residuals(), torch.randn(1, 32, 64, 64), FIXED)
    costs = {bands: ChainCost(layers, chain, FIXED, 1, bands) for bands in (1, 2)}
    busy = {bands: sum(map(sum, cost.computed)) for bands, cost in costs.items()}
    assert 0.5 * busy[1] < busy[2] < 0.65 * busy[1], "half of the rows, and those computed twice"
    assert not any(costs[1].exchanges) and sum(costs[2].exchanges) > 0
    whole = costs[2].seconds(0, len(costs[2].cut.steps))
    assert sum(costs[2].shares(0, len(costs[2].cut.steps))) == pytest.approx(whole)
    four = ChainCost(layers, chain, FIXED, 4, 1)
    assert four.turns == 2 and four.seconds(0, 1) > costs[1].seconds(0, 1)


# ---- compiled ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, NHWC])
def test_a_saved_plan_is_obeyed_and_right(memory_format):
    model = network().to(memory_format=memory_format)
    x = torch.randn(1, 3, 40, 36).to(memory_format=memory_format)
    plan = Plan.from_json(json.loads(json.dumps(plan_of(model, x).to_json())))
    assert len(planned(plan)) == 1
    torch._dynamo.reset()
    fast = torch.compile(model, backend="blocksparse", fullgraph=True, options={"plan": plan})
    out, eager = fast(x), model(x)
    exact = copy.deepcopy(model).double()(x.double())
    assert (out - exact).norm() <= 1.5 * (eager - exact).norm() + 2.0**-21 * exact.norm()
    assert out.stride() == eager.stride()
    assert planned(compiled_graphs()[-1].plan) == planned(plan)


@torch.no_grad()
def test_sources_of_a_chain_are_those_of_its_layers():
    model, x = nn.Sequential(separable(), nn.Conv2d(64, 8, 3)).eval(), torch.randn(1, 32, 24, 24)
    (names,) = planned(plan := bsc.explain(model, x, device=FIXED).plan)
    found = kernel_sources(model, (x,), plan)
    assert len({found[name] for name in names}) == 1 and "bands" in found[names[0]].lower()
