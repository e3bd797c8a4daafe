"""What the planner knows about a machine: `DeviceSpec` for CPUs, the named ones, and this one; `device`
finds these and GPUs (`gpu_devices`).

Units are in the field names; every figure names its source. `calibrate` replaces the figures of the
present machine by measured ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils._pytree import tree_leaves

from .errors import OptionError
from .figures import Figures
from .gpu_devices import SPECS as GPU_SPECS
from .gpu_devices import GpuSpec, present_gpu

HOST = "host"
KIB, MIB = 1024, 1024 * 1024


@dataclass(frozen=True)
class DeviceSpec(Figures):
    """One CPU, with the threads that run a kernel. Immutable; equal by content.

    Args:
        name: `"host"`, or a name that `device` knows.
        isa: `"avx512"`, `"avx2"` or `"portable"`, as torch's vector classes use it.
        threads: threads that share one kernel.
        vector_bits, vector_registers: of one core.
        peak_fp32_flops_per_second_per_thread, peak_bf16_flops_per_second_per_thread,
            peak_int8_ops_per_second_per_thread: of vector instructions; multiply and add count as two.
            Without instructions for bf16 or 8-bit integers, numbers are converted in between.
        peak_amx_flops_per_second_per_thread: of AMX on bf16 tiles; 0 without AMX.
        l1_bytes_per_thread, l2_bytes_per_thread, l3_bytes: data caches; L3 is shared.
        l2_bytes_per_second_per_thread, l3_bytes_per_second, dram_bytes_per_second: streaming rates,
            reads and writes together; L3 and DRAM for all threads together.
        dense_conv_call_seconds, dense_linear_call_seconds: fixed cost of one call of torch's operator.
        sparse_call_seconds: fixed cost of one generated kernel.
        epilogue_seconds_per_vector: bias, activation and store of one vector of outputs, on one thread.
        amx_tile_seconds: fixed cost of 32 pixels by 32 output channels on AMX tiles. By default that of a
            prototype of these kernels, 80 to 110 ns.
        transpose_seconds_per_vector: to bring a vector of activations from channels-last to channel-major
            order, or back, caches and epilogue included; on one thread. By default fitted to MobileNet-v1.
        l2_read_over_copy: rate of reading runs of whole lines from L2, over that of a copy. Fitted likewise.
        dense_int8_epilogue_seconds_per_vector: torch's operators on 8-bit integers: scaling, rounding and
            storing a vector of outputs, on one thread, which layers of few input channels do not hide.
        tile_epilogue_seconds_per_vector: as `epilogue_seconds_per_vector`, by `"<variant>/<bh>x<bw>"`, where
            known.
        efficiency: fraction of peak that kernels reach away from memory limits, by
            `"dense/<geometry>"`, `"dense_bf16/…"` and `"dense_amx/…"` (of those peaks), and
            `"<bh>x<bw>/<geometry>"` (optionally `"<variant>/<bh>x<bw>/…"`); see `cost.geometry` for the
            geometry names.
        sources: where the figures come from, by field name; `"efficiency <name>"` for single fractions.
    """

    name: str
    isa: str
    threads: int
    vector_bits: int
    vector_registers: int
    peak_fp32_flops_per_second_per_thread: float
    peak_bf16_flops_per_second_per_thread: float
    peak_int8_ops_per_second_per_thread: float
    l1_bytes_per_thread: int
    l2_bytes_per_thread: int
    l3_bytes: int
    l2_bytes_per_second_per_thread: float
    l3_bytes_per_second: float
    dram_bytes_per_second: float
    dense_conv_call_seconds: float
    dense_linear_call_seconds: float
    sparse_call_seconds: float
    epilogue_seconds_per_vector: float
    peak_amx_flops_per_second_per_thread: float = 0.0
    amx_tile_seconds: float = 95e-9
    transpose_seconds_per_vector: float = 15e-9 / 16
    l2_read_over_copy: float = 1.4
    dense_int8_epilogue_seconds_per_vector: float = 2e-9
    tile_epilogue_seconds_per_vector: Mapping[str, float] = field(default_factory=dict)
    efficiency: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    type: ClassVar[str] = "cpu"
    example: ClassVar[str] = "avx512-2core"
    texts: ClassVar[tuple[str, ...]] = ("name", "isa")
    optional: ClassVar[tuple[str, ...]] = ("peak_amx_flops_per_second_per_thread",)

    def __post_init__(self) -> None:
        self.check()

    __hash__ = Figures.__hash__

    @property
    def summary(self) -> str:
        """What kind of machine it is, in a few words."""
        return f"{self.threads} threads, {self.isa}{' with AMX' if self.has_amx else ''}"

    @property
    def vector_lanes(self) -> int:
        """fp32 numbers in one vector register."""
        return self.vector_bits // 32

    def peak_flops_per_second(self, dtype: str = "float32") -> float:
        """All threads together."""
        peaks = {
            "bfloat16": self.peak_bf16_flops_per_second_per_thread,
            "uint8": self.peak_int8_ops_per_second_per_thread,
            "int8": self.peak_int8_ops_per_second_per_thread,
        }
        return self.threads * peaks.get(dtype, self.peak_fp32_flops_per_second_per_thread)

    def multiplies(self, dtype: str) -> bool:
        """Whether there are instructions that add up products of several such numbers in each lane."""
        return self.peak_flops_per_second(dtype) > 1.5 * self.peak_flops_per_second()

    @property
    def has_amx(self) -> bool:
        """Whether there are instructions for products of bf16 tiles."""
        return self.peak_amx_flops_per_second_per_thread > 0

    @classmethod
    def host(cls) -> DeviceSpec:
        """This machine: its ISA, threads and caches detected, other figures those of its ISA's class."""
        isa = detect_isa()
        wide = "sapphire-rapids" if detect_amx() else "avx512-2core"
        base = SPECS[{"avx512": wide, "avx2": "avx2-4core"}.get(isa, "portable-2core")]
        threads = torch.get_num_threads()
        # Shared bandwidth grows with the cores that pull on it, up to what a socket can deliver.
        share = min(threads, 16) / base.threads
        return base.with_figures("detected", name=HOST, threads=threads, **_detect_caches()).with_figures(
            f"{base.name}, scaled by threads",
            l3_bytes_per_second=base.l3_bytes_per_second * share,
            dram_bytes_per_second=base.dram_bytes_per_second * max(1.0, share / 2),
        )


