"""The schedulable window and the target batch, by Symphony's own numbers and by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.engine.plan import Pipeline, StagePlan
from broker.engine.predictor import LatencyTable
from broker.engine.request import Client, MapGroup, Request, Task
from broker.engine.stage import Stage
from broker.engine.window import (
    FULL_LOAD,
    SPARE,
    PlannedWindow,
    closes_at,
    opens_at,
    patience_ends,
    target_batch,
)
from laxity.payload import encode

ALPHA, BETA = 0.001082, 0.005204
"""Symphony's example in seconds; its SLO is 100 ms."""


def linear(alpha: float, beta: float, max_batch: int) -> LatencyTable:
    return LatencyTable(max_batch, [(1, alpha + beta), (2, 2 * alpha + beta)])


@pytest.mark.parametrize(("gpus", "batch", "rate"), [(1, 41, 827), (8, 77, 870), (64, 86, 875)])
def test_symphonys_table(gpus: int, batch: int, rate: int) -> None:
    table = linear(ALPHA, BETA, 256)
    assert target_batch(table, gpus, FULL_LOAD, 0.100, 256) == batch
    assert batch / table.upper(batch) == pytest.approx(rate, rel=0.002)


@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_the_rate_that_keeps_all_gpus_busy_is_full_load(gpus: int) -> None:
    table = linear(ALPHA, BETA, 256)
    full = target_batch(table, gpus, FULL_LOAD, 0.100, 256)
    assert target_batch(table, gpus, 2000.0 * gpus, 0.100, 256) == full


def test_fewer_busy_gpus_allow_smaller_batches() -> None:
    """At 1,700 requests/s about two of 64 GPUs are busy: b is feasible iff l(b)·(1 + b/(1700·l(b))) <= 100 ms."""
    table = linear(ALPHA, BETA, 256)
    expected = max(b for b in range(1, 257) if table.upper(b) + b / 1700 <= 0.100)
    assert 1 < expected < 86
    assert target_batch(table, 64, 1700.0, 0.100, 256) == expected


def test_a_batch_that_would_not_fill_in_time_is_not_waited_for() -> None:
    """100 requests/s on one GPU: 1.082 b + 5.204 + 10 b <= 100 ms, b = 8."""
    assert target_batch(linear(ALPHA, BETA, 256), 1, 100.0, 0.100, 256) == 8
    assert target_batch(linear(ALPHA, BETA, 256), 64, 100.0, 0.100, 256) == 8


def test_without_a_rate_half_the_slo_is_a_batchs() -> None:
    """1.082 b + 5.204 <= 50 - 2: b = 39."""
    assert target_batch(linear(ALPHA, BETA, 256), 8, 0.0, 0.100, 256) == 39


def test_the_largest_batch_is_a_bound() -> None:
    assert target_batch(linear(ALPHA, BETA, 16), 8, FULL_LOAD, 0.100, 16) == 16


def test_the_largest_feasible_batch_is_taken_even_where_nothing_is_gained_by_it() -> None:
    """Text lines on a CPU: 27 ms alone, 30 ms each in batches of 6. 2 l(b) <= 0.4 s: b = 6."""
    table = LatencyTable(16, [(1, 0.027), (6, 0.180), (16, 0.520)])
    assert target_batch(table, 1, FULL_LOAD, 0.400, 16) == 6


def test_with_no_batch_feasible_it_is_one() -> None:
    assert target_batch(linear(0.5, 0.5, 8), 1, 10.0, 0.1, 8) == 1


def test_zero_latency_takes_as_many_as_come_in_time() -> None:
    table = LatencyTable(64, [(1, 0.0), (64, 0.0)])
    assert target_batch(table, 1, 0.0, 1.0, 64) == 64
    assert target_batch(table, 1, 20.0, 1.0, 64) == 20
    assert target_batch(table, 1, FULL_LOAD, 1.0, 64) == 64


def test_opens_and_closes_by_hand() -> None:
    """l(b) = 10 b + 5 ms, three wait, the earliest until 1 s; 200 ms reserved (150 of it predicted), 1 ms delay."""
    table = linear(0.010, 0.005, 8)
    assert opens_at(table, 3, 1.0, 0.200, 0.001) == pytest.approx(1.0 - 0.200 - 0.045 - 0.001)
    assert closes_at(table, 3, 1.0, 0.150) == pytest.approx(1.0 - 0.150 - 0.035)


def test_a_full_batch_opens_as_late_as_it_can_start() -> None:
    table = linear(0.010, 0.005, 4)
    assert opens_at(table, 4, 1.0, 0.0, 0.0) == closes_at(table, 4, 1.0, 0.0)


def test_frontrun_and_latest_of_symphonys_example() -> None:
    """Ten requests, the earliest until 100 ms: frontrun = 100 - l(11) - 0.1, latest = 100 - l(10)."""
    table = linear(ALPHA, BETA, 256)
    assert opens_at(table, 10, 0.100, 0.0, 0.0001) == pytest.approx(0.100 - (11 * ALPHA + BETA) - 0.0001)
    assert closes_at(table, 10, 0.100, 0.0) == pytest.approx(0.100 - (10 * ALPHA + BETA))


def test_a_target_batch_is_waited_for_twice_as_long_as_it_takes_to_fill() -> None:
    """Eight at 100 a second."""
    assert patience_ends(5.0, 8, 100.0) == pytest.approx(5.0 + 2 * 0.080)


