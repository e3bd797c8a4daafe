"""Pairs of out-blocks that share activations, and weights packed for kernels that multiply pairs."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .packing import OUTPUT_MAJOR, PackedWeight, pack_weight, tile_slots
from .pattern import BlockPattern

MATCHED_ROWS = 32
"""Most out-blocks that are paired optimally, in 15 ms; time grows with the cube. More are paired greedily."""

ALONE = -1

FILLED = 3
"""Up to so many tiles that one block of a pair keeps alone are not worth a loop of their own, whose pipeline
fills and drains: together with zero tiles of the other block, they join the loop of shared ones."""


class Pair(NamedTuple):
    """Two out-blocks, or one and `ALONE`, and how many places (tap, in-block) each loop visits."""

    a: int
    b: int
    both: int
    only_a: int
    only_b: int

    @property
    def products(self) -> int:
        """Tiles that one program multiplies, zero ones included."""
        return 2 * self.both + self.only_a + self.only_b

    @property
    def loads(self) -> int:
        """Activation tiles that one program loads."""
        return self.both + self.only_a + self.only_b

    @property
    def loops(self) -> int:
        return sum(count > 0 for count in (self.both, self.only_a, self.only_b))


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
    edges = np.argwhere(np.triu(shared, 1))
    match = _matching if len(kept) <= MATCHED_ROWS else _greedy
    found = {tuple(sorted(pair)) for pair in match(edges, value)}
    alone = set(range(len(kept))).difference(*found)
    pairs = [_pair(a, b, int(shared[a, b]), tiles) for a, b in found]
    pairs += [Pair(row, ALONE, 0, int(tiles[row]), 0) for row in alone]
    return tuple(sorted(pairs, key=lambda pair: (-pair.products, -pair.loads, pair.a)))


def shared_fraction(pattern: BlockPattern) -> float:
    """Loads of activations that pairs save, as a fraction of those without pairs (one per kept tile)."""
    kept = pattern.ungroup().num_kept
    return 1 - sum(pair.loads for pair in pair_rows(pattern)) / kept if kept else 0.0


def pack_pairs(weight: Tensor, pattern: BlockPattern) -> PackedWeight:
    """Packs output-major tiles for kernels with a program per pair of out-blocks.

    `row_ptr` is `[pairs, 6]`: out-block a; out-block b, or -1; then where the tiles begin that both keep,
    those of a alone, those of b alone, and where these end. Of what both keep, tiles of a and b alternate;
    a few may be zero, see `FILLED`.
    """
    packed = pack_weight(weight, pattern, OUTPUT_MAJOR)
    slots = torch.nn.functional.pad(tile_slots(pattern.ungroup()), (0, 0, 0, 1), value=-1)
    tiles, places, blocks, rows, begin = [], [], [], [], 0
    for pair in pair_rows(pattern):
        a, b, both, only_a, only_b = pair
        together, alone = _split(slots[[a, b]].T, pair)
        tiles += [together.flatten(), alone]
        places += [torch.where(together < 0, together.flip(1), together).flatten(), alone]
        blocks += [a, b] * both + [a] * only_a + [b] * only_b
        starts = np.cumsum([begin, 2 * both, only_a, only_b]).tolist()
        rows.append([a, b, *starts])
        begin = starts[-1]
    device = weight.device
    zero = packed.values.new_zeros(1, *packed.values.shape[1:])
    values = torch.cat([packed.values, zero])[torch.cat(tiles).to(device)]
    tile_index = packed.tile_index[:, torch.cat(places).to(device)]
    tile_index[2] = torch.tensor(blocks, dtype=torch.int32, device=device)
    return PackedWeight(values, torch.tensor(rows, dtype=torch.int32, device=device), tile_index)


def _split(kept: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """Tiles of the shared loop, `[both, 2]`, and of the others, out of those of a pair, `[places, 2]`.

    Tile -1 is one that is not kept; in the shared loop it is zero.
    """
    here = kept >= 0
    joined = torch.tensor([pair.both > 0 and count == 0 for count in (pair.only_a, pair.only_b)])
    together = here.all(1) | (here & joined).any(1)
    alone = here & ~together[:, None]
    return kept[together], torch.cat([kept[alone[:, i], i] for i in range(2)])


def _pair(a: int, b: int, both: int, tiles: np.ndarray) -> Pair:
    alone = [int(tiles[row]) - both for row in (a, b)]
    only_a, only_b = (0 if count <= FILLED else count for count in alone)
    return Pair(int(a), int(b), both + sum(alone) - only_a - only_b, only_a, only_b)


def _matching(edges: np.ndarray, value: np.ndarray) -> set[tuple[int, int]]:
    import networkx as nx  # slow to import, and only plans for GPUs need it

    graph = nx.Graph()
    graph.add_weighted_edges_from((a, b, float(value[a, b])) for a, b in edges.tolist())
    return nx.max_weight_matching(graph, maxcardinality=True)


def _greedy(edges: np.ndarray, value: np.ndarray) -> set[tuple[int, int]]:
    pairs: set[tuple[int, int]] = set()
    taken: set[int] = set()
    for a, b in edges[np.argsort(-value[tuple(edges.T)], kind="stable")].tolist():
        if a not in taken and b not in taken:
            pairs.add((a, b))
            taken |= {a, b}
    return pairs
