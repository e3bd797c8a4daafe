"""Layers on a GPU: every kernel variant against the strongest dense kernels, within a given time.

    python -m benchmarks.layers --device cuda --minutes 9
    python -m benchmarks.layers --device cuda --block 64x64 --shape 3x3 --configs 8 --tuned
    python -m benchmarks.layers --device interpret           # the same path without a GPU, on two tiny layers

ResNet-50's convolutions (bias and ReLU included), ViT-B/16's and a Llama's linear layers, in bf16. Cells come
in order of importance. All candidates of a chunk of cells are first compiled and checked against float64 in
worker processes, so that a hang costs one worker; then those that passed are timed from CUDA graphs, over
operands that take turns, together with the dense builds. The JSON file is complete after every group: a run
that is cut off has measured what came first.
"""

from __future__ import annotations

import faulthandler
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from blocksparse_compiler import tuned_table

from . import gpu_cases, gpu_machine, gpu_pictures, gpu_tuned, pictures, report
from .gpu_cases import Cell
from .gpu_rows import CellPlan, Row, measure_group
from .gpu_run import CudaRunner, Runner, check, placed_weight, runner_for
from .gpu_worker import Pool, Worker

GRACE_SECONDS = 25
"""After the deadline, for the group under way; then the process ends itself."""
LAST_CHECK_SECONDS = 20
"""Before the deadline no check begins, so that what passed is still timed."""
AUTOTUNE_SECONDS = 90
"""Left over at least, for one more max-autotuned baseline to begin."""


class Session:
    """Chunks of cells, measured until the time is up; rows are written as they come."""

    def __init__(self, runner: Runner, path: Path, deadline: float, configs: int, seconds: float) -> None:
        self.runner, self.path, self.deadline = runner, path, deadline
        self.configs, self.seconds = configs, seconds
        self.rows: list[Row] = []
        self.facts: dict[str, Any] = {"machine": gpu_machine.machine(runner), "log": []}

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def measure(self, cells: Sequence[Cell], pool: Pool | None) -> None:
        """Checks all cells, then times them group by group."""
        self.measure_plans([CellPlan.of(cell, self.runner.spec, self.configs) for cell in cells], pool)

    def measure_plans(self, plans: Sequence[CellPlan], pool: Pool | None) -> None:
        began = time.monotonic()
        self._check(plans, pool)
        checked = time.monotonic()
        for _, group in itertools.groupby(plans, key=lambda p: (p.cell.shape, p.cell.batch, p.cell.dtype)):
            if self.left <= 0:
                break
            members = [plan for plan in group if plan.passed]
            if members:
                self._time(members)
        self.log(
            f"{len(plans)} cells, first {plans[0].cell}: checked in {checked - began:.0f} s, "
            f"timed in {time.monotonic() - checked:.0f} s"
        )
        self.save()

    def _check(self, plans: Sequence[CellPlan], pool: Pool | None) -> None:
        by_cell = {plan.cell: plan for plan in plans}
        candidates = [c for plan in plans for c in plan.candidates]
        if pool is None:
            answers: Any = ((c, _answer(self.runner, c)) for c in candidates)
        else:
            answers = pool.check(candidates, self.deadline - LAST_CHECK_SECONDS)
        for candidate, answer in answers:
            by_cell[candidate.cell].answers[candidate.label] = answer
            if "failed" in answer:
                self.log(f"FAILED {candidate.cell} {candidate.label}: {answer['failed']}")

    def _time(self, plans: Sequence[CellPlan]) -> None:
        try:
            self.rows += measure_group(self.runner, plans, self.seconds)
        except Exception as error:  # the next group may well run
            self.log(f"FAILED {plans[0].cell}: {type(error).__name__}: {error}")
        torch._dynamo.reset()
        self.save()

    def max_autotune(self, cells: Sequence[Cell]) -> None:
        """Adds Inductor's max-autotune to the dense baselines of these layers' rows."""
        assert isinstance(self.runner, CudaRunner)
        for cell in cells:
            if self.left < AUTOTUNE_SECONDS:
                return
            self._autotune_one(self.runner, cell)

    def _autotune_one(self, runner: CudaRunner, cell: Cell) -> None:
        began = time.monotonic()
        weight = placed_weight(cell, "cuda")
        operands = (cell.input("cuda"), weight, gpu_cases.bias(cell, "cuda"))
        try:
            run = runner.max_autotuned(gpu_cases.dense_layer(cell), operands)
            timing = runner.interleave({"max_autotune": lambda: run(*operands)}, self.seconds)
        except Exception as error:
            self.log(f"max-autotune of {cell.shape} failed: {error}")
            return
        self.log(f"max-autotune of {cell.shape} n{cell.batch}: {time.monotonic() - began:.0f} s")
        key = (str(cell.shape), cell.batch)
        for row in self.rows:
            if (row["shape"], row["batch"]) == key:
                # Measured apart and with one set of operands: in favour of dense.
                row["dense"]["max_autotune"] = timing["max_autotune"].to_json()
                _rate_again(row)
        self.save()

    def log(self, line: str) -> None:
        self.facts["log"].append(line)
        print(line, flush=True)

    def save(self) -> None:
        report.save(self.path.stem, self.rows, self.path.parent, **self.facts)


