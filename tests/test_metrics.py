import numpy as np
import pytest

from simulation.metrics import fluid_bound, latency, per_second, rates
from simulation.results import Latency


def test_the_fluid_bound_is_taken_second_by_second() -> None:
    arrivals = np.array([0.1, 0.2, 0.9, 1.5, 3.0, 3.1, 3.2, 3.3])
    offered, bound = fluid_bound(arrivals, 4.0, 2.5)
    assert offered.tolist() == [3, 1, 0, 4]
    assert bound.tolist() == [2.5, 1.0, 0.0, 2.5]


def test_a_last_part_of_a_second_carries_its_part() -> None:
    offered, bound = fluid_bound(np.array([0.0, 1.0, 1.1, 1.2]), 1.5, 4.0)
    assert offered.tolist() == [1, 3]
    assert bound.tolist() == [1.0, 2.0]


def test_seconds_without_arrivals_are_there() -> None:
    assert per_second(np.array([]), 2.2).tolist() == [0, 0, 0]


def test_rates() -> None:
    found = rates(offered=200, good=120, bound=150.0, seconds=10.0)
    assert found.offered_rps == 20.0
    assert found.goodput_rps == 12.0
    assert found.bound_rps == 15.0
    assert found.bound_ratio == pytest.approx(0.8)
    assert found.drop_rate == pytest.approx(0.4)
    # The bound leaves 50 of 200; of the 80 that were not good, 30 could have been.
    assert found.avoidable_drop_rate == pytest.approx(0.15)


def test_more_than_the_bound_is_no_negative_drop() -> None:
    """A queue carries work from a busy second into the next one, which the bound knows nothing of."""
    found = rates(offered=200, good=155, bound=150.0, seconds=10.0)
    assert found.bound_ratio > 1.0
    assert found.avoidable_drop_rate == 0.0


def test_nothing_offered() -> None:
    assert rates(0, 0, 0.0, 5.0) == (0.0, 0.0, 0.0, 1.0, 0.0, 0.0)


def test_latency_in_milliseconds() -> None:
    found = latency(np.arange(1001) / 1000.0)
    assert (found.p50, found.p99, found.p999) == pytest.approx((500.0, 990.0, 999.0))
    assert latency(np.array([])) == Latency(0.0, 0.0, 0.0)
