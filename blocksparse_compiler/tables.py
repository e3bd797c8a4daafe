"""Plans as tables: for a terminal (rich), for a file (plain text), for a page (`explanation.html`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from .cost import format_seconds
from .devices import AnyDevice
from .layouts import CHANNELS_LAST, Layouts
from .plan import DENSE, Decision, Plan, Site

PLAIN_WIDTH = 160


@dataclass(frozen=True)
class Totals:
    """Sums over the layers of a plan that have estimates, in seconds.

    Args:
        dense: every layer dense.
        chosen: every layer as planned.
        layers, sparse: number of layers, and of those on a block-sparse kernel.
    """

    dense: float
    chosen: float
    layers: int
    sparse: int

    @property
    def speedup(self) -> float | None:
        return self.dense / self.chosen if self.chosen else None

    @classmethod
    def of(cls, plan: Plan) -> Totals:
        known = [d for d in plan if DENSE in d.estimates and d.kernel in d.estimates]
        return cls(
            sum(d.estimates[DENSE] for d in known),
            sum(d.estimates[d.kernel] for d in known),
            len(plan),
            sum(d.is_block_sparse for d in plan),
        )

    def __str__(self) -> str:
        head = f"{self.sparse} of {self.layers} layers block-sparse"
        if not self.chosen:
            return head
        return (
            f"{head}; convolutions and linear layers together {format_seconds(self.chosen)} "
            f"against {format_seconds(self.dense)} dense ({self.speedup:.1f}x)"
        )


def shape_label(site: Site) -> str:
    """Kernel, channels and input size in a few characters: `"3x3/2 64→128 g4 @56x56"`."""
    parts = []
    if site.kernel_size:
        parts.append(_times(site.kernel_size) + _stride(site.stride))
    parts.append(f"{site.in_channels}→{site.out_channels}")
    if site.groups > 1:
        parts.append(f"g{site.groups}")
    if site.kernel_size and len(site.input_shape) > 2:
        parts.append("@" + _times(site.input_shape[2:]))
    return " ".join(parts)


def sparse_estimate(decision: Decision) -> float | None:
    """Seconds of the best block-sparse candidate, chosen or not."""
    others = [seconds for name, seconds in decision.estimates.items() if name != DENSE]
    return min(others, default=None)


@dataclass(frozen=True)
class _Column:
    """A column of the plan's table, left out on terminals narrower than `needs`."""

    name: str
    needs: int = 0
    right: bool = False
    ratio: int | None = None


_COLUMNS = (
    _Column("layer", ratio=3),
    _Column("op", needs=130),
    _Column("shape", needs=90, ratio=3),
    _Column("kept", needs=70, right=True),
    _Column("block", needs=70, right=True),
    _Column("kernel", needs=110, ratio=2),
    _Column("layout", needs=90),
    _Column("dense", needs=130, right=True),
    _Column("sparse", needs=130, right=True),
    _Column("gain", needs=110, right=True),
    _Column("why", ratio=6),
)


def plan_table(plan: Plan, *, title: str | None = None, width: int = PLAIN_WIDTH) -> RenderableType:
    """One row per layer, with the columns that `width` characters have room for. `Console.print` it."""
    table = Table(title=title, title_justify="left", caption=str(Totals.of(plan)), caption_justify="left")
    regions = has_regions(plan)
    shown = [c for c in _COLUMNS if c.needs <= width and (regions or c.name != "layout")]
    for column in shown:
        table.add_column(
            column.name,
            justify="right" if column.right else "left",
            ratio=column.ratio,
            overflow="fold",
            no_wrap=column.ratio is None,
        )
    for decision in plan:
        cells = dict(zip((column.name for column in _COLUMNS), _row(decision), strict=True))
        style = "dim" if decision.is_dense else ""
        table.add_row(*(Text(cells[column.name]) for column in shown), style=style)
    return table


