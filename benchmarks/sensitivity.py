"""What plans owe to each figure of the cost model: decisions that change when it is off, and what they cost.

    python -m benchmarks.sensitivity
    python -m benchmarks.sensitivity --device avx512-16core --error 0.3

Plans whole networks with every figure `error` too high and too low, in turn. The cost of a plan is what the
true figures say of its decisions (`regret`: over the time of the plan by the true figures). Measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer
from rich.table import Table

import blocksparse_compiler as bsc
from blocksparse_compiler import BlockPattern, Site, cost, devices
from blocksparse_compiler.cpu_fit import with_figure
from blocksparse_compiler.cpu_probes import EPILOGUE
from blocksparse_compiler.devices import NUMBERS, DeviceSpec
from blocksparse_compiler.passes.choose_kernels import find_patterns
from blocksparse_compiler.passes.find_sites import sites_with_calls
from blocksparse_compiler.passes.static_values import StaticValues
from blocksparse_compiler.roofline import dense_instructions
from blocksparse_compiler.variants import block_shapes

from . import report, zoo

SHAPES = (
    "threads",
    "vector_bits",
    "vector_registers",
    "l1_bytes_per_thread",
    "l2_bytes_per_thread",
    "l3_bytes",
)
"""Fields that are known, not measured."""

CASES: dict[str, tuple[str, tuple[int, int], float, str]] = {
    "ResNet-50, 50 % of 32x32": ("resnet50", (32, 32), 0.5, "float32"),
    "ResNet-50, 50 % of 8x8": ("resnet50", (8, 8), 0.5, "float32"),
    "ResNet-50, 50 % of 16x16, bf16": ("resnet50", (16, 16), 0.5, "bfloat16"),
    "BERT-base, 70 % of 16x16": ("bert_base", (16, 16), 0.7, "float32"),
    "MobileNet-v1, 30 % of weights": ("mobilenet_v1", (1, 1), 0.3, "float32"),
    "MobileNet-v2, 15 % of 4x1": ("mobilenet_v2", (4, 1), 0.15, "float32"),
}
"""Network, tiles, share kept, dtype; densities near those at which sparse kernels begin to pay."""


@dataclass(frozen=True)
class Layer:
    """Layers of a network that cost the same, and the kernels that can run them, with their tiles."""

    site: Site
    count: int
    options: tuple[tuple[str, BlockPattern], ...]

    def seconds(self, choice: int | None, device: DeviceSpec) -> float:
        """Of one option, or dense."""
        if choice is None:
            return cost.dense_cost(self.site, device).evaluate()
        kernel, pattern = self.options[choice]
        return cost.sparse_cost(self.site, pattern, device, kernel).evaluate()

    def choice(self, device: DeviceSpec) -> int | None:
        """As `cost.choose` does."""
        times = [self.seconds(i, device) for i in range(len(self.options))]
        limit = cost.MARGIN * self.seconds(None, device)
        return times.index(min(times)) if times and min(times) < limit else None


Layers = list[Layer]


def layers_of(network: str, block: tuple[int, int], density: float, dtype: str, device: DeviceSpec) -> Layers:
    """The layers of a pruned network at batch 1; those of one shape and as many tiles count as one."""
    found = zoo.NETWORKS[network]()
    names = zoo.pointwise(found.model) if block[1] == 1 else zoo.prunable(found.model, block)
    bsc.prune_blocks(found.model, block, density, include=names)
    kind = report.dtype_of(dtype)
    x = found.input(1)
    graph = bsc.trace(found.model.to(kind), x.to(kind) if x.is_floating_point() else x)
    values, layers = StaticValues(graph), {}
    for call, site in sites_with_calls(graph):
        weight = values.get(call.weight)
        if weight is None:
            continue
        patterns = find_patterns(call, site, weight, block_shapes("cpu", None, site.dtype))
        decision = cost.choose(site, patterns, device)
        possible = len(decision.estimates) > 1
        ranked = cost.candidates(site, patterns, device)[0] if possible else []
        key = replace(site, name="", node=""), tuple((c.label, c.pattern.num_kept) for c in ranked)
        count = layers[key].count + 1 if key in layers else 1
        layers[key] = Layer(site, count, tuple((c.variant, c.pattern) for c in ranked))
    return list(layers.values())


def seconds(layers: Layers, chosen: Sequence[int | None], device: DeviceSpec) -> float:
    """What these choices take, by the figures of `device`."""
    pairs = zip(layers, chosen, strict=True)
    return sum(layer.count * layer.seconds(choice, device) for layer, choice in pairs)


def figures(device: DeviceSpec) -> dict[str, float]:
    """Every measured figure by its name; see `cpu_fit.with_figure`."""
    fields = {name: getattr(device, name) for name in NUMBERS if name not in SHAPES}
    epilogues = fields.pop("tile_epilogue_seconds_per_vector")
    found = {**fields, **{EPILOGUE + name: value for name, value in epilogues.items()}, **device.efficiency}
    return {name: value for name, value in found.items() if value}


def concerns(name: str, layers: Layers, device: DeviceSpec) -> bool:
    """Whether a figure can have a part in the plan of these layers; fields always may."""
    if name in NUMBERS:
        return True
    sites = [layer.site for layer in layers]
    kernels = {kernel for layer in layers for kernel, _ in layer.options}
    kernels |= {dense_instructions(site.dtype, cost.geometry(site), device)[0] for site in sites}
    head = name.removeprefix(EPILOGUE).partition("/")[0]
    return head in kernels or head[0].isdigit()  # of tiles on any kernel


def rows(
    layers_by_case: Mapping[str, Layers], device: DeviceSpec, error: float, advance: Callable[[], object]
) -> Iterator[dict[str, Any]]:
    """One row per network and figure, too high or too low, that changes a decision."""
    known = figures(device)
    for case, layers in layers_by_case.items():
        truth = [layer.choice(device) for layer in layers]
        best = seconds(layers, truth, device)
        for name, value in known.items():
            advance()
            if not concerns(name, layers, device):
                continue
            for factor in (1 - error, 1 + error):
                off = with_figure(device, name, value * factor)
                wrong = [layer.choice(off) for layer in layers]
                pairs = zip(layers, truth, wrong, strict=True)
                changed = sum(layer.count for layer, a, b in pairs if a != b)
                if changed:
                    yield {
                        "case": case,
                        "layers": sum(layer.count for layer in layers),
                        "figure": name,
                        "factor": factor,
                        "changed": changed,
                        "regret": seconds(layers, wrong, device) / best,
                    }


def print_rows(found: Sequence[dict[str, Any]], cases: Mapping[str, Layers], figure_count: int) -> None:
    table = Table(title=f"plans with one of {figure_count} figures off, by network: the costliest first")
    for column in ("network", "layers", "figures that matter", "worst figure", "changed", "regret"):
        table.add_column(column, justify="left" if column in ("network", "worst figure") else "right")
    for case, layers in cases.items():
        mine = sorted((r for r in found if r["case"] == case), key=lambda r: -r["regret"])
        matter = str(len({r["figure"] for r in mine}))
        for i, r in enumerate(mine[:3] or [{"figure": "", "changed": 0, "regret": 1.0}]):
            first = (case, str(sum(layer.count for layer in layers)), matter) if i == 0 else ("", "", "")
            figure = f"{r['figure']} x {r['factor']:.1f}" if r["figure"] else "none"
            table.add_row(*first, figure, str(r["changed"]), f"{r['regret'] - 1:.2%}")
    report.console.print(table)


def run(
    device: Annotated[str, typer.Option(help="A known CPU, or `host`, with its measured figures.")] = "host",
    error: Annotated[float, typer.Option(help="How far figures are off.")] = 0.2,
    name: Annotated[str, typer.Option(help="Results are written as <name>.json.")] = "sensitivity",
) -> None:
    """Decisions that change when a figure is off, and what they cost."""
    spec = devices.device(device)
    if not isinstance(spec, DeviceSpec):
        raise typer.BadParameter(f"{device}: a CPU, please")
    cases = {case: layers_of(*arguments, spec) for case, arguments in CASES.items()}
    with report.progress() as bar:
        task = bar.add_task("planning", total=len(cases) * len(figures(spec)))
        found = list(rows(cases, spec, error, lambda: bar.advance(task)))
    print_rows(found, cases, len(figures(spec)))
    path = report.save(name, found, error=error, figures=spec.to_json())
    report.console.print(f"wrote {path.name} in {path.parent.name}/")


if __name__ == "__main__":
    typer.run(run)
