"""What the Triton kernels become for real GPUs, by cross-compilation: no spills, matrix instructions, wide
asynchronous copies, and a software pipeline that survives."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_cases import FLOAT, HALF, GpuCase, GpuLayer, GpuLayers, generate
from machine_code import main_loops

from blocksparse_compiler import devices
from blocksparse_compiler.plan import Site
from blocksparse_compiler.variants import VARIANTS

pytest.importorskip("triton")

ROWS = [name for name, row in VARIANTS.items() if row.device == "cuda"]
GPUS = {"sm_80": "a100", "sm_90": "h100", "gfx942": "mi300x"}
ONE = (1, 1, 1, 1)
PTX = r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], "
AMD = r"(?:global|buffer)_load_(?:u?short|u?byte)\w*"
# Patterns of narrow loads: of less than 16 bytes, and of less than 8. (AMD's index tables are dwords.)
NARROW = {
    "sm_80": (PTX + "0x[48],", PTX + "0x4,"),
    "sm_90": (PTX + "0x[48],", PTX + "0x4,"),
    "gfx942": (AMD, "no such load"),
}
LAYERS = [
    GpuCase((8, 256, 28, 28), 256, (3, 3), (64, 64), padding=ONE),
    GpuCase((8, 256, 28, 28), 256, (3, 3), (32, 32), HALF, padding=ONE),
    GpuCase((8, 128, 28, 28), 128, (3, 3), (16, 16), padding=ONE, stride=(2, 2)),
    GpuCase((8, 256, 28, 28), 512, (1, 1), (128, 64), HALF),
    GpuCase((8, 256, 28, 28), 256, (3, 3), (64, 64), FLOAT, padding=ONE),
    GpuCase((2048, 1024), 1024, (), (64, 32)),
    GpuCase((4, 4096), 1024, (), (64, 64)),
    GpuCase((1, 4096), 1024, (), (32, 32), HALF),
    GpuCase((16, 2048), 1024, (), (16, 16), FLOAT),
]


@pytest.fixture(autouse=True)
def tf32():
    """fp32 kernels use matrix instructions."""
    with torch.backends.cudnn.flags(allow_tf32=True):
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        yield
        torch.backends.cuda.matmul.allow_tf32 = before


def site(case: GpuCase) -> Site:
    dims = len(case.kernel_size)
    padding = case.padding or (0,) * (2 * dims)
    return Site(
        "layer",
        "layer",
        f"conv{dims}d" if dims else "linear",
        case.out_channels,
        case.in_channels,
        case.kernel_size,
        stride=case.stride or (1,) * dims,
        padding=tuple(zip(padding[::2], padding[1::2], strict=True)),
        dilation=(1,) * dims,
        input_shape=case.input_shape,
        dtype=str(case.dtype).removeprefix("torch."),
        device="cuda:0",
        bias=case.bias,
    )


def candidates(case: GpuCase, row: str, target: str) -> list[GpuCase]:
    """The layer with each of the parameters that the row proposes; none if it cannot run it."""
    pattern = GpuLayer(case).pattern
    if VARIANTS[row].unsupported(site(case), pattern) is not None:
        return []
    configs = VARIANTS[row].configs(site(case), pattern, devices.device(GPUS[target]))
    return [replace(case, variant=row, parameters=config) for config in configs]


def epilogue(y: Any) -> Any:
    return torch.relu(y)


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("row", ROWS)
def test_compiles_to_good_code(row, target):
    cases = [found[0] for case in LAYERS if (found := candidates(case, row, target))]
    if not cases:
        pytest.skip(f"{row} does not run on {target}")
    compiled = compile_all([replace(case, epilogue=epilogue) for case in cases], target)
    for case, kernel in compiled:
        check_resources(case, kernel, target)
        if target != "gfx942":
            check_loop(case, kernel, target)


@pytest.mark.parametrize("target", GPUS)
def test_no_candidate_spills(target):
    cases = [
        found
        for row in ROWS
        for case in (LAYERS[0], LAYERS[4])
        for found in candidates(case, row, target)[1:]
    ]
    for case, kernel in compile_all(cases, target):
        check_resources(case, kernel, target)


def compile_all(cases: list[GpuCase], target: str) -> list[tuple[GpuCase, Any]]:
    """Every layer's kernel as compiled for the target."""
    program = generate(GpuLayers(cases), [case.input() for case in cases], target=target)
    compiled = {kernel.name: kernel.compile() for kernel in program.templates}
    owners = {name: kernel.name for kernel in program.templates for call in kernel.calls for name in call}
    return [(case, compiled[owners[f"layers_{i}_values"]]) for i, case in enumerate(cases)]


def check_resources(case: GpuCase, kernel: Any, target: str) -> None:
    found, limits = kernel.resources, devices.device(GPUS[target])
    assert found.spill_bytes == 0, f"{case}: {found}"
    assert found.tensor_core, f"{case}: no matrix instruction"
    assert found.shared_bytes <= limits.shared_bytes_per_block, f"{case}: {found}"
    assert found.registers * found.num_warps * limits.warp_threads <= limits.registers_per_multiprocessor
    # A tile of weights may hold less than 16 bytes for each thread. Some Tritons' copies bypass L1 if wide.
    (bh, bw), step = case.block, int(case.parameters.get("step", 1))
    wide = bh * bw * step * case.dtype.itemsize >= 16 * found.num_warps * limits.warp_threads
    wide = wide and not case.parameters.get("l1")
    narrow = re.findall(NARROW[target][0 if wide else 1], kernel.assembly)
    assert not narrow, f"{case}: {len(narrow)} narrow loads like {narrow[0]}"


def check_loop(case: GpuCase, kernel: Any, target: str) -> None:
    loops = main_loops(kernel.sass())
    assert loops, f"{case}: no loop around the matrix instructions"
    for loop in loops:
        copies, boxes = loop.count("LDGSTS"), loop.count("UTMALDG")
        assert copies or boxes, f"{case}: nothing is copied ahead"
        assert not loop.count(r"(LDL|STL|LDG\S*\.(U16|U8))"), f"{case}: spills or narrow loads"
        if copies:
            waits = loop.waits(r"DEPBAR\.LE SB0")
            assert waits and min(waits) > 0, f"{case}: the pipeline is drained in each turn, waits {waits}"
        if kernel.resources.tensor_core == "wgmma":
            waits = loop.waits(r"WARPGROUP\.DEPBAR")
            assert not waits or min(waits) > 0, f"{case}: each product is waited for"
