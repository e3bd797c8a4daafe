"""The cost model: properties that hold for any figures, symbolic sizes, and the decision's sentences."""

from __future__ import annotations

import dataclasses

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import FIXED, AnyLayer, conv_site, even_pattern, linear_site

from blocksparse_compiler import BlockPattern, cost, roofline
from blocksparse_compiler.devices import SPECS
from blocksparse_compiler.few_rows import runs_whole

SPEC = FIXED
few = settings(deadline=None, max_examples=30)

sites = st.one_of(
    st.builds(
        conv_site,
        out_channels=st.sampled_from([32, 64, 96, 256, 1000]),
        in_channels=st.sampled_from([32, 48, 64, 512]),
        kernel=st.sampled_from([1, 3]),
        size=st.sampled_from([7, 14, 57]),
        batch=st.sampled_from([1, 3, 8]),
    ),
    st.builds(linear_site, out_channels=st.sampled_from([64, 1000]), rows=st.sampled_from([(1,), (4, 32)])),
)
specs = st.sampled_from([FIXED, *SPECS.values()])
blocks = st.sampled_from([(32, 32), (16, 16), (8, 8), (16, 32)])


# ---- properties ------------------------------------------------------------------------------------


@few
@given(sites, specs, blocks, st.floats(0, 1), st.floats(0, 1))
def test_keeping_more_never_costs_less(site, spec, block, one, other):
    low, high = sorted((one, other))
    cheap, dear = (cost.sparse_cost(site, block, spec, density=d).evaluate() for d in (low, high))
    assert cheap <= dear * (1 + 1e-9)


@few
@given(sites, specs, blocks, st.integers(0, 9), st.floats(0, 0.9))
def test_adding_a_tile_never_costs_less(site, spec, block, seed, density):
    pattern = even_pattern(site, density, block, seed)
    kept = pattern.kept.clone()
    kept.view(-1)[seed % kept.numel()] = True
    before, after = (cost.sparse_cost(site, p, spec).evaluate() for p in (pattern, pattern.with_kept(kept)))
    assert before <= after * (1 + 1e-9)


@few
@given(sites, specs, blocks)
def test_break_even_separates(site, spec, block):
    limit = cost.break_even_density(site, block, spec)
    assert 0 <= limit <= 1
    target = cost.MARGIN * cost.dense_cost(site, spec).evaluate()

    def seconds(density):
        return cost.sparse_cost(site, block, spec, density=density).evaluate()

    if limit > 0:
        assert seconds(limit) < target
    if limit < 0.99:
        assert seconds(limit + 0.01) >= target


@few
@given(sites, specs)
def test_larger_batch_never_costs_less(site, spec):
    bigger = dataclasses.replace(site, input_shape=(2 * site.input_shape[0], *site.input_shape[1:]))
    for make in (cost.dense_cost, lambda s, d: cost.sparse_cost(s, (32, 32), d, density=0.5)):
        assert make(site, spec).evaluate() <= make(bigger, spec).evaluate() * (1 + 1e-9)


@few
@given(sites, specs, blocks)
def test_a_full_weight_stays_dense(table_rows, site, spec, block):
    """Or whole, where torch's kernel costs more to call than to run."""
    decision = cost.choose(site, [even_pattern(site, 2.0, block)], spec)
    assert not decision.is_block_sparse
    assert decision.is_dense or runs_whole(site)


@few
@given(sites, specs, blocks, st.floats(0.01, 1), st.integers(0, 3))
def test_sparse_only_where_estimated_faster(table_rows, site, spec, block, density, seed):
    decision = cost.choose(site, [even_pattern(site, density, block, seed)], spec)
    if not decision.is_dense:
        assert decision.estimates[decision.kernel] < cost.MARGIN * decision.estimates["dense"]
        assert decision.speedup > 1 / cost.MARGIN
    assert decision.reason and "\n" not in decision.reason


@pytest.fixture(scope="module")
def table_rows():
    from blocksparse_compiler import variants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "VARIANTS", {"any": AnyLayer()})
        yield


# ---- symbolic sizes --------------------------------------------------------------------------------


def test_symbolic_batch_evaluates_to_the_static_cost():
    symbolic, static = conv_site(batch="s0"), conv_site(batch=3)
    for make in (cost.dense_cost, lambda s, d: cost.sparse_cost(s, even_pattern(s, 0.3), d)):
        record = make(symbolic, SPEC)
        assert {s.name for s in record.seconds.free_symbols} == {"s0"}
        assert record.evaluate({"s0": 3}) == pytest.approx(make(static, SPEC).evaluate())
        assert cost.value(record.seconds, {"s0": 3}) == pytest.approx(record.evaluate({"s0": 3}))
        assert cost.value(record.flops, {"s0": 3}) == pytest.approx(cost.value(make(static, SPEC).flops))