AnyDevice = DeviceSpec | GpuSpec

NUMBERS = DeviceSpec.number_names()


def detect_isa() -> str:
    """`"avx512"`, `"avx2"` or `"portable"`: what torch's vector classes use on this machine."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return capability if capability in ("avx512", "avx2") else "portable"


def detect_amx(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's cores and system have AMX for bf16. Kernels ask the system for the permission
    to use it when they are compiled, and run on vectors if it refuses."""
    try:
        return {"amx_tile", "amx_bf16"} <= set(cpuinfo.read_text().split())
    except OSError:
        return False


def _detect_caches(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int]:
    """Cache sizes from sysfs; empty where that does not exist."""
    found: dict[str, int] = {}
    for index in sorted(root.glob("index*")):
        try:
            level, kind = (index / "level").read_text().strip(), (index / "type").read_text().strip()
            size = (index / "size").read_text().strip()
        except OSError:
            continue
        if kind != "Instruction" and size.endswith("K"):
            key = {"1": "l1_bytes_per_thread", "2": "l2_bytes_per_thread", "3": "l3_bytes"}.get(level)
            if key:
                found[key] = int(size[:-1]) * KIB
    return found


# ---- named devices -------------------------------------------------------------------------------

# Fractions of peak, measured on the machine of avx512-2core over ResNet-50's layers; the ratio of ours
# to dense carries over to other machines much better than the figures themselves.
_EFFICIENCY = {
    "dense/spatial": 0.98,
    "dense/pointwise": 0.96,
    "dense/linear": 0.92,
    "dense/few_rows": 0.45,
    "dense/grouped": 0.40,
    "dense/depthwise": 0.35,
    "32x32/spatial": 0.99,
    "32x32/pointwise": 0.96,
    "32x32/linear": 0.96,
    "16x16/spatial": 0.88,
    "16x16/pointwise": 0.80,
    "16x16/linear": 0.78,
    "8x8/spatial": 0.78,
    "8x8/pointwise": 0.43,
    "8x8/linear": 0.41,
    "dense_bf16/spatial": 0.98,
    "dense_bf16/pointwise": 0.93,
    "dense_bf16/linear": 0.88,
    "dense_bf16/few_rows": 0.35,
    "cpu_bf16/32x32/spatial": 0.98,
    "cpu_bf16/32x32/pointwise": 0.96,
    "cpu_bf16/32x32/linear": 0.92,
    "cpu_bf16/16x16/spatial": 0.90,
    "cpu_bf16/16x16/pointwise": 0.80,
    "cpu_bf16/16x16/linear": 0.78,
    "cpu_bf16/8x8/spatial": 0.72,
    "cpu_bf16/8x8/pointwise": 0.64,
    "cpu_bf16/8x8/linear": 0.62,
    "dense_int8/spatial": 0.88,
    "dense_int8/pointwise": 0.96,
    "dense_int8/linear": 0.75,
    "dense_int8/few_rows": 0.23,
    "cpu_int8/32x32/spatial": 0.98,
    "cpu_int8/32x32/pointwise": 0.93,
    "cpu_int8/32x32/linear": 0.96,
    "cpu_int8/16x16/spatial": 0.83,
    "cpu_int8/16x16/pointwise": 0.52,
    "cpu_int8/16x16/linear": 0.63,
    "cpu_int8/8x8/spatial": 0.37,
    "cpu_int8/8x8/pointwise": 0.27,
    "cpu_int8/8x8/linear": 0.28,
    "dense_f16/spatial": 0.06,
    "dense_f16/pointwise": 0.05,
    "dense_f16/linear": 0.11,
    "dense_f16/few_rows": 0.05,
    **{
        f"cpu_f16/{block}x{block}/{kind}": fraction
        for block, fraction in ((32, 0.6), (16, 0.45), (8, 0.2))
        for kind in ("spatial", "pointwise", "linear")
    },
}
# The same, restricted to AVX2 (ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2).
_EFFICIENCY_AVX2 = {
    "dense/spatial": 0.92,
    "dense/pointwise": 0.98,
    "dense/linear": 0.85,
    "dense/few_rows": 0.50,
    "dense/grouped": 0.38,
    "dense/depthwise": 0.30,
    "32x32/spatial": 0.80,
    "32x32/pointwise": 0.95,
    "32x32/linear": 0.88,
    "16x16/spatial": 0.82,
    "16x16/pointwise": 0.87,
    "16x16/linear": 0.86,
    "8x8/spatial": 0.76,
    "8x8/pointwise": 0.85,
    "8x8/linear": 0.80,
}
_MEASURED = "measured: AMD EPYC (Zen 5), 2 threads, torch 2.13, gcc 12"
_ZEN5 = "AMD, Software Optimization Guide for the Zen 5 microarchitecture (58455)"
_SPR = "Intel, 64 and IA-32 Architectures Optimization Reference Manual (248966), Golden Cove"
_SKYLAKE = "Intel, 64 and IA-32 Architectures Optimization Reference Manual (248966), Skylake client"


