"""The GPUs that the planner knows by name, and the one in this machine.

Units are in the field names; every figure names its source. "Assumed" figures are leads, to be replaced by
measured ones. None of them has been fitted to kernels of this package yet.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch

from .errors import OptionError
from .gpu_spec import GpuSpec

log = logging.getLogger(__name__)

NUMBERS = GpuSpec.number_names()
KIB, MIB = 1024, 1024 * 1024

# ---- named GPUs ------------------------------------------------------------------------------------

_A100 = "NVIDIA, A100 Tensor Core GPU Architecture whitepaper (2020)"
_A100_SHEET = "NVIDIA, A100 datasheet, SXM 80 GB"
_H100 = "NVIDIA, H100 Tensor Core GPU Architecture whitepaper (2022), SXM5"
_H100_SHEET = "NVIDIA, H100 datasheet, SXM"
_H200_SHEET = "NVIDIA, H200 datasheet, SXM"
_ADA = "NVIDIA, Ada GPU Architecture whitepaper (2022), appendix A"
_L4_SHEET = "NVIDIA, L4 datasheet (sparse figures halved)"
_CUDA = "NVIDIA, CUDA C++ Programming Guide, table of compute capabilities"
_CDNA3 = "AMD, CDNA 3 architecture whitepaper (2023)"
_MI300X = "AMD, Instinct MI300X datasheet"
_LEAD = "assumed; a lead until measured"
_H200_SEEN = "seen on one H200 through torch 2.11"

# Fractions that stand until they are measured with our kernels. The best of them: cuBLAS on 8192-wide
# bf16 products of random data, 790 of 989 TFLOP/s on an H200; a copy through torch, 4.3 of 4.8 TB/s.
_HOPPER_EFFICIENCY = {
    "dense/linear": 0.80,
    "dense/spatial": 0.61,
    "dense/pointwise": 0.61,
    "dense/grouped": 0.10,
    "dense/depthwise": 0.03,
    "dense/template": 0.55,
    "dense/few_rows": 0.80,
    "dram": 0.90,
    "l2": 0.85,
    "l1": 0.6,
    "triton_gather": 0.60,
    "triton_box": 0.68,
    "triton_pair": 0.66,
    "triton_decode": 0.50,
}
# Matrix instructions of whole warps, fed through registers: compilers and libraries come closer to peak.
_AMPERE_EFFICIENCY = {
    **_HOPPER_EFFICIENCY,
    "dense/linear": 0.82,
    "dense/spatial": 0.65,
    "dense/pointwise": 0.65,
    "dense/template": 0.65,
    "triton_gather": 0.65,
}


def _sources(default: str, **other: str) -> dict[str, str]:
    return {**dict.fromkeys((*NUMBERS, "arch", "efficiency"), default), **other}


_H100_SPEC = GpuSpec(
    name="h100",
    backend="cuda",
    arch=90,
    multiprocessors=132,
    clock_hertz=1.70e9,
    peak_flops_per_second={"bfloat16": 989.4e12, "float16": 989.4e12, "tf32": 494.7e12, "float32": 66.9e12},
    l2_bytes=50 * MIB,
    l2_bytes_per_second=5.5e12,
    l2_bytes_per_clock_per_multiprocessor=64,
    dram_bytes_per_second=3.35e12,
    shared_bytes_per_block=227 * KIB,
    shared_bytes_per_multiprocessor=228 * KIB,
    shared_bytes_per_clock_per_multiprocessor=128,
    l1_bytes_per_multiprocessor=256 * KIB,
    registers_per_multiprocessor=65536,
    threads_per_multiprocessor=2048,
    warp_threads=32,
    load_latency_seconds=0.45e-6,
    program_seconds=0.6e-6,
    launch_seconds=2.5e-6,
    graph_launch_seconds=1.3e-6,
    efficiency=_HOPPER_EFFICIENCY,
    sources={
        **_sources(
            _H100,
            clock_hertz="assumed: boost clock less what power limits take; a lead until measured",
            l2_bytes_per_second="Chips and Cheese, Nvidia's H100 (2023), PCIe card; a lead until measured",
            l2_bytes_per_clock_per_multiprocessor=_A100,
            dram_bytes_per_second=_H100_SHEET,
            arch=_CUDA,
            shared_bytes_per_block=_CUDA,
            shared_bytes_per_multiprocessor=_CUDA,
            shared_bytes_per_clock_per_multiprocessor=_CUDA,
            registers_per_multiprocessor=_CUDA,
            threads_per_multiprocessor=_CUDA,
            warp_threads=_CUDA,
            load_latency_seconds=_LEAD,
            program_seconds=_LEAD,
            launch_seconds=_LEAD,
            graph_launch_seconds=_LEAD,
            efficiency=_LEAD,
        ),
        "efficiency dense/linear": _H200_SEEN,
        "efficiency dram": _H200_SEEN,
    },
)

_H200_SPEC = _H100_SPEC.with_figures(_H200_SHEET, name="h200", dram_bytes_per_second=4.8e12).with_figures(
    _H200_SEEN, l2_bytes=60 * MIB
)

_A100_SPEC = (
    _H100_SPEC.with_figures(
        _A100,
        name="a100",
        arch=80,
        multiprocessors=108,
        clock_hertz=1.41e9,
        peak_flops_per_second={"bfloat16": 312e12, "float16": 312e12, "tf32": 156e12, "float32": 19.5e12},
        l2_bytes=40 * MIB,
        l1_bytes_per_multiprocessor=192 * KIB,
    )
    .with_figures(_A100_SHEET, dram_bytes_per_second=2.039e12)
    .with_figures(_CUDA, arch=80, shared_bytes_per_block=163 * KIB, shared_bytes_per_multiprocessor=164 * KIB)
    .with_figures("assumed: 60 % of the 5120 bytes per clock in the whitepaper", l2_bytes_per_second=4.3e12)
    .with_figures(_LEAD, load_latency_seconds=0.40e-6, efficiency=_AMPERE_EFFICIENCY)
)

_RTX4090_SPEC = (
    _A100_SPEC.with_figures(
        _ADA,
        name="rtx4090",
        multiprocessors=128,
        clock_hertz=2.52e9,
        peak_flops_per_second={
            "bfloat16": 165.2e12,
            "float16": 165.2e12,
            "tf32": 82.6e12,
            "float32": 82.6e12,
        },
        l2_bytes=72 * MIB,
        l1_bytes_per_multiprocessor=128 * KIB,
        dram_bytes_per_second=1.008e12,
    )
    .with_figures(
        _CUDA,
        arch=89,
        shared_bytes_per_block=99 * KIB,
        shared_bytes_per_multiprocessor=100 * KIB,
        threads_per_multiprocessor=1536,
    )
    .with_figures(_LEAD, l2_bytes_per_second=5.0e12, load_latency_seconds=0.35e-6)
)

_L4_SPEC = (
    _RTX4090_SPEC.with_figures(
        _L4_SHEET,
        name="l4",
        peak_flops_per_second={"bfloat16": 121e12, "float16": 121e12, "tf32": 60e12, "float32": 30.3e12},
        dram_bytes_per_second=0.3e12,
    )
    .with_figures(_ADA + ", AD104", multiprocessors=58, l2_bytes=48 * MIB)
    .with_figures(
        "assumed: 72 W hold the clock at about 1.2 of 2.04 GHz under matrix work; a lead until measured",
        clock_hertz=1.2e9,
        l2_bytes_per_second=1.3e12,
        efficiency={
            "dense/linear": 0.55,
            "dense/spatial": 0.50,
            "dense/pointwise": 0.50,
            "dense/template": 0.48,
            "triton_gather": 0.48,
            "triton_box": 0.48,
            "triton_pair": 0.48,
        },
    )
)

# Eight dies share 256 MiB of Infinity Cache; it stands for the L2 here, as what all of them share.
_MI300X_SPEC = (
    _H100_SPEC.with_figures(
        _MI300X,
        name="mi300x",
        backend="hip",
        arch="gfx942",
        multiprocessors=304,
        clock_hertz=2.1e9,
        peak_flops_per_second={
            "bfloat16": 1307.4e12,
            "float16": 1307.4e12,
            "tf32": 653.7e12,
            "float32": 163.4e12,
        },
        dram_bytes_per_second=5.3e12,
    )
    .with_figures(
        _CDNA3,
        l2_bytes=256 * MIB,
        l2_bytes_per_clock_per_multiprocessor=64,
        shared_bytes_per_block=64 * KIB,
        shared_bytes_per_multiprocessor=64 * KIB,
        l1_bytes_per_multiprocessor=32 * KIB,
        registers_per_multiprocessor=131072,
        warp_threads=64,
    )
    .with_figures(
        "Chips and Cheese, Testing AMD's Giant MI300X (2024), Infinity Cache; a lead until measured",
        l2_bytes_per_second=11.9e12,
    )
    .with_figures(
        _LEAD,
        load_latency_seconds=0.8e-6,
        program_seconds=1.2e-6,
        launch_seconds=4e-6,
        graph_launch_seconds=2.5e-6,
        efficiency={
            "dense/linear": 0.50,
            "dense/spatial": 0.35,
            "dense/pointwise": 0.40,
            "dense/template": 0.35,
            "dense/few_rows": 0.70,
            "dram": 0.80,
            "triton_gather": 0.35,
            "triton_box": 0.35,
            "triton_pair": 0.35,
        },
    )
)

MEASURED_FOLDER = Path(__file__).parent / "tuned"


def with_measured(spec: GpuSpec) -> GpuSpec:
    """`spec` with the figures that were fitted to measurements on such a GPU, if `gpu_fit` wrote some."""
    path = MEASURED_FOLDER / f"{spec.name}.figures.json"
    try:
        data = json.loads(path.read_text())
        return spec.with_figures(data["source"], **data["figures"])
    except FileNotFoundError:
        return spec
    except (ValueError, KeyError, TypeError) as error:
        log.warning(
            "%s is damaged (%r): planning with the figures of the data sheet. Fit again.", path, error
        )
        return spec


SPECS: dict[str, GpuSpec] = {
    spec.name: with_measured(spec)
    for spec in (_A100_SPEC, _H100_SPEC, _H200_SPEC, _L4_SPEC, _RTX4090_SPEC, _MI300X_SPEC)
}

# ---- the GPU in this machine -----------------------------------------------------------------------

_KNOWN = {
    r"NVIDIA A100-SXM4-80GB": "a100",
    r"NVIDIA H100 80GB HBM3": "h100",
    r"NVIDIA H200": "h200",
    r"NVIDIA L4": "l4",
    r"NVIDIA GeForce RTX 4090": "rtx4090",
    r"AMD Instinct MI300X.*": "mi300x",
}
# The spec to scale from, by least compute capability; newer GPUs than the newest count as that.
_CLOSEST = ((90, "h100"), (89, "rtx4090"), (0, "a100"))


def present_gpu(index: int = 0) -> GpuSpec:
    """The GPU that torch sees as `cuda:<index>`.

    A known one gets its spec. Others are scaled by multiprocessors, clock and memory rate from the closest
    architecture; those that our kernels cannot run on have an `obstacle`.

    Raises:
        OptionError: if torch sees no such GPU.
    """
    try:
        found = torch.cuda.get_device_properties(index)
    except (AssertionError, RuntimeError) as error:
        raise OptionError(
            f"device('cuda:{index}')",
            "a GPU that torch can use",
            str(error).splitlines()[0] if str(error) else "none",
            f"To plan for a GPU that is not here, name it: {', '.join(SPECS)}.",
        ) from error
    return spec_of(found)


def spec_of(properties: Any) -> GpuSpec:
    """The spec for `torch.cuda.get_device_properties(...)`; see `present_gpu`."""
    name = str(properties.name)
    known = next((spec for text, spec in _KNOWN.items() if re.fullmatch(text, name)), None)
    if known and properties.multi_processor_count == SPECS[known].multiprocessors:
        return SPECS[known]
    hip = getattr(torch.version, "hip", None) is not None
    arch: int | str = 10 * int(properties.major) + int(properties.minor)
    if hip:
        arch = str(getattr(properties, "gcnArchName", "gfx000")).partition(":")[0]
    closest = known or ("mi300x" if hip else next(s for least, s in _CLOSEST if int(arch) >= least))
    return with_measured(_scaled(SPECS[closest], _slug(name), arch, properties))


def _scaled(base: GpuSpec, name: str, arch: int | str, properties: Any) -> GpuSpec:
    """`base` with the figures that torch reports, and the rates scaled by them."""
    count = int(properties.multi_processor_count)
    clock = 1e3 * float(getattr(properties, "clock_rate", 0) or 0)  # kHz; absent from some releases
    # The base's clock is the one under load: only a lower boost clock says anything.
    clock = min(clock, base.clock_hertz) if clock else base.clock_hertz
    share = count * clock / (base.multiprocessors * base.clock_hertz)
    peaks = {dtype: peak * share for dtype, peak in base.peak_flops_per_second.items()}
    scaled = f"{base.name}, scaled by multiprocessors and clock"
    reported = {
        field: int(value)
        for field, attribute in (
            ("l2_bytes", "L2_cache_size"),
            ("shared_bytes_per_block", "shared_memory_per_block_optin"),
            ("shared_bytes_per_multiprocessor", "shared_memory_per_multiprocessor"),
            ("registers_per_multiprocessor", "regs_per_multiprocessor"),
            ("threads_per_multiprocessor", "max_threads_per_multi_processor"),
            ("warp_threads", "warp_size"),
        )
        if (value := getattr(properties, attribute, 0))
    }
    if base.backend == "hip":
        reported.pop("l2_bytes", None)  # of one die
    spec = base.with_figures("reported by torch", name=name, arch=arch, multiprocessors=count, **reported)
    spec = spec.with_figures(
        scaled,
        clock_hertz=clock,
        peak_flops_per_second=peaks,
        l2_bytes_per_second=base.l2_bytes_per_second * share,
    )
    memory_hertz = 1e3 * float(getattr(properties, "memory_clock_rate", 0) or 0)
    bus_bits = int(getattr(properties, "memory_bus_width", 0) or 0)
    if memory_hertz and bus_bits:
        rate = 2 * memory_hertz * bus_bits / 8  # two transfers per clock
        return spec.with_figures("reported by torch: memory clock and bus width", dram_bytes_per_second=rate)
    return spec.with_figures(
        f"{base.name}, scaled by multiprocessors",
        dram_bytes_per_second=base.dram_bytes_per_second * min(1.0, count / base.multiprocessors),
    )


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


__all__ = ["MEASURED_FOLDER", "NUMBERS", "SPECS", "GpuSpec", "present_gpu", "spec_of", "with_measured"]
