"""Has Inductor believe in a GPU, so that its Triton code can be generated, read and checked without one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import OptionError
from ..gpu_devices import GpuSpec


@dataclass(frozen=True)
class GpuTarget:
    """What code generation asks of a GPU.

    Args:
        name: as users write it: `sm_90`, `gfx942`.
        backend: `cuda` (NVIDIA) or `hip` (AMD).
        arch: as Triton writes it: 90, or `gfx942`.
        warp_size: threads of a warp (wavefront).
        multiprocessors: streaming multiprocessors (compute units).
        shared_memory_bytes: most shared memory (LDS) of one block.
        registers_per_multiprocessor, threads_per_multiprocessor: limits of occupancy.
        memory_bytes: device memory.
        device_name: what `torch.cuda.get_device_name` would say.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    multiprocessors: int
    shared_memory_bytes: int
    registers_per_multiprocessor: int
    threads_per_multiprocessor: int
    memory_bytes: int
    device_name: str

    @property
    def is_nvidia(self) -> bool:
        return self.backend == "cuda"

    @property
    def capability(self) -> tuple[int, int]:
        """(9, 0) for sm_90; for AMD the numbers that torch reports, (9, 4) for gfx942."""
        return divmod(self.arch, 10) if isinstance(self.arch, int) else (int(self.arch[3]), int(self.arch[4]))

    def triton_target(self) -> Any:
        """Triton's own description. Raises `OptionError` without Triton."""
        require_triton()
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.arch, self.warp_size)

    def __str__(self) -> str:
        return self.name


# Limits: CUDA programming guide, tables of compute capabilities (shared memory: opt-in bytes of one block;
# registers are 32-bit); AMD CDNA 3 instruction set guide. Counts: vendors' data sheets (A100-SXM-80GB,
# H100-SXM, B200, L4, MI300X).
TARGETS: dict[str, GpuTarget] = {
    target.name: target
    for target in (
        GpuTarget("sm_80", "cuda", 80, 32, 108, 166912, 65536, 2048, 80 << 30, "NVIDIA A100-SXM4-80GB"),
        GpuTarget("sm_89", "cuda", 89, 32, 58, 101376, 65536, 1536, 24 << 30, "NVIDIA L4"),
        GpuTarget("sm_90", "cuda", 90, 32, 132, 232448, 65536, 2048, 80 << 30, "NVIDIA H100 80GB HBM3"),
        GpuTarget("sm_100", "cuda", 100, 32, 148, 232448, 65536, 2048, 180 << 30, "NVIDIA B200"),
        GpuTarget("gfx942", "hip", "gfx942", 64, 304, 65536, 131072, 2048, 192 << 30, "AMD Instinct MI300X"),
    )
}


def gpu_target(target: str | GpuTarget | GpuSpec) -> GpuTarget:
    """The `GpuTarget` of a name (`"sm_90"`, `"gfx942"`), or of a device of the planner.

    Raises:
        OptionError: for an unknown name; the message lists the known ones.
    """
    if isinstance(target, GpuTarget):
        return target
    if isinstance(target, GpuSpec):
        return _target_of(target)
    if target not in TARGETS:
        raise OptionError("target", f"one of {', '.join(TARGETS)}", repr(target), "Name a known target.")
    return TARGETS[target]


def _target_of(device: GpuSpec) -> GpuTarget:
    return GpuTarget(
        device.target,
        device.backend,
        device.arch,
        device.warp_threads,
        device.multiprocessors,
        device.shared_bytes_per_block,
        device.registers_per_multiprocessor,
        device.threads_per_multiprocessor,
        80 << 30,
        device.name,
    )


def require_triton() -> None:
    """Raises `OptionError` if Triton cannot be imported."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise OptionError(
            "triton",
            "an installed Triton, to generate and compile GPU kernels",
            str(error),
            "Install it (pip install 'blocksparse-compiler[gpu]'); the CPU path works without.",
        ) from error


@contextlib.contextmanager
def mock_gpu(target: str | GpuTarget) -> Iterator[GpuTarget]:
    """Within this context Inductor and Triton see one GPU, `cuda:0`, that is `target`.

    Lowering and code generation work, on fake tensors; running a kernel does not. Contexts may nest. All is
    as before on exit. Not for several threads at once: the state that it changes is the process's.

    Raises:
        OptionError: for an unknown target, or without Triton.
    """
    found = gpu_target(target)
    require_triton()
    import triton.runtime

    from .inductor_api import pretend_device

    properties = _properties(found)
    config = triton.runtime.driver
    before = config._active
    config.set_active(_driver(found))
    try:
        with pretend_device(properties, found.capability, found.arch, hip=not found.is_nvidia):
            yield found
    finally:
        config._active = before


class _Properties:
    """As `torch.cuda.get_device_properties`. A class, so that it hashes and compares by identity."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def _properties(target: GpuTarget) -> Any:
    major, minor = target.capability
    return _Properties(
        name=target.device_name,
        major=major,
        minor=minor,
        multi_processor_count=target.multiprocessors,
        regs_per_multiprocessor=target.registers_per_multiprocessor,
        max_threads_per_multi_processor=target.threads_per_multiprocessor,
        max_threads_per_block=1024,
        warp_size=target.warp_size,
        total_memory=target.memory_bytes,
        shared_memory_per_block=min(target.shared_memory_bytes, 49152),
        shared_memory_per_block_optin=target.shared_memory_bytes,
        shared_memory_per_multiprocessor=target.shared_memory_bytes,
        gcnArchName=str(target.arch),
    )


def _driver(target: GpuTarget) -> Any:
    """Triton's view of the GPU: enough to choose a compiler, nothing that launches."""
    import triton.backends

    backend = triton.backends.backends["nvidia" if target.is_nvidia else "amd"]

    # A subclass of the real driver: Inductor asks for the type before it would load the real one.
    class MockDriver(backend.driver):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:  # the real one loads the vendor's library
            self.utils = _DriverUtils(target)

        @staticmethod
        def is_active() -> bool:
            return True

        def get_current_target(self) -> Any:
            return target.triton_target()

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: Any = None) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def get_device_capability(self, device: Any = None) -> tuple[int, int]:
            return target.capability

    return MockDriver()


@dataclass(frozen=True)
class _DriverUtils:
    target: GpuTarget

    def get_device_properties(self, device: int = 0) -> dict[str, int]:
        return {
            "max_shared_mem": self.target.shared_memory_bytes,
            "max_num_regs": self.target.registers_per_multiprocessor,
            "multiprocessor_count": self.target.multiprocessors,
            "warpSize": self.target.warp_size,
            "sm_clock_rate": 0,
            "mem_clock_rate": 0,
            "mem_bus_width": 0,
        }


__all__ = ["TARGETS", "GpuTarget", "gpu_target", "mock_gpu", "require_triton"]
