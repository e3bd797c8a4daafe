"""What the planner knows about one GPU: `GpuSpec`. The named ones are in `gpu_devices`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from .errors import OptionError
from .figures import Figures

MIN_ARCH = 80
"""Least compute capability, times ten, that the Triton kernels are built for."""
PRECISIONS = ("bfloat16", "float16", "tf32", "float32")
DENSE = ("linear", "few_rows", "spatial", "pointwise", "grouped", "depthwise", "template")
FRACTIONS = (*(f"dense/{kind}" for kind in DENSE), "dram", "l2", "l1", "triton_gather")
"""What `GpuSpec.efficiency` must hold; other kernel variants default to the gather kernel's figure."""


@dataclass(frozen=True)
class GpuSpec(Figures):
    """One GPU. Immutable; equal by content. A multiprocessor is AMD's compute unit.

    Args:
        name: as `devices.device` knows it.
        backend: `"cuda"` or `"hip"`.
        arch: compute capability times ten (`90`), or the target on AMD (`"gfx942"`).
        multiprocessors, clock_hertz: the clock under load.
        peak_flops_per_second: dense, matrix units, fp32 accumulation, by `PRECISIONS`; `"float32"` is plain
            fp32. Multiply and add count as two.
        l2_bytes: last cache before memory that all multiprocessors share.
        l2_bytes_per_second: from there to all multiprocessors together.
        l2_bytes_per_clock_per_multiprocessor: what one multiprocessor can take in.
        dram_bytes_per_second: peak of the memory.
        shared_bytes_per_block, shared_bytes_per_multiprocessor, shared_bytes_per_clock_per_multiprocessor:
            shared memory (LDS on AMD).
        l1_bytes_per_multiprocessor: shared memory included, where it is part of the same storage.
        registers_per_multiprocessor, threads_per_multiprocessor, warp_threads: limits of occupancy;
            registers of 32 bits.
        load_latency_seconds: from asking for a tile that is in L2 to using it, under load; twice that from
            memory.
        program_seconds: of one program outside its loops: setup, looking up its block row, epilogue.
        launch_seconds: gap that one kernel costs in a stream.
        graph_launch_seconds: the same inside a CUDA graph; see `with_graphs`.
        efficiency: fractions. Of peak: `"dense/<geometry>"` for cuDNN and cuBLAS (`"dense/grouped"` for
            groups of 8 channels), `"dense/template"` for Inductor's own templates, `"<variant>"` for our
            kernels away from memory limits. Of the memory's rate: `"dense/few_rows"` for weights in cuBLAS,
            `"dram"` for all else. Of the L2 rate: `"l2"`. `"l1"`, of loads that L1 could serve, those that it
            does.
        templates: whether dense layers may run on Inductor's own Triton templates, which fuse what follows
            (`max_autotune`); see `as_compiled`.
        sources: where the figures come from, by field name; `"efficiency <name>"` for single fractions.
    """

    type: ClassVar[str] = "cuda"  # ROCm builds of torch call their devices so, too
    example: ClassVar[str] = "h200"
    texts: ClassVar[tuple[str, ...]] = ("name", "backend", "arch", "templates")

    name: str
    backend: str
    arch: int | str
    multiprocessors: int
    clock_hertz: float
    peak_flops_per_second: Mapping[str, float]
    l2_bytes: int
    l2_bytes_per_second: float
    l2_bytes_per_clock_per_multiprocessor: int
    dram_bytes_per_second: float
    shared_bytes_per_block: int
    shared_bytes_per_multiprocessor: int
    shared_bytes_per_clock_per_multiprocessor: int
    l1_bytes_per_multiprocessor: int
    registers_per_multiprocessor: int
    threads_per_multiprocessor: int
    warp_threads: int
    load_latency_seconds: float
    program_seconds: float
    launch_seconds: float
    graph_launch_seconds: float
    efficiency: Mapping[str, float] = field(default_factory=dict)
    templates: bool = False
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check()
        known = self.backend == "cuda" and isinstance(self.arch, int)
        if not known and not (self.backend == "hip" and str(self.arch).startswith("gfx")):
            raise OptionError(
                f"GpuSpec({self.name!r})",
                "backend 'cuda' with arch 80, 90, ... or backend 'hip' with arch 'gfx942', ...",
                f"backend {self.backend!r} with arch {self.arch!r}",
                "Start from a named spec: devices.device('h200').with_figures(...).",
            )
        if set(self.peak_flops_per_second) != set(PRECISIONS):
            raise OptionError(
                f"GpuSpec({self.name!r})",
                f"peak_flops_per_second for {', '.join(PRECISIONS)}",
                f"{', '.join(self.peak_flops_per_second) or 'none'}",
                "Give one figure for each.",
            )
        missing = [name for name in FRACTIONS if name not in self.efficiency]
        if missing:
            raise OptionError(
                f"GpuSpec({self.name!r})",
                f"efficiency of {', '.join(FRACTIONS)}",
                f"none of {', '.join(missing)}",
                "Start from a named spec: devices.device('h200').with_figures(...).",
            )

    __hash__ = Figures.__hash__

    @property
    def obstacle(self) -> str | None:
        """Why none of our kernels runs on this GPU, as a phrase; None if they do."""
        if self.backend == "cuda" and int(self.arch) < MIN_ARCH:
            needed, has = (f"{arch // 10}.{arch % 10}" for arch in (MIN_ARCH, int(self.arch)))
            return f"block-sparse kernels need compute capability {needed}, this GPU has {has}"
        return None

    @property
    def target(self) -> str:
        """`"sm_90"` or `"gfx942"`."""
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)

    @property
    def summary(self) -> str:
        """What kind of machine it is, in a few words."""
        return f"{self.multiprocessors} multiprocessors, {self.target}"

    def with_graphs(self) -> GpuSpec:
        """The same GPU with every kernel launched from a CUDA graph (`mode="reduce-overhead"`)."""
        return self.with_figures(
            self.sources.get("graph_launch_seconds", ""), launch_seconds=self.graph_launch_seconds
        )

    def as_compiled(self, options: Mapping[str, Any]) -> GpuSpec:
        """The same GPU under these options of Inductor: CUDA graphs, and templates for dense layers."""
        spec = self.with_graphs() if options.get("triton.cudagraphs") else self
        tuned = options.get("max_autotune") or options.get("max_autotune_gemm")
        return replace(spec, templates=True) if tuned else spec
