"""The cheapest way to label things with one of two labels, where costs depend on labels and on pairs of them.

Exact, as a minimum cut, if no pair makes disagreement cheaper than agreement (Kolmogorov, Zabih, "What energy
functions can be minimized via graph cuts?", PAMI 26(2), 2004).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Hashable, Iterator
from typing import Generic, TypeVar

import networkx

Thing = TypeVar("Thing", bound=Hashable)

_SOURCE, _SINK = object(), object()
UNIT = 1e-12
"""Seconds of one unit of capacity: cuts through whole numbers are exact."""

Table = tuple[tuple[int, int], tuple[int, int]]


class LabelCosts(Generic[Thing]):
    """Costs in whole units; a thing that no cost was added for has no label."""

    def __init__(self) -> None:
        self.single: dict[Thing, list[int]] = {}
        self.pairs: dict[tuple[Thing, Thing], list[Table]] = {}

    def add(self, thing: Thing, costs: tuple[int, int]) -> None:
        """`costs[label]` for this thing alone."""
        old = self.single.setdefault(thing, [0, 0])
        self.single[thing] = [a + b for a, b in zip(old, costs, strict=True)]

    def add_pair(self, first: Thing, second: Thing, table: Table) -> None:
        """`table[label of first][label of second]`; agreement costs no more than disagreement, in sum."""
        assert first != second
        assert table[0][0] + table[1][1] <= table[0][1] + table[1][0], f"{table} makes disagreement cheaper"
        self.pairs.setdefault((first, second), []).append(table)
        for thing in (first, second):
            self.add(thing, (0, 0))

    def total(self, ones: Container[Thing]) -> int:
        """What it costs to label these 1 and all others 0."""
        singles = sum(costs[thing in ones] for thing, costs in self.single.items())
        return singles + sum(table[a in ones][b in ones] for a, b, table in self._tables())

    def cheapest(self) -> set[Thing]:
        """Those labelled 1 at the least total; of equals, the fewest."""
        graph = networkx.DiGraph()
        graph.add_nodes_from((_SOURCE, _SINK))
        ones, arcs = self._as_arcs()
        for thing, cost in ones.items():  # of label 1, the sink's side, over label 0
            if cost > 0:
                graph.add_edge(_SOURCE, thing, capacity=cost)
            elif cost < 0:
                graph.add_edge(thing, _SINK, capacity=-cost)
        for (first, second), capacity in arcs.items():
            if capacity > 0:
                graph.add_edge(first, second, capacity=capacity)
        _, (_, sinks) = networkx.minimum_cut(graph, _SOURCE, _SINK)
        return set(sinks) - {_SINK}

    def _as_arcs(self) -> tuple[Counter[Thing], Counter[tuple[Thing, Thing]]]:
        """What label 1 costs over label 0 for each thing, and (first 0, second 1) for each pair on top."""
        ones = Counter({thing: costs[1] - costs[0] for thing, costs in self.single.items()})
        arcs: Counter[tuple[Thing, Thing]] = Counter()
        for first, second, ((a, b), (c, d)) in self._tables():
            ones[first] += c - a
            ones[second] += d - c
            arcs[first, second] += b + c - a - d
        return ones, arcs

    def _tables(self) -> Iterator[tuple[Thing, Thing, Table]]:
        for (first, second), tables in self.pairs.items():
            for table in tables:
                yield first, second, table


def units(seconds: float) -> int:
    return round(seconds / UNIT)
