"""Fixed layers, and a kernel table row that says yes to nearly everything."""

from __future__ import annotations

import torch

from blocksparse_compiler import BlockPattern, Site


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


def linear_site(out_channels=3072, in_channels=768, rows=(8, 128)) -> Site:
    return Site("fc", "linear", "linear", out_channels, in_channels, input_shape=(*rows, in_channels))


def even_pattern(site: Site, density: float, block=(32, 32), seed: int = 0) -> BlockPattern:
    """About `density` of the tiles of `site`'s weight, at random."""
    shape = (site.out_channels, site.in_channels // site.groups, *site.kernel_size)
    full = BlockPattern.full(shape, block, site.groups)
    draw = torch.rand(full.grid_shape, generator=torch.Generator().manual_seed(seed))
    return full.with_kept(draw < density)


class AnyLayer:
    """A row of the kernel table that supports everything but transposed convolutions."""

    def unsupported(self, site: Site, pattern: BlockPattern) -> str | None:
        return "transposed convolutions have no block-sparse kernel yet" if site.transposed else None

    def configs(self, site, pattern, device) -> list[dict[str, int | str]]:
        return [{"pixels": 14}, {"pixels": 7}]
