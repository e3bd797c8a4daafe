"""`LabelCosts`: labels that cost least, against trying all of them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocksparse_compiler.minimum_cut import LabelCosts

COST = st.integers(-20, 20)


@st.composite
def tables(draw):
    """Entries whose agreement costs no more than their disagreement."""
    last, first, one = draw(COST), draw(COST), draw(COST)
    return (last, one), (last + first - one + draw(st.integers(0, 20)), first)


@st.composite
def problems(draw):
    costs, things = LabelCosts(), st.integers(0, 7)
    for thing, numbers in draw(st.lists(st.tuples(things, st.tuples(COST, COST)), max_size=8)):
        costs.add(thing, numbers)
    pairs = st.tuples(things, things, tables()).filter(lambda pair: pair[0] != pair[1])
    for pair in draw(st.lists(pairs, max_size=14)):
        costs.add_pair(*pair)
    return costs


@given(problems())
def test_no_labels_cost_less(costs):
    found = costs.cheapest()
    things = list(costs.single)
    subsets = itertools.chain.from_iterable(
        itertools.combinations(things, size) for size in range(len(things) + 1)
    )
    totals = {frozenset(ones): costs.total(ones) for ones in subsets}
    least = min(totals.values())
    assert costs.total(found) == least
    assert all(found <= ones for ones, total in totals.items() if total == least), "the fewest, of equals"


@given(problems(), problems())
def test_costs_add_up(one, other):
    both = LabelCosts()
    for costs in (one, other):
        for thing, numbers in costs.single.items():
            both.add(thing, tuple(numbers))
        for (first, second), added in costs.pairs.items():
            for table in added:
                both.add_pair(first, second, table)
    for ones in ({0, 1, 2}, set(), set(range(8))):
        assert both.total(ones) == one.total(ones) + other.total(ones)


def test_pairs_that_would_rather_disagree_are_refused():
    with pytest.raises(AssertionError, match="disagreement"):
        LabelCosts().add_pair("a", "b", ((0, 0), (0, 1)))
