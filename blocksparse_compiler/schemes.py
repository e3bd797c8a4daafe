"""Fixed sparse structures, chosen before training: which weights of a layer exist at all.

A scheme maps the shape of a weight to the `BlockPattern` of what is kept; `apply_pattern` holds the layer
to it with a mask. Indices are 0-based: output channel o (over all groups), input channel c (inside its
group), tap t (row-major over the kernel).
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .errors import OptionError, PatternError, check_number
from .layout import swap_channels
from .pattern import BlockPattern, BlockShape, check_block_shape

TapSets = tuple[tuple[int, ...], ...]


class Scheme(Protocol):
    """What `apply_pattern` needs of a scheme.

    Attributes:
        dense_stem: whether the first convolution of a model stays dense.
    """

    @property
    def dense_stem(self) -> bool: ...

    def pattern(self, name: str, weight_shape: tuple[int, ...], groups: int) -> BlockPattern:
        """The kept tiles of a weight `[O, C/groups, *kernel]`; `PatternError` if they do not fit it."""
        ...


class FixedMask(nn.Module):
    """A parametrization that zeroes everything outside a pattern, and its gradient with it."""

    mask: Tensor

    def __init__(self, pattern: BlockPattern, transposed: bool, device: torch.device | None = None) -> None:
        super().__init__()
        self.block_shape = pattern.block_shape
        mask = pattern.mask()
        mask = swap_channels(mask, pattern.groups) if transposed else mask
        self.register_buffer("mask", mask.to(device))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0)

    def extra_repr(self) -> str:
        return f"kept={int(self.mask.sum())}/{self.mask.numel()}"


SUPPORTS = (1, 2, 4)


def kernel_supports(support: int, kernel_size: tuple[int, ...]) -> TapSets:
    """All single taps, adjacent pairs, or 2x2 windows of a kernel, row by row; none if there are no such.

    For 3x3 kernels those of Kundu et al., "Pre-defined Sparsity for Low-Complexity Convolutional Neural
    Networks", IEEE Transactions on Computers 2020: pairs lie in a row. Kernels of other sizes and dimensions
    are treated alike: pairs and windows extend along the last axes that are longer than one tap.
    """
    axes = [axis for axis, size in enumerate(kernel_size) if size > 1][-(support.bit_length() - 1) :]
    if support == 1:
        axes = []
    elif 2 ** len(axes) < support:
        return ()
    window = tuple(2 if axis in axes else 1 for axis in range(len(kernel_size)))
    numbers = torch.arange(math.prod(kernel_size)).reshape(kernel_size)
    for axis, size in enumerate(window):
        numbers = numbers.unfold(axis, size, 1)
    return tuple(tuple(row) for row in numbers.reshape(-1, support).tolist())


@dataclass(frozen=True)
class PeriodicKernels:
    """pSConv: each kernel keeps `support` taps, which ones repeats with the period along both channels.

    With `r = (o + c + 1) mod period`, a kernel keeps all taps if `boosted` and `r == 0`, else those of
    `kernel_supports(support, kernel_size)[r]`, cycled. For 3x3 kernels, `PeriodicKernels(4, 8, boosted=True)`
    is the paper's PSD4_P8, of density `((P - 1) n + 9) / (9 P)`; without `boosted` it is PS4_P8. The first
    convolution, 1x1 convolutions and linear layers stay dense, and kernels with no such windows, too.

    Raises:
        OptionError: if support is not 1, 2 or 4, or period is less than 1.
    """

    support: int
    period: int
    boosted: bool = False
    dense_stem = True

    def __post_init__(self) -> None:
        if self.support not in SUPPORTS:
            raise OptionError("PeriodicKernels", "support 1, 2 or 4", repr(self.support), "Use one of these.")
        if self.period < 1:
            raise OptionError("PeriodicKernels", "period >= 1", repr(self.period), "Use for example 8.")

    def pattern(self, name: str, weight_shape: tuple[int, ...], groups: int) -> BlockPattern:
        kernel = weight_shape[2:]
        supports = kernel_supports(self.support, kernel) if math.prod(kernel) > 1 else ()
        if not supports:
            got = "x".join(map(str, kernel)) or "a linear layer"
            expected = (
                f"a kernel with windows of {self.support} taps"
                if math.prod(kernel) > 1
                else "a kernel larger than 1x1"
            )
            raise PatternError(name, expected, got, "Exclude this layer.")
        out, channel = _channels(weight_shape)
        r = (out + channel + 1) % self.period
        cycle = _tap_masks(supports, math.prod(kernel))
        kept = cycle[r % len(cycle)]
        if self.boosted:
            kept = kept | (r == 0)[..., None]
        return _elementwise(kept, weight_shape, groups)


@dataclass(frozen=True)
class StructuredBand:
    """A band over the channels times a set of taps; contains depthwise, groupwise and pointwise convolution.

    Output channel o, in runs of `share` channels, reads the cyclic window of `width` input channels that
    starts at `stride * (o // share)`; channel pair (o, c) has the taps `taps[(o + c) mod len(taps)]`.

    Args:
        width: input channels that an output channel reads; None for all of them.
        stride: by how many input channels the window moves on.
        share: how many output channels in a row have the same window.
        taps: tap sets to cycle through; None for all taps.

    Raises:
        OptionError: if width, stride or share is less than 1, or a tap set is empty.
    """

    width: int | None
    stride: int = 1
    share: int = 1
    taps: TapSets | None = None
    dense_stem = False

    def __post_init__(self) -> None:
        sizes = {"stride": self.stride, "share": self.share}
        if self.width is not None:
            sizes["width"] = self.width
        for option, value in sizes.items():
            if value < 1:
                raise OptionError("StructuredBand", f"{option} >= 1", repr(value), "Use a positive size.")
        if self.taps is not None and not (self.taps and all(self.taps)):
            fix = "Leave taps out to keep all taps."
            raise OptionError("StructuredBand", "tap sets with taps in them", repr(self.taps), fix)

    @classmethod
    def depthwise(cls, multiplier: int = 1) -> StructuredBand:
        """`groups=C`, with `multiplier` output channels for each input channel."""
        return cls(width=1, stride=1, share=multiplier)

    @classmethod
    def groupwise(cls, in_per_group: int, out_per_group: int) -> StructuredBand:
        """`groups=C / in_per_group`."""
        return cls(width=in_per_group, stride=in_per_group, share=out_per_group)

    @classmethod
    def pointwise(cls, kernel_size: tuple[int, ...]) -> StructuredBand:
        """A 1x1 convolution written with a larger kernel of odd sizes: the centre tap alone."""
        return cls(width=None, taps=((math.prod(kernel_size) // 2,),))

    def pattern(self, name: str, weight_shape: tuple[int, ...], groups: int) -> BlockPattern:
        channels, num_taps = weight_shape[1], math.prod(weight_shape[2:])
        width = channels if self.width is None else self.width
        if width > channels:
            fix = "Use a narrower band, or exclude this layer."
            raise PatternError(name, f"a band no wider than {channels} input channels", f"{width}", fix)
        taps = self.taps or (tuple(range(num_taps)),)
        if max(map(max, taps)) >= num_taps or min(map(min, taps)) < 0:
            fix = "Exclude this layer, or use other tap sets."
            raise PatternError(name, f"taps below {num_taps}", repr(taps), fix)
        out, channel = _channels(weight_shape)
        band = (channel - self.stride * (out // self.share)) % channels < width
        cycle = _tap_masks(taps, num_taps)
        kept = cycle[(out + channel) % len(cycle)] & band[..., None]
        return _elementwise(kept, weight_shape, groups)


@dataclass(frozen=True)
class RandomBlocks:
    """A random fraction of the blocks of each layer, with exact counts (and at least one block).

    Args:
        block_shape: (output, input) channels of a block; a block spans all taps.
        density: fraction of blocks to keep, in (0, 1].
        seed: with the layer's name, decides which blocks.

    Raises:
        PatternError, OptionError: on a bad block shape or density.
    """

    block_shape: BlockShape
    density: float
    seed: int = 0
    dense_stem = False

    def __post_init__(self) -> None:
        check_block_shape(self.block_shape, "RandomBlocks")
        check_number(
            "RandomBlocks", "density", self.density, fix="Use for example 0.5 to keep half.", share=True
        )

    def pattern(self, name: str, weight_shape: tuple[int, ...], groups: int) -> BlockPattern:
        full = BlockPattern.full(weight_shape, self.block_shape, groups)
        rows, taps, cols = full.grid_shape
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        count = max(1, math.floor(self.density * rows * cols + 0.5))
        kept = torch.zeros(rows * cols, dtype=torch.bool)
        kept[torch.randperm(rows * cols, generator=generator)[:count]] = True
        return full.with_kept(kept.reshape(rows, 1, cols).expand(rows, taps, cols))


def _channels(weight_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Output and input channel numbers, `[O, 1]` and `[1, C/groups]`."""
    return torch.arange(weight_shape[0])[:, None], torch.arange(weight_shape[1])[None]


def _tap_masks(tap_sets: TapSets, num_taps: int) -> Tensor:
    """bool `[sets, taps]`."""
    masks = torch.zeros(len(tap_sets), num_taps, dtype=torch.bool)
    for mask, taps in zip(masks, tap_sets, strict=True):
        mask[list(taps)] = True
    return masks


def _elementwise(kept: Tensor, weight_shape: tuple[int, ...], groups: int) -> BlockPattern:
    """The pattern of single weights from a bool `[O, C/groups, taps]`."""
    return BlockPattern.full(weight_shape, (1, 1), groups).with_kept(kept.transpose(1, 2))
