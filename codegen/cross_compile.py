"""Machine code for a GPU that is not there, and what it needs: registers, spills, shared memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .mock_gpu import GpuTarget


@dataclass(frozen=True)
class Resources:
    """What one block of a compiled kernel takes, read from its machine code.

    Args:
        registers: 32-bit registers of a thread (AMD: vector registers, accumulators included).
        spill_bytes: local memory of a thread that registers were spilled to.
        shared_bytes: shared memory of a block.
        num_warps, num_stages: as asked for.
        tensor_core: the matrix instruction seen (`wgmma`, `mma.sync`, `tcgen05`, `mfma`), or None.
        tensor_core_count: matrix instructions in the text.
        async_copies: asynchronous copies to shared memory in the text (`cp.async`, TMA loads).
        tma_loads: those that are TMA loads.
        buffers: tiles that shared memory holds of one operand at once, as the pipeliner laid them out;
            None without a pipeline.
        wait_depths: groups that each wait on asynchronous copies leaves in flight.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int
    num_stages: int
    tensor_core: str | None
    tensor_core_count: int
    async_copies: int
    tma_loads: int
    buffers: int | None
    wait_depths: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def blocks_per_multiprocessor(self, target: GpuTarget) -> int:
        """Blocks that run on a multiprocessor at once, as registers, threads and shared memory allow."""
        threads = self.num_warps * target.warp_size
        # Registers are given to a warp in units of 256; each block has 1 KiB of shared memory to itself.
        warp_registers = -(-max(1, self.registers) * target.warp_size // 256) * 256
        limits = [
            target.registers_per_multiprocessor // (warp_registers * self.num_warps),
            target.threads_per_multiprocessor // threads,
            (target.shared_memory_bytes + 1024) // (self.shared_bytes + 1024),
        ]
        return min(limits)


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel compiled for `target`.

    Args:
        assembly: PTX, or AMD's assembly.
        binary: the cubin, or the hsaco.
        ttgir: Triton's last representation that shows layouts and the software pipeline.
    """

    target: GpuTarget
    assembly: str = field(repr=False)
    binary: bytes = field(repr=False)
    ttgir: str = field(repr=False)
    resources: Resources

    @property
    def assembly_suffix(self) -> str:
        return ".ptx" if self.target.is_nvidia else ".amdgcn"

    @property
    def binary_suffix(self) -> str:
        return ".cubin" if self.target.is_nvidia else ".hsaco"

    @property
    def ptx(self) -> str:
        """The PTX text; empty for AMD."""
        return self.assembly if self.target.is_nvidia else ""

    @property
    def cubin(self) -> bytes:
        return self.binary if self.target.is_nvidia else b""

    @property
    def amdgcn(self) -> str:
        """AMD's assembly; empty for NVIDIA."""
        return "" if self.target.is_nvidia else self.assembly

    @property
    def hsaco(self) -> bytes:
        return b"" if self.target.is_nvidia else self.binary

    def sass(self) -> str:
        """NVIDIA's machine code as text, by the disassembler that ships with Triton."""
        return _cuda_tool("nvdisasm", self.binary, "-c") if self.target.is_nvidia else self.assembly


def compile_kernel(
    jit_function: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    attributes: Any,
    options: Mapping[str, Any],
    target: GpuTarget,
) -> CompiledKernel:
    """Compiles a `@triton.jit` function for `target`; needs no GPU."""
    import triton
    from triton.compiler import ASTSource

    source = ASTSource(jit_function, dict(signature), dict(constants), attributes)
    # As Inductor compiles on a GPU; Triton's own default is about to change.
    compiled = triton.compile(
        source, target=target.triton_target(), options={"enable_fp_fusion": True, **options}
    )
    nvidia = target.is_nvidia
    assembly = compiled.asm["ptx" if nvidia else "amdgcn"]
    binary = compiled.asm["cubin" if nvidia else "hsaco"]
    registers, spills = _cubin_usage(binary) if nvidia else _amd_usage(assembly)
    ttgir = compiled.asm["ttgir"]
    resources = Resources(
        registers=registers,
        spill_bytes=spills,
        shared_bytes=int(compiled.metadata.shared),
        num_warps=int(compiled.metadata.num_warps),
        num_stages=int(options["num_stages"]),
        **_instructions(assembly),
        buffers=_buffers(ttgir),
    )
    return CompiledKernel(target, assembly, binary, ttgir, resources)


_TENSOR_CORES = (
    ("tcgen05", r"tcgen05\.mma"),
    ("wgmma", r"wgmma\.mma_async"),
    ("mma.sync", r"\bmma\.sync"),
    ("mfma", r"\bv_mfma"),
)


def _instructions(assembly: str) -> dict[str, Any]:
    counts = [(name, len(re.findall(pattern, assembly))) for name, pattern in _TENSOR_CORES]
    name, count = next(((n, c) for n, c in counts if c), (None, 0))
    tma = len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", assembly))
    plain = len(re.findall(r"cp\.async\.c[ag]\.shared|(?:global|buffer)_load_\w* .*\blds\b", assembly))
    waits = re.findall(r"cp\.async\.wait_group\s+(?:0x)?(\d+)", assembly)
    return {
        "tensor_core": name,
        "tensor_core_count": count,
        "async_copies": tma + plain,
        "tma_loads": tma,
        "wait_depths": tuple(sorted({int(wait) for wait in waits})),
    }


def _buffers(ttgir: str) -> int | None:
    """The leading dimension of the largest multi-buffered allocation: `!ttg.memdesc<4x128x64xbf16, …>`."""
    allocations = re.findall(r"ttg\.local_alloc.*?!ttg\.memdesc<([\dx]+)x[a-z]", ttgir)
    shapes = [tuple(map(int, shape.split("x"))) for shape in allocations]
    pipelined = [shape[0] for shape in shapes if len(shape) > 2]
    return max(pipelined, default=None)


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes spilled to local memory."""
    text = _cuda_tool("cuobjdump", cubin, "-res-usage")
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump -res-usage says nothing about registers: {text[:200]!r}")
    registers, stack, local = map(int, usage.groups())
    return registers, max(stack, local)


def _amd_usage(assembly: str) -> tuple[int, int]:
    def figure(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found.group(1)) if found else 0

    return figure("vgpr_count"), 4 * figure("vgpr_spill_count") + 4 * figure("sgpr_spill_count")


def _cuda_tool(name: str, cubin: bytes, *arguments: str) -> str:
    """The output of a CUDA tool that ships with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, *arguments, file.name], capture_output=True, text=True, check=True
        ).stdout
