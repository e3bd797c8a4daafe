"""Which tiles of a weight are kept (`BlockPattern`), and the tiles themselves (`BlockSparseWeight`).

A convolution weight `[O, C/groups, *kernel]` (a linear weight `[O, C]` is the case of no kernel
dimensions) is cut into tiles `(out-block, tap, in-block)` of shape `(bh, bw)`. Tiles never straddle
two groups; the last tile of a row or column may be ragged. A tile that is not kept costs nothing.
"""

from __future__ import annotations

import base64
import hashlib
import math
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import PatternError

BlockShape = tuple[int, int]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True, eq=False)
class BlockPattern:
    """The kept tiles of one weight. Immutable; equal and hashed by content.

    Args:
        out_channels: O, all groups together.
        in_channels: C, all groups together.
        kernel_size: spatial size of the kernel; `()` for a linear layer.
        groups: number of convolution groups.
        block_shape: `(bh, bw)`, output by input channels.
        kept: bool `[groups * ceil(O/groups/bh), taps, ceil(C/groups/bw)]`, row-major over taps.

    Raises:
        PatternError: on non-positive sizes, a block larger than a group's weight, or a grid of the
            wrong shape or dtype.
    """

    out_channels: int
    in_channels: int
    kernel_size: tuple[int, ...]
    groups: int
    block_shape: BlockShape
    kept: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel_size", tuple(int(k) for k in self.kernel_size))
        object.__setattr__(self, "block_shape", check_block_shape(self.block_shape, "BlockPattern"))
        sizes = (self.out_channels, self.in_channels, self.groups, *self.kernel_size)
        if min(sizes) < 1 or self.out_channels % self.groups or self.in_channels % self.groups:
            raise PatternError(
                "BlockPattern",
                "positive sizes with channels divisible by groups",
                f"out_channels={self.out_channels}, in_channels={self.in_channels}, "
                f"kernel_size={self.kernel_size}, groups={self.groups}",
                "Take the sizes from the layer's weight.",
            )
        (bh, bw), (og, cg) = self.block_shape, self.group_channels
        if bh > og or bw > cg:
            raise PatternError(
                "BlockPattern",
                f"a block no larger than a group's weight ({og} x {cg})",
                f"block_shape={self.block_shape}",
                f"Use block_shape=({min(bh, og)}, {min(bw, cg)}) or smaller.",
            )
        if self.kept.dtype != torch.bool or tuple(self.kept.shape) != self.grid_shape:
            raise PatternError(
                "BlockPattern",
                f"a bool tile grid of shape {list(self.grid_shape)} [out-blocks, taps, in-blocks]",
                f"{self.kept.dtype} of shape {list(self.kept.shape)}",
                "Build it with BlockPattern.from_weight or BlockPattern.full.",
            )
        object.__setattr__(self, "kept", self.kept.detach().cpu().contiguous().clone())

    # ---- construction -------------------------------------------------------------------------

    @classmethod
    def full(
        cls,
        weight_shape: tuple[int, ...] | torch.Size,
        block_shape: BlockShape,
        groups: int = 1,
    ) -> BlockPattern:
        """Every tile of a weight of shape `[O, C/groups, *kernel]` kept."""
        out_channels, in_per_group, *kernel = weight_shape
        grid = grid_shape(out_channels, in_per_group * groups, tuple(kernel), groups, block_shape)
        ones = torch.ones(grid, dtype=torch.bool)
        return cls(out_channels, in_per_group * groups, tuple(kernel), groups, block_shape, ones)

    @classmethod
    def from_weight(cls, weight: Tensor, block_shape: BlockShape, groups: int = 1) -> BlockPattern:
        """Keeps each tile of `weight` `[O, C/groups, *kernel]` that holds a nonzero (NaN counts as one)."""
        full = cls.full(tuple(weight.shape), block_shape, groups)
        nonzero = weight.detach().ne(0)
        return full.with_kept(full.to_tiles(nonzero).flatten(3).any(-1))

    def with_kept(self, kept: Tensor) -> BlockPattern:
        """The same geometry with another tile grid."""
        return BlockPattern(
            self.out_channels, self.in_channels, self.kernel_size, self.groups, self.block_shape, kept
        )

    # ---- sizes --------------------------------------------------------------------------------

    @property
    def group_channels(self) -> tuple[int, int]:
        """(output, input) channels of one group."""
        return self.out_channels // self.groups, self.in_channels // self.groups

    @property
    def num_taps(self) -> int:
        return math.prod(self.kernel_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        return grid_shape(
            self.out_channels, self.in_channels, self.kernel_size, self.groups, self.block_shape
        )

    @property
    def num_kept(self) -> int:
        """Number of kept tiles."""
        return int(self.kept.sum())

    @cached_property
    def kept_elements(self) -> int:
        """Number of weight elements inside kept tiles (ragged tiles count their real size)."""
        (bh, bw), (og, cg) = self.block_shape, self.group_channels
        rows = _edge_sizes(og, bh).repeat(self.groups)
        cols = _edge_sizes(cg, bw)
        return int((self.kept.sum(1) * rows[:, None] * cols[None, :]).sum())

    @property
    def density(self) -> float:
        """Kept elements over all elements of the weight."""
        return self.kept_elements / math.prod(self.weight_shape)

    # ---- identity -----------------------------------------------------------------------------

    @cached_property
    def digest(self) -> str:
        """16 hex digits that name this pattern."""
        head = repr((self.weight_shape, self.groups, self.block_shape)).encode()
        return hashlib.sha256(head + np.packbits(self.kept.numpy()).tobytes()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockPattern) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        bh, bw = self.block_shape
        return (
            f"BlockPattern(weight={list(self.weight_shape)}, groups={self.groups}, block={bh}x{bw}, "
            f"kept={self.num_kept}/{self.kept.numel()}, density={self.density:.3f})"
        )

    # ---- views of a weight ----------------------------------------------------------------------

    @property
    def tile_coordinates(self) -> Tensor:
        """int64 `[n, 3]`: (out-block, tap, in-block) of each kept tile, in lexicographic order."""
        return self.kept.nonzero()

    def to_tiles(self, weight: Tensor) -> Tensor:
        """`[O, C/groups, *kernel]` → `[out-blocks, taps, in-blocks, bh, bw]`, ragged tiles zero-filled."""
        if tuple(weight.shape) != self.weight_shape:
            raise PatternError(
                "BlockPattern.to_tiles",
                f"a weight of shape {list(self.weight_shape)}",
                f"{list(weight.shape)}",
                "Use the pattern of this layer.",
            )
        (bh, bw), (og, cg) = self.block_shape, self.group_channels
        rows, cols = _ceil_div(og, bh), _ceil_div(cg, bw)
        w = weight.reshape(self.groups, og, cg, self.num_taps)
        if og % bh or cg % bw:
            w = torch.nn.functional.pad(w, (0, 0, 0, cols * bw - cg, 0, rows * bh - og))
        w = w.reshape(self.groups, rows, bh, cols, bw, self.num_taps)
        return w.permute(0, 1, 5, 3, 2, 4).reshape(self.groups * rows, self.num_taps, cols, bh, bw)

    def from_tiles(self, tiles: Tensor) -> Tensor:
        """Inverse of `to_tiles`: drops the fill of ragged tiles."""
        (bh, bw), (og, cg) = self.block_shape, self.group_channels
        rows, cols = _ceil_div(og, bh), _ceil_div(cg, bw)
        w = tiles.reshape(self.groups, rows, self.num_taps, cols, bh, bw).permute(0, 1, 4, 3, 5, 2)
        w = w.reshape(self.groups, rows * bh, cols * bw, self.num_taps)[:, :og, :cg]
        return w.reshape(self.weight_shape)

    def mask(self, device: torch.device | str = "cpu") -> Tensor:
        """bool `[O, C/groups, *kernel]`: True where the weight is inside a kept tile."""
        bh, bw = self.block_shape
        kept = self.kept.to(device)[..., None, None]
        return self.from_tiles(kept.expand(*self.grid_shape, bh, bw))

    def apply(self, weight: Tensor) -> Tensor:
        """The weight with every element outside the kept tiles set to exactly zero."""
        return weight.masked_fill(~self.mask(weight.device), 0)

    # ---- other patterns -------------------------------------------------------------------------

    def transpose(self) -> BlockPattern:
        """The pattern of the input gradient: channels swapped inside each group, taps reversed."""
        rows, taps, cols = self.grid_shape
        kept = self.kept.reshape(self.groups, rows // self.groups, taps, cols).flip(2)
        kept = kept.permute(0, 3, 2, 1).reshape(self.groups * cols, taps, rows // self.groups)
        bh, bw = self.block_shape
        return BlockPattern(
            self.in_channels, self.out_channels, self.kernel_size, self.groups, (bw, bh), kept
        )

    def retile(self, block_shape: BlockShape) -> BlockPattern:
        """The smallest pattern of another block shape that covers this one (coarser or finer)."""
        (bh, bw), (height, width) = self.block_shape, check_block_shape(block_shape, "BlockPattern.retile")
        if height % bh or width % bw:
            return BlockPattern.from_weight(self.mask(), block_shape, self.groups)
        # Whole tiles merge: to the grid, a tile is what an element is to a weight.
        wanted = BlockPattern.full(self.weight_shape, (height, width), self.groups)
        rows, taps, cols = self.grid_shape
        grid = self.kept.reshape(rows, taps, cols).transpose(1, 2)
        merged = BlockPattern.from_weight(grid, (height // bh, width // bw), self.groups)
        return wanted.with_kept(merged.kept)

    def ungroup(self) -> BlockPattern:
        """The same weight as a block-diagonal pattern with one group.

        Needs tiles that fill their group, or tiles of one group would straddle the next.
        """
        if self.groups == 1:
            return self
        (bh, bw), (og, cg) = self.block_shape, self.group_channels
        if og % bh or cg % bw:
            raise PatternError(
                "BlockPattern.ungroup",
                f"a block that divides a group's channels ({og} x {cg})",
                f"block_shape={self.block_shape}",
                "Retile first.",
            )
        rows, taps, cols = self.grid_shape
        kept = torch.zeros(self.groups, rows // self.groups, taps, self.groups, cols, dtype=torch.bool)
        each = torch.arange(self.groups)
        kept[each, :, :, each] = self.kept.reshape(self.groups, rows // self.groups, taps, cols)
        kept = kept.reshape(rows, taps, self.groups * cols)
        return BlockPattern(self.out_channels, self.in_channels, self.kernel_size, 1, self.block_shape, kept)

    # ---- JSON ---------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        bits = zlib.compress(np.packbits(self.kept.numpy()).tobytes())
        return {
            "weight_shape": list(self.weight_shape),
            "groups": self.groups,
            "block_shape": list(self.block_shape),
            "kept": base64.b64encode(bits).decode(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BlockPattern:
        """Raises `PatternError` if `data` does not hold a whole pattern."""
        try:
            shape, groups = tuple(data["weight_shape"]), int(data["groups"])
            full = cls.full(shape, tuple(data["block_shape"]), groups)
            packed = np.frombuffer(zlib.decompress(base64.b64decode(data["kept"])), dtype=np.uint8)
            bits = np.unpackbits(packed, count=full.kept.numel()).astype(bool)
            return full.with_kept(torch.from_numpy(bits.reshape(full.grid_shape)))
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            if isinstance(error, PatternError):
                raise
            raise PatternError(
                "BlockPattern.from_json",
                "the keys weight_shape, groups, block_shape and kept, as written by to_json",
                repr(error),
                "Write the file again with BlockPattern.to_json or Plan.save.",
            ) from error


@dataclass(frozen=True, eq=False)
class BlockSparseWeight:
    """A pattern and the values of its kept tiles.

    Args:
        pattern: which tiles are kept.
        values: `[n, bh, bw]` in the order of `pattern.tile_coordinates`; the fill of ragged tiles is
            ignored.

    Raises:
        PatternError: if pattern and values disagree.
    """

    pattern: BlockPattern
    values: Tensor

    def __post_init__(self) -> None:
        expected = (self.pattern.num_kept, *self.pattern.block_shape)
        if tuple(self.values.shape) != expected:
            raise PatternError(
                "BlockSparseWeight",
                f"values of shape {list(expected)} [kept tiles, bh, bw]",
                f"{list(self.values.shape)}",
                "Take values and pattern from the same weight (BlockSparseWeight.from_dense).",
            )

    @classmethod
    def from_dense(
        cls, weight: Tensor, pattern: BlockPattern | BlockShape, groups: int = 1
    ) -> BlockSparseWeight:
        """Gathers the kept tiles of a dense weight; a block shape instead of a pattern finds the zeros."""
        if not isinstance(pattern, BlockPattern):
            pattern = BlockPattern.from_weight(weight, pattern, groups)
        return cls(pattern, gather_tiles(weight, pattern))

    def to_dense(self) -> Tensor:
        """`[O, C/groups, *kernel]`; differentiable with respect to `values`."""
        return scatter_tiles(self.values, self.pattern)

    @classmethod
    def from_bsr(cls, weight: Tensor) -> BlockSparseWeight:
        """From a 2-D `torch.sparse_bsr` tensor (a linear weight)."""
        if weight.layout != torch.sparse_bsr or weight.dim() != 2:
            raise PatternError(
                "BlockSparseWeight.from_bsr",
                "a 2-D torch.sparse_bsr tensor",
                f"{weight.layout} with {weight.dim()} dimensions",
                "Call weight.to_sparse_bsr((bh, bw)) first.",
            )
        crow, col = weight.crow_indices().cpu(), weight.col_indices().cpu()
        bh, bw = weight.values().shape[1:]
        full = BlockPattern.full(tuple(weight.shape), (int(bh), int(bw)))
        rows = torch.repeat_interleave(torch.arange(len(crow) - 1), crow.diff())
        kept = torch.zeros(full.grid_shape, dtype=torch.bool)
        kept[rows, 0, col] = True
        order = torch.argsort(rows * full.grid_shape[2] + col)
        return cls(full.with_kept(kept), weight.values()[order.to(weight.device)])

    def to_bsr(self) -> Tensor:
        """As `torch.sparse_bsr`. Linear layers only, with channels that divide by the block."""
        p = self.pattern
        (bh, bw) = p.block_shape
        if p.kernel_size or p.out_channels % bh or p.in_channels % bw:
            raise PatternError(
                "BlockSparseWeight.to_bsr",
                "a linear weight whose channels divide by the block",
                f"{p}",
                "torch.sparse_bsr holds nothing else; use to_dense().",
            )
        device = self.values.device
        coords = p.tile_coordinates
        crow = torch.zeros(p.grid_shape[0] + 1, dtype=torch.int64)
        crow[1:] = p.kept.sum((1, 2)).cumsum(0)
        return torch.sparse_bsr_tensor(
            crow.to(device),
            coords[:, 2].to(device),
            self.values,
            size=p.weight_shape,
            check_invariants=True,
        )


def gather_tiles(weight: Tensor, pattern: BlockPattern) -> Tensor:
    """The kept tiles `[n, bh, bw]` of a dense weight; differentiable."""
    index = pattern.kept.flatten().nonzero().squeeze(1).to(weight.device)
    return pattern.to_tiles(weight).flatten(0, 2).index_select(0, index)


def scatter_tiles(values: Tensor, pattern: BlockPattern, index: Tensor | None = None) -> Tensor:
    """The dense weight `[O, C/groups, *kernel]` of kept tiles `[n, bh, bw]`; differentiable.

    `index` (int64 `[n]`, flat positions in the tile grid) may be given to avoid computing it again.
    """
    if index is None:
        index = pattern.kept.flatten().nonzero().squeeze(1).to(values.device)
    bh, bw = pattern.block_shape
    tiles = values.new_zeros(math.prod(pattern.grid_shape), bh, bw).index_copy(0, index, values)
    return pattern.from_tiles(tiles)


def grid_shape(
    out_channels: int,
    in_channels: int,
    kernel_size: tuple[int, ...],
    groups: int,
    block_shape: BlockShape,
) -> tuple[int, int, int]:
    """(out-blocks over all groups, taps, in-blocks of one group)."""
    bh, bw = check_block_shape(block_shape, "grid_shape")
    rows = groups * _ceil_div(out_channels // groups, bh)
    return rows, math.prod(kernel_size), _ceil_div(in_channels // groups, bw)


def check_block_shape(block_shape: Any, where: str) -> BlockShape:
    """Two positive ints, or a `PatternError` that says so."""
    try:
        bh, bw = (int(b) for b in block_shape)
        exact = (bh, bw) == tuple(block_shape)
    except (TypeError, ValueError):
        bh, bw, exact = 0, 0, False
    if bh < 1 or bw < 1 or not exact:
        raise PatternError(
            where,
            "block_shape to be two positive integers (output, input channels)",
            repr(block_shape),
            "Use for example (32, 32), (16, 16) or (8, 8).",
        )
    return bh, bw


def _edge_sizes(total: int, block: int) -> Tensor:
    sizes = torch.full((_ceil_div(total, block),), block)
    sizes[-1] = total - block * (len(sizes) - 1)
    return sizes
