"""Puts the committed results into README.md: `python -m benchmarks.readme`, after `make bench`.

Every measured figure of the README stands between `<!-- measured: NAME -->` and `<!-- end -->` and comes
from here; a test compares the two.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import report
from .never_slower import NOISE, by_decision
from .timing import geometric_mean

README = Path(__file__).parent.parent / "README.md"
TITLES = {"resnet50": "ResNet-50", "vgg16": "VGG-16", "vit_b16": "ViT-B/16", "bert_base": "BERT-base"}
TITLES |= {"mobilenet_v1": "MobileNet-v1", "mobilenet_v2": "MobileNet-v2", "resnet18": "ResNet-18"}
TITLES |= {"mobilenet_v3": "MobileNet-v3", "efficientnet_b0": "EfficientNet-B0"}
TITLES |= {"llama_block": "Llama, 2 layers, 128 tokens"}
ENGINES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_SECTION = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def layers(data: dict[str, Any]) -> str:
    """Geometric means over ResNet-50's convolution shapes, ReLU fused."""
    means = _most_threads([s for s in data["summary"] if s["epilogue"] == "relu"])
    densities = list(dict.fromkeys(s["density"] for s in means))
    lines = [
        _row("blocks", "batch", *(f"{d:.0%} kept" for d in densities)),
        _row("---", *["--:"] * (1 + len(densities))),
    ]
    for block, batch in dict.fromkeys((s["block"], s["batch"]) for s in means):
        line = {s["density"]: s["auto"] for s in means if (s["block"], s["batch"]) == (block, batch)}
        lines.append(_row(block, batch, *(f"{line[d]:.2f}×" if d in line else "–" for d in densities)))
    return "\n".join(lines)


