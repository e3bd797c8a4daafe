"""What every benchmark writes: the machine it ran on, JSON, and one picture."""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"

console = Console()


def asks_for_gpu(arguments: Sequence[str]) -> bool:
    """Whether a command line holds `--device` with anything but the CPU: another set of options then."""
    named = [b for a, b in itertools.pairwise(arguments) if a == "--device"]
    named += [a.removeprefix("--device=") for a in arguments if a.startswith("--device=")]
    return any(device != "cpu" for device in named)


def dtype_of(name: str) -> torch.dtype:
    """A floating-point dtype by its name, `bfloat16`.

    Raises:
        typer.BadParameter: for anything else.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise typer.BadParameter(f"expected a floating-point dtype of torch, such as bfloat16, got {name!r}")
    return found


def with_dtype(name: str, dtype: str) -> str:
    """Name of the results of this dtype: `layers`, `layers_bfloat16`."""
    return name if dtype == "float32" else f"{name}_{dtype}"


def progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def machine() -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    return {
        "cpu": _cpu_model(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "date": date.today().isoformat(),
    }


def _cpu_model() -> str:
    """Brand, family and model: hypervisors often hide all but the last two."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    brand = fields.get("model name") or platform.machine()
    return f"{brand} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def merge(old: Path, rows: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """The rows of a results file of this machine, with new ones in place of those that agree on `keys`."""
    if not old.exists():
        return list(rows)
    data = load(old)
    varying = {"date"} | ({"threads"} & set(keys))
    theirs, mine = ({k: v for k, v in m.items() if k not in varying} for m in (data["machine"], machine()))
    if theirs != mine:
        raise ValueError(f"{old.name} is from another machine or torch ({theirs}): write to another --name")
    new = {tuple(row.get(k) for k in keys): row for row in rows}
    kept = [new.pop(tuple(row.get(k) for k in keys), row) for row in data["rows"]]
    return [*kept, *new.values()]


def save(name: str, rows: Sequence[Row], folder: Path = RESULTS, **more: Any) -> Path:
    """Writes `<folder>/<name>.json`: the machine, the rows, and whatever else is given."""
    path = path_of(name, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **more, "rows": list(rows)}, indent=1) + "\n")
    return path


def publish(
    name: str, rows: Sequence[Row], keys: Sequence[str], *, merged: bool, folder: Path = RESULTS
) -> list[Row]:
    """Saves a run's rows and says where; `merged` keeps those of an existing file that differ in `keys`."""
    written = merge(path_of(name, folder), rows, keys) if merged else list(rows)
    path = save(name, written, folder)
    console.print(f"wrote {path.name} in {path.parent.name}/")
    return written


def path_of(name: str, folder: Path = RESULTS) -> Path:
    return folder / f"{name}.json"


def load(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def best(timings: dict[str, Any], key: str = "median_ms") -> str:
    """Name of the fastest candidate."""
    return min(timings, key=lambda name: timings[name][key])


def speedup(dense: dict[str, Any], ours: dict[str, Any], key: str = "median_ms") -> float:
    """Fastest dense time over ours; both as written by `Timing.to_json`."""
    return float(dense[best(dense, key)][key] / ours[key])


def compared(dense: dict[str, Any], ours: dict[str, Any]) -> Row:
    """What a row says of the times of dense builds and of ours."""
    return {
        "dense": dense,
        "best_dense": best(dense),
        "ours": ours,
        "speedup": speedup(dense, ours),
        "speedup_minimum": speedup(dense, ours, "minimum_ms"),
    }
