"""A picture of which weight blocks a folded model kept."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from blocksparse_compiler import BlockPattern


def draw(model: nn.Module, path: Path) -> Path:
    """One panel per folded layer: rows are output blocks, columns input blocks, dark is kept."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    patterns: dict[str, BlockPattern] = {
        name: module.pattern
        for name, module in model.named_modules()
        if isinstance(getattr(module, "pattern", None), BlockPattern)
    }
    figure, axes = plt.subplots(
        1, max(1, len(patterns)), figsize=(1.9 * max(1, len(patterns)), 2.5), squeeze=False
    )
    for axis, (name, pattern) in zip(axes[0], patterns.items(), strict=False):
        axis.imshow(pattern.kept.any(1), cmap="Greys", vmin=0, vmax=1.3, interpolation="nearest")
        axis.set_title(f"{name}\n{pattern.density:.0%} kept", fontsize=8)
        axis.set(xticks=[], yticks=[])
    bh, bw = next(iter(patterns.values())).block_shape if patterns else (0, 0)
    figure.suptitle(f"kept {bh}x{bw} weight blocks (output x input channels)", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