def _rate_again(row: Row) -> None:
    """Speed-ups after another dense baseline has come in."""
    before = row["dense"][row["best_dense"]]["median_ms"]
    row["best_dense"] = report.best(row["dense"])
    factor = row["dense"][row["best_dense"]]["median_ms"] / before
    row["speedup"] = {mode: s and s * factor for mode, s in row["speedup"].items()}
    row["dense_tflops"] /= factor


def _answer(runner: Runner, candidate: gpu_cases.Candidate) -> dict[str, Any]:
    try:
        return dict(check(runner, candidate))
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def chunks(
    device: str, blocks: list[str], densities: list[float], batches: list[int], shape: str
) -> Iterator[list[Cell]]:
    if device == "interpret":
        yield [Cell(s, 2, "16x16", 0.5) for s in gpu_cases.TINY if shape in str(s)]
        return
    for chunk in gpu_cases.by_importance(blocks, densities, batches):
        cells = [cell for cell in chunk if shape in str(cell.shape)]
        if cells:
            yield cells


def run(
    device: Annotated[str, typer.Option(help="cuda, or interpret for a dry run without a GPU.")] = "cuda",
    minutes: Annotated[float, typer.Option(help="Time for everything.")] = 9.0,
    batch: Annotated[list[int], typer.Option(help="Images.")] = list(gpu_cases.BATCHES),  # noqa: B006
    block: Annotated[list[str], typer.Option(help="Blocks of the masks.")] = list(gpu_cases.BLOCKS),  # noqa: B006
    density: Annotated[list[float], typer.Option(help="Kept fractions.")] = list(gpu_cases.DENSITIES),  # noqa: B006
    shape: Annotated[str, typer.Option(help="Only shapes whose name contains this.")] = "",
    configs: Annotated[int, typer.Option(help="Parameters to try for each kernel variant.")] = 3,
    seconds: Annotated[float, typer.Option(help="Of timing per candidate.")] = 0.04,
    workers: Annotated[int, typer.Option(help="Processes that compile and check; 0: this one.")] = 12,
    max_autotune: Annotated[int, typer.Option(help="Layers to max-autotune as a baseline.")] = 3,
    tuned: Annotated[bool, typer.Option(help="Write the fastest parameters into the tuned table.")] = False,
    folder: Annotated[Path, typer.Option(help="For the results, and the tuned table.")] = report.RESULTS,
    name: Annotated[str, typer.Option(help="Results are written as <name>.json and .png.")] = "gpu_layers",
) -> None:
    """Layer by layer on a GPU."""
    deadline = time.monotonic() + 60 * minutes
    faulthandler.dump_traceback_later(60 * minutes + GRACE_SECONDS, exit=True, file=sys.__stderr__)
    on_gpu = device != "interpret"
    runner = runner_for(device)
    session = Session(runner, report.path_of(name, folder), deadline, configs, seconds)
    pool = Pool(workers, lambda: Worker.on(device)) if workers else None
    try:
        with torch.no_grad():
            session.facts["ceilings"] = gpu_machine.ceilings(runner)
            session.save()
            for number, chunk in enumerate(chunks(device, block, density, batch, shape)):
                if session.left <= 0:
                    break
                session.measure(chunk, pool)
                if number == 0 and on_gpu:
                    layers = {(cell.shape, cell.batch): cell for cell in chunk}
                    session.max_autotune(list(layers.values())[:max_autotune])
    finally:
        if pool is not None:
            pool.close()
        faulthandler.cancel_dump_traceback_later()
    finish(session, tuned, folder)


def finish(session: Session, tuned: bool, folder: Path) -> None:
    """The tuned table, the picture, and the table on the terminal last."""
    rows = session.rows
    if tuned:
        target = tuned_table.FOLDER if folder == report.RESULTS else folder
        gpu_tuned.write([{**session.facts, "rows": rows}], target)
    if pictures.can_draw():
        gpu_pictures.draw_layers(rows, session.path.with_suffix(".png"))
    gpu_pictures.print_layers(rows, session.facts)


if __name__ == "__main__":
    typer.run(run)
