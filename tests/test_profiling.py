"""Profiling on a clock that only the batches move."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes.profiling import TIME_BUDGET, batch_sizes, measure_profile, stated_profile, warm_up_sizes
from pipelines.spec import StageSpec


class Bench:
    """A model whose batches take ``seconds(size, nth run of that size)``."""

    def __init__(self, seconds: Callable[[int, int], float]) -> None:
        self.seconds = seconds
        self.now = 100.0
        self.runs: dict[int, int] = {}
        self.announced: list[int] = []

    def run(self, size: int) -> float:
        self.runs[size] = nth = self.runs.get(size, 0) + 1
        seconds = self.seconds(size, nth)
        self.now += seconds
        return seconds

    def measure(self, max_batch: int, longest: float = 1.0) -> list[tuple[int, float]]:
        return measure_profile(
            self.run, max_batch=max_batch, longest=longest, clock=lambda: self.now, progress=self.announced.append
        )


@pytest.mark.parametrize(("largest", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_sizes_are_powers_of_two_and_the_largest(largest: int, sizes: list[int]) -> None:
    assert batch_sizes(largest) == sizes


def test_the_warm_up_does_not_count_nor_a_single_outlier_but_the_worst_repeat_besides_does() -> None:
    bench = Bench(lambda size, nth: {1: 0.5, 3: 0.09, 4: 0.02}.get(nth, 0.01) * size)
    assert bench.measure(2, longest=9.0) == [(1, pytest.approx(0.02)), (2, pytest.approx(0.04))]
    assert bench.announced == [1, 2]


def test_a_batch_that_takes_too_long_is_the_last() -> None:
    assert [size for size, _ in Bench(lambda size, nth: 0.1 * size).measure(64, longest=0.3)] == [1, 2, 4]


@given(st.floats(0.001, 100), st.integers(1, 300))
def test_batch_one_is_always_measured_and_the_time_is_bounded(each: float, max_batch: int) -> None:
    bench = Bench(lambda size, nth: each * size)
    profile = bench.measure(max_batch, longest=1e9)
    assert profile[0] == (1, pytest.approx(each))
    slowest = profile[-1][1]
    assert bench.now - 100 <= TIME_BUDGET + 2 * slowest + 1e-6


def test_the_stated_profile() -> None:
    def stated(profile: dict[str, object]) -> list[tuple[int, float]]:
        stage = {"executor": "python", "max_batch": 4, "profile": profile}
        return stated_profile(msgspec.convert(stage, StageSpec), "cpu")

    assert stated({"alpha_ms": 2, "beta_ms": 1}) == [(size, pytest.approx((2 * size + 1) / 1e3)) for size in (1, 2, 4)]
    assert stated({"latency_ms": {1: 5, 4: 8}}) == [(1, 0.005), (2, pytest.approx(0.006)), (4, 0.008)]
    assert stated_profile(msgspec.convert({"executor": "python"}, StageSpec), "cpu") == []


def test_a_known_profile_is_warmed_up_at_its_smallest_and_its_largest_cheap_batch() -> None:
    assert warm_up_sizes([(4, 0.3), (1, 0.1), (8, 0.9)]) == [1, 4]
    assert warm_up_sizes([(1, 0.1)]) == [1]
    assert warm_up_sizes([(1, 9.0), (2, 18.0)]) == [1]