def _sources(default: str, **other: str) -> dict[str, str]:
    return {**dict.fromkeys((*NUMBERS, "isa", "efficiency"), default), **other}


_AVX512_2CORE = DeviceSpec(
    name="avx512-2core",
    isa="avx512",
    threads=2,
    vector_bits=512,
    vector_registers=32,
    peak_fp32_flops_per_second_per_thread=268e9,
    peak_bf16_flops_per_second_per_thread=600e9,
    peak_int8_ops_per_second_per_thread=1140e9,
    l1_bytes_per_thread=48 * KIB,
    l2_bytes_per_thread=1 * MIB,
    l3_bytes=32 * MIB,
    l2_bytes_per_second_per_thread=120e9,
    l3_bytes_per_second=220e9,
    dram_bytes_per_second=60e9,
    dense_conv_call_seconds=24e-6,
    dense_linear_call_seconds=14e-6,
    sparse_call_seconds=3e-6,
    epilogue_seconds_per_vector=0.7e-9,
    efficiency=_EFFICIENCY,
    sources=_sources(
        _MEASURED,
        isa=_ZEN5,
        vector_bits=_ZEN5,
        vector_registers=_ZEN5,
        l1_bytes_per_thread=_ZEN5,
        l2_bytes_per_thread=_ZEN5,
        l3_bytes=_ZEN5,
    ),
)

