"""Which end of the queue goes first: hysteresis by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.engine.order import KEPT, Order, spread
from broker.engine.policy import make_policy


def test_epsilon_by_hand() -> None:
    """Mean 124: Σ|T_in − T_s| = 24 + 16 + 16 + 4 + 4 = 64, of 620."""
    assert spread([100.0, 140.0, 140.0, 120.0, 120.0]) == pytest.approx(64 / 620)


def test_steady_arrivals_and_none_at_all_have_no_epsilon() -> None:
    assert spread([7.0, 7.0, 7.0]) == 0.0
    assert spread([0.0, 0.0]) == 0.0
    assert spread([]) == 0.0


def test_delayed_transition() -> None:
    """(arrivals, μ, ε, highest first) of one period after the other."""
    order = make_policy("pard", {}).new_order()
    assert not order.highest_first
    for rate, load, epsilon, highest_first in [
        (100.0, 0.50, 0.0, False),
        (140.0, 1.16, 40 / 240, False),  # below 1.167
        (140.0, 1.15, (26.667 + 2 * 13.333) / 380, True),  # above 1.140
        (120.0, 0.89, 60 / 500, True),  # not below 0.880
        (120.0, 1.00, 64 / 620, True),
        (130.0, 0.95, 40 / 650, True),  # the first period's 100 no longer counts: above 0.938
        (130.0, 0.93, 32 / 640, False),  # below 0.950
        (130.0, 1.03, 24 / 630, False),
        (130.0, 1.03, 16 / 640, True),  # above 1.025
    ]:
        order.update(rate, load)
        assert order.epsilon == pytest.approx(epsilon, abs=1e-5)
        assert order.highest_first == highest_first, (rate, load)
        assert order.load == load


def test_instant_transition_has_no_band() -> None:
    order = make_policy("pard-instant", {}).new_order()
    for rate, load, highest_first in [
        (100.0, 0.9, False),
        (200.0, 1.001, True),
        (50.0, 1.0, True),
        (90.0, 0.999, False),
        (10.0, 1.0, False),
    ]:
        order.update(rate, load)
        assert order.epsilon == 0.0
        assert order.highest_first == highest_first


@pytest.mark.parametrize(("policy", "highest_first"), [("pard-hbf", True), ("pard-lbf", False), ("pard-fcfs", False)])
def test_a_fixed_order_stays(policy: str, highest_first: bool) -> None:
    order = make_policy(policy, {}).new_order()
    for load in (0.1, 1.0, 5.0):
        order.update(100.0, load)
        assert order.highest_first == highest_first


@given(st.booleans(), st.lists(st.tuples(st.floats(0.0, 1e4), st.floats(0.0, 3.0)), max_size=20))
def test_the_order_changes_outside_the_band_only(delayed: bool, periods: list[tuple[float, float]]) -> None:
    order = Order(False, False, delayed)
    rates: list[float] = []
    for rate, load in periods:
        rates.append(rate)
        before = order.highest_first
        order.update(rate, load)
        band = spread(rates[-KEPT:]) if delayed else 0.0
        assert order.epsilon == pytest.approx(band)
        expected = True if load > 1.0 + order.epsilon else False if load < 1.0 - order.epsilon else before
        assert order.highest_first == expected
