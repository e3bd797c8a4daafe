"""The AMX instructions in plain C++, against Intel's description of them and against float64."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import blocksparse_compiler.codegen as codegen

HEADER = Path(codegen.__file__).parent / "include" / "amx_emulation.h"

DRIVER = """
#include "amx_emulation.h"
using namespace block_sparse::emulated_amx;
static std::string message;
template <class Call> static const char* guarded(const Call& call) {
  try { call(); } catch (const std::exception& error) { message = error.what(); return message.c_str(); }
  return nullptr;
}
extern "C" {
const char* amx_load_config(const void* p) { return guarded([&] { load_config(p); }); }
const char* amx_release() { return guarded([&] { release(); }); }
const char* amx_zero(int t) { return guarded([&] { zero(t); }); }
const char* amx_load(int t, const void* p, int64_t stride) { return guarded([&] { load(t, p, stride); }); }
const char* amx_store(int t, void* p, int64_t stride) { return guarded([&] { store(t, p, stride); }); }
const char* amx_dot(int s, int a, int b) { return guarded([&] { dot(s, a, b); }); }
}
"""


class Machine:
    """The emulated instructions; a fault raises RuntimeError."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def __call__(self, name: str, *arguments) -> None:
        function = self.library[f"amx_{name}"]
        function.restype = ctypes.c_char_p
        fault = function(*arguments)
        if fault:
            raise RuntimeError(fault.decode())

    def configure(self, shapes: dict[int, tuple[int, int]], palette: int = 1, reserved: int = 0) -> None:
        """Tiles of (rows, bytes of a row)."""
        rows = [shapes.get(t, (0, 0))[0] for t in range(16)]
        widths = [shapes.get(t, (0, 0))[1] for t in range(16)]
        self("load_config", struct.pack("<BB14x16H16B", palette, reserved, *widths, *rows))

    def load(self, tile: int, values: torch.Tensor) -> None:
        stride = values.stride(0) * values.element_size()
        self("load", tile, ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(stride))

    def store(self, tile: int, rows: int = 16, columns: int = 16) -> torch.Tensor:
        out = torch.full((rows, columns), float("nan"))
        self("store", tile, ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(4 * columns))
        return out


@pytest.fixture(scope="module")
def amx(tmp_path_factory) -> Machine:
    folder = tmp_path_factory.mktemp("amx")
    (folder / "driver.cpp").write_text(DRIVER)
    command = ["g++", "-O2", "-std=c++17", "-shared", "-fPIC", "-I", HEADER.parent, "driver.cpp"]
    subprocess.run([*command, "-o", "driver.so"], cwd=folder, check=True, timeout=120)
    return Machine(ctypes.CDLL(str(folder / "driver.so")))


def in_pairs(right: torch.Tensor) -> torch.Tensor:
    """`[k, n]` as the instruction reads it: `[k / 2, n * 2]`."""
    return right.unflatten(0, (-1, 2)).transpose(1, 2).flatten(1).contiguous()


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 16), pairs=st.integers(1, 16), columns=st.integers(1, 16), seed=st.integers(0, 2**16)
)
def test_product_against_float64(amx, rows, pairs, columns, seed):
    random = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, 2 * pairs + 3, generator=random).bfloat16()[
        :, : 2 * pairs
    ]  # a stride of its own
    right = torch.randn(2 * pairs, columns, generator=random).bfloat16()
    start = torch.randn(rows, columns, generator=random)
    amx.configure({0: (rows, 4 * columns), 4: (rows, 4 * pairs), 6: (pairs, 4 * columns)})
    amx.load(0, start)
    amx.load(4, left)
    amx.load(6, in_pairs(right))
    amx("dot", 0, 4, 6)
    exact = start.double() + left.double() @ right.double()
    bound = start.double().abs() + left.double().abs() @ right.double().abs()
    error = (amx.store(0, rows, columns) - exact).abs()
    assert (error <= (2 * pairs + 2) * 2.0**-24 * bound).all()


def one_sum(amx, start: float, left: list[float], right: list[float]) -> float:
    """One output, of one row and one column."""
    pairs = len(left) // 2
    amx.configure({0: (1, 4), 1: (1, 4 * pairs), 2: (pairs, 4)})
    amx.load(0, torch.tensor([[start]]))
    amx.load(1, torch.tensor([left]).bfloat16())
    amx.load(2, in_pairs(torch.tensor(right)[:, None].bfloat16()))
    amx("dot", 0, 1, 2)
    return amx.store(0, 1, 1).item()


