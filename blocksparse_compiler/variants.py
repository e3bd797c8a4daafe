"""The table of kernel variants: what each one supports, and with which parameters it runs best.

Pure data and arithmetic: planning needs neither Inductor nor the target machine. `codegen` turns a row of
this table into code, the cost model, the tests and the benchmarks run over its rows.
"""

from __future__ import annotations

from . import amx_variant, box_variant, cpu_spmm, cpu_variants, depthwise, gpu_variants, pair_variant
from .kernel_variant import KernelConfig, KernelVariant, Parameters, output_pixels
from .pattern import BlockShape, check_block_shape
from .plan import Site

VARIANTS: dict[str, KernelVariant] = {
    variant.name: variant
    for variant in (
        *cpu_variants.CPU_VARIANTS,
        amx_variant.AMX,
        cpu_spmm.SPMM,
        depthwise.DEPTHWISE,
        *gpu_variants.GPU_VARIANTS,
        box_variant.BOX,
        pair_variant.PAIR,
    )
}


def variants_for(site: Site) -> dict[str, KernelVariant]:
    """The rows for the layer's device and dtype; those for its device if none is for its dtype."""
    on_device = {n: v for n, v in VARIANTS.items() if v.device == site.device.partition(":")[0]}
    return {n: v for n, v in on_device.items() if site.dtype in v.dtypes} or on_device


def block_shapes(
    device_type: str, wanted: BlockShape | None = None, dtype: str = "float32"
) -> tuple[BlockShape, ...]:
    """The tiles to look for in the weights of layers on such a device.

    Args:
        wanted: only this one, or the nearest tile that the kernels run (`merged`).
        dtype: of the layers.

    Raises:
        PatternError: if `wanted` is not two positive integers.
    """
    on_gpu = device_type.partition(":")[0] == "cuda"
    if wanted is None:
        return gpu_variants.BLOCK_SHAPES if on_gpu else cpu_variants.block_shapes(dtype)
    wanted = check_block_shape(wanted, "block_shape")
    return (gpu_variants.merged(wanted) if on_gpu else cpu_variants.merged(wanted, dtype),)


__all__ = [
    "VARIANTS",
    "KernelConfig",
    "KernelVariant",
    "Parameters",
    "block_shapes",
    "output_pixels",
    "variants_for",
]
