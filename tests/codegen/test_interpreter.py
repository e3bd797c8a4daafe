"""Triton kernels on CPU tensors: dtypes, reductions, descriptors, helpers; Triton stays as it was."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402
from torch._inductor.runtime import triton_helpers  # noqa: E402
from torch._inductor.runtime.triton_helpers import libdevice  # noqa: E402

from blocksparse_compiler.codegen.interpreter import interpret  # noqa: E402


@triton.jit
def product(a, b, c, n, BLOCK: tl.constexpr):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(tl.load(n)):
        at = k * BLOCK
        acc = tl.dot(
            tl.load(a + row * (2 * BLOCK) + at + column), tl.load(b + (at + row) * BLOCK + column), acc
        )
    tl.store(c + row * BLOCK + column, acc)


@triton.jit
def boxes(x, y, height, width, BLOCK: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [height, width], [width, 1], [BLOCK, BLOCK])
    target = tl.make_tensor_descriptor(y, [height, width], [width, 1], [BLOCK, BLOCK])
    i, j = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    target.store([i, j], source.load([i - 1, j]))  # the row before the first is zero


@triton.jit
def statistics(x, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=float("-inf"))
    most = triton_helpers.max2(value, 0)
    total = tl.sum(tl.where(at < n, libdevice.exp(value - most), 0.0), 0)
    index = tl.argmax(value, 0)
    tl.store(out, most)
    tl.store(out + 1, total)
    tl.store(out + 2, index.to(tl.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matrix_product(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(16, 32).to(dtype), torch.randn(32, 16).to(dtype)
    c = torch.empty(16, 16, dtype=dtype)
    interpret(product.fn, {"a": a, "b": b, "c": c, "n": torch.tensor([2])}, {"BLOCK": 16}, (1, 1, 1))
    exact = a.double() @ b.double()
    assert torch.allclose(c.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_bfloat16_stores_round_to_nearest():
    a = torch.tensor([[1.0 + 2**-9]]).expand(16, 32).contiguous()
    b = torch.eye(32)[:, :16].contiguous()
    c = torch.empty(16, 16, dtype=torch.bfloat16)
    interpret(product.fn, {"a": a * 3, "b": b, "c": c, "n": torch.tensor([2])}, {"BLOCK": 16}, (1, 1, 1))
    assert torch.equal(c, (a[:, :16] * 3).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensor_descriptors_fill_with_zeros(dtype):
    x, y = torch.randn(24, 40).to(dtype), torch.full((24, 40), 7.0, dtype=dtype)
    arguments = {"x": x, "y": y, "height": 24, "width": 40}
    interpret(boxes.fn, arguments, {"BLOCK": 16}, (2, 3, 1))
    assert torch.equal(y[1:], x[:-1]) and not y[0].any()


def test_reductions_and_libdevice():
    x, out = torch.randn(100), torch.zeros(3)
    interpret(statistics.fn, {"x": x, "out": out, "n": 100}, {"BLOCK": 128}, (1, 1, 1))
    expected = torch.stack([x.max(), (x - x.max()).exp().sum(), x.argmax().float()])
    assert torch.allclose(out, expected)


def test_triton_is_left_as_it_was():
    before = (
        tl.load,
        tl.sum,
        tl.tensor.__add__,
        tl.core.reduce,
        triton_helpers.libdevice,
        type(product).__call__,
    )
    with pytest.raises(TypeError):
        interpret(statistics.fn, {"x": torch.ones(4), "out": torch.ones(3)}, {"BLOCK": 4}, (1, 1, 1))
    test_reductions_and_libdevice()
    after = (
        tl.load,
        tl.sum,
        tl.tensor.__add__,
        tl.core.reduce,
        triton_helpers.libdevice,
        type(product).__call__,
    )
    assert before == after


@triton.jit
def arithmetic(a, b, out, n, A: tl.constexpr, B: tl.constexpr):
    """Every operator that has a short cut, on blocks that broadcast, scalars and numbers."""
    i, j = tl.arange(0, A)[:, None], tl.arange(0, B)[None, :]
    x, y, scalar = tl.load(a + i * B + j), tl.load(b + j), tl.load(b)
    k = tl.program_id(0)
    tl.store(out + (0 * n + i) * B + j, x + y - scalar * 3)
    tl.store(out + (1 * n + i) * B + j, 3 * x - (7 - y) * (scalar + x) + k)
    tl.store(out + (2 * n + i) * B + j, ((x < y) & (x <= scalar) | (y > 2)).to(out.dtype.element_ty))
    tl.store(out + (3 * n + i) * B + j, ((i + 1 >= j) & (n > j)).to(out.dtype.element_ty) + (x >= 0))
    tl.store(out + (4 * n + i) * B + j, (x == y).to(out.dtype.element_ty) + (x != y).to(out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float16, torch.bfloat16])
def test_short_cuts_change_nothing(dtype, monkeypatch):
    from blocksparse_compiler.codegen import interpreter

    a, b = (
        torch.randint(-9, 9, shape, generator=torch.manual_seed(0)).to(dtype) for shape in ((8, 16), (16,))
    )
    results = []
    for shortcuts in (interpreter.shortcuts, lambda: ()):
        monkeypatch.setattr(interpreter, "shortcuts", shortcuts)
        out = torch.zeros(5, 8, 16, dtype=dtype)
        interpret(arithmetic.fn, {"a": a, "b": b, "out": out, "n": 8}, {"A": 8, "B": 16}, (1, 1, 1))
        results.append(out)
    assert torch.equal(*results)
    i, j = torch.arange(8)[:, None], torch.arange(16)
    first = a + b - b[0] * 3
    second = 3 * a - (7 - b) * (b[0] + a)
    third = ((a < b) & (a <= b[0]) | (b > 2)).to(dtype)
    fourth = ((i + 1 >= j) & (j < 8)).to(dtype) + (a >= 0)
    assert torch.equal(results[0], torch.stack([first, second, third, fourth, torch.ones_like(a)]))
