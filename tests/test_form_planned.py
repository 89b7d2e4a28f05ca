"""Forming batches within a plan: who falls behind it, who is dropped, and whom priority saves.

l(b) = 10 b ms, and where nothing else is said 100 ms are kept for the stages behind, of which 40 are predicted work.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.engine.fleet import HeldModel
from broker.engine.form_planned import FormPlanned
from broker.engine.formed import Formed
from broker.engine.limits import Limits
from broker.engine.plan import Pipeline, StagePlan
from broker.engine.predictor import LatencyTable
from broker.engine.request import Client, MapGroup, Request, Task
from broker.engine.scheduler import Scheduler
from broker.engine.stage import Stage
from laxity.outcomes import Outcome
from laxity.payload import encode

MS = 1e-3
PAYLOAD = encode(None)
TABLE = LatencyTable(32, [(1, 10 * MS), (2, 20 * MS)])


class World:
    """A stage whose queues are filled by hand; deadlines in milliseconds."""

    def __init__(
        self, *, target: int = 3, reserve: float = 100.0, remaining: float = 40.0, margin: float = 0.0
    ) -> None:
        self.stage = Stage("p@1/s", "", 32, 10_000)
        self.pipeline = Pipeline("p", 10.0, [StagePlan("s", self.stage, [(-1, "")], False, 100)], [("", 0, "")])
        self.stage.target = self.stage.ceiling = target
        self.stage.reserve, self.stage.remaining, self.stage.margin = reserve * MS, remaining * MS, margin * MS
        self.stage.devices = 1

    def task(self, deadline: float, *, priority: int = 0, group: MapGroup | None = None, behind: bool = False) -> Task:
        request = Request(Client("c"), 0, self.pipeline, 0.0, deadline * MS, priority, PAYLOAD, False)
        task = Task(request, self.stage, 0, 0 if group else -1, group, PAYLOAD, 0.0)
        (self.stage.behind if behind else self.stage.queue).push(task)
        return task

    def form(self, start: float = 0.0) -> Formed:
        return FormPlanned().form(self.stage, TABLE, start * MS)

    @property
    def queue(self) -> list[Task]:
        return list(self.stage.queue)

    @property
    def behind(self) -> list[Task]:
        return list(self.stage.behind)


# ---- who falls behind ----------------------------------------------------------------------------


def test_who_misses_the_plan_even_alone_falls_behind_and_is_not_dropped() -> None:
    """A batch of one ends at 10, and 100 are kept: 110."""
    world = World()
    late, exact = world.task(109), world.task(110)
    formed = world.form()
    assert formed.batch == [exact]
    assert formed.dropped == []
    assert world.behind == [late]
    assert world.queue == []


def test_who_stands_in_the_way_of_the_full_batch_falls_behind() -> None:
    """The target batch ends at 30: 130. Until 115 is enough for one alone, but not for three, and there are three
    others."""
    world = World()
    urgent = world.task(115)
    others = [world.task(due) for due in (140, 150, 160)]
    later = world.task(170)
    formed = world.form()
    assert formed.batch == others
    assert world.behind == [urgent]
    assert world.queue == [later]


def test_the_margin_is_used_up_before_anybody_falls_behind() -> None:
    """10 of the 100 that are kept are a margin: 100 is enough."""
    world = World(margin=10.0)
    late, exact = world.task(99), world.task(100)
    assert world.form().batch == [exact]
    assert world.behind == [late]


def test_all_may_fall_behind() -> None:
    world = World()
    tasks = [world.task(due) for due in (30, 60, 100)]
    formed = world.form()
    assert (formed.batch, formed.dropped) == ([], [])
    assert world.behind == tasks
    assert world.queue == []


def test_nobody_waits() -> None:
    formed = World().form()
    assert (formed.batch, formed.dropped, formed.passed) == ([], [], [])


# ---- the turn of those behind --------------------------------------------------------------------


def test_at_their_turn_those_behind_are_run_by_what_is_really_to_come() -> None:
    """40 to come, not 100: batches of three must end by 70."""
    world = World()
    within = world.task(150)
    tasks = [world.task(due, behind=True) for due in (75, 90, 95, 100)]
    world.stage.behind_turn = True
    formed = world.form()
    assert formed.batch == tasks[:3]
    assert formed.dropped == []
    assert world.behind == tasks[3:]
    assert world.queue == [within]


def test_who_cannot_make_it_even_alone_is_dropped_by_how_much_it_is_short() -> None:
    """Start at 5, 10 to run and 40 to come: 55."""
    world = World(target=1)
    lost, exact = world.task(35, behind=True), world.task(55, behind=True)
    world.stage.behind_turn = True
    formed = world.form(start=5.0)
    assert formed.dropped == [lost]
    assert formed.short == pytest.approx([20 * MS])
    assert formed.batch == [exact]


def test_under_overload_those_behind_who_stand_in_the_way_of_others_behind_are_dropped() -> None:
    """Three end at 30 + 40: until 60 is not enough, and there are three others."""
    world = World()
    urgent = world.task(60, behind=True)
    others = [world.task(due, behind=True) for due in (80, 85, 90)]
    world.stage.behind_turn = True
    formed = world.form()
    assert formed.batch == others
    assert formed.dropped == [urgent]


# ---- priority ------------------------------------------------------------------------------------


def test_priority_1_stays_in_the_place_of_the_one_with_the_most_budget() -> None:
    world = World()
    prior = world.task(115, priority=1)
    first, second, last = (world.task(due) for due in (140, 150, 160))
    formed = world.form()
    assert formed.batch == [prior, first, second]
    assert world.behind == []
    assert world.queue == [last]


def test_those_of_priority_1_come_before_others_in_the_order_of_their_deadlines() -> None:
    world = World()
    ordinary = world.task(112)
    prior = [world.task(due, priority=1) for due in (114, 116)]
    others = [world.task(due) for due in (140, 150, 160)]
    formed = world.form()
    assert formed.batch == [*prior, others[0]]
    assert world.behind == [ordinary]
    assert world.queue == others[1:]


def test_more_of_priority_1_than_there_is_room_for_fall_behind() -> None:
    world = World()
    prior = [world.task(115 + due, priority=1) for due in range(5)]
    others = [world.task(due) for due in (140, 150, 160)]
    formed = world.form()
    assert formed.batch == prior[:3]
    assert world.behind == prior[3:]
    assert world.queue == others


def test_priority_1_does_not_save_who_would_be_late_all_the_same() -> None:
    """The batch of three ends at 30, 40 to come: 70."""
    world = World()
    lost, saved = world.task(69, priority=1), world.task(70, priority=1)
    others = [world.task(due) for due in (140, 150, 160)]
    formed = world.form()
    assert formed.batch == [saved, *others[:2]]
    assert world.behind == [lost]


def test_with_nobody_within_the_plan_priority_1_falls_behind_with_all_others() -> None:
    world = World()
    tasks = [world.task(80, priority=1), world.task(90)]
    assert world.form().batch == []
    assert world.behind == tasks


# ---- map stages ----------------------------------------------------------------------------------


def test_items_of_a_map_request_fall_behind_together() -> None:
    world = World()
    group = MapGroup(2)
    items = [world.task(105, group=group) for _ in range(2)]
    other = world.task(200)
    formed = world.form()
    assert formed.batch == [other]
    assert formed.dropped == []
    assert world.behind == items


def test_a_map_request_that_has_begun_is_run_on_whatever_its_plan() -> None:
    """Two of its three items are taken with the target batch; the third one is settled."""
    world = World(target=2)
    group = MapGroup(3)
    items = [world.task(150, group=group) for _ in range(3)]
    assert world.form().batch == items[:2]
    formed = world.form(start=100.0)
    assert formed.batch == items[2:]
    assert world.behind == []


def test_a_map_request_that_does_not_make_it_as_a_whole_is_dropped_not_begun() -> None:
    """Ten items in batches of two take 100 ms, and 40 are to come: 140. A batch of two is within the plan."""
    world = World(target=2)
    group = MapGroup(10)
    items = [world.task(130, group=group) for _ in range(10)]
    formed = world.form()
    assert formed.batch == []
    assert set(formed.dropped) == set(items)


def test_priority_1_does_not_bring_items_in_without_their_request() -> None:
    world = World()
    group = MapGroup(1)
    item = world.task(115, priority=1, group=group)
    others = [world.task(due) for due in (140, 150, 160)]
    assert world.form().batch == others
    assert world.behind == [item]
    assert not group.admitted


# ---- all of them ---------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 1), st.booleans()), max_size=30),
    st.integers(1, 12),
    st.booleans(),
    st.integers(0, 40),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_every_request_is_taken_dropped_or_waits_and_who_is_taken_makes_it(
    tasks: list[tuple[int, int, bool]], target: int, turn: bool, start: int, remaining: int, more: int
) -> None:
    world = World(target=target, reserve=float(remaining + more), remaining=float(remaining))
    made = [world.task(due, priority=priority, behind=behind) for due, priority, behind in tasks]
    before = {id(task) for task in world.behind}
    world.stage.behind_turn = turn
    formed = world.form(float(start))
    assert sorted(map(id, [*formed.batch, *formed.dropped, *world.queue, *world.behind])) == sorted(map(id, made))
    assert len(formed.batch) <= target
    for task in formed.batch:
        assert (start + 10 * len(formed.batch) + remaining) * MS <= task.due + 1e-9
        assert (id(task) in before) == turn, "whoever has fallen behind stays behind"
    for task in formed.dropped:
        assert turn, "nobody within the plan is dropped"
        assert (start + 10 * target + remaining) * MS > task.due
    if turn:
        assert len(formed.batch) + len(formed.dropped) > 0 or not before
    else:
        assert before <= {id(task) for task in world.behind}
        assert formed.batch or not world.queue


# ---- under the scheduler -------------------------------------------------------------------------


class Shard:
    """A scheduler with two stages of 10 (alone) to 20 ms (eight) one behind the other, and an SLO of 1 s; the first has
    ``devices`` devices, the second one."""

    def __init__(self, devices: int, *, load: float = 0.0) -> None:
        self.stage, second = (Stage(f"p@1/{name}", "", 8, 10_000) for name in "ab")
        plans = [
            StagePlan("a", self.stage, [(-1, "")], False, 10),
            StagePlan("b", second, [(0, "")], False, 10),
        ]
        self.scheduler = Scheduler(Limits(), overhead=0.001)
        self.scheduler.apply(Pipeline("p", 1.0, plans, [("", 1, "")]))
        self.stage.rate = second.rate = 60.0
        self.client = Client("c")
        for number in range(devices):
            self.report("a", number, "a")
        self.report("b", 0, "b")
        assert self.scheduler.dispatch(0.0) == []
        self.stage.order.load = load
        self._number = 0
        # What a lone request needs to be within the plan, and what it needs at all.
        self.plan = 0.001 + 10 * MS + self.stage.reserve - self.stage.margin
        self.least = 0.001 + 10 * MS + self.stage.remaining
        assert self.stage.target == 8
        assert self.least + 2 * MS < self.plan

    def report(self, agent: str, number: int, stage: str) -> None:
        self.scheduler.report(agent, number, "gpu", [HeldModel(f"p@1/{stage}", "", 100, [(1, 10 * MS), (8, 20 * MS)])])

    def submit(self, now: float, budget: float) -> Request:
        self._number += 1
        request = self.scheduler.submit(now, self.client, self._number, "p", now, budget, 0, PAYLOAD, False)
        assert request is not None
        return request

    def pull(self, agent: str, number: int, now: float) -> None:
        assert self.scheduler.pull(agent, number, now)

    def grants(self, now: float) -> list[list[Request]]:
        return [[task.request for task in batch.tasks] for batch in self.scheduler.dispatch(now)]


def test_one_look_grants_to_those_within_the_plan_and_those_behind_it_until_there_is_no_device() -> None:
    """The loop ends although both queues are left with requests."""
    shard = Shard(3)
    within = [shard.submit(0.0, 1.0) for _ in range(10)]
    behind = [shard.submit(0.0, shard.plan - 1 * MS) for _ in range(20)]
    for number in range(3):
        shard.pull("a", number, 0.0)
    granted = shard.grants(0.0)
    assert granted[0] == within[:8]
    assert len(granted) == 3
    assert {request for batch in granted[1:] for request in batch} <= set(behind)
    assert len(shard.stage.queue) == 2
    assert len(shard.stage.behind) > 0
    assert shard.scheduler.dispatch(0.0) == []


def test_who_is_behind_ends_before_its_deadline_although_others_may_still_wait() -> None:
    """Under a load of 0.9 those behind wait while the one within the plan does; nobody has them run, and they are
    dropped when they are lost, not when the other one's window opens."""
    shard = Shard(1, load=0.9)
    behind = shard.submit(0.0, shard.plan - 1 * MS)
    other = shard.submit(0.0, 1.0)
    shard.pull("a", 0, 0.0)
    assert shard.grants(0.0) == []
    assert [task.request for task in shard.stage.behind] == [behind]
    now = shard.scheduler.next_wake()
    assert now < behind.deadline
    assert shard.grants(now) == []
    assert behind.outcome is Outcome.DROPPED
    opens = shard.scheduler.next_wake()
    assert opens > behind.deadline
    assert shard.grants(opens + 1e-9) == [[other]]


