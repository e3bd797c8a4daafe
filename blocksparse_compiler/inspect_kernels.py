"""`inspect_kernels`: the GPU kernels of a model, their machine code and resources, made without a GPU."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from .errors import OptionError
from .gpu_devices import GpuSpec
from .gpu_program import gpu_of_target, gpu_program
from .pattern import BlockShape
from .plan import Plan
from .tables import plain_text, plan_table

if TYPE_CHECKING:
    from .codegen.cross_compile import CompiledKernel
    from .codegen.offline import OfflineProgram
    from .codegen.triton_kernel import TritonKernel

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def inspect_kernels(
    model: torch.nn.Module,
    *example_inputs: Any,
    target: str | GpuSpec = "sm_90",
    dtype: torch.dtype | None = None,
    block_shape: BlockShape | None = None,
    dense: str = "auto",
    plan: Plan | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Plans, generates and cross-compiles every kernel of `model` for a GPU that need not be there.

    Args:
        model: in eval mode; it is read, not changed.
        example_inputs: what `model(*example_inputs)` takes.
        target: `"sm_80"`, `"sm_90"`, `"gfx942"` …, or a GPU by name (`"h200"`) or spec. A target is planned
            for as the first known GPU that has it.
        dtype: convert model and inputs to it first.
        block_shape, dense: as for `explain`.
        plan: carry out this plan instead of making one.
        out: also write everything to this folder, see `Inspection.write`.
        progress: is told how far the work is.

    Raises:
        OptionError: for an unknown target, or without Triton.
        LayerError: if the model cannot be captured as one graph.
    """
    if dense not in ("auto", "never"):
        raise OptionError("inspect_kernels", "dense to be 'auto' or 'never'", repr(dense), "Leave it out.")
    device = target if isinstance(target, GpuSpec) else gpu_of_target(target)
    say = progress or (lambda what, done, total: None)
    say("planning and generating", 0, 0)
    made, program = gpu_program(
        model,
        example_inputs,
        device,
        plan=plan,
        dtype=dtype,
        block_shape=block_shape,
        allow_dense=dense == "auto",
    )
    found = Inspection(made, device, program, tuple(_compile(program.kernels, say)))
    if out is not None:
        found.write(out)
    return found


@dataclass(frozen=True)
class KernelReport:
    """One kernel: its text (`kernel`), and its machine code (`compiled`), or why there is none (`error`)."""

    kernel: TritonKernel
    compiled: CompiledKernel | None = field(repr=False)
    error: str = ""

    @property
    def label(self) -> str:
        """A readable name: the layers it computes, or the kernel's own."""
        layers = self.kernel.layers if self.kernel.is_template else ()
        more = f"_and_{len(layers) - 1}_more" if len(layers) > 1 else ""
        return re.sub(r"[^\w.-]", "_", layers[0] + more if layers else self.kernel.name)

    def to_json(self) -> dict[str, Any]:
        kernel = self.kernel
        return {
            "kernel": kernel.name,
            "kind": kernel.kind,
            "layers": list(kernel.layers),
            "ops": list(kernel.ops),
            "signature": kernel.signature,
            "constants": {name: str(value) for name, value in kernel.constants.items()},
            "launches": [list(call) for call in kernel.calls],
            "resources": self.compiled and self.compiled.resources.to_json(),
            "error": self.error,
        }


@dataclass(frozen=True)
class Inspection:
    """What `inspect_kernels` found. Prints as two tables.

    Attributes:
        plan: the decision about every layer.
        device: the GPU planned for.
        program: the whole generated program; `program.run(*inputs)` runs it on CPU tensors.
        reports: each Triton kernel with its machine code, in order of definition.
    """

    plan: Plan
    device: GpuSpec
    program: OfflineProgram
    reports: tuple[KernelReport, ...]

    @property
    def kernels(self) -> dict[str, str]:
        """Fused Triton source by layer name, for the layers on a block-sparse kernel."""
        return {layer: kernel.source for kernel in self.program.templates for layer in kernel.layers}

    @property
    def problems(self) -> list[str]:
        """What would keep a kernel from running, or from running well; empty if all is right."""
        return [f"{report.label}: {problem}" for report in self.reports for problem in _problems(report)]

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the plan, the program, and a folder for each kernel; returns the folder.

        `README.txt` holds the tables, `plan.json` the plan, `resources.json` every figure, `program.py`
        Inductor's wrapper; `kernels/<nn>_<layer>/` the kernel as `kernel.py`, `.ttgir`, `.ptx` and `.cubin`
        (AMD: `.amdgcn` and `.hsaco`).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.plan.save(folder / "plan.json")
        (folder / "program.py").write_text(self.program.source, encoding="utf-8")
        entries = []
        for number, report in enumerate(self.reports, 1):
            place = folder / "kernels" / f"{number:02d}_{report.label[:80]}"
            _write_kernel(place, report)
            entries.append({"folder": str(place.relative_to(folder)), **report.to_json()})
        resources = {"target": self.program.target.name, "device": self.device.name, "kernels": entries}
        (folder / "resources.json").write_text(json.dumps(resources, indent=1), encoding="utf-8")
        (folder / "README.txt").write_text(str(self) + "\n", encoding="utf-8")
        return folder

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title = f"{self.device.name} ({self.device.summary})"
        yield Group(
            plan_table(self.plan, title=title, width=options.max_width),
            Text(),
            kernel_table(self.reports, f"kernels for {self.program.target}", self.program.externs),
        )
        for problem in self.problems:
            yield Text(f"! {problem}", style="red")

    def __str__(self) -> str:
        return plain_text(self)

    __repr__ = __str__