@given(
    st.floats(0.0, 0.1),
    st.floats(0.0, 0.1),
    st.integers(1, 64),
    st.one_of(st.just(0.0), st.floats(0.001, 1e6), st.just(FULL_LOAD)),
    st.floats(0.001, 10.0),
    st.integers(1, 64),
)
def test_the_target_is_feasible_and_the_window_is_one(
    alpha: float, beta: float, gpus: int, rate: float, budget: float, max_batch: int
) -> None:
    table = linear(alpha, beta, max_batch)
    target = target_batch(table, gpus, rate, budget, max_batch)
    assert 1 <= target <= max_batch
    if target > 1:
        assert table.upper(target) <= budget
    for batch in range(1, max_batch + 1):
        assert opens_at(table, batch, 10.0, 0.5, 0.0) <= closes_at(table, batch, 10.0, 0.5)


# ---- within the plan and behind it ---------------------------------------------------------------


class Planned:
    """A stage of l(b) = 10 b + 5 ms that waits for four, of whom 100 are expected a second; 200 ms are kept for the
    stages behind it (150 of them predicted, 20 a margin), and a grant takes 1 ms."""

    def __init__(self) -> None:
        self.stage = Stage("p@1/s", "", 8, 1000)
        self.pipeline = Pipeline("p", 10.0, [StagePlan("s", self.stage, [(-1, "")], False, 10)], [("", 0, "")])
        self.stage.target = 4
        self.stage.reserve, self.stage.remaining, self.stage.margin = 0.200, 0.150, 0.020
        self.table = linear(0.010, 0.005, 8)

    def task(self, due: float, *, queued_at: float = 0.0, behind: bool = False, group: MapGroup | None = None) -> Task:
        request = Request(Client("c"), 0, self.pipeline, 0.0, due, 0, encode(None), False)
        task = Task(request, self.stage, 0, 0 if group else -1, group, encode(None), queued_at)
        (self.stage.behind if behind else self.stage.queue).push(task)
        return task

    def update(self, now: float) -> tuple[float, float, bool]:
        """(opens, closes, whether it is the turn of those behind)."""
        PlannedWindow().update(now, self.stage, self.table, 0.001)
        return self.stage.opens, self.stage.closes, self.stage.behind_turn


def test_the_window_of_those_within_the_plan_opens_by_the_most_urgent_of_them() -> None:
    """l(3) = 35 ms, and 200 are kept."""
    planned = Planned()
    planned.task(0.300)
    planned.task(0.500)
    assert planned.update(0.0) == pytest.approx((0.300 - 0.200 - 0.035 - 0.001, 0.300 - 0.150 - 0.025, False))


def test_the_target_batch_opens_it_at_once() -> None:
    planned = Planned()
    for _ in range(6):
        planned.task(0.500)
    assert planned.update(0.1) == pytest.approx((0.1, 0.500 - 0.150 - 0.045, False))


def test_a_settled_one_is_not_kept_waiting() -> None:
    planned = Planned()
    group = MapGroup(3)
    group.admitted = True
    planned.task(0.010, group=group)
    assert planned.update(0.1)[0] == 0.1
    assert not planned.stage.behind_turn
    assert len(planned.stage.behind) == 0


def test_it_opens_when_the_target_batch_should_have_been_full_long_ago() -> None:
    planned = Planned()
    planned.stage.rate = 100.0
    planned.task(0.900, queued_at=0.1)
    assert planned.update(0.1)[0] == pytest.approx(patience_ends(0.1, 4, 100.0)) == pytest.approx(0.180)


def test_who_misses_the_plan_even_alone_goes_behind_it_but_for_the_margin() -> None:
    """Grant 1, alone 15, kept 200 less a margin of 20: 196."""
    planned = Planned()
    late = planned.task(0.1955)
    on_the_edge = planned.task(0.1965)
    assert planned.update(0.0)[2] is False
    assert list(planned.stage.behind) == [late]
    assert list(planned.stage.queue) == [on_the_edge]
    assert planned.stage.opens < 0.0, "it should have opened before"


def test_with_nobody_within_the_plan_it_is_the_turn_of_those_behind() -> None:
    planned = Planned()
    planned.stage.order.load = 2.0
    for _ in range(6):
        planned.task(0.180)
    assert planned.update(0.0) == pytest.approx((0.0, 0.180 - 0.150 - 0.045, True))
    assert len(planned.stage.behind) == 6


@pytest.mark.parametrize(("load", "turn"), [(0.0, True), (SPARE, True), (SPARE + 0.01, False), (3.0, False)])
def test_while_others_may_wait_those_behind_take_what_is_to_spare(load: float, turn: bool) -> None:
    planned = Planned()
    planned.stage.order.load = load
    planned.task(0.180, behind=True)
    planned.task(0.900)
    opens, closes, behind_turn = planned.update(0.0)
    assert behind_turn == turn
    if turn:
        assert (opens, closes) == pytest.approx((0.0, 0.180 - 0.150 - 0.015))
    else:
        assert opens == pytest.approx(0.900 - 0.200 - 0.025 - 0.001)


def test_once_their_window_is_open_those_within_the_plan_go_first() -> None:
    planned = Planned()
    planned.task(0.180, behind=True)
    for _ in range(4):
        planned.task(0.900)
    assert planned.update(0.0) == pytest.approx((0.0, 0.900 - 0.150 - 0.045, False))


def test_the_turn_ends() -> None:
    planned = Planned()
    planned.task(0.180)
    assert planned.update(0.0)[2] is True
    planned.stage.behind.pop_lowest()
    planned.task(0.900)
    assert planned.update(0.0)[2] is False
