"""Block masks that are good expanders: products of bipartite Ramanujan graphs."""

from __future__ import annotations

import functools
import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import OptionError, PatternError
from .pattern import BlockPattern, BlockShape, check_block_shape

TRIES = 20


@dataclass(frozen=True)
class RamanujanBlocks:
    """Every block row keeps equally many blocks, every block column too, and information spreads fast.

    The kept blocks of a layer are the edges of a bipartite graph between block rows and block columns: the
    Kronecker product of biregular graphs, each drawn at random until it is Ramanujan, that is, until the
    second singular value of its 0/1 matrix is at most `√(d_row - 1) + √(d_col - 1)` (Vooturi, Varma and
    Kothapalli, "Ramanujan Bipartite Graph Products for Efficient Block Sparse Neural Networks", 2020).
    Equal rows also suit the kernels: no thread waits for a longer row.

    Args:
        block_shape: (output, input) channels of a block; a block spans all taps.
        density: fraction of blocks to keep, in (0, 1]; or one fraction for each factor of the product, the
            outermost first. A factor on a grid of r x c blocks has a density of j / gcd(r, c), the nearest.
        inner_size: rows and columns of every factor but the outermost.
        seed: with the layer's name, decides which blocks.

    Raises:
        PatternError, OptionError: on a bad block shape, density or size.
    """

    block_shape: BlockShape
    density: float | tuple[float, ...]
    inner_size: int = 4
    seed: int = 0
    dense_stem = False

    def __post_init__(self) -> None:
        check_block_shape(self.block_shape, "RamanujanBlocks")
        if not self.densities or not all(0 < density <= 1 for density in self.densities):
            fix = "Use for example 0.5, or (0.5, 0.5) for a product that keeps a quarter."
            raise OptionError("RamanujanBlocks", "densities in (0, 1]", repr(self.density), fix)
        if self.inner_size < 2:
            fix = "Use for example 4."
            raise OptionError("RamanujanBlocks", "inner_size >= 2", repr(self.inner_size), fix)

    @property
    def densities(self) -> tuple[float, ...]:
        return self.density if isinstance(self.density, tuple) else (self.density,)

    def pattern(self, name: str, weight_shape: tuple[int, ...], groups: int) -> BlockPattern:
        full = BlockPattern.full(weight_shape, self.block_shape, groups)
        rows, taps, cols = full.grid_shape
        kept = [self._mask(f"{name} {group}", rows // groups, cols) for group in range(groups)]
        return full.with_kept(torch.cat(kept)[:, None].expand(rows, taps, cols))

    def _mask(self, name: str, rows: int, cols: int) -> Tensor:
        inner = len(self.densities) - 1
        size = self.inner_size**inner
        if rows % size or cols % size:
            fix = "Use another block_shape or inner_size, fewer factors, or exclude this layer."
            raise PatternError(
                "RamanujanBlocks", f"a grid that divides by {size}", f"{rows}x{cols} blocks", fix
            )
        grids = [(rows // size, cols // size), *[(self.inner_size, self.inner_size)] * inner]
        mask = torch.ones(1, 1)
        for i, (density, (r, c)) in enumerate(zip(self.densities, grids, strict=True)):
            seed = zlib.crc32(f"{self.seed} {name} {i}".encode())
            mask = torch.kron(mask, ramanujan_graph(r, c, _row_degree(r, c, density), seed).float())
        return mask.bool()


def ramanujan_graph(rows: int, cols: int, degree: int, seed: int) -> Tensor:
    """bool `[rows, cols]`: a random bipartite graph, `degree` edges per row and `rows * degree / cols` per
    column, whose second singular value is within `ramanujan_bound`; of `TRIES` draws the best if none is.
    """
    return _ramanujan_graph(rows, cols, degree, seed).clone()


@functools.lru_cache(maxsize=1024)
def _ramanujan_graph(rows: int, cols: int, degree: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if degree == cols:
        return torch.ones(rows, cols, dtype=torch.bool)
    bound, best, least = ramanujan_bound(degree, rows * degree // cols), None, math.inf
    for _ in range(TRIES):
        graph = _biregular_graph(rows, cols, degree, generator)
        second = second_singular_value(graph)
        if second < least:
            best, least = graph, second
        if second <= bound + 1e-6:
            break
    assert best is not None
    return best


def ramanujan_bound(row_degree: int, col_degree: int) -> float:
    """`√(d_row - 1) + √(d_col - 1)`: no infinite family of biregular graphs has a smaller second value."""
    return math.sqrt(row_degree - 1) + math.sqrt(col_degree - 1)


def second_singular_value(mask: Tensor) -> float:
    """Of the 0/1 matrix; the first is `√(d_row · d_col)` for a biregular graph."""
    values = torch.linalg.svdvals(mask.double())
    return float(values[1]) if len(values) > 1 else 0.0


def _biregular_graph(rows: int, cols: int, degree: int, generator: torch.Generator) -> Tensor:
    """A simple bipartite graph of these degrees, shuffled by exchanging the ends of random pairs of edges."""
    import networkx as nx  # slow to import

    start = nx.bipartite.havel_hakimi_graph([degree] * rows, [rows * degree // cols] * cols, nx.Graph())
    edges = [(min(u, v), max(u, v) - rows) for u, v in start.edges]
    present, n = set(edges), len(edges)
    for i, j in torch.randint(n, (10 * n, 2), generator=generator).tolist():
        (a, b), (c, d) = edges[i], edges[j]
        if a != c and b != d and (a, d) not in present and (c, b) not in present:
            present -= {(a, b), (c, d)}
            present |= {(a, d), (c, b)}
            edges[i], edges[j] = (a, d), (c, b)
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    mask[tuple(torch.tensor(edges).T)] = True
    return mask


def _row_degree(rows: int, cols: int, density: float) -> int:
    """The nearest number of blocks per row that gives every column equally many."""
    steps = math.gcd(rows, cols)
    nearest = max(1, math.floor(density * steps + 0.5))
    if abs(nearest / steps - density) > density / 4:
        raise PatternError(
            "RamanujanBlocks",
            f"a density near a multiple of 1/{steps}, for equal rows and columns",
            f"{density:g} of {rows}x{cols} blocks",
            "Use another density or block_shape, RandomBlocks, or exclude this layer.",
        )
    return nearest * cols // steps
