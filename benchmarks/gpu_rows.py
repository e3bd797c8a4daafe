"""One group of layers of one shape, timed together with its dense baselines; and what a row says of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from blocksparse_compiler import Decision, cost
from blocksparse_compiler.plan import DENSE
from blocksparse_compiler.variants import block_shapes
from blocksparse_compiler.zero_blocks import zero_block_patterns

from . import gpu_baselines, report
from .gpu_cases import Candidate, Cell, bias, candidates, dense_layer
from .gpu_run import CudaRunner, Runner, placed_weight
from .timing import Call

Row = dict[str, Any]


@dataclass
class CellPlan:
    """The candidates of one cell, what the cost model would do, and what became of each.

    Args:
        answers: of the check, by label; only what passed is timed.
    """

    cell: Cell
    decision: Decision
    candidates: list[Candidate]
    refusals: list[str]
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, cell: Cell, spec: Any, configs: int) -> CellPlan:
        found, refusals = candidates(cell, spec, configs)
        tiles = zero_block_patterns(cell.weight(), 1, block_shapes("cuda"))
        decision = cost.choose(cell.site(), tiles, spec)
        plan = cls(cell, decision, found, refusals)
        auto = plan.auto
        if auto is not None and auto.label not in [c.label for c in found]:
            found.append(auto)
        return plan

    @property
    def auto(self) -> Candidate | None:
        """What the backend would run; None for dense."""
        pattern = self.decision.pattern
        if self.decision.kernel == DENSE or pattern is None:
            return None
        return Candidate(self.cell, self.decision.kernel, pattern.block_shape, dict(self.decision.config))

    @property
    def passed(self) -> list[Candidate]:
        return [c for c in self.candidates if "error" in self.answers.get(c.label, {})]


def measure_group(runner: Runner, plans: Sequence[CellPlan], seconds: float) -> list[Row]:
    """Rows for cells that share shape, batch and dtype; `seconds` of timing per call.

    Every candidate that passed its check, every dense build and other libraries take turns.
    """
    first = plans[0].cell
    inputs = _Inputs(runner, first)
    dense = _dense_calls(runner, first, inputs)
    calls, libraries = dict(dense), []
    for plan in plans:
        for candidate in plan.passed:
            calls[f"{plan.cell} {candidate.label}"] = _sparse_call(runner, candidate, inputs)
        for name, call in _library_calls(runner, plan.cell, inputs).items():
            calls[f"{plan.cell} {name}"] = call
            libraries.append(f"{plan.cell} {name}")
    run = {key: call for key, (call, _) in calls.items()}
    measured = runner.interleave(run, seconds * len(calls), libraries)
    timings = {key: timing.to_json(calls[key][1]) for key, timing in measured.items()}
    ours = {name: timings[name] for name in dense}
    return [_row(runner, plan, ours, timings) for plan in plans]


# ---- calls -----------------------------------------------------------------------------------------


class _Inputs:
    """Inputs of one layer, shared by all that is timed together."""

    def __init__(self, runner: Runner, cell: Cell) -> None:
        self._runner, self._cell = runner, cell
        self._made: list[Tensor] = []

    def enough(self, weight_bytes: float) -> list[Tensor]:
        """So many that the cache holds no operand when its turn comes again."""
        cell = self._cell
        item = cell.torch_dtype.itemsize
        out_bytes = item * cell.pixels * cell.site().out_channels
        count = self._runner.copies(item * math.prod(cell.input_shape) + weight_bytes + out_bytes)
        while len(self._made) < count:
            self._made.append(cell.input(self._runner.device))
        return self._made[:count]


def _rotating(
    runner: Runner, function: Callable[..., Any], sets: Sequence[tuple[Tensor, ...]]
) -> tuple[Call, int]:
    """A call that runs the function on every set of operands in turn, and how often it does."""
    turns = list(sets) * math.ceil(runner.least_launches / len(sets))

    def call() -> Any:
        for operands in turns[:-1]:
            function(*operands)
        return function(*turns[-1])

    return call, len(turns)


def _dense_calls(runner: Runner, cell: Cell, inputs: _Inputs) -> dict[str, tuple[Call, int]]:
    weight, added = placed_weight(replace(cell, density=1.0), runner.device), bias(cell, runner.device)
    sets = [(x, weight.clone(), added) for x in inputs.enough(weight.nbytes)]
    builds = runner.dense(dense_layer(cell), sets[0])
    return {name: _rotating(runner, build, sets) for name, build in builds.items()}


def _sparse_call(runner: Runner, candidate: Candidate, inputs: _Inputs) -> tuple[Call, int]:
    function, packed = candidate.build(runner.device)
    added = bias(candidate.cell, runner.device)
    xs = inputs.enough(packed.values.nbytes)
    sets = [(x, packed.values.clone(), packed.row_ptr, packed.tile_index, added) for x in xs]
    return _rotating(runner, runner.compile(function, sets[0]), sets)


def _library_calls(runner: Runner, cell: Cell, inputs: _Inputs) -> dict[str, tuple[Call, int]]:
    """Other libraries: on one weight, to their advantage."""
    if cell.is_conv or not isinstance(runner, CudaRunner):
        return {}
    weight = placed_weight(cell, runner.device)
    xs = inputs.enough(weight.nbytes * cell.density)
    found = gpu_baselines.others(weight, cell.block_shape, xs[0])
    return {name: _rotating(runner, product, [(x,) for x in xs]) for name, product in found.items()}


# ---- rows ------------------------------------------------------------------------------------------


def _row(runner: Runner, plan: CellPlan, dense: Mapping[str, Any], timings: Mapping[str, Any]) -> Row:
    cell = plan.cell
    own = [_candidate_row(runner, plan, c, timings[f"{cell} {c.label}"]) for c in plan.passed]
    best_dense = report.best(dict(dense))
    dense_ms = dense[best_dense]["median_ms"]
    failed = {label: a["failed"] for label, a in plan.answers.items() if "failed" in a}
    libraries = {n: t for n in gpu_baselines.LIBRARIES if (t := timings.get(f"{cell} {n}"))}
    best = min(own, key=lambda r: float(r["median_ms"]), default=None)
    auto = plan.auto
    chosen = next((r for r in own if auto is not None and r["label"] == auto.label), None)
    # A dense layer of ours is Inductor's.
    auto_ms = chosen["median_ms"] if chosen else dense.get("inductor", dense[best_dense])["median_ms"]
    return {
        "cell": cell.to_json(),
        "shape": str(cell.shape),
        "batch": cell.batch,
        "block": cell.block,
        "density": cell.density,
        "mask": cell.mask,
        "dtype": cell.dtype,
        "kept": float(cell.weight().ne(0).float().mean()),
        "gflop": cell.dense_flops / 1e9,
        "dense": dict(dense),
        "best_dense": best_dense,
        "dense_tflops": cell.dense_flops / dense_ms / 1e9,
        "libraries": libraries,
        "auto": DENSE if auto is None else auto.label if chosen else "failed",
        "why": plan.decision.reason,
        "estimates_ms": {k: 1e3 * v for k, v in plan.decision.estimates.items()},
        "candidates": own,
        "best": best and best["label"],
        "speedup": {
            "auto": dense_ms / auto_ms,
            "best": dense_ms / best["median_ms"] if best else None,
        },
        "failed": failed,
        "refusals": plan.refusals,
    }


def _candidate_row(runner: Runner, plan: CellPlan, candidate: Candidate, timing: Mapping[str, Any]) -> Row:
    """Time and achieved rates: on kept tiles, and on the bytes that must move at least."""
    cell, site, pattern = plan.cell, plan.cell.site(), candidate.pattern
    seconds = float(timing["median_ms"]) / 1e3
    item = cell.torch_dtype.itemsize
    tile_elements = pattern.num_kept * math.prod(candidate.tile)
    out = cell.pixels * site.out_channels
    moved = item * (math.prod(cell.input_shape) + out + tile_elements)
    estimate = cost.sparse_cost(site, pattern, runner.spec, candidate.variant, config=candidate.config)
    answer = plan.answers[candidate.label]
    return {
        "label": candidate.label,
        "variant": candidate.variant,
        "tile": "x".join(map(str, candidate.tile)),
        "config": dict(candidate.config),
        **timing,
        "kept_tflops": 2 * cell.pixels * tile_elements / seconds / 1e12,
        "least_tbytes_per_second": moved / seconds / 1e12,
        "estimate_ms": 1e3 * estimate.evaluate(None),
        **{key: answer[key] for key in ("error", "dense_error", "seconds") if key in answer},
    }
