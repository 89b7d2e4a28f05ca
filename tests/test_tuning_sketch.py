"""The sketch of waits: its error is bounded, and adding sketches up is as good as one of all waits."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.tuning.sketch import BINS, ERROR, LEAST, MOST, distribution, merged, quantile, sketch, values

WAITS = st.lists(st.floats(0.0, 2 * MOST), max_size=40)


@given(st.floats(LEAST, MOST))
def test_a_wait_is_within_the_error_of_its_bins_value(wait: float) -> None:
    counts = sketch([wait])
    assert sum(counts) == counts[-1] == 1
    assert values()[len(counts) - 1] == pytest.approx(wait, rel=ERROR * (1 + 1e-6)) or wait <= LEAST * (1 + 1e-6)


def test_hardly_any_wait_is_none_and_a_long_one_the_longest() -> None:
    assert sketch([0.0, LEAST / 2, LEAST, -1e-9]) == [4]
    assert len(sketch([1e9])) == BINS


def test_of_no_waits() -> None:
    assert sketch([]) == []
    assert quantile([], 0.5) == 0.0
    assert distribution([], 0.1, 4).tolist() == [1.0, 0.0, 0.0, 0.0]


@given(st.lists(WAITS, max_size=5))
def test_the_sum_of_sketches_is_the_sketch_of_all(parts: list[list[float]]) -> None:
    together = [wait for part in parts for wait in part]
    assert merged([sketch(part) for part in parts]) == sketch(together)
    assert sum(sketch(together)) == len(together)


@given(st.lists(st.floats(LEAST, MOST), min_size=1, max_size=200), st.floats(0.0, 1.0))
def test_quantiles_are_within_the_error(waits: list[float], part: float) -> None:
    exact = sorted(waits)[int(part * (len(waits) - 1))]
    found = quantile(sketch(waits), part)
    assert found == pytest.approx(exact, rel=ERROR * (1 + 1e-6)) or exact <= LEAST * (1 + 1e-6)


def test_a_distribution_by_hand() -> None:
    parts = distribution(sketch([0.0, 0.05, 0.25, 0.25, 99.0]), 0.1, 4)
    assert parts == pytest.approx([0.4, 0.0, 0.4, 0.2])


def test_it_is_small() -> None:
    """Ten thousand waits of up to half a second."""
    text = json.dumps(sketch(np.random.default_rng(1).uniform(0.0, 0.5, 10_000).tolist()), separators=(",", ":"))
    assert len(text) < 200
