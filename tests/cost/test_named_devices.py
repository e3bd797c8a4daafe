"""Plans for named CPUs on the real kernel table: what is slower stays dense, and reasons say how."""

from __future__ import annotations

import pytest
from layer_cases import conv_site, even_pattern

from blocksparse_compiler import cost
from blocksparse_compiler.devices import SPECS


@pytest.mark.parametrize(
    "dtype, block, density",
    [
        ("float32", (8, 8), 0.5),
        ("bfloat16", (8, 8), 0.5),
        ("uint8", (8, 8), 0.5),
        ("bfloat16", (16, 16), 0.75),
    ],
)
def test_short_sums_in_small_tiles_stay_dense(dtype, block, density):
    """64 → 256 channels: measured at 0.6 to 1.1 times the speed of dense layers."""
    site = conv_site(256, 64, 1, 56, 8, dtype=dtype)
    decision = cost.choose(site, [even_pattern(site, density, block)], SPECS["avx512-2core"])
    assert decision.is_dense and "needs below" in decision.reason


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_reasons_name_tile_isa_and_the_next_best_tile(dtype):
    site = conv_site(256, 256, 3, 14, 8, dtype=dtype)
    patterns = [even_pattern(site, 0.3, (side, side)) for side in (32, 16)]
    decision = cost.choose(site, patterns, SPECS["avx512-2core"])
    for part in ("of 32x32 tiles kept", "of 16x16 tiles would take", "avx512, 14 pixels by 32 outputs"):
        assert part in decision.reason


def test_amx_is_named():
    site = conv_site(256, 256, 3, 14, 8, dtype="bfloat16")
    decision = cost.choose(site, [even_pattern(site, 0.5)], SPECS["sapphire-rapids"])
    assert decision.kernel == "cpu_amx_bf16" and "; AMX, 32 pixels by 32 outputs at a time" in decision.reason


def test_scattered_weights_name_their_vectors():
    site = conv_site(256, 256, 1, 28, 1)
    decision = cost.choose(site, [even_pattern(site, 0.1, (2, 1))], SPECS["avx512-2core"])
    assert decision.kernel == "cpu_f32_spmm" and "vectors along pixels, 2 outputs" in decision.reason
