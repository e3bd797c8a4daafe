"""Fixed layers, and a kernel table row that says yes to nearly everything."""

from __future__ import annotations

import torch

from blocksparse_compiler import BlockPattern, Site
from blocksparse_compiler.devices import DeviceSpec

# Round figures that no calibration or new release changes: sentences and choices in tests rest on them.
FIXED = DeviceSpec(
    name="fixed",
    isa="avx512",
    threads=2,
    vector_bits=512,
    vector_registers=32,
    peak_fp32_flops_per_second_per_thread=250e9,
    peak_bf16_flops_per_second_per_thread=500e9,
    peak_int8_ops_per_second_per_thread=1000e9,
    l1_bytes_per_thread=48 * 1024,
    l2_bytes_per_thread=1024 * 1024,
    l3_bytes=32 * 1024 * 1024,
    l2_bytes_per_second_per_thread=100e9,
    l3_bytes_per_second=100e9,
    dram_bytes_per_second=50e9,
    dense_conv_call_seconds=10e-6,
    dense_linear_call_seconds=5e-6,
    sparse_call_seconds=5e-6,
    epilogue_seconds_per_vector=0.5e-9,
    efficiency={
        "dense_bf16/spatial": 0.95,
        "dense_bf16/pointwise": 0.9,
        "dense_bf16/linear": 0.85,
        "dense/spatial": 1.0,
        "dense/pointwise": 1.0,
        "dense/linear": 1.0,
        "dense/grouped": 0.5,
        "dense/depthwise": 0.2,
        **{f"32x32/{kind}": 0.9 for kind in ("spatial", "pointwise", "linear")},
        **{f"16x16/{kind}": 0.8 for kind in ("spatial", "pointwise", "linear")},
        **{f"8x8/{kind}": 0.4 for kind in ("spatial", "pointwise", "linear")},
    },
)


def conv_site(out_channels=256, in_channels=256, kernel=3, size=14, batch=8, **kwargs) -> Site:
    fields = {
        "name": "layer",
        "node": "conv2d",
        "op": "conv2d",
        "out_channels": out_channels,
        "in_channels": in_channels,
        "kernel_size": (kernel, kernel),
        "stride": (1, 1),
        "padding": ((kernel // 2, kernel // 2),) * 2,
        "dilation": (1, 1),
        "input_shape": (batch, in_channels, size, size),
    }
    return Site(**{**fields, **kwargs})


def linear_site(out_channels=3072, in_channels=768, rows=(8, 128), **kwargs) -> Site:
    shape = (*rows, in_channels)
    return Site("fc", "linear", "linear", out_channels, in_channels, input_shape=shape, **kwargs)


def even_pattern(site: Site, density: float, block=(32, 32), seed: int = 0) -> BlockPattern:
    """About `density` of the tiles of `site`'s weight, at random."""
    shape = (site.out_channels, site.in_channels // site.groups, *site.kernel_size)
    full = BlockPattern.full(shape, block, site.groups)
    draw = torch.rand(full.grid_shape, generator=torch.Generator().manual_seed(seed))
    return full.with_kept(draw < density)


class AnyLayer:
    """A row of the kernel table that supports everything but transposed convolutions."""

    device = "cpu"
    dtypes = ("float32",)

    def unsupported(self, site: Site, pattern: BlockPattern) -> str | None:
        return "transposed convolutions have no block-sparse kernel yet" if site.transposed else None

    def configs(self, site, pattern, device) -> list[dict[str, int | str]]:
        return [{"pixels": 14}, {"pixels": 7}]

    def describe(self, site, pattern, device, config) -> str:
        return ""
