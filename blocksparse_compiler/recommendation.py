"""What `recommend_block_shape` found, and how it prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from . import variants
from .cost import format_seconds
from .devices import AnyDevice
from .pattern import BlockShape
from .plan import Site
from .tables import plain_text, shape_label


def shape_name(shape: BlockShape) -> str:
    return "x".join(map(str, shape))


@dataclass(frozen=True)
class LayerAdvice:
    """The estimates for all layers of one geometry.

    Args:
        names: qualified names of these layers.
        site: what they have in common.
        dense_seconds: of one of them.
        speedups: by block shape, then by density; 1 where the layer would stay dense.
        break_even: by block shape, the largest density, in percent steps, that pays; 0 if none does.
        note: why no block shape ever pays; empty if one does.
    """

    names: tuple[str, ...]
    site: Site
    dense_seconds: float
    speedups: Mapping[BlockShape, Mapping[float, float]]
    break_even: Mapping[BlockShape, float]
    note: str = ""


@dataclass(frozen=True)
class Recommendation:
    """Estimated gains of block shapes on one device, before training. Prints as two tables.

    Args:
        device: the device that the estimates are for.
        densities: shares of kept blocks, largest first.
        block_shapes: the shapes that were compared.
        layers: the layers, those of one geometry together.
        best: the shape to train with; `None` if none is worth it.
        reason: one sentence saying why.
    """

    device: AnyDevice
    densities: tuple[float, ...]
    block_shapes: tuple[BlockShape, ...]
    layers: tuple[LayerAdvice, ...]
    best: BlockShape | None = None
    reason: str = ""

    @property
    def dense_seconds(self) -> float:
        """Of all convolutions and linear layers together."""
        return sum(len(layer.names) * layer.dense_seconds for layer in self.layers)

    def speedup(self, block_shape: BlockShape, density: float) -> float:
        """Of all convolutions and linear layers together; those that would not gain stay dense."""
        seconds = sum(
            len(layer.names) * layer.dense_seconds / layer.speedups[block_shape][density]
            for layer in self.layers
        )
        return self.dense_seconds / seconds if seconds else 1.0

    def layers_that_pay(self, block_shape: BlockShape, density: float) -> int:
        """How many layers would run block-sparse."""
        return sum(len(layer.names) for layer in self.layers if layer.speedups[block_shape][density] > 1)

    def found_as(self, block_shape: BlockShape) -> BlockShape:
        """The tile that a plan for only this block shape looks for."""
        return variants.block_shapes(self.device.type, block_shape)[0]

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device.name,
            "best": None if self.best is None else list(self.best),
            "reason": self.reason,
            "densities": list(self.densities),
            "speedups": {
                shape_name(shape): {str(d): self.speedup(shape, d) for d in self.densities}
                for shape in self.block_shapes
            },
            "layers": [
                {
                    "names": list(layer.names),
                    "site": layer.site.to_json(),
                    "dense_seconds": layer.dense_seconds,
                    "speedups": {
                        shape_name(s): {str(d): x for d, x in by.items()} for s, by in layer.speedups.items()
                    },
                    "break_even": {shape_name(s): d for s, d in layer.break_even.items()},
                    "note": layer.note,
                }
                for layer in self.layers
            ],
        }

    # ---- printing -----------------------------------------------------------------------------

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        total = sum(len(layer.names) for layer in self.layers)
        yield Text(f"{total} convolutions and linear layers on {self.device.name} ({self.device.summary})")
        yield Text(
            f"Estimated speed-up of all of them together ({format_seconds(self.dense_seconds)} dense) "
            "by share of blocks kept; in brackets, how many run block-sparse:"
        )
        yield self._shapes_table()
        shape = self.best or max(self.block_shapes, key=lambda s: self.speedup(s, self.densities[-1]))
        yield self._layers_table(shape)
        yield Text(self.reason, style="bold")

    def __str__(self) -> str:
        return plain_text(self)

    __repr__ = __str__

    def _shapes_table(self) -> Table:
        table = Table()
        table.add_column("block")
        for density in self.densities:
            table.add_column(f"{density:.0%} kept", justify="right")
        for shape in self.block_shapes:
            cells = (
                f"{self.speedup(shape, d):.2f}x ({self.layers_that_pay(shape, d)})" for d in self.densities
            )
            name = shape_name(shape) + (" *" if shape == self.best else "")
            table.add_row(name, *cells, style="bold" if shape == self.best else "")
        return table

    def _layers_table(self, shape: BlockShape) -> Table:
        table = Table(title=f"Layer by layer, with {shape_name(shape)} blocks", title_justify="left")
        table.add_column("layer", overflow="fold", ratio=3)
        table.add_column("shape", ratio=3)
        table.add_column("dense", justify="right", no_wrap=True)
        for density in self.densities:
            table.add_column(f"{density:.0%}", justify="right", no_wrap=True)
        table.add_column("pays below", justify="right", no_wrap=True)
        table.add_column("why not", overflow="fold", ratio=5)
        for layer in self.layers:
            first, more = layer.names[0], len(layer.names) - 1
            limit = layer.break_even[shape]
            table.add_row(
                Text(first + (f" and {more} more" if more else "")),
                shape_label(layer.site),
                format_seconds(layer.dense_seconds),
                *(f"{x:.1f}x" if (x := layer.speedups[shape][d]) > 1 else "–" for d in self.densities),
                f"{limit:.0%}" if limit else "never",
                layer.note or ("" if limit else "not with these blocks"),
                style="" if limit else "dim",
            )
        return table
