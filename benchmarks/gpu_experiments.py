"""Questions about a GPU that decide how kernels should be built, answered in one run.

    python -m benchmarks.gpu_experiments --minutes 9

In this order: rates of the L2 cache and of the matrix units by width of the tile; kernels that read through
pointers, by boxes, and in pairs of out-blocks, against cuDNN on ResNet-50's 3x3 layers, with random masks and
with equally many blocks in every row; stages and splits of linear layers on one row.
"""

from __future__ import annotations

import faulthandler
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from blocksparse_compiler import BlockPattern
from blocksparse_compiler.variants import VARIANTS

from . import gpu_cases, gpu_machine, gpu_pictures, report
from .gpu_cases import Candidate, Cell
from .gpu_layers import GRACE_SECONDS, Session
from .gpu_rows import CellPlan
from .gpu_run import runner_for
from .gpu_worker import Pool, Worker

WIDTHS = (16, 32, 64, 128, 256)
BOX_ROWS = (64, 128, 256)
CONFIGS = 8
SIZES = (14, 28), (56, 7)
"""Of images: those where L2 decides, then the largest and the smallest."""
DECODE_STAGES = (3, 4, 6, 8, 10)
DECODE_SPLITS = (1, 2, 4, 8, 16)


def rates(seconds: float = 0.2) -> dict[str, float]:
    """TB/s of L2 by way of reading, and TFLOP/s of the matrix units by shape of tile."""
    from blocksparse_compiler import gpu_timing

    from . import gpu_probes

    count = torch.cuda.get_device_properties(0).multi_processor_count
    probes = {"l2 through pointers": gpu_probes.l2_reads(count)}
    if torch.cuda.get_device_capability() >= (9, 0):
        probes |= {f"l2 by boxes of {rows}x64": gpu_probes.l2_copies(count, rows) for rows in BOX_ROWS}
    for n in WIDTHS:
        for m, warps in ((64, 4), (128, 4), (128, 8)):
            if m * n > 64 * 256 and warps == 4:
                continue  # more sums than registers
            probes[f"product {m}x{n}, {warps} warps"] = gpu_probes.tile_products(count, n, m, warps=warps)
    calls = {name: call for name, (call, _) in probes.items()}
    timings = gpu_timing.interleave(calls, seconds * len(calls), flush=False)
    return {name: amount / timings[name].minimum / 1e12 for name, (_, amount) in probes.items()}


def mask_cells(sizes: tuple[int, ...], batches: tuple[int, ...]) -> list[Cell]:
    """3x3 layers with either kind of mask."""
    shapes = [s for s in gpu_cases.SPATIAL if s.size in sizes and s.stride == 1]
    return [
        Cell(shape, batch, "64x64", density, mask=mask)
        for shape in shapes
        for batch in batches
        for density in (0.5, 0.25)
        for mask in ("random", "balanced")
    ]


def decode_plan(cell: Cell, spec: Any) -> CellPlan:
    """Every number of stages with every split, next to what the variants would do."""
    plan = CellPlan.of(cell, spec, 1)
    variant = VARIANTS["triton_decode"]
    pattern = BlockPattern.from_weight(cell.weight(), cell.block_shape)
    base = dict(variant.configs(cell.site(), pattern, spec)[0])
    known = {c.label for c in plan.candidates}
    for stages in DECODE_STAGES:
        for split in DECODE_SPLITS:
            config = {**base, "stages": stages, "split": split}
            candidate = Candidate(cell, variant.name, cell.block_shape, config)
            if candidate.label not in known:
                plan.candidates.append(candidate)
    return plan


def run(
    device: Annotated[str, typer.Option(help="cuda, or interpret for a dry run without a GPU.")] = "cuda",
    minutes: Annotated[float, typer.Option(help="Time for everything.")] = 9.0,
    workers: Annotated[int, typer.Option(help="Processes that compile and check; 0: this one.")] = 12,
    seconds: Annotated[float, typer.Option(help="Of timing per candidate.")] = 0.04,
    folder: Annotated[Path, typer.Option(help="For the results.")] = report.RESULTS,
    name: Annotated[str, typer.Option(help="Results are written as <name>.json.")] = "gpu_experiments",
) -> None:
    """Experiments on a GPU."""
    deadline = time.monotonic() + 60 * minutes
    faulthandler.dump_traceback_later(60 * minutes + GRACE_SECONDS, exit=True, file=sys.__stderr__)
    on_gpu = device != "interpret"
    runner = runner_for(device)
    session = Session(runner, report.path_of(name, folder), deadline, CONFIGS, seconds)
    pool = Pool(workers, lambda: Worker.on(device)) if workers else None
    spec = runner.spec
    try:
        with torch.no_grad():
            session.facts["ceilings"] = gpu_machine.ceilings(runner)
            if on_gpu:
                session.facts["rates"] = rates()
                for what, rate in session.facts["rates"].items():
                    session.log(f"{what}: {rate:.2f}e12 per second")
            session.save()
            if on_gpu:
                session.measure(mask_cells(SIZES[0], (64, 256)), pool)
                llama = [Cell(s, rows, "64x64", 0.25) for s in gpu_cases.LLAMA for rows in (1, 16)]
                session.measure_plans([decode_plan(cell, spec) for cell in llama], pool)
                session.measure(mask_cells(SIZES[1], (64, 256)), pool)
            else:
                tiny = Cell(gpu_cases.TINY[1], 2, "16x16", 0.5, mask="balanced")
                session.measure_plans([decode_plan(tiny, spec)], pool)
    finally:
        if pool is not None:
            pool.close()
        faulthandler.cancel_dump_traceback_later()
    gpu_pictures.print_layers(session.rows, session.facts)


if __name__ == "__main__":
    typer.run(run)