def _most_threads(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    most = max(s["threads"] for s in entries)
    return [s for s in entries if s["threads"] == most]


def scaling(data: dict[str, Any]) -> str:
    """What a second thread gives, to dense layers and to ours: geometric means over the convolutions."""
    means = [s for s in data["summary"] if s["epilogue"] == "relu" and s["block"] == "32x32"]
    lines = [
        _row("32x32 blocks", "kept", "speed-up on 1 thread", "on 2 threads", "dense scales by", "ours by"),
        _row("---", *["--:"] * 5),
    ]
    for two in (s for s in means if s["threads"] == 2):
        for one in means:
            if one["threads"] == 1 and all(one[key] == two[key] for key in ("batch", "density")):
                scales = (f"{one[key] / two[key]:.2f}×" for key in ("dense_ms", "auto_ms"))
                ratios = (f"{s['auto']:.2f}×" for s in (one, two))
                lines.append(_row(f"batch {two['batch']}", f"{two['density']:.0%}", *ratios, *scales))
    return "\n".join(lines)


def engines(data: dict[str, Any]) -> str:
    """Our layers against dense ones on other engines."""
    means = _most_threads([s for s in data["summary"] if s["epilogue"] == "relu" and s["engines_ms"]])
    names = [name for name in ENGINES if any(name in s["engines_ms"] for s in means)]
    lines = [
        _row("32x32 blocks", "kept", "over torch's fastest", *(f"over {ENGINES[n]}" for n in names)),
        _row("---", *["--:"] * (2 + len(names))),
    ]
    for s in means:
        if s["block"] == "32x32" and s["density"] in (0.5, 0.25):
            over = (
                f"{s['engines_ms'][n] / s['auto_ms']:.2f}×" if n in s["engines_ms"] else "" for n in names
            )
            lines.append(_row(f"batch {s['batch']}", f"{s['density']:.0%}", f"{s['auto']:.2f}×", *over))
    return "\n".join(lines)


def decode(data: dict[str, Any]) -> str:
    """Linear layers on few rows: geometric means over the shapes."""
    rows = data["rows"]
    densities = list(dict.fromkeys(r["density"] for r in rows))
    lines = [
        _row("blocks", "rows", *(f"{d:.0%} kept" for d in densities)),
        _row("---", *["--:"] * (1 + len(densities))),
    ]
    for block, count in dict.fromkeys((r["block"], r["batch"]) for r in rows):
        cells = []
        for d in densities:
            same = [r for r in rows if (r["block"], r["batch"], r["density"]) == (block, count, d)]
            cells.append(f"{geometric_mean([r['speedup']['auto'] for r in same]):.2f}×")
        lines.append(_row(block, count, *cells))
    return "\n".join(lines)


def models(data: dict[str, Any]) -> str:
    """One row per network, mask and batch."""
    lines = [
        _row("network", "batch", "parameters kept", "fastest dense build", "ours", "speed-up"),
        _row("---", *["--:"] * 5),
    ]
    for row in data["rows"]:
        name = TITLES.get(row["model"], row["model"])
        if row["keep"].startswith("DBSR"):
            name += f", {row['keep']}"
        dense = row["dense"][row["best_dense"]]["median_ms"]
        times = f"{dense:.0f} ms", f"{row['ours']['median_ms']:.0f} ms"
        lines.append(_row(name, row["batch"], f"{row['kept']:.0%}", *times, f"**{row['speedup']:.2f}×**"))
    return "\n".join(lines)


def compile_time(data: dict[str, Any]) -> str:
    """Seconds to the first result, next to the two builds of Inductor."""
    lines = [
        _row("first result of", "backend", "cold caches", "warm caches"),
        _row("---", "---", "--:", "--:"),
    ]
    for row in data["rows"]:
        for backend, seconds in row["seconds"].items():
            cells = (f"{seconds[state]:.1f} s" for state in ("cold", "warm"))
            lines.append(_row(TITLES.get(row["model"], row["model"]), backend, *cells))
    return "\n".join(lines)


def linear(data: dict[str, Any]) -> str:
    """BERT's linear layers against dense, and torch's own block-sparse product against dense."""
    rows = [r for r in data["rows"] if r["shape"].startswith("linear") and r["block"] == "32x32"]
    theirs = [r for r in rows if r["torch_bsr"]]
    columns = ["ours", "`torch.sparse_bsr`"] if theirs else ["ours"]
    lines = [_row("32x32 blocks, BERT's linear layers", *columns), _row("---", *["--:"] * len(columns))]
    for density in dict.fromkeys(r["density"] for r in theirs or rows):
        members = [r for r in rows if r["density"] == density]
        ratios = [[r["speedup"]["auto"] for r in members]]
        if theirs:
            ratios.append([report.speedup(r["dense"], r["torch_bsr"]) for r in members])
        lines.append(_row(f"{density:.0%} kept", *(f"{geometric_mean(ratio):.2f}×" for ratio in ratios)))
    return "\n".join(lines)


def training(data: dict[str, Any]) -> str:
    """A training step of ResNet-50's stages."""
    lines = [
        _row("ResNet-50's", "batch", "kept", "stored as", "fastest dense step", "ours", "speed-up"),
        _row("---", "--:", "--:", "---", *["--:"] * 3),
    ]
    for row in data["rows"]:
        dense = row["dense"][row["best_dense"]]["median_ms"]
        form = {"masked": "masks", "folded": "kept tiles"}[row["form"]]
        times = f"{dense:.0f} ms", f"{row['ours']['median_ms']:.0f} ms"
        cells = (row["stage"], row["batch"], f"{row['density']:.0%}", form, *times)
        lines.append(_row(*cells, f"**{row['speedup']:.2f}×**"))
    return "\n".join(lines)


def sparse_pointwise(data: dict[str, Any]) -> str:
    """MobileNets with scattered zeros in their 1x1 convolutions."""
    lines = [
        _row(
            "network",
            "batch",
            "threads",
            "zeros in 1x1 layers",
            "blocks",
            "fastest dense",
            "ours",
            "speed-up",
        ),
        _row("---", "--:", "--:", "--:", "--:", "--:", "--:", "--:"),
    ]
    for row in data["rows"]:
        dense = row["dense"][row["best_dense"]]["median_ms"]
        times = f"{dense:.1f} ms", f"{row['ours']['median_ms']:.1f} ms"
        threads = row.get("threads", data["machine"]["threads"])
        cells = (
            TITLES.get(row["model"], row["model"]),
            row["batch"],
            threads,
            f"{row['sparsity']:.0%}",
            row["block"],
        )
        lines.append(_row(*cells, *times, f"**{row['speedup']:.2f}×**"))
    return "\n".join(lines)


def periodic(data: dict[str, Any]) -> str:
    """Networks with periodic kernels."""
    lines = [
        _row("network", "batch", "kernels", "MACs kept", "fastest dense build", "ours", "speed-up"),
        _row("---", "--:", "---", *["--:"] * 4),
    ]
    for row in data["rows"]:
        dense = row["dense"][row["best_dense"]]["median_ms"]
        times = f"{dense:.1f} ms", f"{row['ours']['median_ms']:.1f} ms"
        name = TITLES.get(row["model"], row["model"])
        cells = (name, row["batch"], row["scheme"], f"{row['kept_macs']:.0%}", *times)
        lines.append(_row(*cells, f"**{row['speedup']:.2f}×**"))
    return "\n".join(lines)


def break_even(data: dict[str, Any]) -> str:
    """From which share of zeros on a sparse 1x1 convolution pays, measured and planned."""
    lines = [
        _row("1x1 convolution", "blocks", "dense", "30% kept", "10% kept", "pays below", "planned below"),
        _row("---", "---", *["--:"] * 5),
    ]
    for row in data["rows"]:
        ratios = (f"{row['dense_us'] / row['ours_us'][d]:.2f}×" for d in ("0.3", "0.1"))
        limits = (f"{row[key]:.0%} kept" for key in ("break_even", "planned"))
        lines.append(_row(row["shape"], row["block"], f"{row['dense_us']:.0f} us", *ratios, *limits))
    return "\n".join(lines)


def quantized(data: dict[str, Any]) -> str:
    """Layers of models quantized to 8 bits, geometric means over the shapes."""
    densities = list(data["rows"][0]["densities"])
    means = (geometric_mean([r["densities"][d]["speedup"] for r in data["rows"]]) for d in densities)
    return "\n".join(
        [
            _row("32x32 blocks", *(f"{float(d):.0%} kept" for d in densities)),
            _row("---", *["--:"] * len(densities)),
            _row("ResNet-50's convolutions and a linear layer", *(f"{mean:.2f}×" for mean in means)),
        ]
    )


def never_slower(data: dict[str, Any]) -> str:
    """How many of the layers drawn at random are slower than dense."""
    lines = [
        _row("layers drawn at random", "number", "geometric mean", "slower than dense by over 5%", "worst"),
        _row("---", *["--:"] * 4),
    ]
    for name, rows in by_decision(data["rows"]).items():
        ratios = [row["speedup"] for row in rows]
        slower = sum(ratio < 1 / NOISE for ratio in ratios)
        mean = geometric_mean(ratios)
        lines.append(_row(name, len(rows), f"**{mean:.2f}×**", slower, f"{min(ratios, default=1):.2f}×"))
    return "\n".join(lines)


def machine(data: dict[str, Any]) -> str:
    """What the figures were measured on."""
    m = data["machine"]
    return (
        f"Measured on {m['threads']} threads of {m['cpu']}, {m['instruction_set']}, torch {m['torch']}, fp32."
    )


SECTIONS = {
    "layers": (layers, "layers"),
    "models": (models, "models"),
    "layers_bf16": (layers, "layers_bfloat16"),
    "models_bf16": (models, "models_bfloat16"),
    "linear_bf16": (linear, "layers_bfloat16"),
    "linear": (linear, "layers"),
    "compile_time": (compile_time, "compile_time"),
    "training": (training, "training"),
    "sparse_pointwise": (sparse_pointwise, "sparse_pointwise"),
    "periodic": (periodic, "periodic"),
    "scaling": (scaling, "layers"),
    "engines": (engines, "layers"),
    "decode": (decode, "decode"),
    "break_even": (break_even, "break_even"),
    "quantized": (quantized, "quantized"),
    "never_slower": (never_slower, "never_slower"),
    "machine": (machine, "layers"),
}


def fill(text: str, folder: Path = report.RESULTS) -> str:
    """The README's text with every measured section written anew."""

    def section(match: re.Match[str]) -> str:
        render, name = SECTIONS[match[2]]
        return f"{match[1]}{render(report.load(folder / f'{name}.json'))}\n{match[3]}"

    return _SECTION.sub(section, text)


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    README.write_text(fill(README.read_text()))
