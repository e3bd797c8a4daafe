"""The generated CPU kernels against plain torch in float64."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from case_lists import TRICKY, cases
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_cases import Case, Layers, assert_close_to_float64, compiling, count_kernels, run

from blocksparse_compiler.variants import VARIANTS


def check(cases: list[Case]) -> str:
    """Runs the layers, compares, and returns the generated text."""
    module = Layers(cases)
    xs = [case.input() for case in cases]
    outs, source = run(module, xs, dynamic=False)
    for layer, x, out in zip(module.layers, xs, outs, strict=True):
        assert_close_to_float64(layer, x, out)
    assert count_kernels(source)["block_sparse"] >= 1
    assert "blocksparse" not in source.replace("blocksparse_compiler", ""), "an operator was not lowered"
    return source


@pytest.mark.parametrize("variant", ["cpu_f32", "cpu_bf16", "cpu_f16"])
def test_tricky_shapes(variant):
    multiple = VARIANTS[variant].width_multiple
    cases = [replace(case, variant=variant) for case in TRICKY if case.block[1] % multiple == 0]
    source = check(cases)
    wanted = sum(case.parameters.get("prefetch") == "output" for case in cases)
    assert source.count("prefetch_output<SEGMENT, WIDTH>(Y") == wanted > 0
    # Torch would move them under masks, through memory.
    assert "block_sparse::store_part<" in source
    assert not re.search(r"\.store\(Y.*, static_cast<int64_t>\(\d+L?\)\);", source)


@settings(deadline=None, max_examples=3, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.lists(cases(), min_size=12, max_size=12))
def test_random_shapes(drawn):
    check(drawn)


def test_one_compilation_serves_every_batch():
    pad = (1, 1, 1, 1)
    module = Layers([Case((4, 32, 7, 9), 32, (3, 3), padding=pad), Case((4, 32, 7, 9), 32, (1, 1))])
    with compiling() as sources:
        fast = torch.compile(module, fullgraph=True)
        for batch in (2, 3, 8, 5):
            x = torch.randn(batch, 32, 7, 9).to(memory_format=torch.channels_last)
            torch._dynamo.mark_dynamic(x, 0)
            with torch._dynamo.config.patch(error_on_recompile=batch != 2):
                outs = fast([x, x])
            for layer, out in zip(module.layers, outs, strict=True):
                assert_close_to_float64(layer, x, out)
    assert count_kernels("\n".join(sources))["block_sparse"] == len(module.layers)


def test_symbolic_image_and_row_sizes():
    pad = (1, 1, 1, 1)
    cases = [Case((2, 16, 7, 9), 16, (3, 3), padding=pad), Case((2, 16, 7, 9), 16, (1, 1)), Case((4, 16), 16)]
    cases += [replace(case, variant="cpu_bf16") for case in cases]
    module = Layers(cases)
    with compiling() as sources:
        fast = torch.compile(module, fullgraph=True)
        for i, (batch, height, width) in enumerate([(2, 7, 9), (3, 2, 3), (2, 18, 30)]):
            x = torch.randn(batch, 16, height, width).to(memory_format=torch.channels_last)
            xs = [x, x, torch.randn(batch * height, 16)]
            xs += [x.bfloat16() for x in xs]
            for layer_input in xs:  # channels are dimension 1 of all of them
                torch._dynamo.mark_dynamic(layer_input, [d for d in range(layer_input.dim()) if d != 1])
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                outs = fast(xs)
            for layer, layer_input, out in zip(module.layers, xs, outs, strict=True):
                assert_close_to_float64(layer, layer_input, out)
    assert count_kernels("\n".join(sources))["block_sparse"] == len(cases)


def test_every_variant_of_the_table_is_tested():
    assert {name for name, variant in VARIANTS.items() if variant.device == "cpu"} == {
        "cpu_f32",
        "cpu_f32_depthwise",
        "cpu_bf16",
        "cpu_f16",
        "cpu_amx_bf16",
        "cpu_f32_spmm",
        "cpu_int8",  # test_int8_kernels.py
    }
