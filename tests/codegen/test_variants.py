"""The kernel table, its parameters, and how pixels map to register tiles."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layer_cases import FIXED, conv_site, linear_site

from blocksparse_compiler import BlockPattern
from blocksparse_compiler.codegen.tiling import LEFT, RIGHT, WIDE, ConvGeometry, flat_tiling, row_tiling
from blocksparse_compiler.cpu_variants import cache_friendly_pixels, register_tile
from blocksparse_compiler.errors import PlanError
from blocksparse_compiler.variants import VARIANTS, KernelConfig, output_pixels

CPU = VARIANTS["cpu_f32"]


def full(site, block=(32, 32)):
    shape = (site.out_channels, site.in_channels // site.groups, *site.kernel_size)
    return BlockPattern.full(shape, block, site.groups)


def test_kernel_text_round_trip():
    config = KernelConfig("cpu_f32", {"chunk": 4, "split": "rows"})
    pattern = full(linear_site())
    assert KernelConfig.decode(config.encode(pattern)) == config
    assert pattern.digest in config.encode(pattern)
    assert config.encode() == "cpu_f32;chunk=4;split=rows"


@pytest.mark.parametrize("text", ["", "cpu_f32;chunk", ";chunk=1", "cpu_f32;=1"])
def test_bad_kernel_text(text):
    with pytest.raises(PlanError, match="key=value"):
        KernelConfig.decode(text)


@pytest.mark.parametrize(
    "lanes, registers, block, expected",
    [
        (16, 32, (32, 32), (14, 2, 16, 1)),
        (16, 32, (16, 16), (28, 1, 16, 1)),
        (16, 32, (64, 8), (14, 2, 16, 1)),
        (16, 32, (48, 16), (28, 1, 16, 1)),
        # Low blocks fill a vector with two or four input channels, if their width allows.
        (16, 32, (8, 8), (28, 1, 16, 2)),
        (16, 32, (4, 4), (28, 1, 16, 4)),
        (16, 32, (8, 3), (28, 1, 8, 1)),
        (16, 32, (24, 8), (28, 1, 8, 1)),
        (8, 16, (32, 32), (6, 2, 8, 1)),
        (8, 16, (8, 8), (13, 1, 8, 1)),
        (8, 16, (4, 4), (12, 1, 8, 2)),
        (4, 16, (32, 32), (2, 4, 4, 1)),
    ],
)
def test_register_tile(lanes, registers, block, expected):
    tile = register_tile(block, lanes, registers)
    assert (tile.pixels, tile.vectors, tile.lanes, tile.split) == expected
    assert tile.pixels * tile.vectors + tile.vectors + 1 < registers
    assert block[0] % tile.width == 0 and block[1] % tile.split == 0


@pytest.mark.parametrize(
    "lanes, registers, block, unpacked, expected",
    [
        (16, 32, (32, 32), False, (14, 2, 16, 1)),
        (16, 32, (8, 8), False, (28, 1, 16, 2)),
        # Each half of the pairs takes a register, of the weights and of the inputs.
        (16, 32, (32, 32), True, (12, 2, 16, 1)),
        (8, 16, (32, 32), True, (4, 2, 8, 1)),
        (8, 16, (4, 4), True, (10, 1, 8, 2)),
        # Two output channels in a vector would take four input channels.
        (16, 32, (8, 2), False, (28, 1, 8, 1)),
    ],
)
def test_register_tile_for_pairs(lanes, registers, block, unpacked, expected):
    tile = register_tile(block, lanes, registers, 2, unpacked)
    assert (tile.pixels, tile.vectors, tile.lanes, tile.split, tile.pack) == (*expected, 2)
    parts = 2 if unpacked else 1
    assert tile.pixels * tile.vectors + parts * (tile.vectors + 1) <= registers


def test_no_register_tile_for_odd_blocks():
    assert register_tile((6, 8), 16, 32) is None
    assert register_tile((16, 3), 16, 32, pack=2) is None


@pytest.mark.parametrize(
    "site, block, reason",
    [
        (conv_site(), (32, 32), None),
        (linear_site(), (16, 8), None),
        (conv_site(dtype="bfloat16"), (32, 32), "bfloat16"),
        (conv_site(device="cuda:0"), (32, 32), "cuda"),
        (conv_site(op="conv_transpose2d"), (32, 32), "conv_transpose2d"),
        (conv_site(), (2, 32), "multiple of 4"),
        (conv_site(groups=4), (64, 64), None),
        (conv_site(groups=4), (48, 48), "straddle"),
    ],
)
def test_unsupported_says_why(site, block, reason):
    found = CPU.unsupported(site, full(site, block))
    assert found is None if reason is None else reason in found


def test_configs_fit_the_machine():
    site = conv_site(kernel=1, in_channels=1024, size=14)
    best, *others = CPU.configs(site, full(site, (16, 16)), FIXED)
    assert best == {"chunk": 1, "pixels": 10, "row_threads": 1}
    assert best not in others and len(others) >= 2
    # Pixels 4 KiB apart share one set of the L1 cache, 256 bytes apart sixteen.
    assert cache_friendly_pixels(site, FIXED) == 10
    assert cache_friendly_pixels(conv_site(in_channels=64), FIXED) == 160


def test_few_pixels_and_large_weights_split_block_rows():
    site = conv_site(512, 512, size=7, batch=1)
    assert CPU.configs(site, full(site), FIXED)[0]["row_threads"] == 2
    many = dataclasses.replace(FIXED, threads=16)
    assert CPU.configs(site, full(site), many)[0]["row_threads"] > 1
    assert CPU.configs(conv_site(), full(conv_site()), FIXED)[0]["row_threads"] == 1
    symbolic = linear_site(rows=("s0", 128))
    assert output_pixels(symbolic) is None
    assert CPU.configs(symbolic, full(symbolic), FIXED)[0]["row_threads"] == 1


def best(site, block=(32, 32)):
    return CPU.configs(site, full(site, block), FIXED)[0]


def test_few_pixels_read_their_weights_once():
    assert best(conv_site(512, 512, kernel=1, size=7, batch=1))["chunk"] == 4
    assert best(conv_site(512, 512, kernel=1, size=7, batch=8))["chunk"] == 1
    assert best(linear_site(rows=(16,)))["chunk"] == 2


def test_rows_of_a_single_narrow_image_are_tiles_of_their_own():
    assert best(conv_site(512, 512, size=7, batch=1))["pixels"] == 7
    # Whole images share tiles; few taps of a high image are outside; one vector by seven pixels is slow.
    assert "pixels" not in best(conv_site(512, 512, size=7, batch=2))
    assert "pixels" not in best(conv_site(512, 512, kernel=1, size=7, batch=1))
    assert "pixels" not in best(conv_site(64, 64, size=7, batch=1, input_shape=(1, 64, 56, 7)))
    assert "pixels" not in best(conv_site(64, 64, size=7, batch=1), (16, 16))


def test_outputs_that_leave_the_cache_are_asked_for_early():
    large = conv_site(256, 64, kernel=1, size=56)
    assert best(large)["prefetch"] == "output"
    assert "prefetch" not in best(conv_site(256, 64, kernel=1, size=14))
    # Lines 4 KiB apart would push each other out of L1.
    assert "prefetch" not in best(conv_site(1024, 64, kernel=1, size=56))
    others = CPU.configs(conv_site(), full(conv_site()), FIXED)[1:]
    assert any(config.get("prefetch") == "output" for config in others)


@pytest.mark.parametrize(
    "site, sentence",
    [
        (conv_site(), "avx512, 14 pixels by 32 outputs at a time, threads share pixels"),
        (
            conv_site(256, 1024, kernel=1),
            "avx512, 10 pixels by 32 outputs at a time (more would crowd L1, 4 KiB apart), "
            "threads share pixels",
        ),
        (
            linear_site(4096, 4096, (4,)),
            "avx512, 10 rows by 32 outputs at a time (more would crowd L1, 16 KiB apart), "
            "threads share block rows",
        ),
    ],
)
def test_a_kernel_says_how_it_runs_a_layer(site, sentence):
    assert CPU.describe(site, full(site), FIXED, best(site)) == sentence


@given(st.integers(0, 3000), st.integers(1, 28))
def test_flat_tiles_are_even(pixels, most):
    tiling = flat_tiling(pixels, most)
    assert 1 <= tiling.segment <= most
    count = -(-pixels // tiling.segment)
    assert count == -(-pixels // most)
    assert tiling.ragged == (pixels % tiling.segment != 0)


def _conv(width, kernel, stride=1, pad=0, dilation=1):
    out = (width + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
    size = (width, width), (out, out), (0, 0, 16)
    return ConvGeometry(*size, (kernel,) * 2, (stride,) * 2, (pad,) * 2, (dilation,) * 2)


@pytest.mark.parametrize(
    "conv, images, expected",
    [
        (_conv(56, 3, pad=1), 1, (1, 14, LEFT | RIGHT, False)),
        (_conv(56, 3, stride=2, pad=1), 1, (1, 14, LEFT, False)),
        (_conv(15, 3, pad=1), 1, (1, 8, LEFT | RIGHT, True)),
        (_conv(7, 3, pad=1), 8, (2, 7, LEFT | RIGHT, False)),
        (_conv(7, 3, pad=1), 3, (2, 7, LEFT | RIGHT, True)),
        (_conv(4, 3, pad=1), 6, (3, 4, LEFT | RIGHT, False)),
        (_conv(28, 5, pad=2), 1, (1, 14, WIDE, False)),
        (_conv(28, 3, pad=2, dilation=2), 1, (1, 14, WIDE, False)),
        (_conv(28, 1, stride=2), 1, (1, 14, 0, False)),
    ],
)
def test_row_tiles(conv, images, expected):
    tiling = row_tiling(images, conv, 14)
    assert (tiling.segments, tiling.segment, tiling.border, tiling.ragged) == expected
