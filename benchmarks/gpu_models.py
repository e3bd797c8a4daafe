"""Whole networks on a GPU in bf16, against their dense builds, within a given time.

    python -m benchmarks.models --device cuda --minutes 9
    python -m benchmarks.models --device cuda --model resnet50 --batch 256 --keep 0.25 --autotune

Two times are taken: that of the kernels alone, captured in a CUDA graph, all builds in turns; and at batch 1
the latency, the wall clock of a call under `mode="reduce-overhead"`, as a user sees it. The JSON file is
complete after every row.
"""

from __future__ import annotations

import copy
import faulthandler
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import blocksparse_compiler as bsc
from blocksparse_compiler.passes.pipeline import PassContext, run_pipeline

from . import baselines, gpu_machine, models, pictures, report, zoo
from .gpu_layers import GRACE_SECONDS
from .gpu_run import CudaRunner, Runner, relative_error, runner_for
from .ours import newest_plan

CASES = (
    ("resnet50", 256, ("0.5", "0.25")),
    ("vit_b16", 64, ("0.5", "0.25")),
    ("resnet50", 1, ("0.25",)),
    ("resnext50", 256, ("0.25",)),
    ("resnet50", 64, ("0.5", "0.25")),
    ("vit_b16", 1, ("0.25",)),
)
"""Network, batch and kept densities (or `DBSR-A`, `DBSR-B`), in order of importance."""

Forward = Callable[[Tensor], Tensor]
Row = dict[str, Any]


class Build:
    """A network compiled in one way: what to call, how long that took, what was decided."""

    def __init__(self, make: Callable[[], tuple[Forward, bsc.Plan | None]], x: Tensor) -> None:
        began = time.perf_counter()
        self.call, self.plan = make()
        self.call(x)
        self.seconds = time.perf_counter() - began


# ---- builds ----------------------------------------------------------------------------------------


def placed(network: zoo.Network, runner: Runner) -> zoo.Network:
    network.model.to(runner.device, torch.bfloat16)
    return network


def dense(network: zoo.Network, x: Tensor, runner: Runner, mode: str | None = None) -> Build:
    """Frozen Inductor."""

    def make() -> tuple[Forward, None]:
        if not isinstance(runner, CudaRunner):
            return network.forward, None
        with torch._inductor.config.patch(freezing=True):
            fast = baselines.compiled(network.forward, mode=mode)
            for _ in range(3 if mode else 1):  # CUDA graphs are recorded at the second call
                fast(x)
        return fast, None

    return Build(make, x)


def ours(
    network: zoo.Network, x: Tensor, runner: Runner, mode: str | None = None, autotune: bool = False
) -> Build:
    """This package's backend; without a GPU its passes and the interpreter."""

    def make() -> tuple[Forward, bsc.Plan]:
        if isinstance(runner, CudaRunner):
            how: dict[str, Any] = {"mode": mode} if mode else {"options": {"autotune": autotune}}
            fast = baselines.compiled(network.forward, backend="blocksparse", **how)
            for _ in range(3 if mode else 1):
                fast(x)
            return fast, newest_plan()
        from blocksparse_compiler.codegen import offline

        gm = bsc.trace(network.model, x)
        plan = run_pipeline(gm, PassContext(runner.spec, allow_dense=False))
        return offline.generate(gm, (x,), "sm_90").run, plan

    return Build(make, x)


# ---- one network -----------------------------------------------------------------------------------