def test_even_and_odd_products_are_summed_apart_then_added(amx):
    big, one = 2.0**24, [1.0] * 4
    # Even: 2^24 + 1 - 2^24 loses the one. Odd: 0 + 1 + 1. One sum from left to right would lose two of three.
    assert one_sum(amx, 0.0, [big, 0.0, 1.0, 1.0, -big, 1.0], [*one, 1.0, 1.0]) == 2.0
    # The old sum comes last.
    assert one_sum(amx, big, [1.0, 1.0], one[:2]) == big + 2
    assert one_sum(amx, big, [1.0, 0.0], one[:2]) == big


def test_products_are_not_rounded(amx):
    a = 1 + 2.0**-7
    assert one_sum(amx, 0.0, [1.0, 0.0, a, 0.0], [-1.0, 0.0, a, 0.0]) == 2.0**-6 + 2.0**-14


def test_denormals_are_zero(amx):
    tiny = 2.0**-130  # a denormal bf16
    assert torch.tensor(tiny).bfloat16().item() == tiny
    assert one_sum(amx, 0.0, [tiny, 0.0], [2.0**100, 0.0]) == 0.0
    assert one_sum(amx, 0.0, [2.0**-70, 0.0], [2.0**-70, 0.0]) == 0.0, "the result"
    assert one_sum(amx, 2.0**-130, [0.0, 0.0], [1.0, 1.0]) == 0.0, "the old sum"


def test_rows_beyond_the_shape_are_neither_read_nor_written(amx):
    amx.configure({0: (3, 16)})
    values = torch.arange(64.0).reshape(16, 4)
    amx.load(0, values)
    out = amx.store(0, 16, 4)
    assert torch.equal(out[:3], values[:3]) and out[3:].isnan().all()


def test_a_stride_of_zero_repeats_a_row(amx):
    amx.configure({0: (4, 64)})
    amx("load", 0, ctypes.c_void_p((row := torch.arange(16.0)).data_ptr()), ctypes.c_int64(0))
    assert torch.equal(amx.store(0, 4), row.expand(4, 16))


def test_configuration_and_zero_clear_tiles(amx):
    shapes = {0: (2, 8)}
    for clear in (lambda: amx.configure(shapes), lambda: amx("zero", 0)):
        amx.configure(shapes)
        amx.load(0, torch.ones(2, 2))
        clear()
        assert not amx.store(0, 2, 2).any()


GOOD = {0: (16, 64), 4: (16, 64), 6: (16, 64)}


@pytest.mark.parametrize(
    "shapes, instruction, message",
    [
        (None, ("zero", 0), "no tile configuration"),
        (GOOD, ("zero", 1), "tile 1 is not configured"),
        (GOOD, ("zero", 8), "there is no tile 8"),
        (GOOD, ("dot", 0, 4, 4), "must differ"),
        ({**GOOD, 4: (8, 64)}, ("dot", 0, 4, 6), "differ in rows"),
        ({**GOOD, 0: (16, 32)}, ("dot", 0, 4, 6), "differ in columns"),
        ({**GOOD, 6: (8, 64)}, ("dot", 0, 4, 6), "16 pairs in a row of the left factor, but 8 rows"),
        ({0: (17, 64)}, None, "17 rows exceed 16"),
        ({0: (16, 65)}, None, "65 bytes of a row exceed 64"),
        ({0: (16, 0)}, None, "rows without bytes"),
        ({9: (1, 4)}, None, "beyond 8"),
    ],
)
def test_misuse_faults(amx, shapes, instruction, message):
    amx("release")
    with pytest.raises(RuntimeError, match=message):
        if shapes is not None:
            amx.configure(shapes)
        if instruction is not None:
            amx(*instruction)


def test_bad_configurations_fault(amx):
    with pytest.raises(RuntimeError, match="palette 2"):
        amx.configure(GOOD, palette=2)
    with pytest.raises(RuntimeError, match="must be zero"):
        amx.configure(GOOD, reserved=1)


def test_threads_have_tiles_of_their_own(amx):
    from concurrent.futures import ThreadPoolExecutor

    amx.configure(GOOD)
    with ThreadPoolExecutor(1) as other, pytest.raises(RuntimeError, match="no tile configuration"):
        other.submit(amx, "zero", 0).result()
