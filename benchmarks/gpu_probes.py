"""What the GPU can do at most: copies, matrix products, and reads of its L2 cache. Needs Triton to import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from blocksparse_compiler import gpu_timing

GIB = 1 << 30
L2_PROGRAMS_PER_MULTIPROCESSOR = 8
L2_TILE = 8192
L2_ROUNDS = 64


@triton.jit
def read_tiles(source, out, tiles, ROUNDS: tl.constexpr, TILE: tl.constexpr):
    """Every program sums ROUNDS tiles of a buffer that L2 holds, each program in another order."""
    program = tl.program_id(0)
    offsets = tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    tile = program * 7 % tiles
    for _ in range(ROUNDS):
        values = tl.load(source + tile * TILE + offsets, cache_modifier=".cg")
        total += values.to(tl.float32)
        tile = (tile + 13) % tiles
    tl.store(out + program, tl.sum(total, 0))


@triton.jit
def copy_boxes(source, out, tiles, ROUNDS: tl.constexpr, ROWS: tl.constexpr):
    """As `read_tiles`, by the copy engine: boxes [ROWS, 64] into shared memory."""
    program = tl.program_id(0)
    boxes = tl.make_tensor_descriptor(source, [tiles * ROWS, 64], [64, 1], [ROWS, 64])
    total = tl.zeros((ROWS, 64), tl.float32)
    tile = program * 7 % tiles
    for _ in range(ROUNDS):
        total += boxes.load([tile * ROWS, 0]).to(tl.float32)
        tile = (tile + 13) % tiles
    tl.store(out + program, tl.sum(tl.sum(total, 1), 0))


@triton.jit
def multiply_tiles(a, b, out, ROUNDS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Multiplies one pair of tiles over and over: the rate of the matrix units at this width."""
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + rows[:, None] * K + inner[None, :])
    right = tl.load(b + columns[None, :] * K + inner[:, None])
    total = tl.zeros((M, N), tl.float32)
    for _ in range(ROUNDS):
        total = tl.dot(left, right, total)
    tl.store(out + tl.program_id(0) * M * N + rows[:, None] * N + columns[None, :], total)


def ceilings(seconds: float = 0.3) -> dict[str, float]:
    """Bytes and operations per second of this GPU: the most that rows can be compared with."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    calls = {
        "dram_bytes_per_second": copy(GIB),
        "l2_bytes_per_second": l2_reads(multiprocessors),
        "bfloat16_flops_per_second": product(8192, 8192, 8192),
    }
    timings = gpu_timing.interleave({name: call for name, (call, _) in calls.items()}, seconds, flush=False)
    return {name: amount / timings[name].minimum for name, (_, amount) in calls.items()}


def copy(size: int) -> tuple[Callable[[], Any], float]:
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * size


def product(m: int, n: int, k: int) -> tuple[Callable[[], Any], float]:
    a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    return lambda: a @ b.t(), 2.0 * m * n * k


def l2_reads(multiprocessors: int, buffer_bytes: int = 16 << 20) -> tuple[Callable[[], Any], float]:
    source = torch.randn(buffer_bytes // 2, device="cuda").to(torch.bfloat16)
    programs = multiprocessors * L2_PROGRAMS_PER_MULTIPROCESSOR
    out = torch.empty(programs, device="cuda")
    tiles = len(source) // L2_TILE

    def call() -> None:
        read_tiles[(programs,)](source, out, tiles, ROUNDS=L2_ROUNDS, TILE=L2_TILE, num_warps=8)

    return call, 2.0 * programs * L2_ROUNDS * L2_TILE


def l2_copies(
    multiprocessors: int, rows: int, buffer_bytes: int = 16 << 20
) -> tuple[Callable[[], Any], float]:
    source = torch.randn(buffer_bytes // 2, device="cuda").to(torch.bfloat16)
    programs = 4 * multiprocessors
    out = torch.empty(programs, device="cuda")
    tiles = len(source) // (64 * rows)
    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device="cuda"))

    def call() -> None:
        copy_boxes[(programs,)](source, out, tiles, ROUNDS=L2_ROUNDS, ROWS=rows, num_warps=4, num_stages=4)

    return call, 2.0 * programs * L2_ROUNDS * 64 * rows


def tile_products(
    multiprocessors: int, n: int, m: int = 128, k: int = 64, warps: int = 4
) -> tuple[Callable[[], Any], float]:
    rounds, programs = 2000, 2 * multiprocessors
    a = torch.randn(m, k, device="cuda").to(torch.bfloat16)
    b = torch.randn(n, k, device="cuda").to(torch.bfloat16)
    out = torch.empty(programs, m, n, device="cuda")

    def call() -> None:
        multiply_tiles[(programs,)](a, b, out, ROUNDS=rounds, M=m, N=n, K=k, num_warps=warps)

    return call, 2.0 * programs * rounds * m * n * k
