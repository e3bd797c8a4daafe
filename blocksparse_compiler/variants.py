"""The table of kernel variants: what each one supports, and with which parameters it runs best.

Pure data and arithmetic: planning needs neither Inductor nor the target machine. `codegen` turns a row of
this table into code, the cost model, the tests and the benchmarks run over its rows.
"""

from __future__ import annotations

from . import box_variant, cpu_spmm, cpu_variants, depthwise, gpu_variants, pair_variant
from .kernel_variant import KernelConfig, KernelVariant, Parameters, output_pixels
from .pattern import BlockShape, check_block_shape

VARIANTS: dict[str, KernelVariant] = {
    variant.name: variant
    for variant in (
        *cpu_variants.CPU_VARIANTS,
        cpu_spmm.SPMM,
        depthwise.DEPTHWISE,
        *gpu_variants.GPU_VARIANTS,
        box_variant.BOX,
        pair_variant.PAIR,
    )
}


def block_shapes(device_type: str, wanted: BlockShape | None = None) -> tuple[BlockShape, ...]:
    """The tiles to look for in the weights of layers on such a device.

    Args:
        wanted: only this one; on GPUs the nearest tile that their kernels run (`gpu_variants.merged`).

    Raises:
        PatternError: if `wanted` is not two positive integers.
    """
    on_gpu = device_type.partition(":")[0] == "cuda"
    if wanted is None:
        return gpu_variants.BLOCK_SHAPES if on_gpu else cpu_variants.BLOCK_SHAPES
    wanted = check_block_shape(wanted, "block_shape")
    return (gpu_variants.merged(wanted) if on_gpu else wanted,)


__all__ = [
    "VARIANTS",
    "KernelConfig",
    "KernelVariant",
    "Parameters",
    "block_shapes",
    "output_pixels",
]
