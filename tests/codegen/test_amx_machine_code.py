"""The kernel on real AMX instructions compiles, and its inner loop is what it should be.

Nothing here runs on AMX: the sources are those of the emulated runs, without the emulation.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sysconfig

import pytest
import torch.utils.cpp_extension
from kernel_cases import Case, Layers, run

from blocksparse_compiler.codegen.cpu_amx_template import emulated_amx

FLAGS = [
    *("-std=c++20", "-O3", "-march=sapphirerapids", "-fopenmp", "-fPIC", "-w", "-DCPU_CAPABILITY_AVX512"),
    *("-ffast-math", "-fno-finite-math-only", "-fno-unsafe-math-optimizations"),  # as Inductor compiles
    *("-fno-tree-loop-vectorize", "-ffp-contract=off"),
]
PAD = (1, 1, 1, 1)
MODES = {
    "rows": Case((40, 64), 64, (), (32, 32), variant="cpu_amx_bf16", epilogue=torch.relu),
    "direct": Case(
        (1, 64, 28, 28), 64, (3, 3), (32, 32), padding=PAD, variant="cpu_amx_bf16", epilogue=torch.relu
    ),
    "panel": Case(
        (1, 64, 7, 7), 64, (3, 3), (32, 32), padding=PAD, variant="cpu_amx_bf16", epilogue=torch.relu
    ),
}


@pytest.fixture(scope="module")
def functions(tmp_path_factory) -> dict[str, list[str]]:
    """Instructions with their addresses, of the parallel part of each kernel."""
    folder = tmp_path_factory.mktemp("amx")
    if platform.machine() not in ("x86_64", "AMD64") or not shutil.which("objdump"):
        pytest.skip("no objdump for x86")
    (folder / "probe.cpp").write_text('void f() { asm("tdpbf16ps %tmm0, %tmm1, %tmm2"); }')
    if compiled(folder, "probe").returncode:
        pytest.skip("the compiler or its assembler does not know AMX")
    layers = Layers(list(MODES.values()))
    with emulated_amx():
        _, source = run(layers, [case.input() for case in MODES.values()], dynamic=False)
    define = "#define BLOCKSPARSE_EMULATE_AMX\n"
    assert source.count(define) == len(MODES)
    # With the C++ wrapper, the text of the kernels is a string in a Python module.
    program = re.search(r"cpp_wrapper_src = \(\s*r?([\"']{3})(.*?)\1", source, re.S).group(2)
    (folder / "kernels.cpp").write_text(program.replace(define, ""))
    outcome = compiled(folder, "kernels")
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    command = ["objdump", "-d", "--no-show-raw-insn", "kernels.o"]
    listing = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^[0-9a-f]+ <(cpp_\w+\._omp_fn\.0)>:\n(.*?)(?:\n\n|\Z)", listing, re.M | re.S)
    return dict(zip(MODES, (body.splitlines() for _, body in sorted(found, key=order)), strict=True))


def order(function: tuple[str, str]) -> int:
    """Kernels are numbered in their names."""
    return int(re.search(r"_(\d+)\._omp", function[0]).group(1))


def compiled(folder, name: str) -> subprocess.CompletedProcess:
    include = [*torch.utils.cpp_extension.include_paths(), sysconfig.get_path("include")]
    command = ["g++", *FLAGS, *(f"-I{path}" for path in include), "-c", f"{name}.cpp", "-o", f"{name}.o"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def loops(lines: list[str]) -> list[list[str]]:
    """The innermost loops that multiply tiles."""
    parsed = [re.match(r"\s*([0-9a-f]+):\s+(.*)", line) for line in lines]
    code = [(int(m.group(1), 16), m.group(2)) for m in parsed if m]
    place = {address: i for i, (address, _) in enumerate(code)}
    spans = []
    for i, (_, text) in enumerate(code):
        jump = re.match(r"j\w+\s+([0-9a-f]+)", text)
        first = place.get(int(jump.group(1), 16)) if jump else None
        if first is not None and first <= i and any("tdpbf16ps" in t for _, t in code[first : i + 1]):
            spans.append((first, i + 1))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[text for _, text in code[a:b]] for a, b in inner]


def count(instructions: list[str], name: str) -> int:
    return sum(text.startswith(name) for text in instructions)


@pytest.mark.parametrize("mode", MODES)
def test_inner_loop(functions, mode):
    found = loops(functions[mode])
    assert found
    for loop in found:
        assert count(loop, "tdpbf16ps") == 4
        assert count(loop, "tileloadd") == 4
        for name in ("tilestored", "tilezero", "ldtilecfg", "call"):
            assert count(loop, name) == 0, name
    assert any(count(loop, "vcvtne2ps2bf16") for loop in found), "no output is stored meanwhile"


@pytest.mark.parametrize("mode", MODES)
def test_tiles_are_stored_once(functions, mode):
    code = [line.split(":", 1)[1].strip() for line in functions[mode] if ":" in line]
    assert count(code, "tilestored") == 4
    assert count(code, "ldtilecfg") == 1 and count(code, "tilerelease") == 1
