"""Time to the first result of a model, with cold and with warm caches, against Inductor's.

    python -m benchmarks.compile_time --model resnet50 --keep DBSR-B

Every measurement is a process of its own: cold starts with an empty Inductor cache, warm starts a new
process on the cache that the cold one left. Importing torch and building the model are not counted.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from blocksparse_compiler.devices import device

from . import baselines, models, report, zoo

BACKENDS = ("inductor", "inductor+cpp_wrapper", "blocksparse")
WORKER = "--worker"


def first_call_seconds(backend: str, name: str, keep: str, batch: int) -> float:
    """Seconds of compiling and calling once, in this process."""
    network, _ = models.pruned(name, keep, (32, 32))
    x = network.input(batch)
    with torch.no_grad():
        warm_up()
        start = time.perf_counter()
        if backend == "blocksparse":
            baselines.compiled(network.forward, backend="blocksparse")(x)
        else:
            with baselines.frozen_inductor(backend.endswith("cpp_wrapper")):
                baselines.compiled(network.forward)(x)
        return time.perf_counter() - start


def warm_up() -> None:
    """Imports what either backend needs, and calibrates this machine if that was never done."""
    for module in ("torch._inductor.compile_fx", "blocksparse_compiler.backend"):
        importlib.import_module(module)
    baselines.compiled(lambda t: t + 1, backend="aot_eager")(torch.zeros(1))
    device()


def in_subprocess(backend: str, name: str, keep: str, batch: int, cache: str) -> float:
    command = [sys.executable, "-m", "benchmarks.compile_time", WORKER, backend, name, keep, str(batch)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure(name: str, keep: str, batch: int) -> dict[str, Any]:
    """Cold and warm seconds of every backend, and ours over Inductor's."""
    seconds: dict[str, dict[str, float]] = {}
    for backend in BACKENDS:
        with tempfile.TemporaryDirectory() as cache:
            cold = in_subprocess(backend, name, keep, batch, cache)
            warm = min(in_subprocess(backend, name, keep, batch, cache) for _ in range(2))
        seconds[backend] = {"cold": cold, "warm": warm}
    ours = seconds["blocksparse"]
    ratios = {
        backend: {state: ours[state] / seconds[backend][state] for state in ours} for backend in BACKENDS[:2]
    }
    return {"model": name, "keep": keep, "batch": batch, "seconds": seconds, "ours_over": ratios}


def run(
    model: Annotated[list[str], typer.Option(help="Networks.")] = ["resnet50"],  # noqa: B006
    keep: Annotated[str, typer.Option(help="DBSR-A, DBSR-B or a density.")] = "DBSR-B",
    batch: Annotated[int, typer.Option(help="Batch size.")] = 8,
) -> None:
    """Compilation time against Inductor's own."""
    unknown = [name for name in model if name not in zoo.NETWORKS]
    if unknown:
        raise typer.BadParameter(f"{unknown}: expected some of {list(zoo.NETWORKS)}")
    rows = [measure(name, keep, batch) for name in model]
    table = Table(title="seconds to the first result")
    for column in ("model", "backend", "cold", "warm"):
        table.add_column(column, justify="right" if column in ("cold", "warm") else "left")
    for row in rows:
        for backend, seconds in row["seconds"].items():
            table.add_row(row["model"], backend, f"{seconds['cold']:.1f}", f"{seconds['warm']:.1f}")
    report.console.print(table)
    report.save("compile_time", rows)


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        print(json.dumps(first_call_seconds(*sys.argv[2:5], int(sys.argv[5]))))
    else:
        typer.run(run)