def kernel_table(reports: Iterable[KernelReport], title: str, externs: Iterable[str] = ()) -> Table:
    """One row per kernel with what it needs of the GPU."""
    counts: dict[str, int] = {}
    for name in externs:
        counts[name] = counts.get(name, 0) + 1
    calls = ", ".join(f"{count} x {name}" for name, count in counts.items())
    caption = f"and library calls: {calls}" if calls else None
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("kernel of", overflow="fold", ratio=3)
    table.add_column("fuses", overflow="fold", ratio=3)
    for name in ("launches", "warps", "stages", "registers", "spills", "shared", "blocks/SM", "copies"):
        table.add_column(name, justify="right")
    table.add_column("matrix unit")
    for report in reports:
        style = "" if report.kernel.is_template else "dim"
        table.add_row(*map(Text, _row(report)), style="red" if _problems(report) else style)
    return table


def _row(report: KernelReport) -> tuple[str, ...]:
    kernel = report.kernel
    more = f" and {len(kernel.layers) - 1} more" if len(kernel.layers) > 1 else ""
    name = kernel.layers[0] + more if kernel.is_template and kernel.layers else kernel.name
    fused = " ".join(dict.fromkeys(op.split(".")[1] for op in kernel.ops if "." in op))
    head = (name, fused, str(len(kernel.calls)), str(kernel.num_warps), str(kernel.num_stages))
    if report.compiled is None:
        return (*head, "", "", "", "", "", f"failed: {report.error}")
    found = report.compiled.resources
    copies = f"{found.buffers} x {'TMA' if found.tma_loads else 'async'}" if found.buffers else ""
    return (
        *head,
        str(found.registers),
        f"{found.spill_bytes} B",
        f"{found.shared_bytes / 1024:.1f} KiB",
        str(found.blocks_per_multiprocessor(report.compiled.target)),
        copies,
        found.tensor_core or "",
    )


def _problems(report: KernelReport) -> list[str]:
    if report.compiled is None:
        return [f"does not compile: {report.error}"]
    found, target = report.compiled.resources, report.compiled.target
    problems = []
    if found.shared_bytes > target.shared_memory_bytes:
        problems.append(
            f"needs {found.shared_bytes} bytes of shared memory, {target} has {target.shared_memory_bytes}"
        )
    if found.spill_bytes:
        problems.append(f"spills {found.spill_bytes} bytes of registers to memory")
    if report.kernel.is_template and "tl.dot" in report.kernel.source and not found.tensor_core:
        problems.append("multiplies without matrix instructions")
    return problems


def _compile(kernels: tuple[TritonKernel, ...], say: Progress) -> list[KernelReport]:
    """Compiles all kernels, several at a time: the compiler runs outside Python."""
    for kernel in kernels:
        _ = kernel.kind  # loads it: that changes global state for a moment, and so is not for threads
    reports: dict[str, KernelReport] = {}
    say("compiling kernels", 0, len(kernels))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        running = {pool.submit(_report, kernel): kernel for kernel in kernels}
        for done, future in enumerate(as_completed(running), 1):
            reports[running[future].name] = future.result()
            say("compiling kernels", done, len(kernels))
    # What failed is tried once more by itself: Triton does not promise to compile in several threads.
    return [r if r.compiled is not None else _report(r.kernel) for r in (reports[k.name] for k in kernels)]


def _report(kernel: TritonKernel) -> KernelReport:
    try:
        return KernelReport(kernel, kernel.compile())
    except Exception as error:  # one kernel that fails must not hide the others
        text = str(error).strip() or type(error).__name__
        return KernelReport(kernel, None, text.splitlines()[0][:200])


def _write_kernel(place: Path, report: KernelReport) -> None:
    place.mkdir(parents=True, exist_ok=True)
    (place / "kernel.py").write_text(report.kernel.text.lstrip(), encoding="utf-8")
    compiled = report.compiled
    if compiled is not None:
        (place / f"kernel{compiled.assembly_suffix}").write_text(compiled.assembly, encoding="utf-8")
        (place / f"kernel{compiled.binary_suffix}").write_bytes(compiled.binary)
        (place / "kernel.ttgir").write_text(compiled.ttgir, encoding="utf-8")
