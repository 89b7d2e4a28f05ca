"""The budget queue against a sorted list."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.engine.budget_queue import BUCKET, BudgetQueue
from broker.engine.plan import Pipeline, StagePlan
from broker.engine.request import Client, Request, Task
from broker.engine.stage import Stage
from laxity.payload import encode

STAGE = Stage("p@1/s", "", 8, 10_000)
PIPELINE = Pipeline("p", 1.0, [StagePlan("s", STAGE, [(-1, "")], False, 1)], [("", 0, "")])
CLIENT = Client("c")
PAYLOAD = encode(None)


def make_task(deadline: float) -> Task:
    request = Request(CLIENT, 0, PIPELINE, 0.0, deadline, 0, PAYLOAD, False)
    return Task(request, STAGE, 0, -1, None, PAYLOAD, 0.0)


class Model:
    """What the queue is to do, as slowly as one likes: a list, sorted stably."""

    def __init__(self) -> None:
        self.queue = BudgetQueue()
        self.tasks: list[Task] = []

    def push(self, deadline: float) -> None:
        task = make_task(deadline)
        self.queue.push(task)
        self.tasks = sorted([*self.tasks, task], key=lambda each: each.key)

    def check(self) -> None:
        assert len(self.queue) == len(self.tasks)
        if self.tasks:
            assert self.queue.lowest() is self.tasks[0]
            assert self.queue.highest() is self.tasks[-1]

    def pop_from(self, key: float) -> None:
        """Take some that stand at a key or behind it."""
        for _ in range(5):
            rest = [task for task in self.tasks if task.key >= key]
            assert self.queue.count_from(key) == len(rest)
            if not rest:
                with pytest.raises(IndexError):
                    self.queue.pop_from(key)
                return
            assert self.queue.pop_from(key) is rest[0]
            self.tasks.remove(rest[0])

    def check_order(self) -> None:
        found = list(self.queue)
        assert len(found) == len(self.tasks)
        assert all(one is other for one, other in zip(found, self.tasks, strict=True))


# Few different deadlines, so that there are many ties; long ascending runs, so that buckets are split.
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(0, 12)),
        st.tuples(st.just("run"), st.integers(0, 12)),
        st.tuples(st.just("same"), st.integers(0, 12)),
        st.tuples(st.just("lowest"), st.integers(1, 400)),
        st.tuples(st.just("lowest few"), st.integers(0, 3 * BUCKET)),
        st.tuples(st.just("highest"), st.integers(1, 400)),
        st.tuples(st.just("remove"), st.integers(0, 10_000)),
        st.tuples(st.just("remove every second"), st.just(0)),
        st.tuples(st.just("from"), st.integers(0, 26)),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=80)
@given(STEPS)
def test_does_what_a_sorted_list_does(steps: list[tuple[str, int]]) -> None:
    model = Model()
    for step, number in steps:
        if step == "push":
            model.push(float(number))
        elif step == "run":
            for index in range(BUCKET // 2):
                model.push(number + index / BUCKET)
        elif step == "same":
            for _ in range(BUCKET // 3):
                model.push(float(number))
        elif step == "lowest":
            for _ in range(min(number, len(model.tasks))):
                assert model.queue.pop_lowest() is model.tasks.pop(0)
        elif step == "lowest few":
            assert model.queue.pop_lowest_few(number) == model.tasks[:number]
            del model.tasks[:number]
        elif step == "highest":
            for _ in range(min(number, len(model.tasks))):
                assert model.queue.pop_highest() is model.tasks.pop()
        elif step == "remove" and model.tasks:
            task = model.tasks.pop(number % len(model.tasks))
            assert model.queue.remove(task)
            assert not model.queue.remove(task)
        elif step == "remove every second":
            for task in model.tasks[::2]:
                assert model.queue.remove(task)
            model.tasks = model.tasks[1::2]
        elif step == "from":
            model.pop_from(number / 2)
        model.check()
    model.check_order()


def test_ties_stand_in_order_of_arrival_over_several_buckets() -> None:
    queue = BudgetQueue()
    early = [make_task(5.0) for _ in range(3 * BUCKET)]
    queue_first = make_task(4.0)
    last = make_task(6.0)
    for task in (*early, last, queue_first):
        queue.push(task)
    late = [make_task(5.0) for _ in range(3)]
    for task in late:
        queue.push(task)
    assert list(queue) == [queue_first, *early, *late, last]


def test_each_of_many_ties_can_be_removed() -> None:
    queue = BudgetQueue()
    ties = [make_task(5.0) for _ in range(3 * BUCKET)]
    for task in [make_task(4.0), *ties, make_task(6.0)]:
        queue.push(task)
    for task in [*ties[::-3], *ties[::-3]]:
        assert queue.remove(task) == (task in ties)
        if task in ties:
            ties.remove(task)
    assert list(queue)[1:-1] == ties


def test_descending_deadlines_keep_both_ends_right() -> None:
    queue = BudgetQueue()
    tasks = [make_task(float(-index)) for index in range(2 * BUCKET + 3)]
    for task in tasks:
        queue.push(task)
    assert list(queue) == tasks[::-1]
    while len(queue) > 1:
        assert queue.pop_lowest() is tasks.pop()
        if len(queue) > 1:
            assert queue.pop_highest() is tasks.pop(0)


def test_a_task_that_is_not_there_is_not_removed() -> None:
    queue = BudgetQueue()
    there = make_task(1.0)
    queue.push(there)
    assert not queue.remove(make_task(1.0))
    assert not queue.remove(make_task(0.5))
    assert not queue.remove(make_task(2.0))
    assert list(queue) == [there]


def test_an_empty_queue_can_be_used_again() -> None:
    queue = BudgetQueue()
    for _ in range(3):
        task = make_task(1.0)
        queue.push(task)
        assert queue.pop_highest() is task
        assert len(queue) == 0
        assert list(queue) == []
        assert not queue.remove(task)
