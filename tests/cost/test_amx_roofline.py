"""Planning for AMX: who gets it, what it costs, and that estimates agree with what was measured."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
from layer_cases import FIXED, conv_site, even_pattern, linear_site

from blocksparse_compiler import cost
from blocksparse_compiler.amx_roofline import amx_cost
from blocksparse_compiler.candidate_cost import dense_cost, sparse_cost
from blocksparse_compiler.devices import SPECS, detect_amx
from blocksparse_compiler.plan import Site
from blocksparse_compiler.variants import VARIANTS

AMX = VARIANTS["cpu_amx_bf16"]
XEON = SPECS["sapphire-rapids"]
TWO_CORES = XEON.with_figures(
    "measured: the machine of the figures below",
    threads=2,
    l3_bytes_per_second=52e9,
    dram_bytes_per_second=50e9,
)

# Channels, input size, output channels, kernel, stride.
RESNET = [
    (64, 56, 64, 3, 1),
    (128, 28, 128, 3, 1),
    (256, 14, 256, 3, 1),
    (512, 7, 512, 3, 1),
    (128, 56, 128, 3, 2),
    (256, 56, 64, 1, 1),
    (64, 56, 256, 1, 1),
    (512, 28, 128, 1, 1),
    (1024, 14, 256, 1, 1),
    (256, 14, 1024, 1, 1),
    (2048, 7, 512, 1, 1),
    (512, 7, 2048, 1, 1),
]


def conv(batch, shape) -> Site:
    channels, size, out, kernel, stride = shape
    return conv_site(out, channels, kernel, size, batch, stride=(stride, stride), dtype="bfloat16")


@pytest.mark.parametrize(
    "batch, density, measured", [(8, 0.5, 2.05), (8, 0.25, 3.0), (1, 0.5, 3.35), (1, 0.25, 5.0)]
)
def test_ratio_to_dense_is_near_the_measured_one(batch, density, measured):
    """Geometric mean over ResNet-50's layers, against that of tuned prototypes of the same structure."""
    ratios = []
    for shape in RESNET:
        site = conv(batch, shape)
        ours = amx_cost(site, (32, 32), TWO_CORES, AMX.name, density=density).evaluate()
        ratios.append(dense_cost(site, TWO_CORES).evaluate() / ours)
    assert statistics.geometric_mean(ratios) == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("density, measured", [(0.5, 3065e9), (0.25, 5925e9), (0.1, 11000e9)])
def test_linear_rate_is_near_the_measured_one(density, measured):
    """Dense flops over time, in one thread, without the call."""
    site = linear_site(1024, 1024, (128,), dtype="bfloat16")
    one = dataclasses.replace(TWO_CORES, threads=1)
    record = amx_cost(site, (32, 32), one, AMX.name, density=density)
    assert 2 * 128 * 1024**2 / float(record.compute_seconds) == pytest.approx(measured, rel=0.2)


def test_half_empty_tiles_take_as_long():
    site = conv(8, RESNET[2])
    whole, half = (float(amx_cost(site, (b, b), XEON, AMX.name).compute_seconds) for b in (32, 16))
    fixed = float(amx_cost(site, (32, 32), XEON, AMX.name, density=1e-9).compute_seconds)
    assert half - fixed == pytest.approx(2 * (whole - fixed), rel=1e-6)


def test_symbolic_sizes():
    batch = conv("s0", RESNET[2])
    assert amx_cost(batch, (32, 32), XEON, AMX.name).evaluate({"s0": 8}) == pytest.approx(
        amx_cost(conv(8, RESNET[2]), (32, 32), XEON, AMX.name).evaluate(), rel=0.05
    )
    image = dataclasses.replace(batch, input_shape=(8, 256, "s0", "s0"))
    assert amx_cost(image, (32, 32), XEON, AMX.name) == sparse_cost(image, (32, 32), XEON, "cpu_bf16")


@pytest.mark.parametrize("site", [conv(8, RESNET[2]), conv("s0", RESNET[5]), linear_site(dtype="bfloat16")])
def test_configs_need_amx(site):
    pattern = even_pattern(site, 0.5, (32, 32))
    assert not AMX.configs(site, pattern, FIXED)
    found = AMX.configs(site, pattern, XEON)
    assert found and all(found.count(config) == 1 for config in found)
    assert all(config["chunk"] >= 1 and XEON.threads >= config["row_threads"] >= 1 for config in found)


@pytest.mark.parametrize(
    "block, reason",
    [
        ((32, 32), None),
        ((48, 16), None),
        ((16, 96), None),
        ((8, 8), "multiple of 16"),
        ((32, 3), "neither even"),
        ((32, 48), "multiple of 32"),
    ],
)
def test_supported_blocks(block, reason):
    found = AMX.unsupported(conv(8, RESNET[2]), even_pattern(conv(8, RESNET[2]), 0.5, block))
    assert found is None if reason is None else reason in found


def test_plans_for_a_machine_with_amx():
    site = conv(8, RESNET[2])
    decision = cost.choose(site, [even_pattern(site, 0.5, (32, 32)), even_pattern(site, 0.5, (16, 16))], XEON)
    assert decision.kernel == AMX.name and decision.pattern.block_shape == (32, 32)
    assert decision.estimates["cpu_amx_bf16 32x32"] < decision.estimates["cpu_bf16 32x32"]
    assert decision.estimates["cpu_amx_bf16 32x32"] < decision.estimates["cpu_amx_bf16 16x16"]
    elsewhere = cost.choose(site, [even_pattern(site, 0.5, (32, 32))], FIXED)
    assert elsewhere.kernel == "cpu_bf16" and AMX.name not in elsewhere.estimates


def test_detection_reads_the_flags(tmp_path):
    path = tmp_path / "cpuinfo"
    for text, found in (("flags : avx512f amx_tile amx_bf16", True), ("flags : amx_tile amx_int8", False)):
        path.write_text(text)
        assert detect_amx(path) == found
    assert not detect_amx(tmp_path / "none")
