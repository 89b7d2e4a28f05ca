"""Forming deferred batches from hand-made queues. l(b) = 10 b ms throughout, unless a test says otherwise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.engine.budget_queue import BudgetQueue
from broker.engine.form_deferred import FormDeferred
from broker.engine.formed import Formed
from broker.engine.plan import Pipeline, StagePlan
from broker.engine.predictor import LatencyTable
from broker.engine.request import Client, MapGroup, Request, Task
from broker.engine.stage import Stage
from laxity.payload import encode

STAGE = Stage("p@1/s", "", 32, 10_000)
PIPELINE = Pipeline("p", 10.0, [StagePlan("s", STAGE, [(-1, "")], False, 100)], [("", 0, "")])
CLIENT = Client("c")
PAYLOAD = encode(None)
MS = 1e-3


def linear(alpha: float, beta: float, max_batch: int = 32) -> LatencyTable:
    return LatencyTable(max_batch, [(1, (alpha + beta) * MS), (2, (2 * alpha + beta) * MS)])


TABLE = linear(10.0, 0.0)


def make_queue(*deadlines_ms: float) -> tuple[BudgetQueue, list[Task]]:
    queue = BudgetQueue()
    tasks = []
    for deadline in deadlines_ms:
        request = Request(CLIENT, 0, PIPELINE, 0.0, deadline * MS, 0, PAYLOAD, False)
        task = Task(request, STAGE, 0, -1, None, PAYLOAD, 0.0)
        tasks.append(task)
        queue.push(task)
    return queue, tasks


def map_request(queue: BudgetQueue, deadline_ms: float, items: int) -> list[Task]:
    request = Request(CLIENT, 0, PIPELINE, 0.0, deadline_ms * MS, 0, PAYLOAD, False)
    group = MapGroup(items)
    tasks = [Task(request, STAGE, 0, index, group, PAYLOAD, 0.0) for index in range(items)]
    for task in tasks:
        queue.push(task)
    return tasks


def run(
    queue: BudgetQueue, *, target: int, ceiling: int = 0, table: LatencyTable = TABLE, start: float = 0.0,
    remaining: float = 0.0, gpus: int = 1,
) -> Formed:  # fmt: skip
    stage = Stage("p@1/s", "", 32, 10_000)
    stage.queue = queue
    stage.target, stage.ceiling = target, ceiling or target
    stage.remaining, stage.devices = remaining, gpus
    return FormDeferred().form(stage, table, start)


def test_nothing_waits() -> None:
    formed = run(BudgetQueue(), target=4)
    assert (formed.batch, formed.dropped, formed.short) == ([], [], [])


def test_takes_the_earliest_deadlines_up_to_the_target() -> None:
    queue, (c, a, b, d) = make_queue(300, 100, 200, 400)
    formed = run(queue, target=3)
    assert formed.batch == [a, b, c]
    assert formed.dropped == []
    assert list(queue) == [d]


def test_drops_who_cannot_make_it_even_alone_and_says_by_how_much() -> None:
    """Start at 5, 10 to run, 20 still to come: 35."""
    queue, (late, later, exact) = make_queue(10, 34, 35)
    formed = run(queue, target=1, start=5 * MS, remaining=20 * MS)
    assert formed.dropped == [late, later]
    assert formed.short == pytest.approx([25 * MS, 1 * MS])
    assert formed.batch == [exact]


def test_drops_all() -> None:
    queue, tasks = make_queue(1, 2, 3)
    formed = run(queue, target=2)
    assert formed.dropped == tasks
    assert formed.batch == []
    assert len(queue) == 0


def test_passes_over_and_drops_whom_the_full_batch_cannot_meet() -> None:
    """A batch of 3 ends at 30: the one until 15 stands in its way, and there are three others."""
    queue, (urgent, *others) = make_queue(15, 40, 50, 60)
    formed = run(queue, target=3)
    assert formed.dropped == [urgent]
    assert formed.short == pytest.approx([15 * MS])
    assert formed.batch == others


def test_passed_over_requests_come_first_where_the_batch_shrinks_so_that_they_make_it() -> None:
    """Three wait, a batch of 3 ends at 30: the first (until 25) is passed over; the two left end at 20, which it
    meets after all, and it goes first."""
    queue, (first, second, third) = make_queue(25, 40, 50)
    formed = run(queue, target=3)
    assert formed.dropped == []
    assert formed.batch == [first, second]
    assert list(queue) == [third]


def test_passed_over_requests_for_whom_there_is_no_room_go_on_waiting() -> None:
    """All until 25: batches of 2 end at 20. All but two are passed over, none dropped, two taken."""
    queue, tasks = make_queue(*[25] * 6)
    formed = run(queue, target=6)
    assert formed.dropped == []
    assert formed.batch == tasks[:2]
    assert sorted(map(id, queue)) == sorted(map(id, tasks[2:]))


def test_grows_beyond_the_target_where_that_is_free_and_faster() -> None:
    """l(b) = b + 9: a batch of 10 ends at 19; the first has until 15, which is a batch of 6."""
    queue, tasks = make_queue(15, *[100] * 9)
    formed = run(queue, target=2, ceiling=32, table=linear(1.0, 9.0))
    assert formed.batch == tasks[:6]
    assert len(queue) == 4


def test_grows_to_the_ceiling_at_most() -> None:
    queue, tasks = make_queue(*[1000] * 20)
    formed = run(queue, target=2, ceiling=8, table=linear(1.0, 9.0))
    assert formed.batch == tasks[:8]


def test_does_not_grow_where_a_larger_batch_is_slower_for_each() -> None:
    table = LatencyTable(4, [(1, 10 * MS), (2, 20 * MS), (3, 40 * MS), (4, 60 * MS)])
    queue, tasks = make_queue(*[1000] * 4)
    formed = run(queue, target=1, ceiling=4, table=table)
    assert formed.batch == tasks[:2]


def test_zero_latency_takes_all_up_to_the_ceiling() -> None:
    queue, tasks = make_queue(*range(1, 21))
    formed = run(queue, target=1, ceiling=16, table=LatencyTable(32, [(1, 0.0), (32, 0.0)]))
    assert formed.batch == tasks[:16]
    assert formed.dropped == []


def test_a_map_request_is_taken_whole_or_not_at_all() -> None:
    """Four items in batches of 2 on one device take 40; there are 35: dropped, though the first two would make it."""
    queue = BudgetQueue()
    tasks = map_request(queue, 35, 4)
    formed = run(queue, target=2)
    assert formed.batch == []
    assert formed.dropped == tasks
    assert formed.short[0] == pytest.approx(5 * MS)


def test_more_devices_make_the_rounds_of_a_map_request_fewer() -> None:
    queue = BudgetQueue()
    tasks = map_request(queue, 35, 4)
    formed = run(queue, target=2, gpus=2)
    assert formed.batch == tasks[:2]
    assert formed.dropped == []
    assert all(task.settled() for task in tasks)


def test_items_of_a_request_once_taken_are_not_dropped_any_more() -> None:
    queue = BudgetQueue()
    tasks = map_request(queue, 40, 4)
    assert run(queue, target=2).batch == tasks[:2]
    formed = run(queue, target=2, start=39 * MS)
    assert formed.batch == tasks[2:]
    assert formed.dropped == []


def test_passed_over_map_items_are_decided_on_like_all_others() -> None:
    """Six items until 25: passed over by the full batch, then too many for the batches of 2 that remain."""
    queue = BudgetQueue()
    tasks = map_request(queue, 25, 6)
    formed = run(queue, target=6)
    assert formed.batch == []
    assert set(formed.dropped) == set(tasks)


def test_passed_over_map_items_that_make_it_are_settled() -> None:
    """One item until 15 stands before another request's: a batch of 2 ends at 20, but that of 1 left over at 10."""
    queue = BudgetQueue()
    (mine,) = map_request(queue, 15, 1)
    (other,) = map_request(queue, 100, 1)
    formed = run(queue, target=2)
    assert formed.batch == [mine]
    assert formed.dropped == []
    assert mine.settled()
    assert not other.settled()
    assert list(queue) == [other]


