import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocksparse_compiler import SparsitySchedule
from blocksparse_compiler.errors import OptionError


def test_the_cubic_ramp_is_zhu_and_guptas():
    schedule = SparsitySchedule(warmup=10, ramp=40, shape="cubic")
    s_i, s_f = 0.0, 0.9
    for step in range(10, 51):
        expected = s_f + (s_i - s_f) * (1 - (step - 10) / 40) ** 3
        assert s_f * schedule.pressure(step) == pytest.approx(expected, abs=1e-12)
    assert schedule.pressure(9) == 0
    assert schedule.pressure(1000) == 1


@given(st.integers(0, 30), st.integers(0, 30), st.sampled_from(["constant", "linear", "cubic"]))
def test_one_ramp_never_falls_and_ends_at_one(warmup, ramp, shape):
    schedule = SparsitySchedule(warmup, ramp, shape, freeze=warmup + ramp + 1)
    pressures = [schedule.pressure(step) for step in range(1, 80)]
    assert pressures == sorted(pressures)
    assert all(p == 0 for p in pressures[: max(0, warmup - 1)])
    assert set(pressures[warmup + ramp :]) == {1.0}


def test_cycles_go_from_dense_to_sparse_each_time_and_end_sparse():
    schedule = SparsitySchedule(warmup=10, freeze=70, cycles=2, shape="linear")
    pressures = [schedule.pressure(step) for step in range(1, 100)]
    assert [schedule.pressure(s) for s in (10, 19, 25, 30, 39, 40, 49, 55, 69, 70, 99)] == pytest.approx(
        [0, 0, 0.5, 1, 1, 0, 0, 0.5, 1, 1, 1]
    )
    assert sum(a > b for a, b in itertools.pairwise(pressures)) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"warmup": -1},
        {"ramp": 1.5},
        {"every": 0},
        {"shape": "square"},
        {"warmup": 5, "ramp": 5, "freeze": 9},
        {"freeze": 0},
        {"cycles": 2},
        {"cycles": 2, "freeze": 10, "ramp": 3},
    ],
    ids=str,
)
def test_wrong_schedules(wrong):
    with pytest.raises(OptionError, match="SparsitySchedule: expected"):
        SparsitySchedule(**wrong)
