"""What was found in a graph (`Site`), what was decided about it (`Decision`), and all of it (`Plan`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .errors import PlanError
from .pattern import BlockPattern

DENSE = "dense"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Site:
    """One convolution or linear layer in a graph.

    Sizes that are unknown until run time are strings that sympy can read (`"s0"`); all others are ints.

    Args:
        name: qualified name of the layer, as the user knows it (`layer1.0.conv2`).
        node: name of the FX node.
        op: `"linear"`, `"conv1d"`, `"conv2d"`, `"conv3d"`, or `"conv_transpose1d"` … `3d`.
        out_channels, in_channels, kernel_size, groups: as in `BlockPattern`.
        stride, dilation, output_padding: one entry per spatial dimension; `()` for linear.
        padding: `(before, after)` per spatial dimension.
        input_shape: `[N, C, *spatial]`, or `[*rows, C]` for linear.
        dtype, device: `"float32"`, `"cpu"` …; `"uint8"` or `"int8"` of a quantized input, where the weights
            are int8.
        bias: whether the layer adds a bias.
        epilogue: names of the pointwise ops that follow (`("relu",)`).
    """

    name: str
    node: str
    op: str
    out_channels: int
    in_channels: int
    kernel_size: tuple[int, ...] = ()
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    input_shape: tuple[int | str, ...] = ()
    dtype: str = "float32"
    device: str = "cpu"
    bias: bool = False
    epilogue: tuple[str, ...] = ()

    @property
    def transposed(self) -> bool:
        return self.op.startswith("conv_transpose")

    @property
    def is_quantized(self) -> bool:
        return self.dtype in ("uint8", "int8")

    @property
    def output_spatial(self) -> tuple[int | str, ...]:
        """Spatial output sizes; a string where the input size is symbolic."""
        return tuple(self._output_size(i) for i in range(len(self.kernel_size)))

    def _output_size(self, i: int) -> int | str:
        size, reach = self.input_shape[2 + i], self.dilation[i] * (self.kernel_size[i] - 1) + 1
        before, after = self.padding[i]
        if isinstance(size, str):
            if self.transposed:
                rest = reach + self.output_padding[i] - before - after
                return f"({size} - 1)*{self.stride[i]} + {rest}"
            return f"floor(({size} + {before + after - reach})/{self.stride[i]}) + 1"
        if self.transposed:
            return (size - 1) * self.stride[i] - before - after + reach + self.output_padding[i]
        return (size + before + after - reach) // self.stride[i] + 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Site:
        known = {f.name for f in fields(cls)}
        return cls(**{key: _tuples(value) for key, value in data.items() if key in known})


@dataclass(frozen=True)
class Decision:
    """What happens to one site, and why.

    Args:
        site: the layer.
        kernel: `"dense"`, or the name of a row of the kernel variant table.
        reason: one sentence for the user.
        pattern: the kept tiles, in the block shape the kernel uses; `None` if no zero block was found.
        config: the kernel's parameters (ints and strings), empty for dense.
        estimates: seconds per candidate, for the size hints used in planning.
        measured: whether `estimates` were measured on the device rather than computed.
    """

    site: Site
    kernel: str
    reason: str
    pattern: BlockPattern | None = None
    config: Mapping[str, int | str] = field(default_factory=dict)
    estimates: Mapping[str, float] = field(default_factory=dict)
    measured: bool = False

    @property
    def is_dense(self) -> bool:
        return self.kernel == DENSE

    @property
    def is_block_sparse(self) -> bool:
        """Whether it leaves out zero tiles; depthwise layers and others on kernels of ours may be whole."""
        return not self.is_dense and self.density < 1

    @property
    def density(self) -> float:
        return 1.0 if self.pattern is None else self.pattern.density

    @property
    def speedup(self) -> float | None:
        """Estimated dense time over the chosen kernel's; `None` without estimates."""
        dense, chosen = self.estimates.get(DENSE), self.estimates.get(self.kernel)
        return dense / chosen if dense and chosen else None

    def to_json(self) -> dict[str, Any]:
        return {
            "site": self.site.to_json(),
            "kernel": self.kernel,
            "reason": self.reason,
            "pattern": self.pattern and self.pattern.to_json(),
            "config": dict(self.config),
            "estimates": dict(self.estimates),
            "measured": self.measured,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Decision:
        pattern = data.get("pattern")
        return cls(
            Site.from_json(data["site"]),
            data["kernel"],
            data["reason"],
            BlockPattern.from_json(pattern) if pattern else None,
            data.get("config", {}),
            data.get("estimates", {}),
            data.get("measured", False),
        )


@dataclass(frozen=True)
class Plan:
    """The decisions about every site of a graph, in graph order, for one device.

    Prints as a table, saves as JSON, can be edited (`with_kernel`) and passed back in through
    `torch.compile(model, backend="blocksparse", options={"plan": plan})`.
    """

    decisions: tuple[Decision, ...] = ()
    device: str = "cpu"

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)

    def __str__(self) -> str:
        from .tables import render_plan

        return render_plan(self)

    def __getitem__(self, name: str) -> Decision:
        """The decision about the layer with this qualified name (or FX node name)."""
        for decision in self.decisions:
            if name in (decision.site.name, decision.site.node):
                return decision
        raise PlanError(
            f"Plan[{name!r}]",
            "the name of a layer in this plan",
            repr(name),
            f"Layers: {', '.join(d.site.name for d in self.decisions) or 'none'}.",
        )

    def with_kernel(self, name: str, kernel: str, **config: int | str) -> Plan:
        """A plan in which the layer `name` uses another kernel."""
        old = self[name]
        if kernel != DENSE and old.pattern is None:
            raise PlanError(
                f"Plan.with_kernel({name!r})",
                "a layer with zero blocks",
                "a layer without a pattern",
                f"Leave it {DENSE!r}, or prune it first (prune_blocks, insert_block_scales).",
            )
        new = replace(old, kernel=kernel, config=config or old.config, reason="chosen by the user")
        return replace(self, decisions=tuple(new if d is old else d for d in self.decisions))

    @property
    def digest(self) -> str:
        """16 hex digits over everything that changes the generated code."""
        parts = [
            (d.site.to_json(), d.kernel, d.pattern and d.pattern.digest, sorted(d.config.items()))
            for d in self.decisions
        ]
        return hashlib.sha256(json.dumps([self.device, parts], sort_keys=True).encode()).hexdigest()[:16]

    # ---- JSON ---------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        return {
            "format": "blocksparse-plan",
            "version": FORMAT_VERSION,
            "device": self.device,
            "decisions": [d.to_json() for d in self.decisions],
        }

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Raises `PlanError` on anything that `to_json` did not write."""
        if not isinstance(data, Mapping) or data.get("format") != "blocksparse-plan":
            raise PlanError("Plan.from_json", "a blocksparse plan", type(data).__name__, "Use Plan.save.")
        if data.get("version") != FORMAT_VERSION:
            raise PlanError(
                "Plan.from_json",
                f"format version {FORMAT_VERSION}",
                f"version {data.get('version')!r}",
                "Make the plan again with this version of the package.",
            )
        try:
            return cls(tuple(Decision.from_json(d) for d in data["decisions"]), data["device"])
        except (KeyError, TypeError) as error:
            raise PlanError(
                "Plan.from_json", "a whole plan", repr(error), "Save it again with Plan.save."
            ) from error

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_json(), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except json.JSONDecodeError as error:
            raise PlanError(str(path), "a JSON file", str(error), "Save it again with Plan.save.") from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value