def test_who_makes_room_for_a_map_request_that_is_dropped_is_replaced() -> None:
    queue = BudgetQueue()
    doomed = map_request(queue, 50, 10)
    _, (other,) = make_queue(60)
    queue.push(other)
    formed = run(queue, target=1)
    assert formed.dropped == doomed
    assert formed.batch == [other]


@given(
    st.lists(st.integers(1, 200), max_size=30),
    st.integers(1, 12),
    st.integers(0, 12),
    st.integers(0, 40),
    st.integers(0, 40),
    st.floats(0.5, 10.0),
    st.floats(0.0, 30.0),
)
def test_every_request_is_taken_dropped_or_waits_and_who_is_taken_makes_it(
    deadlines: list[int], target: int, more: int, start_ms: int, remaining_ms: int, alpha: float, beta: float
) -> None:
    table = linear(alpha, beta)
    queue, tasks = make_queue(*deadlines)
    start, remaining = start_ms * MS, remaining_ms * MS
    formed = run(queue, target=target, ceiling=target + more, table=table, start=start, remaining=remaining)
    assert sorted(map(id, [*formed.batch, *formed.dropped, *queue])) == sorted(map(id, tasks))
    assert len(formed.batch) <= target + more
    assert len(formed.dropped) == len(formed.short)
    assert all(short > 0.0 for short in formed.short)
    for task in formed.batch:
        assert start + table.upper(len(formed.batch)) + remaining <= task.key + 1e-9
    assert [task.key for task in queue] == sorted(task.key for task in queue)
    if not formed.batch:
        assert len(queue) == 0
    # Only those are dropped whom a batch of the target size would miss.
    for task in formed.dropped:
        assert start + table.upper(target) + remaining > task.key
