"""The cost model of GPUs: properties for any spec, known figures, and what is decided for known layers."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layer_cases import conv_site, even_pattern, linear_site

from blocksparse_compiler import cost, gpu_roofline, sizes
from blocksparse_compiler.errors import OptionError
from blocksparse_compiler.gpu_devices import SPECS
from blocksparse_compiler.gpu_programs import Programs, Tile, makespan, programs
from blocksparse_compiler.variants import VARIANTS

H200 = SPECS["h200"]
few = settings(deadline=None, max_examples=30)


def on_gpu(site, dtype="bfloat16", **kwargs):
    return replace(site, device="cuda", dtype=dtype, **kwargs)


gpu_sites = st.one_of(
    st.builds(
        conv_site,
        out_channels=st.sampled_from([64, 96, 256, 1000]),
        in_channels=st.sampled_from([64, 96, 512]),
        kernel=st.sampled_from([1, 3]),
        size=st.sampled_from([7, 14, 57]),
        batch=st.sampled_from([1, 3, 64]),
    ),
    st.builds(linear_site, st.sampled_from([64, 1000, 4096]), rows=st.sampled_from([(1,), (16,), (4, 128)])),
).flatmap(lambda site: st.sampled_from(["bfloat16", "float16", "float32"]).map(lambda d: on_gpu(site, d)))
specs = st.sampled_from(list(SPECS.values()))
blocks = st.sampled_from([(16, 16), (32, 32), (64, 32), (64, 64)])
variant_names = st.sampled_from([name for name, row in VARIANTS.items() if row.device == "cuda"])


def seconds(site, pattern, spec, variant="triton_gather", **kwargs):
    return cost.sparse_cost(site, pattern, spec, variant, **kwargs).evaluate()


def runs(site, pattern, spec, variant):
    row = VARIANTS[variant]
    return row.unsupported(site, pattern) is None and row.configs(site, pattern, spec)


# ---- properties ------------------------------------------------------------------------------------


@few
@given(gpu_sites, specs, blocks, variant_names, st.floats(0, 1), st.floats(0, 1))
def test_keeping_more_never_costs_less(site, spec, block, variant, one, other):
    assume(runs(site, even_pattern(site, 2.0, block), spec, variant))
    low, high = sorted((one, other))
    assert seconds(site, block, spec, variant, density=low) <= seconds(
        site, block, spec, variant, density=high
    ) * (1 + 1e-9)


@few
@given(gpu_sites, specs, blocks, variant_names, st.integers(0, 9), st.floats(0, 0.9))
def test_adding_a_tile_never_costs_less(site, spec, block, variant, seed, density):
    pattern = even_pattern(site, density, block, seed)
    configs = runs(site, pattern, spec, variant)
    assume(configs and variant != "triton_pair")  # rows may be paired anew
    kept = pattern.kept.clone()
    kept.view(-1)[seed % kept.numel()] = True
    for config in configs:  # of the same parameters: the variant may offer others for another pattern
        before, after = (
            seconds(site, p, spec, variant, config=config) for p in (pattern, pattern.with_kept(kept))
        )
        assert before <= after * (1 + 1e-9)


@few
@given(gpu_sites, specs, blocks, st.floats(0.05, 1))
def test_larger_batch_never_costs_less(site, spec, block, density):
    bigger = replace(site, input_shape=(2 * site.input_shape[0], *site.input_shape[1:]))
    config = {"pixels": 128, "warps": 4, "stages": 3}
    for make in (
        cost.dense_cost,
        lambda s, d: gpu_roofline.sparse_cost(s, block, d, "triton_gather", config, density=density),
    ):
        assert make(site, spec).evaluate() <= make(bigger, spec).evaluate() * (1 + 1e-9)


@few
@given(gpu_sites, specs, blocks)
def test_break_even_separates(site, spec, block):
    limit = cost.break_even_density(site, block, spec, variant="triton_gather")
    target = cost.MARGIN * cost.dense_cost(site, spec).evaluate()
    if limit > 0:
        assert seconds(site, block, spec, density=limit) < target
    if limit < 0.99:
        assert seconds(site, block, spec, density=limit + 0.01) >= target


@few
@given(gpu_sites, specs, blocks, st.floats(0.01, 1), st.integers(0, 3))
def test_sparse_only_where_estimated_faster(site, spec, block, density, seed):
    decision = cost.choose(site, [even_pattern(site, density, block, seed)], spec)
    if not decision.is_dense:
        assert decision.estimates[decision.kernel] < cost.MARGIN * decision.estimates["dense"]
        offered = VARIANTS[decision.kernel].configs(site, decision.pattern, spec)
        assert dict(decision.config) in offered
        costs = [seconds(site, decision.pattern, spec, decision.kernel, config=c) for c in offered]
        assert decision.estimates[decision.kernel] == pytest.approx(min(costs))
    assert decision.reason and "\n" not in decision.reason


@few
@given(
    st.lists(st.floats(0.1, 5), min_size=1, max_size=12),
    st.integers(1, 20),
    st.integers(1, 16),
    st.floats(0, 3),
)
def test_makespan_is_within_the_bounds_of_scheduling(times, tiles, slots, more):
    times = np.array(times)
    found, total = makespan(times, tiles, slots), tiles * times.sum()
    assert max(times.max(), total / slots) <= found * (1 + 1e-9)
    assert found <= max(times.max(), total / slots + times.mean()) * (1 + 1e-9)
    assert found <= makespan(times + more, tiles, slots) * (1 + 1e-9)
    assert found <= makespan(times, tiles + 1, slots) * (1 + 1e-9)


def test_equal_programs_run_in_whole_waves():
    one = np.ones(1)
    assert [makespan(one, n, 132) for n in (1, 132, 133, 264, 265)] == [1, 1, 2, 2, 3]
    assert makespan(np.array([]), 5, 132) == 0


@few
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 16), st.sampled_from([1, 2, 4]))
def test_splitting_keeps_all_tiles(steps, parts, step):
    tiles = [step * n for n in steps]
    work = Programs.single(np.array(tiles, float)).split(parts, step)
    assert len(work.products) == len(tiles) * parts
    assert work.products.reshape(len(tiles), parts).sum(1).tolist() == tiles
    assert work.products.max() == step * max(-(-n // parts) for n in steps)
    assert not (work.products % step).any()


def test_block_rows_are_filled_up_to_whole_steps():
    site = on_gpu(linear_site(64, 256, (512,)))
    pattern = even_pattern(site, 2.0, (32, 32))
    kept = pattern.kept.clone()
    kept[0, 0, :3] = False
    work = programs(site, pattern.with_kept(kept), "triton_gather", {"step": 2})
    assert work.products.tolist() == [6, 8]


def test_boxes_cover_images():
    site = layer(14, 256, 256, 3, 10)
    boxes = {"pixels": 128, "box_n": 4, "box_h": 2, "box_w": 16}
    tile = Tile(site, (64, 64), H200, "triton_box", boxes, 1)
    assert tile.count == 3 * 7 * 1
    assert replace(tile, config={"pixels": 128}).count == 16
    symbolic = replace(tile, site=replace(site, input_shape=("s0", 256, 14, 14)))
    assert cost.value(symbolic.count, {"s0": 10}) == 3 * 7


# ---- symbolic sizes --------------------------------------------------------------------------------


def test_symbolic_batch_evaluates_to_the_static_cost():
    symbolic, static = (on_gpu(conv_site(batch=b), bias=True) for b in ("s0", 48))
    config = {"pixels": 128, "warps": 4, "stages": 4}
    hints = {"s0": 48}
    for make in (
        lambda s: cost.dense_cost(s, H200, hints),
        lambda s: cost.sparse_cost(s, even_pattern(s, 0.3), H200, "triton_gather", config=config),
    ):
        record = make(symbolic)
        assert {s.name for s in record.seconds.free_symbols} == {"s0"}
        assert record.evaluate(hints) == pytest.approx(make(static).evaluate())
        assert cost.value(record.seconds, hints) == pytest.approx(record.evaluate(hints))
        assert record.limit(hints) == make(static).limit()


def test_numbers_stay_numbers():
    assert sizes.number(cost.symbolic("2*3")) == 6
    assert type(sizes.maximum(1, 2.0)) is float and sizes.ceiling(2.1) == 3
    assert not gpu_roofline.dense_cost(on_gpu(conv_site()), H200).seconds.free_symbols


# ---- known figures ---------------------------------------------------------------------------------

RESNET50 = [  # image side, input and output channels, kernel, how often
    *((56, 64, 64, 3, 3), (56, 256, 64, 1, 2), (56, 64, 256, 1, 4)),
    *((28, 128, 128, 3, 4), (28, 512, 128, 1, 3), (28, 128, 512, 1, 4)),
    *((14, 256, 256, 3, 6), (14, 1024, 256, 1, 5), (14, 256, 1024, 1, 6)),
    *((7, 512, 512, 3, 3), (7, 2048, 512, 1, 2), (7, 512, 2048, 1, 3)),
]


def layer(side, channels, out, kernel, batch):
    return on_gpu(conv_site(out, channels, kernel, side, batch))


def reference_dense(side, channels, out, kernel, batch):
    """A dense kernel at a flat 600 TFLOP/s, or nine tenths of 4.3 TB/s."""
    pixels, taps = batch * side**2, kernel**2
    traffic = 2 * (pixels * (channels + out) + taps * channels * out)
    return max(2 * pixels * taps * channels * out / 600e12, traffic / 4.3e12 / 0.9) + 2.5e-6


@pytest.mark.parametrize(
    "batch, block, density, expected",
    [
        (64, 64, 0.5, 0.71),
        (256, 64, 0.5, 0.76),
        (64, 64, 0.25, 1.05),
        (256, 64, 0.25, 1.14),
        (64, 32, 0.5, 0.47),
        (256, 32, 0.5, 0.48),
        (64, 32, 0.25, 0.79),
        (256, 32, 0.25, 0.82),
    ],
)
def test_kernels_of_single_block_rows_over_all_of_resnet50(batch, block, density, expected):
    """Speed-up of one program per block row and 128 or 256 pixels, by an independent roofline."""
    configs = [{"pixels": 128, "warps": 4, "stages": 4}, {"pixels": 256, "warps": 8, "stages": 4}]
    dense = sparse = 0.0
    for *shape, count in RESNET50:
        site = layer(*shape, batch)
        dense += count * reference_dense(*shape, batch)
        sparse += count * min(
            seconds(site, (block, block), H200, density=density, config=config) for config in configs
        )
    assert dense / sparse == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(
    "batch, density, expected", [(64, 0.5, 1.40), (64, 0.25, 2.17), (256, 0.5, 1.70), (256, 0.25, 2.79)]
)
def test_kernels_that_load_a_halo_once_for_nine_taps(batch, density, expected):
    """The same for 3x3 layers on kernels with 512 pixels and their halo (1.5 times the pixels) per load."""
    waste = {56: 64 / 56, 28: 32 / 28, 14: 16 / 14 * 1.07, 7: 64 / 49}  # pixels computed but not stored
    config = {"pixels": 512, "warps": 8, "stages": 4}
    # Warps that only copy keep the loads of the next program coming while one ends.
    spec = H200.with_figures("test", program_seconds=1e-9, load_latency_seconds=1e-9)
    dense = halo = 0.0
    for *shape, count in RESNET50:
        side, channels, out, kernel = shape
        if kernel == 3:
            site = layer(side, channels, out, kernel, round(batch * waste[side]))
            tiles = np.full(out // 64, density * 9 * channels / 64)
            record = gpu_roofline.kernel_cost(
                site, spec, "triton_box", config, Programs(tiles, tiles * 1.5 / 9), (64, 64), 0
            )
            traffic = cost.value(record.memory_seconds) / waste[side]  # of real pixels
            fixed = replace(record, memory_seconds=cost.symbolic(0) + traffic)
            dense += count * reference_dense(*shape, batch)
            halo += count * fixed.evaluate()
    assert dense / halo == pytest.approx(expected, rel=0.15)


def test_a_kernel_of_small_blocks_is_bound_by_l2():
    """32x32 blocks and 128 pixels: 25.6 FLOP per byte, 140 TFLOP/s at 5.5 TB/s."""
    site = layer(14, 256, 256, 3, 1024)
    record = gpu_roofline.sparse_cost(
        site, (32, 32), H200, "triton_gather", {"pixels": 128, "warps": 4, "stages": 4}, density=0.5
    )
    assert record.limit() == "L2"
    full_rate = cost.value(record.flops) / (cost.value(record.l2_seconds) * H200.efficiency["l2"])
    assert full_rate == pytest.approx(140e12, rel=0.1)


def test_large_products_reach_what_was_seen():
    """8192 x 8192 x 8192 in bf16: 770 to 800 TFLOP/s on an H200."""
    record = cost.dense_cost(on_gpu(linear_site(8192, 8192, (8192,))), H200)
    assert cost.value(record.flops) / record.evaluate() == pytest.approx(785e12, rel=0.1)


def test_decoding_is_bound_by_the_bytes_of_the_weight():
    site = on_gpu(linear_site(14336, 4096, (1,)))
    dense = cost.dense_cost(site, H200)
    assert dense.limit() == "memory"
    assert dense.evaluate() == pytest.approx(2 * 14336 * 4096 / (0.8 * 4.8e12) + 2.5e-6, rel=0.1)


def test_dtypes_count():
    half, single = (on_gpu(conv_site(batch=256), dtype) for dtype in ("float16", "float32"))
    dense_half, dense_single = (cost.dense_cost(s, H200) for s in (half, single))
    assert cost.value(dense_single.bytes) == 2 * cost.value(dense_half.bytes)
    assert dense_single.evaluate() > 1.5 * dense_half.evaluate()
    config = {"pixels": 64, "warps": 4, "stages": 3}
    exact, fast = (
        seconds(single, (32, 32), H200, config={**config, "precision": p}) for p in ("ieee", "tf32")
    )
    assert exact > 1.2 * fast


def test_what_follows_a_dense_layer_costs_another_kernel_or_a_slower_one():
    plain = on_gpu(conv_site(batch=256))
    followed = replace(plain, bias=True)
    templates = H200.as_compiled({"max_autotune": True})
    alone, fused, two = (
        cost.dense_cost(site, spec).evaluate()
        for site, spec in ((plain, H200), (followed, templates), (followed, H200))
    )
    assert alone < fused <= two
    assert H200.as_compiled({}) is H200
    graphs = H200.as_compiled({"triton.cudagraphs": True})
    assert graphs.launch_seconds == H200.graph_launch_seconds and not graphs.templates
    linear = on_gpu(linear_site())
    biased = replace(linear, bias=True)  # cuBLAS adds it
    assert cost.dense_cost(biased, H200).evaluate() == cost.dense_cost(linear, H200).evaluate()
    for site in (followed, replace(biased, epilogue=("gelu",))):
        fused = cost.sparse_cost(site, (64, 64), H200, "triton_gather", density=0.3)
        alone = cost.sparse_cost(
            replace(site, bias=False, epilogue=()), (64, 64), H200, "triton_gather", density=0.3
        )
        assert fused.evaluate() == alone.evaluate()


def test_narrow_groups_run_far_from_peak():
    sites = [replace(layer(56, 256, 256, 3, 256), groups=groups) for groups in (64, 32, 16, 8, 4, 1)]
    records = [cost.dense_cost(site, H200) for site in sites]
    rates = [cost.value(r.flops) / cost.value(r.compute_seconds) for r in records]
    assert rates == sorted(rates) and rates[0] < 0.1 * rates[-1] and rates[-2] == rates[-1]


def test_the_best_variant_is_the_default():
    site = layer(14, 256, 256, 3, 256)
    best = cost.sparse_cost(site, (64, 64), H200, density=0.2).evaluate()
    for name in ("triton_gather", "triton_box", "triton_pair"):
        assert best <= seconds(site, (64, 64), H200, name, density=0.2)
    assert cost.break_even_density(site, (64, 64), H200) > 0.2
    with pytest.raises(OptionError, match="8x8 tiles on h200"):
        cost.sparse_cost(site, (8, 8), H200, density=0.2)
    with pytest.raises(OptionError, match="triton_box"):
        cost.sparse_cost(site, (64, 64), SPECS["a100"], "triton_box", density=0.2)


def test_graphs_make_launches_cheaper():
    site = on_gpu(linear_site(256, 256, (16,)))
    before, after = (cost.dense_cost(site, spec).evaluate() for spec in (H200, H200.with_graphs()))
    assert before - after == pytest.approx(H200.launch_seconds - H200.graph_launch_seconds)


def test_one_heavy_row_costs_more_than_an_even_spread():
    site = on_gpu(linear_site(1024, 8192, (512,)))
    full = even_pattern(site, 2.0, (64, 64))
    skewed, even = full.kept & False, full.kept & False
    skewed[0] = True
    even[:, 0, :8] = True
    assert skewed.sum() == even.sum()
    costs = [seconds(site, full.with_kept(k), H200) for k in (skewed, even)]
    assert costs[0] > 2 * costs[1]


def test_shared_activation_tiles_are_loaded_once():
    site = on_gpu(conv_site(256, 256, 3, 14, 256))
    same = even_pattern(site, 0.5, (64, 64)).kept
    same[1::2] = same[0::2]
    pattern = even_pattern(site, 2.0, (64, 64)).with_kept(same)
    work = programs(site, pattern, "triton_pair", {})
    assert work.products.sum() == pattern.num_kept and work.loads.sum() == pattern.num_kept / 2
    config = {"pixels": 128, "warps": 8, "stages": 3}
    pair, single = (
        gpu_roofline.sparse_cost(site, pattern, H200, variant, config)
        for variant in ("triton_pair", "triton_gather")
    )
    assert cost.value(pair.l2_seconds) < 0.75 * cost.value(single.l2_seconds)


def test_taps_find_each_others_pixels_in_l1():
    site = layer(28, 128, 128, 3, 64)
    config = {"pixels": 128, "warps": 4, "stages": 2}

    def l2(site, **more):
        record = cost.sparse_cost(
            site, (64, 64), H200, "triton_gather", density=0.5, config={**config, **more}
        )
        return cost.value(record.l2_seconds)

    assert 0.3 < l2(site, l1=1) / l2(site) < 0.8
    assert l2(site, l1=1, stages=12) == l2(site, stages=12)  # shared memory leaves no room
    pointwise = layer(28, 128, 128, 1, 64)
    assert l2(pointwise, l1=1) == l2(pointwise)
    wide = layer(28, 2048, 128, 3, 64)
    assert l2(wide, l1=1) / l2(wide) > l2(site, l1=1) / l2(site)


# ---- decisions -------------------------------------------------------------------------------------


def decide(site, density, block=(64, 64), spec=H200):
    return cost.choose(site, [even_pattern(site, density, block)], spec)


def test_layers_of_resnet50_get_what_suits_them():
    for shape in ((56, 64, 64, 3), (14, 256, 256, 3), (7, 512, 512, 3)):
        decision = decide(layer(*shape, 256), 0.2)
        assert decision.speedup > 1.2
        # Boxes, shared loads, or taps that find each other in L1: whatever spares L2.
        assert decision.kernel in ("triton_box", "triton_pair") or decision.config.get("l1")
        assert decide(layer(*shape, 256), 0.2, spec=SPECS["a100"]).kernel in ("triton_gather", "triton_pair")
    shared = decide(layer(14, 1024, 256, 1, 256), 0.3)
    assert shared.kernel == "triton_pair" and shared.speedup > 1
    assert decide(layer(56, 64, 256, 1, 256), 0.2).is_dense
    assert decide(layer(7, 512, 512, 3, 1), 0.5).is_dense


GOLDEN = [
    ("large", "N% of NxN tiles kept: N us against N ms dense (Nx), bound by loading tiles from LN"),
    ("half", "stays dense: N% kept needs below N% to pay at this size, bound by loading tiles from LN"),
    ("thin", "stays dense: bound by reading and writing activations, which no zero block spares"),
    ("decode", "N% of NxN tiles kept: N us against N us dense (Nx), bound by device memory"),
    (
        "lonely",
        "stays dense: N% kept needs below N% to pay at this size, "
        "with too few programs to fill N multiprocessors",
    ),
    ("tiny", "stays dense: too little work at this size for any sparse kernel to pay"),
    ("exact", "N% of NxN tiles kept: N ms against N ms dense (Nx), bound by matrix instructions"),
]


@pytest.mark.parametrize("name, sentence", GOLDEN, ids=[name for name, _ in GOLDEN])
def test_sentences(name, sentence, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    site, density = {
        "large": (layer(14, 256, 256, 3, 256), 0.25),
        "half": (layer(14, 256, 1024, 1, 256), 0.5),
        "thin": (layer(56, 64, 256, 1, 256), 0.5),
        "decode": (on_gpu(linear_site(14336, 4096, (1,))), 0.3),
        "lonely": (layer(7, 512, 512, 3, 1), 0.5),
        "tiny": (on_gpu(linear_site(128, 128, (64,))), 0.5),
        "exact": (replace(layer(14, 256, 256, 3, 256), dtype="float32"), 0.25),
    }[name]
    reason = decide(site, density).reason
    assert re.sub(r"\d+(\.\d+)?", "N", reason) == sentence


def test_few_rows_go_to_the_decode_kernel():
    for rows in (1, 16):
        decision = decide(on_gpu(linear_site(14336, 4096, (rows,))), 0.1)
        assert decision.kernel == "triton_decode" and decision.speedup > 4
        assert decision.config["split"] >= 1
    assert decide(on_gpu(linear_site(14336, 4096, (4096,))), 0.1).kernel != "triton_decode"


def test_old_gpus_stay_dense():
    spec = H200.with_figures("test", name="turing", arch=75)
    decision = decide(layer(14, 256, 256, 3, 256), 0.1, spec=spec)
    assert decision.reason == (
        "stays dense: block-sparse kernels need compute capability 8.0, this GPU has 7.5"
    )
    assert set(decision.estimates) == {"dense"}


def test_variants_that_a_gpu_lacks_are_not_offered():
    site = layer(14, 256, 256, 3, 256)
    for spec in (SPECS["a100"], SPECS["mi300x"]):
        decision = decide(site, 0.1, spec=spec)
        offered = {n for n, row in VARIANTS.items() if row.device == "cuda" and row.runs_on(spec)}
        assert {name.split()[0] for name in decision.estimates} - {"dense"} <= offered
