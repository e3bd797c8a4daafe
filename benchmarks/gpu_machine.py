"""The GPU that a benchmark ran on, and what it can do at most."""

from __future__ import annotations

from typing import Any

import torch

from blocksparse_compiler.tune import gpu_versions

from . import report
from .gpu_run import CudaRunner, Runner


def machine(runner: Runner) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    toolkit, triton = gpu_versions()
    facts = {**report.machine(), "spec": runner.spec.name, "cuda": toolkit, "triton": triton, "gpu": "none"}
    if not isinstance(runner, CudaRunner):
        return facts
    properties = torch.cuda.get_device_properties(0)
    return {
        **facts,
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "memory_bytes": properties.total_memory,
        "cudnn": torch.backends.cudnn.version(),
    }


def ceilings(runner: Runner) -> dict[str, float]:
    """Measured rates of copies, L2 reads and matrix products; of a GPU that is not here, its datasheet's."""
    if isinstance(runner, CudaRunner):
        from .gpu_probes import ceilings as measured

        return measured()
    spec = runner.spec
    return {
        "dram_bytes_per_second": spec.dram_bytes_per_second,
        "l2_bytes_per_second": spec.l2_bytes_per_second,
        "bfloat16_flops_per_second": spec.peak_flops_per_second["bfloat16"],
    }
