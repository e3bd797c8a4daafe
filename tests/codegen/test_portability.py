"""One source for every vector width, inside packages, with frozen weights; and honest fallbacks."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import Case, Layer, assert_close_to_float64, compiling, run

from blocksparse_compiler.codegen import lowerings
from blocksparse_compiler.codegen.lowerings import source_digest

HELPERS = Path(__file__).parents[1] / "helpers"

OTHER_ISA = """
import sys
from dataclasses import replace
from kernel_cases import Case, Layers, assert_close_to_float64, run
pad = (1, 1, 1, 1)
cases = [
    Case((2, 32, 7, 9), 40, (3, 3), (32, 32), padding=pad),
    Case((1, 16, 6, 15), 16, (5, 3), (16, 16), stride=(1, 2), padding=(2, 2, 2, 2)),
    Case((3, 32, 4, 4), 32, (3, 3), (8, 8), padding=pad),
    Case((5, 32), 48, (), (16, 16)),
    Case((5, 32), 40, (), (4, 4)),
]
cases = [replace(case, variant=v) for case in cases for v in ("cpu_f32", "cpu_bf16", "cpu_f16")]
module = Layers(cases)
xs = [case.input() for case in cases]
outs, source = run(module, xs, dynamic=False)
for layer, x, out in zip(module.layers, xs, outs):
    assert_close_to_float64(layer, x, out)
for text in sys.argv[1:]:
    assert text in source, text
"""


ELEMENTS = ("float", "at::BFloat16")


@pytest.mark.parametrize(
    "capability, tiles",
    [("avx2", ["8, 1, 2, ", "8, 2, 1, "]), ("default", ["4, 1, 4, ", "4, 1, 2, "])],
)
def test_other_vector_widths(capability, tiles):
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(HELPERS)}
    texts = [f"Element = {element};\n    using RegisterTile = Tile<Element, " for element in ELEMENTS]
    command = [sys.executable, "-c", OTHER_ISA, *(text + tile for text in texts for tile in tiles)]
    subprocess.run(command, env=environment, check=True, timeout=300)


def test_frozen_weights():
    layer = Layer(Case((2, 32, 5, 5), 32, (3, 3), (32, 32), padding=(1, 1, 1, 1)))
    x = layer.case.input()
    with compiling(freezing=True, cpp_wrapper=True) as sources:
        out = torch.compile(layer.eval(), fullgraph=True)(x)
    assert_close_to_float64(layer, x, out)
    assert "RegisterTile" in sources[0]


def test_package_holds_the_kernel(tmp_path):
    layer = Layer(Case((2, 32, 5, 5), 32, (3, 3), (32, 32), padding=(1, 1, 1, 1), epilogue=torch.relu))
    x = layer.case.input()
    lowerings.register()
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: batch}})
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
        loaded = torch._inductor.aoti_load_package(path)
        for n in (1, 3):
            more = torch.randn(n, 32, 5, 5).to(memory_format=torch.channels_last)
            want = torch.relu(layer.reference(more)).float()
            torch.testing.assert_close(loaded(more), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layer_input, reason",
    [
        (Case((2, 16, 4, 4, 4), 16, (3, 3, 3)), "3 spatial dimensions"),
        (Case((4, 18), 18, (), (6, 6)), "block height 6"),
    ],
    ids=["conv3d", "odd block"],
)
def test_what_is_not_covered_runs_as_the_operator(layer_input, reason, caplog):
    layer = Layer(layer_input)
    x = layer_input.input()
    with caplog.at_level(logging.WARNING, "blocksparse_compiler"):
        out, source = run(layer, x)
    assert_close_to_float64(layer, x, out)
    assert reason in caplog.text
    assert "RegisterTile" not in source


def test_float64_runs_as_the_operator(caplog):
    layer = Layer(Case((4, 16), 16))
    x = layer.case.input().double()
    out, _ = run(layer.double(), x)
    torch.testing.assert_close(out, layer.reference(x))


def test_source_digest_is_stable():
    assert source_digest() == source_digest()
    assert len(source_digest()) == 16
