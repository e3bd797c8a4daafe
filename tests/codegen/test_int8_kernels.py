"""The kernels on 8-bit integers against float64, bit for bit: sums are exact, and scales powers of two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from case_lists import TRICKY
from case_lists import cases as float_cases
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_cases import compiling, count_kernels, run
from quantized_cases import (
    BOUNDS,
    QuantizedCase,
    QuantizedLayer,
    QuantizedLayers,
    assert_exact,
    check,
    requantize,
)

from blocksparse_compiler.codegen import lowerings
from blocksparse_compiler.variants import VARIANTS

HELPERS = Path(__file__).parents[1] / "helpers"
WIDTH = VARIANTS["cpu_int8"].width_multiple
U8, S8 = torch.uint8, torch.int8
ZERO_POINTS = ((U8, 0), (U8, 131), (S8, -128), (S8, 3))
PAD = (1, 1, 1, 1)


def quantized(case, dtype=U8, zero_point=0, **changes):
    fields = {name: getattr(case, name) for name in case.__dataclass_fields__ if name != "variant"}
    return QuantizedCase(**{**fields, "dtype": dtype, "zero_point": zero_point, **changes})


def test_tricky_shapes():
    tricky = [case for case in TRICKY if case.block[1] % WIDTH == 0]
    check([quantized(case, *ZERO_POINTS[i % 4]) for i, case in enumerate(tricky)])


def test_no_part_of_a_sum_saturates():
    shape = {"input_shape": (3, 256), "out_channels": 32, "block": (32, 32), "density": 1.0, "extreme": True}
    check([QuantizedCase(**shape), QuantizedCase(**shape, zero_point=255), QuantizedCase(**shape, dtype=S8)])


@st.composite
def cases(draw):
    case = draw(float_cases().filter(lambda case: case.block[1] % WIDTH == 0))
    dtype = draw(st.sampled_from([U8, S8]))
    low, high = BOUNDS[dtype]
    zero_point = draw(st.sampled_from([low, high]) | st.integers(low, high))
    epilogue = draw(st.sampled_from([case.epilogue, requantize(U8, 0), requantize(S8, -7)]))
    return quantized(case, dtype, zero_point, epilogue=epilogue)


@settings(deadline=None, max_examples=2, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.lists(cases(), min_size=12, max_size=12))
def test_random_shapes(drawn):
    check(drawn)


def test_one_compilation_serves_every_batch():
    shapes = [((3, 3), PAD, 131), ((1, 1), (), 0), ((3, 3), PAD, 0)]
    cases = [QuantizedCase((4, 32, 7, 9), 32, k, padding=p, zero_point=z) for k, p, z in shapes]
    module = QuantizedLayers(cases)
    with compiling():
        fast = torch.compile(module, fullgraph=True, dynamic=True)
        for batch in (2, 3, 8, 5):
            x = torch.randint(0, 256, (batch, 32, 7, 9), dtype=U8).to(memory_format=torch.channels_last)
            with torch._dynamo.config.patch(error_on_recompile=batch != 2):
                outs = fast([x] * len(cases))
            for layer, out in zip(module.layers, outs, strict=True):
                assert_exact(layer, x, out)


def test_what_follows_runs_inside_the_kernel():
    """A residual that is quantized itself, a ReLU and the next quantize: one kernel, which stores bytes."""
    layer = QuantizedLayer(QuantizedCase((2, 32, 7, 14), 64, (3, 3), (32, 32), padding=PAD, zero_point=9))
    x = layer.case.input()
    residual = torch.randint(0, 256, (2, 64, 7, 14), dtype=U8).to(memory_format=torch.channels_last)

    def block(x, residual):
        return requantize(U8, 5)(layer(x) + (residual.float() - 128) * 2.0**-5)

    out, source = run(block, x, residual)
    want = layer.reference(x).float() + (residual.float() - 128) * 2.0**-5
    torch.testing.assert_close(out, requantize(U8, 5)(want), rtol=0, atol=0)
    assert count_kernels(source) == {"block_sparse": 1, "all": 1}
    assert "to_bytes<uint8_t>" in source


def test_operators_pass_opcheck():
    for case in (
        QuantizedCase((2, 8, 5, 5), 16, (3, 3), (8, 4), padding=(1, 0, 2, 1), zero_point=7),
        QuantizedCase((2, 3, 8), 16, (), (8, 4), dtype=S8, zero_point=-1),
    ):
        layer, x = QuantizedLayer(case), case.input()
        torch.library.opcheck(layer.operator, layer.arguments(x))
        assert_exact(layer, x, layer(x))


OTHER_INSTRUCTIONS = """
import torch
from quantized_cases import QuantizedCase, check
PAD, S8 = (1, 1, 1, 1), torch.int8
check([
    QuantizedCase((2, 32, 7, 9), 40, (3, 3), (32, 32), padding=PAD, zero_point=77),
    QuantizedCase((1, 16, 6, 15), 16, (5, 3), (16, 16), stride=(1, 2), padding=(2, 2, 2, 2), dtype=S8),
    QuantizedCase((3, 32, 4, 4), 32, (3, 3), (8, 8), padding=PAD),
    QuantizedCase((3, 64), 32, (), (4, 4), density=1.0, extreme=True),
])
"""


@pytest.mark.parametrize(
    "capability, compiler_option",
    [("avx512", "-mno-avx512vnni"), ("avx2", ""), ("avx2", "-mno-avxvnni"), ("default", "")],
    ids=["avx512 without vnni", "avx2", "avx2 without vnni", "portable"],
)
def test_other_instructions(capability, compiler_option, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" {compiler_option}\n')
    compiler.chmod(0o755)
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": capability,
        "CXX": str(compiler),
        "PYTHONPATH": str(HELPERS),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    subprocess.run([sys.executable, "-c", OTHER_INSTRUCTIONS], env=environment, check=True, timeout=300)


def test_weights_of_another_type_run_as_the_operator(caplog):
    layer = QuantizedLayer(QuantizedCase((4, 32), 16))
    layer.values = layer.values.short()
    x = layer.case.input()
    lowerings.register()
    out, source = run(layer, x)
    assert_exact(layer, x, out)
    assert "weights of torch.int16" in caplog.text and "RegisterTile" not in source
