"""Pairs of out-blocks that share activations, and weights packed for kernels that multiply pairs."""

from __future__ import annotations

import functools
from typing import NamedTuple

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from .packing import OUTPUT_MAJOR, PackedWeight, pack_weight, select_tiles, tile_slots
from .pattern import BlockPattern

MATCHED_ROWS = 64
"""Most out-blocks that are paired optimally, which takes 0.2 s for so many; more are paired greedily."""

ALONE = -1


class Pair(NamedTuple):
    """Two out-blocks, or one and `ALONE`, and their numbers of tiles."""

    a: int
    b: int
    both: int
    only_a: int
    only_b: int

    @property
    def products(self) -> int:
        return 2 * self.both + self.only_a + self.only_b

    @property
    def loads(self) -> int:
        """Activation tiles that one program loads."""
        return self.both + self.only_a + self.only_b


@functools.lru_cache(maxsize=256)
def pair_rows(pattern: BlockPattern) -> tuple[Pair, ...]:
    """Pairs the out-blocks so that many (tap, in-block) are shared, and pairs are about equally long.

    Every out-block is in one pair; those that share nothing stay alone. Longest pairs first.
    """
    kept = pattern.ungroup().kept.flatten(1).numpy()
    tiles = kept.sum(1)
    shared = kept.astype(np.float32) @ kept.T.astype(np.float32)
    # Half a tile of imbalance costs as much as half a load saved.
    value = shared - abs(tiles[:, None] + tiles - 2 * tiles.mean()) / 2
    edges = [(a, b) for a, b in zip(*np.nonzero(np.triu(shared, 1)), strict=True)]
    match = _matching if len(kept) <= MATCHED_ROWS else _greedy
    found = {tuple(sorted(pair)) for pair in match(edges, value)}
    alone = set(range(len(kept))).difference(*found)
    pairs = [_pair(a, b, int(shared[a, b]), tiles) for a, b in found]
    pairs += [Pair(row, ALONE, 0, int(tiles[row]), 0) for row in alone]
    return tuple(sorted(pairs, key=lambda pair: (-pair.products, -pair.loads, pair.a)))


def shared_fraction(pattern: BlockPattern) -> float:
    """Loads of activations that pairs save, as a fraction of those without pairs (one per kept tile)."""
    return sum(pair.both for pair in pair_rows(pattern)) / max(1, pattern.ungroup().num_kept)


def pack_pairs(weight: Tensor, pattern: BlockPattern) -> PackedWeight:
    """Packs output-major tiles for kernels with a program per pair of out-blocks.

    `row_ptr` is `[pairs, 6]`: out-block a; out-block b, or -1; then where the tiles begin that both keep,
    those of a alone, those of b alone, and where these end. Of what both keep, tiles of a and b alternate.
    """
    packed = pack_weight(weight, pattern, OUTPUT_MAJOR)
    slot = tile_slots(pattern.ungroup())
    slot = torch.nn.functional.pad(slot, (0, 0, 0, 1), value=-1)  # for the block that is not there
    order, rows, begin = [], [], 0
    for a, b, both, only_a, only_b in pair_rows(pattern):
        in_both = (slot[a] >= 0) & (slot[b] >= 0)
        order += [torch.stack([slot[a], slot[b]], 1)[in_both].flatten()]
        order += [slot[row][(slot[row] >= 0) & ~in_both] for row in (a, b)]
        starts = np.cumsum([begin, 2 * both, only_a, only_b]).tolist()
        rows.append([a, b, *starts])
        begin = starts[-1]
    row_ptr = torch.tensor(rows, dtype=torch.int32, device=weight.device)
    return select_tiles(packed, torch.cat(order))._replace(row_ptr=row_ptr)


def _pair(a: int, b: int, both: int, tiles: np.ndarray) -> Pair:
    return Pair(int(a), int(b), both, int(tiles[a]) - both, int(tiles[b]) - both)


def _matching(edges: list[tuple[int, int]], value: np.ndarray) -> set[tuple[int, int]]:
    graph = nx.Graph()
    graph.add_weighted_edges_from((a, b, float(value[a, b])) for a, b in edges)
    return nx.max_weight_matching(graph, maxcardinality=True)


def _greedy(edges: list[tuple[int, int]], value: np.ndarray) -> set[tuple[int, int]]:
    pairs: set[tuple[int, int]] = set()
    taken: set[int] = set()
    for a, b in sorted(edges, key=lambda edge: -value[edge]):
        if a not in taken and b not in taken:
            pairs.add((a, b))
            taken |= {a, b}
    return pairs
