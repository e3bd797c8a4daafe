"""`explain`: what the compiler would do with a model, layer by layer, and why."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult

from .cost import format_seconds
from .devices import AnyDevice, home
from .devices import device as find_device
from .errors import OptionError
from .gpu_devices import GpuSpec
from .pattern import BlockShape
from .plan import DENSE, Decision, Plan
from .tables import (
    PLAIN_WIDTH,
    Totals,
    has_regions,
    layout_label,
    plan_table,
    render_plan,
    shape_label,
    sparse_estimate,
)


class Explanation:
    """The plan of a model for one device. Prints as a table; shows as a page in a notebook.

    Attributes:
        plan: the `Plan`, which `torch.compile(..., options={"plan": plan})` accepts.
        device: the `DeviceSpec` or `GpuSpec` that it was made for.
    """

    def __init__(
        self,
        plan: Plan,
        device: AnyDevice,
        model: torch.nn.Module | None = None,
        inputs: tuple[Any, ...] = (),
    ) -> None:
        self.plan, self.device = plan, device
        self._model, self._inputs = model, inputs

    @property
    def title(self) -> str:
        name = "plan" if self._model is None else type(self._model).__name__
        return f"{name} on {self.device.name} ({self.device.summary})"

    @property
    def totals(self) -> Totals:
        """Estimated seconds of all convolutions and linear layers, dense and as planned."""
        return Totals.of(self.plan)

    @cached_property
    def kernels(self) -> dict[str, str]:
        """Generated source by layer name, for the layers on a block-sparse kernel.

        C++ for the CPU of this machine (compiles the model), Triton for any GPU (needs Triton, but no GPU).

        Raises:
            OptionError: if the plan is for another CPU; for a GPU, if Triton is not installed.
        """
        from .sources import gpu_sources, kernel_sources

        if isinstance(self.device, GpuSpec) and self._model is not None:
            return gpu_sources(self._model, self._inputs, self.plan, self.device)
        if self._model is None or self.device != find_device(None):
            raise OptionError(
                "Explanation.kernels",
                "a plan for this machine, or for a GPU",
                f"a plan for {self.device.name!r}",
                "Call explain(model, *inputs) without device= to read the kernels that run here.",
            )
        return kernel_sources(self._model, self._inputs, self.plan)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes one self-contained page; returns its path."""
        path = Path(path)
        path.write_text(self._html(), encoding="utf-8")
        return path

    def to_json(self) -> dict[str, Any]:
        """The plan (as `Plan.to_json`) and the device."""
        return {"device": self.device.to_json(), "plan": self.plan.to_json()}

    def _html(self) -> str:
        from jinja2 import Environment, PackageLoader

        environment = Environment(loader=PackageLoader(__package__), autoescape=True)
        slowest = max((d.estimates.get(DENSE, 0.0) for d in self.plan), default=0.0)
        return environment.get_template("explanation.html").render(
            title=self.title,
            totals=self.totals,
            regions=has_regions(self.plan),
            rows=[_html_row(decision, slowest) for decision in self.plan],
            kernels=self.__dict__.get("kernels", {}),
        )

    def _repr_html_(self) -> str:
        return self._html()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield plan_table(self.plan, title=self.title, width=options.max_width)

    def __str__(self) -> str:
        return render_plan(self.plan, title=self.title, width=PLAIN_WIDTH)

    __repr__ = __str__


def explain(
    model: torch.nn.Module,
    *example_inputs: Any,
    device: str | torch.device | AnyDevice | None = None,
    block_shape: BlockShape | None = None,
    dense: str = "auto",
    training: bool = False,
) -> Explanation:
    """What `torch.compile(model, backend="blocksparse")` would do with each layer, and why.

    Runs nothing and compiles nothing; any device can be planned for on any machine.

    Args:
        model: a module; it is read, not changed.
        example_inputs: what `model(*example_inputs)` takes.
        device: name of a known CPU or GPU, `"cuda"` for the present GPU, a `DeviceSpec` or `GpuSpec`, or
            `None` for the device that the model is on.
        block_shape: consider only this tile; by default every supported one.
        dense: `"auto"`, or `"never"` for a block-sparse kernel wherever one exists.
        training: plan training steps, forward and backward, instead of inference. Only zeros that training
            cannot change count then; such an explanation has no `.kernels`.

    Returns:
        An `Explanation`: print it, or read `.plan`, `.kernels`, `.to_html(path)`.

    Raises:
        OptionError: for an unknown device (the message lists the known ones) or `dense`.
        LayerError: if the model cannot be captured as one graph, or a weight is not finite.
    """
    if dense not in ("auto", "never"):
        raise OptionError("explain", "dense to be 'auto' or 'never'", repr(dense), "Leave it out.")
    from .planning import plan as make_plan
    from .planning import plan_training
    from .trace import trace

    spec = find_device(home(model, example_inputs) if device is None else device)
    graph = trace(model, *example_inputs)
    if training:
        plan = plan_training(graph, spec, block_shape=block_shape, allow_dense=dense == "auto")
        return Explanation(plan, spec)
    plan = make_plan(graph, spec, block_shape=block_shape, allow_dense=dense == "auto")
    return Explanation(plan, spec, model, example_inputs)


def _html_row(decision: Decision, slowest: float) -> dict[str, Any]:
    dense, sparse = decision.estimates.get(DENSE), sparse_estimate(decision)
    chosen = decision.estimates.get(decision.kernel)

    def width(seconds: float | None) -> float:
        return round(100 * seconds / slowest, 1) if seconds and slowest else 0.0

    return {
        "name": decision.site.name,
        "op": decision.site.op,
        "shape": shape_label(decision.site),
        "density": decision.density,
        "kept": f"{decision.density:.0%}" if decision.pattern else "",
        "block": "x".join(map(str, decision.pattern.block_shape)) if decision.pattern else "",
        "kernel": decision.kernel,
        "layout": layout_label(decision),
        "is_dense": decision.is_dense,
        "dense_time": format_seconds(dense) if dense else "",
        "sparse_time": format_seconds(sparse) if sparse else "",
        "dense_width": width(dense),
        "chosen_width": width(chosen),
        "gain": f"{decision.speedup:.1f}x" if decision.speedup and not decision.is_dense else "",
        "reason": decision.reason,
    }
