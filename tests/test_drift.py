"""Models that take another time than their profiles say: found, reported and told once."""

from __future__ import annotations

import pytest

from broker.drift import LASTING, DriftWatch
from broker.engine.predictor import KEPT, LatencyTable
from broker.engine.report import StageFigures
from broker.engine.stage import Stage


def figures(**drift: float) -> list[StageFigures]:
    found = StageFigures(Stage("p@1/a", "", 8, 100))
    found.drift = drift
    return [found]


def test_a_table_knows_how_far_it_is_off_its_profile() -> None:
    table = LatencyTable(8, [(1, 0.010), (8, 0.080)])
    for number in range(KEPT):
        assert table.drift() == 0.0, "too few to tell"
        table.observe(number / 100, 1 + number % 2 * 7, 0.013 if number % 2 == 0 else 0.100, 0.004 * (number % 2))
    assert table.drift() == pytest.approx(1.3)
    table.expire(60.0)
    assert table.drift() == 0.0


def test_without_profile_nothing_drifts() -> None:
    table = LatencyTable(8, [])
    for number in range(2 * KEPT):
        table.observe(number / 100, 1, 0.010)
    assert table.drift() == 0.0


def test_what_lasts_is_told_once_and_so_is_its_end() -> None:
    watch = DriftWatch()
    told = [watch.note(figures(gpu=1.5)) for _ in range(2 * LASTING)]
    assert [bool(news) for news in told] == [number == LASTING - 1 for number in range(2 * LASTING)]
    assert told[LASTING - 1] == ["p@1/a takes 1.50 times what its profile says on gpu"]
    assert not any(watch.note(figures(gpu=1.18)) for _ in range(2 * LASTING)), "still nearly as far off"
    told = [watch.note(figures(gpu=0.98)) for _ in range(2 * LASTING)]
    assert [bool(news) for news in told] == [number == LASTING - 1 for number in range(2 * LASTING)]
    assert watch.note(figures(gpu=0.5)) == []


def test_a_moment_is_no_drift() -> None:
    watch = DriftWatch()
    for number in range(5 * LASTING + 1):
        assert watch.note(figures(gpu=1.9 if number % LASTING else 1.0)) == []
    for _ in range(LASTING - 1):
        assert watch.note(figures(gpu=1.9)) == []
    assert watch.note(figures()) == []
    assert watch.note(figures(gpu=1.9)) == [], "nothing was measured in between"


def test_a_model_that_is_gone_is_forgotten() -> None:
    watch = DriftWatch()
    for _ in range(LASTING):
        news = watch.note(figures(gpu=0.5))
    assert len(news) == 1
    watch.note([])
    for _ in range(LASTING):
        news = watch.note(figures(gpu=0.5))
    assert len(news) == 1