# Peak: two 512-bit FMA units at 2.6 GHz under AVX-512 load.
_AVX512_16CORE = (
    _AVX512_2CORE.with_figures(
        _SPR,
        name="avx512-16core",
        threads=16,
        peak_fp32_flops_per_second_per_thread=166e9,
        peak_bf16_flops_per_second_per_thread=332e9,
        peak_int8_ops_per_second_per_thread=664e9,
        l2_bytes_per_thread=2 * MIB,
        l3_bytes=30 * MIB,
        l2_bytes_per_second_per_thread=100e9,
    )
    .with_figures(
        "assumed: 8 channels of DDR5-4800 at 70 %, a mesh half as fast again",
        l3_bytes_per_second=320e9,
        dram_bytes_per_second=200e9,
    )
    .with_figures(_MEASURED, efficiency=_EFFICIENCY)
)

# Peak: 2 * 16 * 16 * 32 operations every 16 cycles, at 2.6 GHz; 2.55 to 2.85 TFLOP/s were measured from L1.
# Of the fractions, those of linear layers were measured as such (torch: 1024 x 1024 on 128 rows, 0.74 TFLOP/s
# in one thread); those of convolutions reproduce a prototype's measured ratios to torch over ResNet-50.
_SAPPHIRE_RAPIDS = _AVX512_16CORE.with_figures(
    "Intel, 64 and IA-32 Architectures Optimization Reference Manual (248966), chapter on Intel AMX",
    name="sapphire-rapids",
    peak_amx_flops_per_second_per_thread=2.66e12,
).with_figures(
    "a prototype with these tiles, measured: Intel Xeon with AMX, 2 threads, gcc 12",
    amx_tile_seconds=95e-9,
    efficiency={
        "dense_amx/spatial": 0.55,
        "dense_amx/pointwise": 0.36,
        "dense_amx/linear": 0.28,
        "cpu_amx_bf16/32x32/spatial": 0.95,
        "cpu_amx_bf16/32x32/pointwise": 0.80,
        "cpu_amx_bf16/32x32/linear": 0.70,
        "cpu_amx_bf16/16x16/spatial": 0.95,
        "cpu_amx_bf16/16x16/pointwise": 0.80,
        "cpu_amx_bf16/16x16/linear": 0.70,
    },
)

# Peak: two 256-bit FMA units at 3.6 GHz.
_AVX2_4CORE = (
    _AVX512_2CORE.with_figures(
        _SKYLAKE,
        name="avx2-4core",
        isa="avx2",
        threads=4,
        vector_bits=256,
        vector_registers=16,
        peak_fp32_flops_per_second_per_thread=115e9,
        peak_bf16_flops_per_second_per_thread=80e9,
        peak_int8_ops_per_second_per_thread=115e9,
        l1_bytes_per_thread=32 * KIB,
        l2_bytes_per_thread=256 * KIB,
        l3_bytes=8 * MIB,
        l2_bytes_per_second_per_thread=70e9,
    )
    .with_figures(
        "assumed: 2 channels of DDR4-2666 at 75 %, a ring two and a half times as fast",
        l3_bytes_per_second=80e9,
        dram_bytes_per_second=32e9,
    )
    .with_figures(f"{_MEASURED}, restricted to AVX2", efficiency=_EFFICIENCY_AVX2)
)

