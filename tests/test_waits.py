"""Waits at a stage: the weighted mean by hand, the distributions against PARD's quantiles."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.engine.waits import BINS, Waits, convolve, quantile


def after(periods: list[list[float]], history: float = 5.0) -> Waits:
    """What is known after periods with requests that waited so long in the queue."""
    waits = Waits(history)
    for queued in periods:
        for seconds in queued:
            waits.note(seconds, 0.0)
        waits.end_period()
    return waits


# ---- q -------------------------------------------------------------------------------------------


def test_nothing_known() -> None:
    waits = Waits(5.0)
    assert (waits.queued, waits.last, waits.longest) == (0.0, 0.0, 0.0)
    waits.end_period()
    assert (waits.queued, waits.last, waits.longest) == (0.0, 0.0, 0.0)


def test_the_periods_are_weighted_linearly_with_the_newest_heaviest() -> None:
    """(1·10 + 2·20 + 3·30 + 4·40 + 5·50) / 15 = 550 / 15 ms."""
    waits = after([[0.010], [0.020], [0.030], [0.040], [0.050]])
    assert waits.queued == pytest.approx(0.550 / 15)
    assert waits.last == 0.050


def test_a_sixth_period_has_the_first_forgotten() -> None:
    """(1·20 + 2·30 + 3·40 + 4·50 + 5·0) / 15 = 400 / 15 ms."""
    waits = after([[9.0], [0.020], [0.030], [0.040], [0.050], [0.0]])
    assert waits.queued == pytest.approx(0.400 / 15)
    assert waits.last == 0.0


def test_a_period_counts_by_its_requests() -> None:
    """(1·(10 + 30) + 2·0 + 3·50) / (1·2 + 2·0 + 3·1) = 190 / 5 ms; one without requests changes nothing."""
    waits = after([[0.010, 0.030], [], [0.050]])
    assert waits.queued == pytest.approx(0.190 / 5)


def test_the_history_says_how_many_periods_count() -> None:
    """(1·20 + 2·30) / 3."""
    assert after([[9.0], [0.020], [0.030]], history=2.0).queued == pytest.approx(0.080 / 3)
    assert after([[9.0], [0.030]], history=0.5).queued == pytest.approx(0.030)


def test_waits_noted_together_are_those_noted_one_by_one() -> None:
    waits = Waits(5.0)
    waits.note_queued(0.060, 3)
    waits.end_period()
    assert waits.queued == pytest.approx(after([[0.010, 0.020, 0.030]]).queued)


def test_a_period_counts_when_it_has_ended() -> None:
    waits = after([[0.010]])
    waits.note(5.0, 0.0)
    assert waits.queued == pytest.approx(0.010)
    assert waits.last == pytest.approx(0.010)


def test_the_longest_is_that_of_the_last_period() -> None:
    waits = Waits(5.0)
    for seconds in (0.2, 0.5, 0.3):
        waits.took(seconds)
    assert waits.longest == 0.0
    waits.end_period()
    assert waits.longest == 0.5
    waits.took(0.1)
    waits.end_period()
    assert waits.longest == 0.1


# ---- w -------------------------------------------------------------------------------------------


def spread_evenly(count: int = 2000, periods: int = 4) -> Waits:
    """Batch waits evenly spread over 0 to 1 s."""
    waits = Waits(5.0)
    for number in range(periods):
        for at in range(number, count, periods):
            waits.note(0.0, (at + 0.5) / count)
        waits.end_period()
    return waits


IRWIN_HALL = {
    1: {0.075: 0.075, 0.1: 0.100, 0.15: 0.150},
    2: {0.075: 0.387, 0.1: 0.447, 0.15: 0.548},
    3: {0.075: 0.766, 0.1: 0.843, 0.15: 0.966},
    4: {0.075: 1.159, 0.1: 1.247, 0.15: 1.386},
    5: {0.075: 1.561, 0.1: 1.661, 0.15: 1.817},
}
"""PARD's w by the number of stages behind and λ, for batch waits that are uniform over 0 to 1."""


@pytest.mark.parametrize("stages", list(IRWIN_HALL))
def test_the_quantiles_of_summed_uniform_waits(stages: int) -> None:
    width = stages / (BINS - 1)
    own = spread_evenly().distribution(width)
    summed = own
    for _ in range(stages - 1):
        summed = convolve(own, summed)
    for part, seconds in IRWIN_HALL[stages].items():
        assert quantile(summed, part, width, stages) == pytest.approx(seconds, abs=0.004)


def test_a_distribution_by_hand() -> None:
    waits = Waits(5.0)
    for seconds in (0.0, 0.05, 0.25, 0.25, 999.0):
        waits.note(0.0, seconds)
    waits.end_period()
    bins = waits.distribution(0.1)
    assert {at: p for at, p in enumerate(bins) if p} == pytest.approx({0: 0.4, 2: 0.4, BINS - 1: 0.2})


def test_where_nothing_is_known_nobody_waits() -> None:
    bins = Waits(5.0).distribution(0.1)
    assert bins[0] == 1.0
    assert sum(bins) == 1.0
    assert quantile(bins, 0.1, 0.0, 1) == 0.0


def test_old_waits_are_forgotten() -> None:
    waits = Waits(1.0)
    for seconds in (0.95, 0.35):
        waits.note(0.0, seconds)
        waits.end_period()
    assert waits.distribution(0.1)[3] == 1.0


def test_a_convolution_by_hand() -> None:
    """0 or 2, and 1 or 3, each as likely: 1, 3, 3, 5."""
    one, other = [0.0] * BINS, [0.0] * BINS
    one[0] = one[2] = other[1] = other[3] = 0.5
    assert {at: p for at, p in enumerate(convolve(one, other)) if p} == {1: 0.25, 3: 0.5, 5: 0.25}


def test_what_lies_beyond_the_last_bin_is_put_into_it() -> None:
    late = [0.0] * BINS
    late[BINS - 2] = 1.0
    assert convolve(late, late)[BINS - 1] == 1.0


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=50), st.floats(0.01, 0.99))
def test_so_many_lie_below_a_quantile(seconds: list[float], part: float) -> None:
    waits = Waits(5.0)
    for each in seconds:
        waits.note(0.0, each)
    waits.end_period()
    width = 1.0 / (BINS - 1)
    at = quantile(waits.distribution(width), part, width, 1)
    assert sum(each < at - width for each in seconds) <= part * len(seconds) + 1e-6
    assert sum(each <= at + width for each in seconds) >= part * len(seconds) - 1e-6