def test_below_that_load_who_is_behind_takes_a_device_at_once() -> None:
    shard = Shard(1, load=0.7)
    behind = shard.submit(0.0, shard.plan - 1 * MS)
    shard.submit(0.0, 1.0)
    shard.pull("a", 0, 0.0)
    assert shard.grants(0.0) == [[behind]]


def test_a_window_that_is_looked_at_late_by_less_than_the_margin_has_nobody_fall_behind() -> None:
    shard = Shard(1)
    requests = [shard.submit(0.0, 0.2), shard.submit(0.0, 1.0)]
    shard.pull("a", 0, 0.0)
    assert shard.grants(0.0) == []
    late = shard.scheduler.next_wake() + 0.9 * shard.stage.margin
    assert shard.grants(late) == [requests]
    assert not shard.stage.behind_turn


def test_who_came_back_from_a_lost_host_may_be_behind_by_then() -> None:
    shard = Shard(2)
    request = shard.submit(0.0, shard.plan + 1 * MS)
    shard.pull("a", 0, 0.0)
    assert shard.grants(0.0) == [[request]]
    assert shard.scheduler.agent_lost(0.002, "a", "lost") == 1
    assert [task.request for task in shard.stage.queue] == [request]
    shard.report("c", 0, "a")
    shard.pull("c", 0, 0.002)
    assert shard.grants(0.002) == [[request]]
    assert shard.stage.behind_turn
