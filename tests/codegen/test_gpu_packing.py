"""Tiles as the GPU kernels with one program per out-block read them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksparse_compiler import BlockPattern
from blocksparse_compiler.packing import OUTPUT_MAJOR, pack_rows, unpack_weight


@st.composite
def weights(draw):
    bh, bw = draw(st.sampled_from([(16, 16), (32, 16), (16, 32), (4, 8)]))
    out, channels = draw(st.integers(bh, 80)), draw(st.integers(bw, 80))
    kernel = draw(st.sampled_from([(), (3,), (2, 3), (1, 1)]))
    pattern = BlockPattern.full((out, channels, *kernel), (bh, bw))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    pattern = pattern.with_kept(torch.rand(pattern.grid_shape, generator=random) < density)
    weight = pattern.apply(torch.randn(out, channels, *kernel, generator=random))
    return weight, pattern, draw(st.sampled_from([1, 2, 4]))


@settings(deadline=None, max_examples=40)
@given(weights())
def test_rows_are_whole_and_hold_the_weight(drawn):
    weight, pattern, multiple = drawn
    packed = pack_rows(weight, pattern, multiple)
    assert all(tensor.is_contiguous() for tensor in packed)
    block, begin, end = packed.row_ptr.long().T
    counts = end - begin
    assert sorted(block.tolist()) == list(range(pattern.grid_shape[0]))
    assert (counts % multiple == 0).all() and int(counts.sum()) == len(packed.values)
    assert (counts.diff() <= 0).all(), "the longest rows come first"
    kept = pattern.kept.sum((1, 2))[block]
    assert (counts >= kept).all() and (counts - kept < multiple).all()
    for row, first, last in packed.row_ptr.tolist():
        assert (packed.tile_index[2, first:last] == row).all()
    first_channel, tap = packed.tile_index[0], packed.tile_index[1]
    assert ((first_channel >= 0) & (first_channel + pattern.block_shape[1] <= weight.shape[1])).all()
    assert ((tap >= 0) & (tap < pattern.num_taps)).all()
    back = unpack_weight(*packed, weight.shape[0], weight.shape[1], tuple(weight.shape[2:]), OUTPUT_MAJOR)
    assert torch.equal(back, weight)
