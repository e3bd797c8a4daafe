"""Kernels for pairs of out-blocks, against plain torch in float64; how blocks are paired and packed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_cases import BFLOAT, FLOAT, HALF, GpuCase, GpuLayer, assert_close_to_float64, check, generate
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksparse_compiler import BlockPattern
from blocksparse_compiler.packing import OUTPUT_MAJOR, pack_rows, unpack_weight
from blocksparse_compiler.pair_packing import ALONE, MATCHED_ROWS, pack_pairs, pair_rows, shared_fraction

pytest.importorskip("triton")

ONE = (1, 1, 1, 1)


def case(shape, out_channels, kernel=(), block=(16, 16), **kwargs) -> GpuCase:
    return GpuCase(shape, out_channels, kernel, block, variant="triton_pair", **kwargs)


def box(n, h, w) -> dict[str, int | str]:
    return {"pixels": n * h * w, "box": 1, "box_n": n, "box_h": h, "box_w": w}


CASES = [
    # Even and odd numbers of out-blocks, ragged channels, pixels past the end.
    case((2, 32, 7, 7), 64, (3, 3), padding=ONE),
    case((1, 32, 9, 5), 80, (3, 3), stride=(2, 2), padding=ONE, bias=False),
    case((2, 40, 5, 5), 70, (3, 3), (32, 32), padding=ONE, dilation=(2, 1)),
    case((1, 64, 5, 5), 96, (1, 1), (32, 32)),
    case((1, 32, 5, 5), 48, (5, 7), density=0.2, padding=(2, 2, 3, 3)),
    # Nothing shared, all shared, rows without tiles, one block alone, groups.
    case((1, 32, 5, 5), 64, (3, 3), padding=ONE, density=0.05),
    case((1, 32, 5, 5), 64, (3, 3), padding=ONE, density=1.0),
    case((1, 32, 5, 5), 80, (3, 3), padding=ONE, empty_rows=(0, 3)),
    case((1, 32, 5, 5), 16, (3, 3), padding=ONE),
    case((1, 64, 5, 5), 64, (3, 3), padding=ONE, groups=2),
    # Other numbers of dimensions.
    case((2, 16, 20), 64, (3,), padding=(1, 0)),
    case((1, 16, 3, 4, 5), 48, (3, 1, 3), padding=(1, 1, 0, 0, 1, 1)),
    case((5, 64), 96),
    case((2, 3, 40), 50, bias=False),
    case((2, 32, 6, 6), 128, (3, 3), (64, 32), padding=ONE, parameters={"l1": 1}),
    # In boxes of pixels; with strides that boxes cannot take.
    case((3, 32, 7, 7), 192, (3, 3), (64, 32), padding=ONE, parameters=box(2, 8, 8)),
    case((2, 32, 6, 6), 128, (3, 3), (64, 32), stride=(2, 2), padding=ONE, parameters=box(1, 4, 4)),
    case((2, 32, 7, 7), 128, (3, 3), (64, 32), stride=(2, 2), padding=ONE, parameters=box(1, 4, 4)),
    case((2, 64, 5, 5), 150, (1, 1), (64, 64), parameters={"box": 1}),
    case((37, 64), 130, (), (64, 64), parameters={"box": 1}),
]


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT], ids=str)
def test_geometries(dtype):
    check([replace(c, dtype=dtype, seed=i) for i, c in enumerate(CASES)])


@pytest.mark.parametrize("parameters", [{}, box(2, 4, 8)], ids=["pointers", "boxes"])
def test_epilogue_is_fused_into_both_stores(parameters):
    def residual(y, r):
        return torch.relu(y + r), y

    layer = GpuLayer(
        case(
            (3, 32, 7, 7),
            192,
            (3, 3),
            (64, 32),
            padding=ONE,
            dtype=HALF,
            epilogue=residual,
            parameters=parameters,
        )
    )
    x = layer.case.input()
    r = (
        torch.randn(3, 192, 7, 7, generator=torch.Generator().manual_seed(1))
        .half()
        .to(memory_format=torch.channels_last)
    )
    program = generate(layer, x, r)
    assert len(program.kernels) == 1 and not program.externs
    exact = layer.reference(x)
    for got, expected in zip(program.run(x, r), residual(exact, r.double()), strict=True):
        assert torch.allclose(got.double(), expected, atol=1e-2)


def test_dynamic_batch():
    layer = GpuLayer(case((4, 32, 7, 7), 80, (3, 3), padding=ONE, dtype=HALF))
    x = layer.case.input()
    program = generate(layer, x, dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    for batch in (2, 5):
        x = layer.case.input(batch)
        assert_close_to_float64(layer, x, program.run(x))


# ---- pairs -----------------------------------------------------------------------------------------


@st.composite
def patterns(draw):
    block = draw(st.sampled_from([(16, 16), (8, 16), (4, 2)]))
    groups = draw(st.sampled_from([1, 1, 2]))
    channels = block[0] * draw(st.integers(1, 9)) * groups, block[1] * draw(st.integers(1, 4)) * groups
    ragged = groups == 1
    channels = channels[0] + 3 * ragged, channels[1] + ragged
    kernel = draw(st.sampled_from([(), (3,), (3, 3)]))
    pattern = BlockPattern.full((channels[0], channels[1] // groups, *kernel), block, groups)
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    density = draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    return pattern.with_kept(torch.rand(pattern.grid_shape, generator=random) < density)


@settings(max_examples=60, deadline=None)
@given(patterns())
def test_packing_round_trip(pattern):
    weight = pattern.apply(torch.randn(pattern.weight_shape))
    packed = pack_pairs(weight, pattern)
    flat = pattern.ungroup()
    dense = unpack_weight(*packed, flat.out_channels, flat.in_channels, flat.kernel_size, layout=OUTPUT_MAJOR)
    out, inner = pattern.group_channels
    for group in range(pattern.groups):
        rows = slice(group * out, (group + 1) * out)
        columns = slice(group * inner, (group + 1) * inner)
        assert torch.equal(dense[rows, columns], weight[rows])
        dense[rows, columns] = 0
    assert not dense.any()


@settings(max_examples=60, deadline=None)
@given(patterns())
def test_every_block_is_in_one_pair_with_its_tiles(pattern):
    packed = pack_pairs(pattern.apply(torch.randn(pattern.weight_shape)), pattern)
    place, tap, block = packed.tile_index.tolist()
    seen, before = [], 0
    for a, b, both, only_a, only_b, end in packed.row_ptr.tolist():
        seen += [row for row in (a, b) if row != ALONE]
        assert both == before and both <= only_a <= only_b <= end
        before = end
        assert set(block[both:only_a:2]) <= {a} and set(block[both + 1 : only_a : 2]) <= {b}
        assert [place[both:only_a:2], tap[both:only_a:2]] == [
            place[both + 1 : only_a : 2],
            tap[both + 1 : only_a : 2],
        ]
        assert set(block[only_a:only_b]) <= {a} and set(block[only_b:end]) <= {b}
        rest_a, rest_b = (
            set(zip(place[s], tap[s], strict=True)) for s in (slice(only_a, only_b), slice(only_b, end))
        )
        assert not rest_a & rest_b, "shared tiles loaded twice"
    assert sorted(seen) == list(range(pattern.ungroup().grid_shape[0]))
    assert before == packed.values.shape[0]


def test_taps_that_read_the_same_channels_follow_each_other():
    pattern = BlockPattern.full((64, 160, 3, 3), (32, 32))
    packed = pack_rows(torch.randn(64, 160, 3, 3), pattern)
    place, tap, _ = packed.tile_index[:, : 5 * 9].tolist()
    steps = [(0, 32)] * 9 + [(64, 96)] * 9 + [(128,)] * 9
    expected = [(at, i % 9) for i, channels in enumerate(steps) for at in channels]
    assert list(zip(place, tap, strict=True)) == expected


def rows_with(kept: torch.Tensor) -> BlockPattern:
    """A pattern of 1x1 tiles with these rows."""
    return BlockPattern.full(tuple(kept.shape), (1, 1)).with_kept(kept[:, None, :])


def test_equal_rows_are_paired():
    kinds = torch.eye(5, dtype=torch.bool).repeat_interleave(4, dim=1)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    pairs = pair_rows(rows_with(torch.cat([kinds, kinds])[order]))
    assert all(order[p.a] % 5 == order[p.b] % 5 for p in pairs)
    assert [(p.both, p.only_a, p.only_b) for p in pairs] == [(4, 0, 0)] * 5
    assert [(p.products, p.loads) for p in pairs] == [(8, 4)] * 5
    assert shared_fraction(rows_with(kinds)) == 0.0
    assert shared_fraction(rows_with(torch.cat([kinds, kinds]))) == 0.5


def test_few_lone_tiles_join_the_shared_loop_with_zero_tiles():
    kept = torch.zeros(2, 20, dtype=torch.bool)
    kept[0, :10], kept[1, 2:] = True, True
    pattern = rows_with(kept)
    ((a, b, both, only_a, only_b),) = pair_rows(pattern)
    assert {a, b} == {0, 1} and (both, *sorted([only_a, only_b])) == (10, 0, 10)
    assert pair_rows(pattern)[0].loops == 2
    weight = pattern.apply(torch.randn(2, 20))
    packed = pack_pairs(weight, pattern)
    assert int(packed.values.eq(0).sum()) == 2 and packed.values.shape[0] == 30
    assert torch.equal(unpack_weight(*packed, 2, 20, (), layout=OUTPUT_MAJOR), weight)


def test_rows_that_share_nothing_stay_alone():
    pairs = pair_rows(rows_with(torch.eye(3, dtype=torch.bool)))
    assert {(p.a, p.b) for p in pairs} == {(0, ALONE), (1, ALONE), (2, ALONE)}


@pytest.mark.parametrize("rows", [MATCHED_ROWS, MATCHED_ROWS + 2])
def test_pairs_share_more_than_neighbours_and_are_balanced(rows):
    kept = torch.rand(rows, 72, generator=torch.Generator().manual_seed(0)) < 0.5
    pairs = pair_rows(rows_with(kept))
    neighbours = int((kept[0::2] & kept[1::2]).sum())
    assert sum(int((kept[p.a] & kept[p.b]).sum()) for p in pairs) > 1.1 * neighbours
    work = [p.products for p in pairs]
    assert work == sorted(work, reverse=True)
    assert work[0] < 1.25 * sum(work) / len(work)


# ---- machine code ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters, target, registers",
    [
        ({**box(64, 2, 2), "warps": 8, "stages": 4}, "sm_90", 200),
        ({**box(32, 2, 2), "warps": 4, "stages": 3}, "sm_90", 200),
        ({"pixels": 128, "warps": 8, "stages": 3}, "sm_90", 200),
        ({"pixels": 128, "warps": 8, "stages": 3}, "sm_80", 255),
    ],
)
def test_machine_code(parameters, target, registers):
    layer = GpuLayer(
        case(
            (64, 128, 14, 14), 128, (3, 3), (64, 64), padding=ONE, epilogue=torch.relu, parameters=parameters
        )
    )
    (kernel,) = generate(layer, layer.case.input(), target=target).templates
    compiled = kernel.compile()
    found = compiled.resources
    assert found.spill_bytes <= (0 if "box" in parameters else 16) and found.registers <= registers
    # Four products per channel step of 64: two for shared tiles, one for each block's own.
    if target == "sm_90":
        assert found.tensor_core == "wgmma" and found.tensor_core_count % (4 * 4) == 0
    if "box" in parameters:
        assert found.tma_loads == found.async_copies > 0
        depths = {line.split()[-1] for line in compiled.ptx.splitlines() if "wgmma.wait_group" in line}
        assert {"1;", "2;"} <= depths