# torch's fallback classes on any machine.
_PORTABLE_2CORE = _AVX2_4CORE.with_figures(
    "assumed: 128-bit vectors at 3 GHz without fused multiply-add",
    name="portable-2core",
    isa="portable",
    threads=2,
    peak_fp32_flops_per_second_per_thread=24e9,
    peak_bf16_flops_per_second_per_thread=16e9,
    peak_int8_ops_per_second_per_thread=24e9,
    l3_bytes_per_second=40e9,
    dram_bytes_per_second=20e9,
    efficiency={
        f"{block}x{block}/{kind}": 0.5 for block in (32, 16, 8) for kind in ("spatial", "pointwise", "linear")
    },
)

SPECS: dict[str, DeviceSpec] = {
    spec.name: spec
    for spec in (_AVX512_2CORE, _AVX512_16CORE, _SAPPHIRE_RAPIDS, _AVX2_4CORE, _PORTABLE_2CORE)
}


def device(which: str | torch.device | AnyDevice | os.PathLike[str] | None = None) -> AnyDevice:
    """The spec of a device.

    Args:
        which: `None`, `"cpu"`, `"host"` or a CPU `torch.device` for this machine (calibrated figures if
            there are any), `"cuda"`, `"cuda:1"` or a CUDA `torch.device` for the GPU in it, the name of a
            known device, a `.json` file written from a spec's `to_json`, or a spec (returned as it is).

    Raises:
        OptionError: for anything else; the message lists the names.
    """
    if isinstance(which, DeviceSpec | GpuSpec):
        return which
    if which is None or str(which) in (HOST, "cpu", "cpu:0"):
        from .calibrate import calibrated

        return calibrated(DeviceSpec.host())
    if not isinstance(which, str | torch.device | os.PathLike):
        raise OptionError(
            "device",
            "a name, a torch.device or a device spec",
            f"a {type(which).__name__}",
            "Pass a model's example inputs to trace(model, inputs), which comes before plan().",
        )
    name = os.fspath(which) if isinstance(which, os.PathLike) else str(which)
    kind, _, index = name.partition(":")
    if kind == GpuSpec.type and (index.isdigit() or name == kind):
        return present_gpu(int(index or 0))
    named: dict[str, AnyDevice] = {**SPECS, **GPU_SPECS}
    if name.lower() in named:
        return named[name.lower()]
    if name.endswith(".json") and Path(name).is_file():
        return _from_file(name)
    raise OptionError(
        f"device({name!r})",
        "the name of a known device",
        repr(name),
        f"CPUs: {', '.join((HOST, *SPECS))}. GPUs: cuda (the present one), {', '.join(GPU_SPECS)}. "
        "Or a .json file written from a spec's to_json.",
    )


def home(model: torch.nn.Module, inputs: Iterable[Any] = ()) -> str | None:
    """`"cuda:1"` for a model with tensors or inputs there; None for one on the CPU."""
    tensors = (*model.parameters(), *model.buffers(), *tree_leaves(list(inputs)))
    found = (str(t.device) for t in tensors if isinstance(t, torch.Tensor) and t.device.type == GpuSpec.type)
    return next(found, None)


def _from_file(name: str) -> AnyDevice:
    try:
        data = json.loads(Path(name).read_text())
    except json.JSONDecodeError as error:
        raise OptionError(f"device({name!r})", "a JSON file", str(error), "Write it again.") from error
    kind = data.get("type") if isinstance(data, dict) else None
    return GpuSpec.from_json(data) if kind == GpuSpec.type else DeviceSpec.from_json(data)