def test_symbolic_image_size():
    no_padding = {"stride": (2, 2), "padding": ((0, 0),) * 2}
    site = conv_site(**no_padding, input_shape=(1, 256, "s1", "4*s2"))
    static = conv_site(**no_padding, input_shape=(1, 256, 21, 40))
    hints = {"s1": 21, "s2": 10}
    assert cost.dense_cost(site, SPEC).evaluate(hints) == pytest.approx(
        cost.dense_cost(static, SPEC).evaluate()
    )


@pytest.mark.parametrize(
    "text, expected", [("s0", 5), ("2*s0 + 1", 11), ("(s0//2)", 2), ("E", 5), ("s0*I", 25)]
)
def test_symbols_are_never_sympy_constants(text, expected):
    expression = cost.symbolic(text)
    assert all(isinstance(s, sympy.Symbol) and s.is_integer for s in expression.free_symbols)
    assert cost.value(expression, dict.fromkeys(("s0", "E", "I"), 5)) == expected


def test_flops_of_known_layers():
    plain = conv_site(64, 32, 3, 10, 2, padding=((0, 0),) * 2)
    assert float(cost.dense_cost(plain, SPEC).flops) == 2 * (2 * 8 * 8) * 64 * 32 * 9
    assert cost.dense_cost(plain, SPEC).bytes == 4 * (2 * 32 * 100 + 2 * 2 * 64 * 64 + 64 * 32 * 9)
    padded = cost.dense_cost(conv_site(64, 32, 3, 10, 2), SPEC)  # 28 of 30 taps are inside, each way
    assert float(padded.flops) == pytest.approx(2 * (2 * 28 * 28) * 64 * 32)
    grouped = cost.dense_cost(conv_site(64, 32, 3, 10, 2, groups=4), SPEC)
    assert float(grouped.flops) == pytest.approx(float(padded.flops) / 4)
    linear = cost.dense_cost(linear_site(128, 64, (3, 5)), SPEC)
    assert float(linear.flops) == 2 * 15 * 128 * 64
    up = conv_site(
        64, 32, 2, 10, 2, op="conv_transpose2d", stride=(2, 2), padding=((0, 0),) * 2, output_padding=(0, 0)
    )
    assert float(cost.dense_cost(up, SPEC).flops) == 2 * (2 * 10 * 10) * 64 * 32 * 4


@pytest.mark.parametrize(
    "kernel, stride, dilation, padding, size",
    [
        (3, 1, 1, (1, 1), 7),
        (3, 2, 1, (1, 1), 8),
        (5, 1, 2, (4, 4), 9),
        (2, 1, 1, (0, 1), 5),
        (7, 2, 1, (3, 3), 11),
    ],
)
def test_inside_fraction_counts_taps_by_brute_force(kernel, stride, dilation, padding, size):
    site = conv_site(
        8, 8, kernel, size, 1, stride=(stride,) * 2, dilation=(dilation,) * 2, padding=(padding,) * 2
    )
    ones = torch.ones(1, 1, size, size)
    padded = torch.nn.functional.pad(ones, (*padding, *padding))
    taps = torch.nn.functional.conv2d(
        padded, torch.ones(1, 1, kernel, kernel), stride=stride, dilation=dilation
    )
    assert tuple(taps.shape[2:]) == site.output_spatial
    assert roofline.inside_fraction(site) == pytest.approx(taps.mean().item() / kernel**2)


def test_limit_names_the_roof():
    assert cost.dense_cost(conv_site(), SPEC).limit() == "compute"
    assert cost.sparse_cost(conv_site(256, 64, 1, 56), (32, 32), SPEC, density=0.05).limit() == "memory"
    assert cost.dense_cost(linear_site(8, 8, (1,)), SPEC).limit() == "overhead"


def test_one_heavy_row_costs_more_than_an_even_spread():
    site = linear_site(1024, 1024, (4,))  # fewer rows than a register tile: only block rows can be shared out
    full = BlockPattern.full((1024, 1024), (32, 32))
    skewed, even = full.kept & False, full.kept & False
    skewed[0] = True
    even[:, 0, 0] = True
    spec = SPEC.with_figures("test", threads=16)
    assert skewed.sum() == even.sum()
    costs = [
        cost.value(cost.sparse_cost(site, full.with_kept(k), spec).compute_seconds) for k in (skewed, even)
    ]
    assert costs[0] > 2 * costs[1]


def test_lower_blocks_are_never_more_efficient_and_width_does_not_matter():
    site = conv_site()
    rates = [roofline.efficiency(site, (height, 8), SPEC) for height in (1, 2, 4, 8, 16, 32, 64)]
    assert rates == sorted(rates) and 0 < rates[0] < rates[-1] <= 1
    assert len({roofline.efficiency(site, (16, width), SPEC) for width in (2, 4, 16, 64)}) == 1
    assert len({roofline.efficiency(site, (32, width), SPEC) for width in (1, 4, 16, 64)}) == 1
    assert roofline.efficiency(site, (16, 1), SPEC) < roofline.efficiency(site, (16, 2), SPEC)


