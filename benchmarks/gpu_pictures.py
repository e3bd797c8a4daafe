"""Tables and a picture of rows measured on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import report
from .timing import geometric_mean

Row = dict[str, Any]


LINE = "{:<22} {:>9} {:>5} {:>5} {:>9} {:<12} {:>4} {:>11} {:>5} {:>5} {:>5} {:>5}  {}"
HEAD = (
    "layer",
    "block",
    "n",
    "kept",
    "dense ms",
    "",
    "TF/s",
    "auto",
    "best",
    "TF/s",
    "peak",
    "DRAM",
    "kernel",
)


def print_layers(rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """One line per layer and mask: the fastest dense build, the speed-up as decided and with the best kernel,
    and what that reaches: TFLOP/s on kept tiles, parts of the measured peak and of the memory's rate. Masks
    with equally many blocks in every row are marked `b`."""
    print(f"\n{facts['machine']['gpu']}: speed-up over the fastest dense build")
    print(LINE.format(*HEAD))
    for row in rows:
        print(_line(row, facts["ceilings"]))
    for block, density, mean, count in means(rows):
        print(
            f"{block} {density:.0%} kept, {count} convolutions: "
            f"auto {mean['auto']:.2f}, best {mean['best']:.2f}"
        )
    print(", ".join(f"{name} {value:.3g}" for name, value in facts["ceilings"].items()), flush=True)


def _line(row: Row, roofs: dict[str, float]) -> str:
    dense = row["dense"][row["best_dense"]]["median_ms"]
    block = row["block"] + ("" if row.get("mask", "random") == "random" else " b")
    start = [row["shape"], block, row["batch"], f"{row['kept']:.0%}", f"{dense:.4f}"]
    start += [row["best_dense"], f"{row['dense_tflops']:.0f}"]
    auto = f"{row['speedup']['auto']:.2f} {'dense' if row['auto'] == 'dense' else ''}"
    best = next((c for c in row["candidates"] if c["label"] == row["best"]), None)
    if best is None:
        return LINE.format(*start, auto, *[""] * 5)
    peak = best["kept_tflops"] * 1e12 / roofs["bfloat16_flops_per_second"]
    dram = best["least_tbytes_per_second"] * 1e12 / roofs["dram_bytes_per_second"]
    rates = f"{row['speedup']['best']:.2f}", f"{best['kept_tflops']:.0f}", f"{peak:.0%}", f"{dram:.0%}"
    failed = f" ({len(row['failed'])} failed)" if row["failed"] else ""
    return LINE.format(*start, auto, *rates, short(best) + failed)


def short(candidate: Row) -> str:
    """`gather 64x64 pixels128 stages4 warps4`."""
    parameters = " ".join(f"{key}{value}" for key, value in sorted(candidate["config"].items()))
    return f"{candidate['variant'].removeprefix('triton_')} {candidate['tile']} {parameters}"


def means(rows: Sequence[Row]) -> list[tuple[str, float, dict[str, float], int]]:
    """Geometric means over the convolutions, by block and density."""
    found = []
    convolutions = [row for row in rows if not row["shape"].startswith("linear") and row["speedup"]["best"]]
    for key in dict.fromkeys((row["block"], row["density"]) for row in convolutions):
        members = [row["speedup"] for row in convolutions if (row["block"], row["density"]) == key]
        mean = {mode: geometric_mean([s[mode] for s in members]) for mode in ("auto", "best")}
        found.append((*key, mean, len(members)))
    return found


def draw_layers(rows: Sequence[Row], path: Path) -> None:
    """Speed-up of the best kernel and of the model's choice, a pair of dots per layer and mask."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in rows if row["speedup"]["best"]]
    if not shown:
        return
    figure, axis = plt.subplots(figsize=(8, 0.22 * len(shown) + 1.6))
    names = [f"{r['shape']}, {r['batch']}, {r['block']}, {r['kept']:.0%}" for r in shown]
    places = range(len(shown))
    axis.plot([r["speedup"]["best"] for r in shown], places, "o", label="best kernel")
    axis.plot([r["speedup"]["auto"] for r in shown], places, "x", color="black", label="as decided")
    axis.plot([1 / r["kept"] for r in shown], places, "|", color="grey", label="1 / kept")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(list(places), names, fontsize=6)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="speed-up over the fastest dense kernel, bf16")
    axis.set_xticks([0.5, 1, 2, 4, 8], ["0.5×", "1×", "2×", "4×", "8×"])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    # The table, and the picture where there was no matplotlib, of a results file.
    results = Path(sys.argv[1])
    data = report.load(results)
    print_layers(data["rows"], data)
    draw_layers(data["rows"], results.with_suffix(".png"))
