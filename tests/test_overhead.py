"""The measured overhead: rises at once, falls slowly, stays credible, and learns what each element adds."""

from __future__ import annotations

import pytest

from broker.engine.overhead import DECAY, LEAST, MOST, Overhead


def test_rises_at_once_and_says_so() -> None:
    overhead = Overhead(0.001)
    assert overhead.observe(0.0, 1, 0.004)
    assert overhead.base == 0.004
    assert not overhead.observe(0.0, 1, 0.004)


def test_falls_by_a_part_of_the_difference() -> None:
    overhead = Overhead(0.010)
    assert not overhead.observe(0.0, 1, 0.005)
    assert overhead.base == pytest.approx(0.010 - DECAY * 0.005)


def test_forgets_within_some_hundred_batches() -> None:
    overhead = Overhead(0.020)
    for _ in range(300):
        overhead.observe(0.0, 1, 0.001)
    assert overhead.base == pytest.approx(0.001, rel=0.1)


def test_forgets_within_a_few_seconds_where_little_is_measured() -> None:
    overhead = Overhead(0.001)
    overhead.observe(0.0, 1, 0.050)
    for second in range(1, 6):
        overhead.observe(float(second), 1, 0.001)
    assert overhead.base < 0.006


@pytest.mark.parametrize("measured", [0.0, -5.0])
def test_is_never_less_than_credible(measured: float) -> None:
    overhead = Overhead(0.001)
    for _ in range(1000):
        overhead.observe(0.0, 1, measured)
    assert overhead.base == LEAST


def test_is_never_more_than_credible() -> None:
    overhead = Overhead(0.001)
    assert overhead.observe(0.0, 1, 17.0)
    assert overhead.base == MOST
    assert not overhead.observe(0.0, 1, 17.0)
    assert overhead.base == MOST


def test_is_the_same_for_batches_of_all_sizes_at_first() -> None:
    overhead = Overhead(0.002)
    assert [overhead.seconds(batch) for batch in (0, 1, 64)] == [0.002] * 3


def test_learns_what_each_element_adds() -> None:
    """1 ms, and 50 µs an element."""
    overhead = Overhead(0.001)
    for _ in range(100):
        for batch in (1, 8, 16, 32, 4):
            overhead.observe(0.0, batch, 0.001 + 0.000050 * batch)
    assert overhead.per_element == pytest.approx(0.000050, rel=0.02)
    for batch in (1, 16, 64):
        assert overhead.seconds(batch) == pytest.approx(0.001 + 0.000050 * batch, rel=0.05)


def test_elements_that_add_nothing_are_not_charged() -> None:
    """Larger batches that happen to be faster are no reason to expect less of still larger ones."""
    for slope in (0.0, -0.000020):
        overhead = Overhead(0.001)
        for _ in range(100):
            for batch in (1, 8, 16, 32, 4):
                overhead.observe(0.0, batch, 0.002 + slope * batch)
        assert overhead.per_element == pytest.approx(0.0, abs=1e-9)


def test_batches_of_one_size_say_nothing_about_others() -> None:
    overhead = Overhead(0.001)
    for number in range(200):
        overhead.observe(0.0, 16, 0.001 + 0.0005 * (number % 3))
    assert overhead.per_element == 0.0


def test_the_mean_is_not_that_of_the_worst() -> None:
    overhead = Overhead(0.001)
    assert overhead.mean(1) == overhead.seconds(1)
    for number in range(400):
        overhead.observe(number * 0.01, 1, 0.040 if number % 40 == 0 else 0.001)
    assert overhead.base > 0.015
    assert 0.001 <= overhead.mean(1) < 0.005