def measure(
    name: str,
    batch: int,
    keeps: tuple[str, ...],
    block: tuple[int, int],
    runner: Runner,
    left: Callable[[], float],
    autotune: bool = False,
) -> Iterator[Row]:
    """One row per mask, as soon as it is measured; stops when no time is `left` for another build."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = placed(zoo.NETWORKS[name](), runner)
    x = network.input(batch).to(runner.device, torch.bfloat16)
    fastest = dense(network, x, runner)
    builds = {"eager": network.forward, "inductor": fastest.call}
    for keep in keeps:
        if left() < fastest.seconds:
            return
        sparse, kept = models.pruned(name, keep, block)
        sparse = placed(sparse, runner)
        mine = ours(sparse, x, runner, autotune=autotune)
        assert mine.plan is not None
        facts = {**check(mine.call, sparse, x), **decided(mine.plan)}
        calls = {key: (lambda b=b: b(x)) for key, b in {**builds, "ours": mine.call}.items()}
        timings = {key: t.to_json() for key, t in runner.interleave(calls, 2.0).items()}
        own = timings.pop("ours")
        row: Row = {
            "model": name,
            "batch": batch,
            "keep": keep,
            "block": "x".join(map(str, block)),
            "dtype": "bfloat16",
            "kept": kept,
            "dense": timings,
            "best_dense": report.best(timings),
            "ours": own,
            "speedup": report.speedup(timings, own),
            "compile_seconds": {"inductor": fastest.seconds, "ours": mine.seconds},
            **facts,
        }
        if isinstance(runner, CudaRunner):
            row["peak_bytes"] = {"inductor": peak_bytes(fastest, x), "ours": peak_bytes(mine, x)}
        yield row
        if batch == 1 and isinstance(runner, CudaRunner) and left() > 2 * mine.seconds:
            yield {**row, "latency_ms": latencies(network, sparse, x, runner)}


def check(fast: Forward, network: zoo.Network, x: Tensor) -> dict[str, float]:
    """Relative error of ours and of eager against float64, on one item; raises if ours is wrong."""
    y, eager = fast(x)[:1], network.forward(x)[:1]
    output = copy.deepcopy(network.model).double()(x[:1].double())
    reference = output if isinstance(output, Tensor) else output[0]
    error, floor = relative_error(y, reference), relative_error(eager, reference)
    if not error <= 2 * floor + 1e-3:
        raise RuntimeError(f"relative error {error:.1e}, eager {floor:.1e}; nothing was timed")
    return {"error": error, "dense_error": floor}


def decided(plan: bsc.Plan) -> dict[str, Any]:
    """How many layers run on each kernel, and why the dense ones stay dense."""
    reasons = Counter(d.reason.partition(":")[2].strip()[:60] for d in plan if d.is_dense)
    return {"kernels": dict(Counter(d.kernel for d in plan)), "dense_reasons": dict(reasons)}


def peak_bytes(build: Build, x: Tensor) -> int:
    """Most GPU memory in use during a call, weights of all builds included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    build.call(x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def latencies(network: zoo.Network, sparse: zoo.Network, x: Tensor, runner: Runner) -> dict[str, float]:
    """Median milliseconds of a call, by the wall clock."""
    mode = "reduce-overhead"
    builds = {"inductor": dense(network, x, runner, mode), "ours": ours(sparse, x, runner, mode)}
    samples: dict[str, list[float]] = {name: [] for name in builds}
    for name in ("inductor", "ours") * 4:
        for _ in range(25):
            torch.compiler.cudagraph_mark_step_begin()
            torch.cuda.synchronize()
            began = time.perf_counter()
            builds[name].call(x)
            torch.cuda.synchronize()
            samples[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(times) for name, times in samples.items()}


# ---- all of them -----------------------------------------------------------------------------------

LINE = "{:<10} {:>5} {:>7} {:>7} {:>6} {:>9} {:<9} {:>9} {:>7}  {}"
HEAD = ("model", "batch", "mask", "block", "kept", "dense ms", "", "ours ms", "", "kernels")


def print_models(rows: list[Row], facts: dict[str, Any]) -> None:
    print(f"\n{facts['machine']['gpu']}, bf16, GPU time")
    print(LINE.format(*HEAD))
    for r in rows:
        kernels = " ".join(f"{name} {count}" for name, count in r["kernels"].items())
        wall = r.get("latency_ms")
        latency = f"; latency {wall['inductor']:.2f} → {wall['ours']:.2f} ms" if wall else ""
        times = (
            f"{r['dense'][r['best_dense']]['median_ms']:.2f}",
            r["best_dense"],
            f"{r['ours']['median_ms']:.2f}",
        )
        start = r["model"], r["batch"], r["keep"], r["block"], f"{r['kept']:.0%}"
        print(LINE.format(*start, *times, f"{r['speedup']:.2f}x", kernels + latency), flush=True)


def run(
    device: Annotated[str, typer.Option(help="cuda, or interpret for a dry run without a GPU.")] = "cuda",
    minutes: Annotated[float, typer.Option(help="Time for everything.")] = 9.0,
    model: Annotated[list[str], typer.Option(help="Networks; default: a list of cases.")] = [],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Batch sizes of --model.")] = [256, 1],  # noqa: B006
    keep: Annotated[list[str], typer.Option(help="DBSR-A, DBSR-B or a density.")] = [],  # noqa: B006
    block: Annotated[str, typer.Option(help="Blocks of the masks.")] = "64x64",
    autotune: Annotated[bool, typer.Option(help="Have the backend measure each layer.")] = False,
    folder: Annotated[Path, typer.Option(help="For the results.")] = report.RESULTS,
    name: Annotated[str, typer.Option(help="Results are written as <name>.json and .png.")] = "gpu_models",
) -> None:
    """Whole networks on a GPU."""
    deadline = time.monotonic() + 60 * minutes
    faulthandler.dump_traceback_later(60 * minutes + GRACE_SECONDS, exit=True, file=sys.__stderr__)
    runner = runner_for(device)
    facts: dict[str, Any] = {"machine": gpu_machine.machine(runner), "log": []}
    wanted = [(m, b, tuple(keep) or ("0.5", "0.25")) for m in model for b in batch]
    cases = wanted or [(m, b, tuple(keep) or keeps) for m, b, keeps in CASES]
    height, width = (int(side) for side in block.split("x"))
    rows: dict[tuple[Any, ...], Row] = {}
    with torch.no_grad():
        for case in cases:
            if time.monotonic() > deadline:
                break
            try:
                left = lambda: deadline - time.monotonic()  # noqa: E731
                for row in measure(*case, (height, width), runner, left, autotune):
                    rows[row["model"], row["batch"], row["keep"]] = row  # a later one knows more
                    report.save(name, list(rows.values()), folder, **facts)
            except Exception as error:  # the next network may well run
                facts["log"].append(f"FAILED {case}: {type(error).__name__}: {error}")
                print(facts["log"][-1], flush=True)
    faulthandler.cancel_dump_traceback_later()
    path = report.save(name, list(rows.values()), folder, **facts)
    if rows and pictures.can_draw():
        pictures.draw_models(list(rows.values()), path.with_suffix(".png"))
    print_models(list(rows.values()), facts)


if __name__ == "__main__":
    typer.run(run)
