"""What a model costs, layer by layer, against the same model dense."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .layout import canonical_shape, groups_of, is_transposed
from .pattern import BlockShape
from .selection import Layer, select_layers
from .tables import plain_text
from .weights import effective_weight, evaluation_mode, kept_pattern, weight_parameters


@dataclass(frozen=True)
class LayerSparsity:
    """One layer, or the total.

    Args:
        block_shape: (output, input) channels of a tile; None if the layer is dense.
        kept_tiles, tiles: tiles (out-block, tap, in-block) that are not zero, and all of them.
        parameters, dense_parameters: weight elements in kept tiles, and all of them; bias included.
        macs, dense_macs: multiply-accumulates for the example inputs (a batch of 8 counts 8 times); None
            if no inputs were given or the layer was not called.
    """

    name: str
    type: str
    block_shape: BlockShape | None
    kept_tiles: int
    tiles: int
    parameters: int
    dense_parameters: int
    macs: int | None = None
    dense_macs: int | None = None


@dataclass(frozen=True)
class SparsityReport:
    """Rows in model order; prints as a table. `total` includes `other_parameters` (batch norm …)."""

    rows: tuple[LayerSparsity, ...]
    other_parameters: int

    def __getitem__(self, name: str) -> LayerSparsity:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    @property
    def total(self) -> LayerSparsity:
        counted = [row for row in self.rows if row.macs is not None]
        return LayerSparsity(
            name="total",
            type="",
            block_shape=None,
            kept_tiles=sum(row.kept_tiles for row in self.rows),
            tiles=sum(row.tiles for row in self.rows),
            parameters=sum(row.parameters for row in self.rows) + self.other_parameters,
            dense_parameters=sum(row.dense_parameters for row in self.rows) + self.other_parameters,
            macs=sum(row.macs or 0 for row in counted) if counted else None,
            dense_macs=sum(row.dense_macs or 0 for row in counted) if counted else None,
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": [asdict(row) for row in self.rows],
            "other_parameters": self.other_parameters,
            "total": asdict(self.total),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def __rich__(self) -> Table:
        table = Table(
            caption="tiles, parameters and multiply-accumulates: kept / dense", caption_justify="left"
        )
        table.add_column("layer", overflow="fold")
        for column in ("type", "block", "tiles", "parameters", "MACs", "kept"):
            table.add_column(column, justify="left" if column == "type" else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*_cells(row), style="dim" if row.block_shape is None else "")
        if self.other_parameters:
            table.add_row("everything else", "", "", "", _count(self.other_parameters), "", style="dim")
        table.add_section()
        table.add_row(*_cells(self.total), style="bold")
        return table

    def __str__(self) -> str:
        return plain_text(self)


def sparsity_report(model: nn.Module, *example_inputs: Any, **example_kwargs: Any) -> SparsityReport:
    """Parameters, multiply-accumulates and kept tiles of every convolution and linear layer, and in total.

    Works for plain, pruned, scaled and folded models; block scales are not counted, as folding removes
    them. With example inputs the model is run once, in evaluation mode and without gradients, for the
    output shapes; convolutions and linear layers count (padding included), batch norm, pooling and
    attention products do not.

    Raises:
        LayerError: if a weight is not finite.
    """
    layers = select_layers(model, "sparsity_report")
    positions: dict[nn.Module, int] = {}
    if example_inputs or example_kwargs:
        with _counting_positions(layers, positions), evaluation_mode(model), torch.no_grad():
            model(*example_inputs, **example_kwargs)
    counted: set[int] = set()  # tied weights count once
    rows = tuple(_row(layer, positions.get(layer.module), counted) for layer in layers)
    in_layers = {id(p) for layer in layers for p in layer.module.parameters()}
    others = sum(p.numel() for p in model.parameters() if id(p) not in in_layers)
    return SparsityReport(rows, others)


def _row(layer: Layer, positions: int | None, counted: set[int]) -> LayerSparsity:
    """`positions`: how often the whole weight is used, that is, the number of output positions."""
    module = layer.module
    pattern = kept_pattern(layer, effective_weight(layer))
    dense = math.prod(canonical_shape(module))
    kept = dense if pattern is None else pattern.kept_elements
    bias = module.bias.numel() if isinstance(module.bias, Tensor) else 0
    owner = id(weight_parameters(module)[0])
    once = 0 if owner in counted else 1
    counted.add(owner)
    return LayerSparsity(
        name=layer.name,
        type=parametrize.type_before_parametrizations(module).__name__,
        block_shape=None if pattern is None else pattern.block_shape,
        kept_tiles=0 if pattern is None else pattern.num_kept,
        tiles=0 if pattern is None else pattern.kept.numel(),
        parameters=once * kept + bias,
        dense_parameters=once * dense + bias,
        macs=None if positions is None else kept * positions,
        dense_macs=None if positions is None else dense * positions,
    )


@contextmanager
def _counting_positions(layers: list[Layer], positions: dict[nn.Module, int]) -> Iterator[None]:
    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        out_channels, in_channels, *_ = canonical_shape(module)
        if is_transposed(module):
            used = inputs[0].numel() // (in_channels * groups_of(module))
        else:
            used = output.numel() // out_channels
        positions[module] = positions.get(module, 0) + used

    handles = [layer.module.register_forward_hook(count) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cells(row: LayerSparsity) -> tuple[str, ...]:
    block = "x".join(map(str, row.block_shape)) if row.block_shape else ""
    return (
        row.name,
        row.type,
        block,
        f"{row.kept_tiles} / {row.tiles}" if row.tiles else "",
        _of(row.parameters, row.dense_parameters),
        "" if row.macs is None or row.dense_macs is None else _of(row.macs, row.dense_macs),
        f"{row.parameters / row.dense_parameters:.1%}" if row.dense_parameters else "",
    )


def _of(kept: int, dense: int) -> str:
    return _count(dense) if kept == dense else f"{_count(kept)} / {_count(dense)}"


def _count(n: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return str(n)
