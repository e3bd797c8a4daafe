"""The text of some kernels, against `golden/`: what a change to a template means, read in a diff.

`pytest tests/codegen/test_gpu_golden.py --update-golden` writes the files anew. Inductor's epilogue differs
from one release of torch to the next, and is left out.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gpu_cases import HALF, GpuCase, GpuLayer, generate

pytest.importorskip("triton")

GOLDEN = Path(__file__).parent / "golden"
ONE = (1, 1, 1, 1)
KERNELS = {
    "gather_conv3x3": GpuCase((2, 64, 7, 7), 64, (3, 3), (32, 32), padding=ONE, parameters={"step": 2}),
    "gather_conv1x1_swapped": GpuCase(
        (2, 128, 7, 7), 128, (1, 1), (64, 64), HALF, parameters={"pixels": 256, "warps": 8, "swapped": 1}
    ),
    "gather_conv3d": GpuCase((1, 16, 4, 8, 11), 32, (3, 3, 5), stride=(1, 2, 2), dilation=(1, 1, 2)),
    "decode_linear": GpuCase(
        (4, 256), 128, (), (64, 64), variant="triton_decode", parameters={"pixels": 16, "split": 2}
    ),
    "box_conv3x3": GpuCase(
        (2, 64, 7, 7),
        64,
        (3, 3),
        (64, 64),
        padding=ONE,
        variant="triton_box",
        parameters={"pixels": 128, "box_n": 2, "box_h": 8, "box_w": 8},
    ),
    "pair_conv3x3": GpuCase((2, 64, 7, 7), 128, (3, 3), (64, 32), padding=ONE, variant="triton_pair"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_text(name, request):
    layer = GpuLayer(KERNELS[name])
    program = generate(layer, KERNELS[name].input())
    text = without_epilogue(program.templates[0].source)
    path = GOLDEN / f"{name}.py.txt"
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text, f"run with --update-golden to write {path.name} anew"


def test_dead_golden_files_are_removed():
    assert {path.name for path in GOLDEN.iterdir()} == {f"{name}.py.txt" for name in KERNELS}


def without_epilogue(source: str) -> str:
    """The kernel without its name, and down to the index of the store."""
    source = re.sub(r"def \w+\(", "def kernel(", source)
    lines = source.splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if re.match(r"\s*xindex\d* = ", line))
    return "".join(lines[: last + 1])


def test_what_golden_files_leave_out():
    text = "def triton_0(a):\n    xindex = 1\n    tmp0 = acc\n    tl.store(a, tmp0)\n"
    assert without_epilogue(text) == "def kernel(a):\n    xindex = 1\n"
