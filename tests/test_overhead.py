"""The measured overhead: rises at once, falls slowly, stays credible."""

from __future__ import annotations

import pytest

from broker.engine.overhead import DECAY, LEAST, MOST, Overhead


def test_rises_at_once_and_says_so() -> None:
    overhead = Overhead(0.001)
    assert overhead.observe(0.004)
    assert overhead.seconds == 0.004
    assert not overhead.observe(0.004)


def test_falls_by_a_part_of_the_difference() -> None:
    overhead = Overhead(0.010)
    assert not overhead.observe(0.005)
    assert overhead.seconds == pytest.approx(0.010 - DECAY * 0.005)


def test_forgets_within_some_hundred_batches() -> None:
    overhead = Overhead(0.020)
    for _ in range(300):
        overhead.observe(0.001)
    assert overhead.seconds == pytest.approx(0.001, rel=0.1)


@pytest.mark.parametrize("measured", [0.0, -5.0])
def test_is_never_less_than_credible(measured: float) -> None:
    overhead = Overhead(0.001)
    for _ in range(1000):
        overhead.observe(measured)
    assert overhead.seconds == LEAST


def test_is_never_more_than_credible() -> None:
    overhead = Overhead(0.001)
    assert overhead.observe(17.0)
    assert overhead.seconds == MOST
    assert not overhead.observe(17.0)
    assert overhead.seconds == MOST
