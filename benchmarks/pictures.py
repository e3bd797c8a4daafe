"""Tables and pictures of benchmark rows."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from . import report
from .timing import geometric_mean

Row = dict[str, Any]


def _unique(rows: Iterable[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def is_linear(row: Row) -> bool:
    return str(row["shape"]).startswith("linear")


def summarize(rows: list[Row]) -> list[Row]:
    """Geometric-mean speed-ups and times over the convolution shapes, one entry per batch, block, epilogue,
    density and number of threads."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if not is_linear(row):
            key = row["batch"], row["block"], row["epilogue"], row["density"], row.get("threads")
            groups[key].append(row)
    return [
        {
            "batch": batch,
            "block": block,
            "epilogue": epilogue,
            "density": density,
            "threads": threads,
            "shapes": len(members),
            "ideal": geometric_mean([1 / row["kept"] for row in members]),
            "auto": geometric_mean([row["speedup"]["auto"] for row in members]),
            "forced": geometric_mean([row["speedup"]["forced"] for row in members]),
            "worst_auto": min(row["speedup"]["auto"] for row in members),
            "dense_ms": geometric_mean([row["dense"][row["best_dense"]]["median_ms"] for row in members]),
            "auto_ms": geometric_mean([row["ours"]["auto"]["median_ms"] for row in members]),
            "engines_ms": _engine_means(members),
        }
        for (batch, block, epilogue, density, threads), members in groups.items()
    ]


def _engine_means(rows: list[Row]) -> dict[str, float]:
    """Milliseconds of every engine that ran all of these layers."""
    names = set.intersection(*(set(row.get("engines", {})) for row in rows))
    return {n: geometric_mean([row["engines"][n]["median_ms"] for row in rows]) for n in sorted(names)}


def print_layers(rows: list[Row]) -> None:
    """Every shape, then the geometric means: speed-up as decided, and in brackets with the kernel forced."""
    densities = _unique(rows, "density")
    for batch, block, epilogue in dict.fromkeys((r["batch"], r["block"], r["epilogue"]) for r in rows):
        members = [r for r in rows if (r["batch"], r["block"], r["epilogue"]) == (batch, block, epilogue)]
        table = Table(title=f"batch {batch}, blocks {block}, epilogue {epilogue}: speed-up over dense")
        for column in ("layer", "dense ms", *(f"{d:.0%} kept" for d in densities)):
            table.add_column(column, justify="left" if column == "layer" else "right")
        for shape in _unique(members, "shape"):
            cells = {r["density"]: r for r in members if r["shape"] == shape}
            first = next(iter(cells.values()))
            dense = first["dense"][first["best_dense"]]["median_ms"]
            table.add_row(
                shape,
                f"{dense:.3f} {first['best_dense']}",
                *(_cell(cells[d]["speedup"]) if d in cells else "" for d in densities),
            )
        means = summarize(members)
        if means:
            table.add_section()
            table.add_row("geometric mean", "", *(_cell(s) for s in means))
            for engine, ms in means[0]["engines_ms"].items():
                ratios = (f"{ms / s['auto_ms']:.2f}" for s in means)
                table.add_row(f"over {engine}", f"{ms:.3f}", *ratios)
        report.console.print(table)


def _cell(speedup: dict[str, float]) -> str:
    auto, forced = speedup["auto"], speedup["forced"]
    return f"{auto:.2f}" if auto == forced else f"{auto:.2f} ({forced:.2f})"


def can_draw() -> bool:
    """Whether matplotlib is there: machines that only measure do without."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_layers(rows: list[Row], path: Path) -> None:
    """Geometric-mean speed-up against kept fraction: one panel per batch, one line per block shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    means = summarize(rows)
    means = [s for s in means if s["threads"] == max(s["threads"] for s in means)]
    if not means:
        return
    epilogue = means[0]["epilogue"]
    batches = sorted({s["batch"] for s in means}, reverse=True)
    figure, axes = plt.subplots(
        1, len(batches), figsize=(4.6 * len(batches), 3.6), squeeze=False, sharey=True
    )
    for axis, batch in zip(axes[0], batches, strict=True):
        for block in _unique(means, "block"):
            line = [s for s in means if (s["batch"], s["block"], s["epilogue"]) == (batch, block, epilogue)]
            axis.plot([s["density"] for s in line], [s["auto"] for s in line], "o-", label=block)
        ideal = [s for s in means if s["batch"] == batch and s["block"] == means[0]["block"]]
        axis.plot(
            [s["density"] for s in ideal], [s["ideal"] for s in ideal], "--", color="grey", label="1 / kept"
        )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=f"batch {batch}", xlabel="kept fraction of the blocks", yscale="log", xlim=(1.05, 0))
        axis.set_yticks([1, 2, 4, 8], ["1×", "2×", "4×", "8×"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("speed-up over the fastest dense kernel")
    axes[0][0].legend(frameon=False)
    figure.suptitle("ResNet-50's 12 convolution shapes, fp32", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_models(rows: list[Row], path: Path) -> None:
    """Milliseconds of the fastest dense build and of ours, one pair of bars per model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.4))
    names = [f"{r['model']}, {r['kept']:.0%} kept, batch {r['batch']}" for r in rows]
    axis.barh(names, [r["speedup"] for r in rows], color="tab:blue", height=0.6)
    axis.axvline(1, color="black", linewidth=0.8)
    for i, row in enumerate(rows):
        axis.text(row["speedup"], i, f" {row['speedup']:.2f}×", va="center", fontsize=9)
    axis.invert_yaxis()
    dtype = {"float32": "fp32", "bfloat16": "bf16"}[rows[0].get("dtype", "float32")]
    axis.set_xlabel(f"speed-up of the whole model over its fastest dense build ({dtype})")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
