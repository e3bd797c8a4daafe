"""Patterns and block-sparse weights: round trips, sizes, errors."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from blocksparse_compiler import BlockPattern, BlockSparseWeight
from blocksparse_compiler.errors import PatternError
from blocksparse_compiler.packing import pack_weight, unpack_weight
from blocksparse_compiler.pattern import gather_tiles, scatter_tiles
from blocksparse_compiler.zero_blocks import zero_block_patterns


@st.composite
def patterns(draw, groups=(1, 2, 3), divisible=False):
    g = draw(st.sampled_from(groups))
    kernel = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    bh, bw = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rows, cols = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    out_group = rows * bh if divisible else rows * bh + draw(st.integers(0, bh - 1))
    in_group = cols * bw if divisible else cols * bw + draw(st.integers(0, bw - 1))
    full = BlockPattern.full((g * out_group, in_group, *kernel), (bh, bw), g)
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return full.with_kept(
        torch.rand(full.grid_shape, generator=seed) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    )


many = settings(deadline=None, max_examples=60)


@many
@given(patterns())
def test_dense_round_trip_and_sizes(pattern):
    weight = pattern.apply(torch.randn(pattern.weight_shape).abs() + 1)
    assert BlockPattern.from_weight(weight, pattern.block_shape, pattern.groups) == pattern
    assert int(weight.ne(0).sum()) == pattern.kept_elements == int(pattern.mask().sum())
    sparse = BlockSparseWeight.from_dense(weight, pattern)
    assert sparse.values.shape[0] == pattern.num_kept
    assert torch.equal(sparse.to_dense(), weight)
    assert torch.equal(pattern.from_tiles(pattern.to_tiles(weight)), weight)


@many
@given(patterns())
def test_json_and_hash(pattern):
    again = BlockPattern.from_json(pattern.to_json())
    assert again == pattern and hash(again) == hash(pattern)
    assert torch.equal(again.kept, pattern.kept)
    flipped = pattern.kept.clone()
    flipped.view(-1)[0] ^= True
    assert pattern.with_kept(flipped) != pattern


@many
@given(patterns())
def test_transpose_is_the_pattern_of_the_input_gradient(pattern):
    weight = pattern.apply(torch.randn(pattern.weight_shape).abs() + 1)
    (og, cg), g = pattern.group_channels, pattern.groups
    swapped = weight.reshape(g, og, cg, *pattern.kernel_size).transpose(1, 2)
    swapped = swapped.flip(list(range(3, 3 + len(pattern.kernel_size)))) if pattern.kernel_size else swapped
    swapped = swapped.reshape(g * cg, og, *pattern.kernel_size)
    transposed = pattern.transpose()
    assert BlockPattern.from_weight(swapped, transposed.block_shape, g) == transposed
    assert transposed.transpose() == pattern


@many
@given(patterns(), st.integers(1, 4), st.integers(1, 4))
def test_retile_covers_and_is_smallest(pattern, bh, bw):
    bh, bw = min(bh, pattern.group_channels[0]), min(bw, pattern.group_channels[1])
    other = pattern.retile((bh, bw))
    assert bool((other.mask() | ~pattern.mask()).all())
    tiles = other.to_tiles(pattern.mask()).flatten(3).any(-1)
    assert torch.equal(tiles, other.kept)


@many
@given(patterns(), st.integers(1, 4), st.integers(1, 4))
def test_merging_whole_tiles_finds_what_the_weight_shows(pattern, rows, cols):
    (bh, bw), (og, cg) = pattern.block_shape, pattern.group_channels
    shape = (bh * min(rows, og // bh), bw * min(cols, cg // bw))
    assert pattern.retile(shape) == BlockPattern.from_weight(pattern.mask(), shape, pattern.groups)
    with pytest.raises(PatternError, match="no larger than a group"):
        pattern.retile((bh * (og // bh + 1), bw))


@many
@given(patterns(groups=(1, 2)))
def test_patterns_of_several_shapes_are_those_of_each(pattern):
    weight, (og, cg) = pattern.apply(torch.randn(pattern.weight_shape).abs() + 1), pattern.group_channels
    shapes = [(2, 2), (4, 2), (6, 3), pattern.block_shape, (1, cg), (og, 1), (og + 1, 1)]
    each = [BlockPattern.from_weight(weight, s, pattern.groups) for s in shapes if s[0] <= og and s[1] <= cg]
    found = zero_block_patterns(weight, pattern.groups, shapes)
    assert found == [p for p in each if not p.kept.all()]


@many
@given(patterns(divisible=True))
def test_ungrouping_is_block_diagonal(pattern):
    weight = pattern.apply(torch.randn(pattern.weight_shape).abs() + 1)
    g, (og, cg) = pattern.groups, pattern.group_channels
    dense = torch.zeros(pattern.out_channels, pattern.in_channels, *pattern.kernel_size)
    for i in range(g):
        dense[i * og : (i + 1) * og, i * cg : (i + 1) * cg] = weight[i * og : (i + 1) * og]
    assert BlockPattern.from_weight(dense, pattern.block_shape) == pattern.ungroup()


@many
@given(patterns(groups=(1,)))
def test_packed_weights_unpack_exactly(pattern):
    weight = pattern.apply(torch.randn(pattern.weight_shape))
    packed = pack_weight(weight, pattern)
    n, (bh, bw) = pattern.num_kept, pattern.block_shape
    assert packed.values.shape == (n, bw, bh) and packed.tile_index.shape == (3, n)
    if n:
        assert int(packed.tile_index[0].min()) >= 0
        assert int(packed.tile_index[0].max()) + bw <= pattern.in_channels
    out = unpack_weight(*packed, pattern.out_channels, pattern.in_channels, pattern.kernel_size)
    assert torch.equal(out, weight)


def test_scatter_and_gather_are_differentiable():
    full = BlockPattern.full((6, 5, 2), (4, 2))
    pattern = full.with_kept(torch.rand(full.grid_shape) < 0.6)
    values = torch.randn(pattern.num_kept, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: scatter_tiles(v, pattern), (values,))
    weight = torch.randn(6, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: gather_tiles(w, pattern), (weight,))


@many
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_bsr_round_trip(rows, cols, bh, bw):
    full = BlockPattern.full((rows * bh, cols * bw), (bh, bw))
    pattern = full.with_kept(torch.rand(full.grid_shape) < 0.5)
    weight = pattern.apply(torch.randn(pattern.weight_shape).abs() + 1)
    bsr = BlockSparseWeight.from_dense(weight, pattern).to_bsr()
    assert torch.equal(bsr.to_dense(), weight)
    again = BlockSparseWeight.from_bsr(bsr)
    assert again.pattern == pattern and torch.equal(again.to_dense(), weight)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BlockPattern.full((8, 8), (0, 4)), "two positive integers"),
        (lambda: BlockPattern.full((8, 8), (-1, 4)), "two positive integers"),
        (lambda: BlockPattern.full((8, 8), (4,)), "two positive integers"),
        (lambda: BlockPattern.full((8, 8), (2.5, 4)), "two positive integers"),
        (lambda: BlockPattern.full((8, 8), (16, 4)), r"block_shape=\(8, 4\) or smaller"),
        (lambda: BlockPattern(8, 8, (), 3, (4, 4), torch.ones(2, 1, 2).bool()), "divisible by groups"),
        (lambda: BlockPattern(8, 8, (), 1, (4, 4), torch.ones(2, 2).bool()), r"shape \[2, 1, 2\]"),
        (lambda: BlockPattern(8, 8, (), 1, (4, 4), torch.ones(2, 1, 2)), "bool"),
        (lambda: BlockSparseWeight(BlockPattern.full((8, 8), (4, 4)), torch.ones(3, 4, 4)), r"\[4, 4, 4\]"),
        (lambda: BlockPattern.full((8, 8), (4, 4)).to_tiles(torch.ones(8, 9)), r"\[8, 9\]"),
        (lambda: BlockSparseWeight.from_bsr(torch.ones(4, 4)), "sparse_bsr"),
        (
            lambda: BlockSparseWeight.from_dense(torch.ones(9, 8), (4, 4)).to_bsr(),
            "channels divide by the block",
        ),
        (lambda: BlockPattern.from_json({"groups": 1}), "weight_shape"),
        (lambda: BlockPattern.full((8, 8), (3, 4), 2).ungroup(), "divides a group's channels"),
    ],
)
def test_errors_teach(make, words):
    with pytest.raises(PatternError, match=words):
        make()