def render_plan(plan: Plan, *, title: str | None = None, width: int = PLAIN_WIDTH) -> str:
    """`plan_table` as plain text of at most `width` columns."""
    return plain_text(plan_table(plan, title=title, width=width), width)


def plain_text(renderable: RenderableType, width: int = PLAIN_WIDTH) -> str:
    """What a terminal without colours, `width` columns wide, would show."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().rstrip("\n")


def _row(decision: Decision) -> tuple[str, ...]:
    site, pattern, estimates = decision.site, decision.pattern, decision.estimates
    dense, sparse = estimates.get(DENSE), sparse_estimate(decision)
    gain = None if decision.is_dense else decision.speedup
    return (
        site.name,
        site.op,
        shape_label(site),
        f"{decision.density:.0%}" if pattern else "",
        _times(pattern.block_shape) if pattern else "",
        decision.kernel,
        layout_label(decision),
        format_seconds(dense) if dense else "",
        format_seconds(sparse) if sparse else "",
        f"{gain:.1f}x" if gain else "",
        decision.reason,
    )


def has_regions(plan: Plan) -> bool:
    """Whether any layer reads or writes channels first."""
    return any(Layouts.of(decision.config) != CHANNELS_LAST for decision in plan)


def layout_label(decision: Decision) -> str:
    """Where the channels lie; nothing for linear layers, which know but one layout."""
    return str(Layouts.of(decision.config)) if decision.site.kernel_size else ""


def _times(sizes: tuple[int | str, ...]) -> str:
    return "x".join(str(size) for size in sizes)


def _stride(stride: tuple[int, ...]) -> str:
    if set(stride) <= {1}:
        return ""
    return f"/{stride[0]}" if len(set(stride)) == 1 else f"/{_times(stride)}"


# ---- facts and devices -----------------------------------------------------------------------------

_SUFFIXES = (
    ("_flops_per_second_per_thread", 1e9, "GFLOP/s per thread"),
    ("_flops_per_second", 1e12, "TFLOP/s"),
    ("_bytes_per_second_per_thread", 1e9, "GB/s per thread"),
    ("_bytes_per_second", 1e9, "GB/s"),
    ("_bytes_per_clock_per_multiprocessor", 1, "B per clock and multiprocessor"),
    ("_bytes_per_multiprocessor", 1024, "KiB per multiprocessor"),
    ("_bytes_per_block", 1024, "KiB per thread block"),
    ("_bytes_per_thread", 1024, "KiB per thread"),
    ("_bytes", 1024, "KiB"),
    ("_seconds_per_vector", 1e-9, "ns per vector"),
    ("_seconds", 1e-6, "us"),
    ("_hertz", 1e9, "GHz"),
    ("_per_multiprocessor", 1, "per multiprocessor"),
)


def facts_table(facts: Mapping[str, str]) -> RenderableType:
    """Two columns: name and value."""
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def device_table(device: AnyDevice) -> RenderableType:
    """Every figure of a device, with its unit and its source."""
    table = Table(title=f"{device.name} ({device.summary})", title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("unit")
    table.add_column("source", overflow="fold")
    for name in device.number_names():
        found, source = getattr(device, name), device.sources.get(name, "")
        if isinstance(found, Mapping):
            for key, number in found.items():
                figure, number_text, unit = _figure(name, number)
                table.add_row(f"{figure} {key}", number_text, unit, source)
        else:
            table.add_row(*_figure(name, found), source)
    for kind, fraction in sorted(device.efficiency.items()):
        source = device.sources.get(f"efficiency {kind}", device.sources.get("efficiency", ""))
        table.add_row(f"efficiency {kind}", f"{fraction:.2f}", "of peak", source)
    return table


def _figure(name: str, value: float) -> tuple[str, str, str]:
    for suffix, size, unit in _SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix).replace("_", " "), f"{value / size:,.4g}", unit
    return name.replace("_", " "), f"{value:g}", ""
