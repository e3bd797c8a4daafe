"""Compiling, checking and timing on a GPU; and the same steps without one, in Triton's interpreter."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import blocksparse_compiler as bsc
from blocksparse_compiler import gpu_timing
from blocksparse_compiler.codegen import inductor_api, lowerings
from blocksparse_compiler.devices import GpuSpec, device

from . import baselines, timing
from .gpu_cases import Candidate, Cell, bias, dense_layer
from .timing import Call, Timing

EXACT_FLOPS = 2e10
"""Layers up to this size are checked against float64, larger ones against float32 without TF32."""


class Runner(ABC):
    """Where the benchmark runs.

    Attributes:
        device: of the tensors.
        spec: of the GPU that is planned for, with kernels launched from CUDA graphs, as they are timed.
        least_launches: of a kernel in one timed call, to drown the cost of the call.
    """

    device: str
    spec: GpuSpec
    least_launches = 1

    @abstractmethod
    def compile(self, function: Callable[..., Any], arguments: Sequence[Tensor]) -> Callable[..., Any]:
        """The function compiled for arguments of these shapes, and called once."""

    @abstractmethod
    def interleave(
        self, calls: Mapping[str, Call], seconds: float, uncaptured: Collection[str] = ()
    ) -> dict[str, Timing]:
        """Times the calls in turn; `uncaptured` ones are no candidates for a CUDA graph."""

    def dense(self, function: Callable[..., Any], arguments: Sequence[Tensor]) -> dict[str, Any]:
        """The dense builds of a function by name; each called once."""
        function(*arguments)
        return {"eager": function}

    def copies(self, moved_bytes: float) -> int:
        """How many sets of operands it takes so that the cache holds none of them at their next turn."""
        return 1


class CudaRunner(Runner):
    """A GPU."""

    device = "cuda"
    least_launches = 8

    def __init__(self) -> None:
        spec = device("cuda")
        assert isinstance(spec, GpuSpec)
        self.spec = spec.with_graphs()
        lowerings.register()
        torch.backends.cudnn.benchmark = True

    def compile(self, function: Callable[..., Any], arguments: Sequence[Tensor]) -> Callable[..., Any]:
        with stable_cache():
            fast = baselines.compiled(function, fullgraph=True)
            fast(*arguments)
        return fast

    def dense(self, function: Callable[..., Any], arguments: Sequence[Tensor]) -> dict[str, Any]:
        return {**super().dense(function, arguments), "inductor": self.compile(function, arguments)}

    def max_autotuned(self, function: Callable[..., Any], arguments: Sequence[Tensor]) -> Callable[..., Any]:
        """Inductor's best of cuDNN or cuBLAS and its own templates; takes up to a minute."""
        fast = baselines.compiled(function, fullgraph=True, mode="max-autotune-no-cudagraphs")
        fast(*arguments)
        return fast

    def interleave(
        self, calls: Mapping[str, Call], seconds: float, uncaptured: Collection[str] = ()
    ) -> dict[str, Timing]:
        measured = gpu_timing.interleave(calls, seconds, flush=False, uncaptured=uncaptured)
        return {name: Timing(t.median, t.minimum, t.rounds) for name, t in measured.items()}

    def copies(self, moved_bytes: float) -> int:
        return max(2, min(40, math.ceil(2 * self.spec.l2_bytes / moved_bytes)))


class InterpretRunner(Runner):
    """No GPU: Inductor's program for one, on CPU tensors. Right results; times mean nothing."""

    device = "cpu"

    def __init__(self) -> None:
        spec = device("h200")
        assert isinstance(spec, GpuSpec)
        self.spec = spec.with_graphs()

    def compile(self, function: Callable[..., Any], arguments: Sequence[Tensor]) -> Callable[..., Any]:
        from blocksparse_compiler.codegen import offline

        gm = bsc.trace(_Function(function), *arguments)
        return offline.generate(gm, tuple(arguments), "sm_90").run

    def interleave(
        self, calls: Mapping[str, Call], seconds: float, uncaptured: Collection[str] = ()
    ) -> dict[str, Timing]:
        return timing.interleave(calls, budget=0, rounds=(1, 1), warmup=1)


def runner_for(name: str) -> Runner:
    """For `"cuda"` or `"interpret"`."""
    return InterpretRunner() if name == "interpret" else CudaRunner()


class _Function(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Tensor) -> Any:
        return self.function(*arguments)


@contextlib.contextmanager
def stable_cache() -> Iterator[None]:
    """Has Inductor's graph cache see the kernels' sources, as the backend does: workers fill it."""
    key = inductor_api.cache_key_pass(lowerings.source_digest(), {})
    with torch._inductor.config.patch(post_grad_custom_post_pass=key):
        yield


# ---- correctness -----------------------------------------------------------------------------------


def check(runner: Runner, candidate: Candidate) -> dict[str, float]:
    """Relative error of a candidate and of torch's dense kernel; compiles it on the way.

    Raises:
        RuntimeError: if it is wrong.
    """
    cell = candidate.cell
    function, packed = candidate.build(runner.device)
    x, added = cell.input(runner.device), bias(cell, runner.device)
    weight = placed_weight(cell, runner.device)
    reference = exact(cell, x, weight, added)
    floor = relative_error(dense_layer(cell)(x, weight, added), reference)
    run = runner.compile(function, (x, *packed, added))
    _poison(reference.shape, x)
    error = relative_error(run(x, *packed, added), reference)
    if not error <= 2 * floor + 1e-4:
        raise RuntimeError(f"relative error {error:.1e}, dense {floor:.1e}")
    return {"error": error, "dense_error": floor}


def exact(cell: Cell, x: Tensor, weight: Tensor, added: Tensor) -> Tensor:
    """The layer in float64 if it is small, else in plain float32."""
    dtype = torch.float64 if cell.dense_flops <= EXACT_FLOPS else torch.float32
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        return dense_layer(cell)(x.to(dtype), weight.to(dtype), added.to(dtype))


def relative_error(out: Tensor, reference: Tensor) -> float:
    difference = (out.to(reference.dtype) - reference).norm() / reference.norm()
    return float(difference)


def placed_weight(cell: Cell, where: str) -> Tensor:
    weight = cell.weight().to(where)
    return weight.to(memory_format=torch.channels_last) if cell.is_conv else weight


def _poison(shape: Sequence[int], x: Tensor) -> None:
    """Leaves NaN in the memory that the next output of this shape will probably get."""
    for _ in range(2):
        torch.full(tuple(shape), math.nan, dtype=x.dtype, device=x.device)