def test_figures_of_a_variant_come_first():
    spec = SPEC.with_figures("test", efficiency={"special/32x32/spatial": 0.123})
    assert roofline.efficiency(conv_site(), (32, 32), spec, "special") == 0.123
    assert roofline.efficiency(conv_site(), (32, 32), spec, "other") != 0.123


# ---- the decision ----------------------------------------------------------------------------------


def test_sparse_decision(table, spec):
    site = conv_site()
    pattern = even_pattern(site, 0.25)
    decision = cost.choose(site, [pattern], spec)
    assert decision.kernel == "any" and decision.pattern == pattern and decision.config == {"pixels": 14}
    assert set(decision.estimates) == {"dense", "any", "any 32x32"}
    assert not decision.measured


def test_the_best_block_shape_wins(table, spec):
    site = conv_site()
    coarse = even_pattern(site, 0.25)
    fine = coarse.retile((16, 16))
    assert cost.choose(site, [fine, coarse], spec).pattern == coarse
    sparse_fine = even_pattern(site, 0.1, (16, 16))
    assert cost.choose(site, [sparse_fine.retile((32, 32)), sparse_fine], spec).pattern == sparse_fine


def test_estimates_hold_the_best_block_of_a_variant(table, spec):
    site = conv_site()
    patterns = [even_pattern(site, 0.2, b) for b in ((8, 8), (32, 32), (16, 16))]
    estimates = cost.choose(site, patterns, spec).estimates
    blocks = [estimates[f"any {b}x{b}"] for b in (8, 16, 32)]
    assert estimates["any"] == min(blocks) and len(set(blocks)) == 3


def test_dense_never_forces_a_kernel(table, spec):
    site = linear_site(64, 64, (4,))
    pattern = even_pattern(site, 1.0)
    assert cost.choose(site, [pattern], spec).is_dense
    forced = cost.choose(site, [pattern], spec, allow_dense=False)
    assert forced.kernel == "any"


def test_hints_decide(table, spec):
    site = linear_site(128, 128, ("s0",))
    pattern = even_pattern(site, 0.5)
    assert cost.choose(site, [pattern], spec, hints={"s0": 1}).is_dense
    assert not cost.choose(site, [pattern], spec, hints={"s0": 4096}).is_dense


GOLDEN = [
    ("depthwise", "stays dense: depthwise convolution has one input channel per group"),
    ("no zeros", "stays dense: no zero blocks found in any supported tile shape"),
    ("no zeros in one shape", "stays dense: no zero blocks found in 32x32 tiles"),
    ("no kernel", "stays dense: transposed convolutions have no block-sparse kernel yet"),
    ("unknown shape", "stays dense: its input shape is unknown"),
    ("tiny", "stays dense: too little work at this size for any sparse kernel to pay"),
    ("memory", "stays dense: bound by reading and writing activations, which no zero block spares"),
    ("too full", "stays dense: 94% kept needs below 85% to pay at this size"),
    ("sparse", "26% of 32x32 tiles kept: 1.02 ms against 3.40 ms dense (3.3x)"),
    ("forced", "97% of 32x32 tiles kept: 3.67 ms against 3.40 ms dense (0.9x); dense is not allowed here"),
]


def _golden_case(name, spec):
    site, kept, options = conv_site(), 0.25, {}
    if name == "depthwise":
        site = conv_site(groups=256)
        return cost.choose(site, [even_pattern(site, 0.5, (1, 1))], spec)
    if name == "no zeros":
        return cost.choose(site, [], spec)
    if name == "no zeros in one shape":
        kept = 1.0
    if name == "no kernel":
        site = conv_site(op="conv_transpose2d", output_padding=(0, 0))
    if name == "unknown shape":
        site = conv_site(input_shape=())
    if name == "tiny":
        site, kept = linear_site(32, 64, (1,)), 0.5
    if name == "memory":
        site, kept, spec = (
            conv_site(512, 32, 1, 112),
            0.5,
            spec.with_figures("test", dram_bytes_per_second=3e9),
        )
    if name in ("too full", "forced"):
        kept, options = (0.94, {}) if name == "too full" else (0.97, {"allow_dense": False})
    return cost.choose(site, [even_pattern(site, kept)], spec, **options)


@pytest.mark.parametrize("name, sentence", GOLDEN, ids=[name for name, _ in GOLDEN])
def test_sentences(table, spec, name, sentence):
    assert _golden_case(name, spec).reason == sentence


@pytest.mark.parametrize(
    "seconds, text",
    [(2.0, "2.00 s"), (1.52e-3, "1.52 ms"), (0.41e-3, "0.41 ms"), (12.34e-6, "12.3 us"), (0.0, "0.0 us")],
)
def test_format_seconds(seconds, text):
    assert cost.format_seconds(seconds) == text
