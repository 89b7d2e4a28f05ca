"""A stage's own accounts: forced waiting, deadlines, thinning, and where its tasks are."""

from __future__ import annotations

import pytest

from broker.engine.devices import Device
from broker.engine.ledger import Ledger
from broker.engine.limits import Limits
from broker.engine.plan import Pipeline, StagePlan
from broker.engine.policy import make_policy
from broker.engine.predictor import LatencyTable
from broker.engine.request import Client, Request, Task
from broker.engine.stage import NEVER, Stage
from laxity.outcomes import Outcome
from laxity.payload import encode

PAYLOAD = encode(None)


class World:
    """A pipeline of one stage with an SLO of 1 s, and its ledger."""

    def __init__(self, policy: str = "laxity") -> None:
        self.stage = Stage("p@1/s", "", 8, 1000)
        plans = [StagePlan("s", self.stage, [(-1, "")], False, 1)]
        self.pipeline = Pipeline("p", 1.0, plans, [("", 0, "")], make_policy(policy, {}))
        self.ledger = Ledger(Limits())
        self.client = Client("c")

    def task(self, due: float = 1.0, *, priority: int = 0, queued_at: float = 0.0) -> Task:
        """One that waits."""
        request = Request(
            self.client, len(self.client.requests), self.pipeline, 0.0, due, priority, PAYLOAD, False
        )  # fmt: skip
        self.ledger.enter(request)
        task = Task(request, self.stage, 0, -1, None, PAYLOAD, queued_at)
        request.tasks.append(task)
        self.stage.push(task)
        return task


# ---- forced waiting ------------------------------------------------------------------------------


def test_forced_waiting_is_the_time_without_a_free_device() -> None:
    stage = World().stage
    assert stage.blocked_for(5.0) == 0.0
    stage.block(10.0)
    assert stage.blocked_for(10.0) == 0.0
    assert stage.blocked_for(12.5) == 2.5
    stage.block(11.0)
    assert stage.blocked_for(13.0) == 3.0
    stage.unblock(14.0)
    assert stage.blocked_for(20.0) == 4.0
    stage.unblock(21.0)
    stage.block(22.0)
    stage.unblock(22.5)
    assert stage.blocked_for(30.0) == 4.5


def test_a_task_knows_how_long_its_stage_had_been_blocked_when_it_came() -> None:
    """Blocked from 1 to 3 and from 5 to 6: who came at 2 was kept waiting for 2 s of it by 7, who came at 4 for 1."""
    world = World()
    stage = world.stage
    stage.block(1.0)
    early = world.task(queued_at=2.0)
    stage.unblock(3.0)
    late = world.task(queued_at=4.0)
    stage.block(5.0)
    stage.unblock(6.0)
    assert stage.blocked_for(7.0) - early.blocked == 2.0
    assert stage.blocked_for(7.0) - late.blocked == 1.0


# ---- deadlines -----------------------------------------------------------------------------------


def test_due_by_the_policys_budget() -> None:
    """A third of the SLO of 1 s is this stage's; a request's own deadline is never passed."""
    for policy, due in (("laxity", [10.9, 10.2]), ("symphony", [10.0 + 1 / 3, 10.2])):
        world = World(policy)
        world.stage.due_share = 1 / 3
        found = []
        for budget in (0.9, 0.2):
            request = Request(world.client, 1, world.pipeline, 10.0, 10.0 + budget, 0, PAYLOAD, False)
            found.append(world.stage.due(request))
        assert found == pytest.approx(due)


def test_the_queue_is_kept_by_deadlines_or_by_arrival() -> None:
    for policy, first in (("nexus", 1), ("naive", 0), ("clipper++", 0), ("pard-fcfs", 0)):
        world = World(policy)
        tasks = [world.task(0.9, queued_at=0.1), world.task(0.5, queued_at=0.2)]
        assert world.stage.queue.lowest() is tasks[first]


# ---- thinning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0.0, 0.25, 0.6, 1.0])
def test_arrivals_are_thinned_evenly(part: float) -> None:
    stage = World().stage
    stage.admits = part
    let_in = [stage.lets_in(False) for _ in range(1000)]
    assert sum(let_in) == pytest.approx(part * 1000, abs=1)
    for at in range(0, 1000, 20):
        assert sum(let_in[at : at + 20]) == pytest.approx(part * 20, abs=1)


def test_urgent_ones_are_let_in_at_the_others_expense() -> None:
    stage = World().stage
    stage.admits = 0.6
    urgent = [True, False, False, False] * 250
    let_in = [stage.lets_in(each) for each in urgent]
    assert all(let_in[::4])
    assert sum(let_in) == pytest.approx(600, abs=1)


def test_many_urgent_ones_do_not_shut_the_others_out_for_long() -> None:
    stage = World().stage
    stage.admits = 0.5
    assert all(stage.lets_in(True) for _ in range(1000))
    assert [stage.lets_in(False) for _ in range(30)].index(True) < 25


# ---- who waits -----------------------------------------------------------------------------------


def test_a_task_is_taken_out_of_wherever_it_waits() -> None:
    world = World("pard")
    stage = world.stage
    queued, behind, alone, collected, other = (world.task() for _ in range(5))
    for task in (behind, alone, collected, other):
        stage.queue.remove(task)
    stage.behind.push(behind)
    stage.put_alone([alone, other])
    device = Device(0, "a", 0, "gpu")
    device.collects_for = stage
    device.collected = [collected]
    stage.collecting[0] = device
    assert stage.waiting() == 5
    for left, task in enumerate((queued, behind, alone, collected)):
        world.ledger.end(0.0, task.request, Outcome.CANCELLED, "", "")
        assert stage.waiting() == 4 - left
    assert stage.take_alone() == [other]
    assert device.collected == []
    assert stage.waiting() == 0


def test_a_stage_is_idle_when_nobody_waits_anywhere() -> None:
    world = World()
    stage = world.stage
    assert stage.idle()
    task = world.task()
    assert not stage.idle()
    stage.behind.push(stage.queue.pop_lowest())
    assert not stage.idle()
    stage.behind.pop_lowest()
    stage.put_alone([task])
    assert not stage.idle()
    assert stage.take_alone() == [task]
    assert stage.idle()


# ---- when somebody is lost -----------------------------------------------------------------------


def test_the_first_to_be_hopeless_of_those_within_the_plan_and_behind_it() -> None:
    """100 ms to run and 200 ms to come: 300 ms before their deadlines."""
    world = World()
    stage = world.stage
    stage.table, stage.remaining, stage.devices = LatencyTable(8, [(1, 0.1), (8, 0.1)]), 0.2, 1
    assert stage.hopeless_at() == NEVER
    world.task(0.9)
    assert stage.hopeless_at() == pytest.approx(0.6)
    world.task(0.8)
    behind = stage.queue.pop_lowest()
    stage.behind.push(behind)
    assert stage.hopeless_at() == pytest.approx(0.5)
    behind.is_probe = True
    assert stage.hopeless_at() == pytest.approx(0.6)
    stage.queue.pop_lowest()
    assert stage.hopeless_at() == pytest.approx(0.8)
    alone = world.task(0.7)
    stage.queue.remove(alone)
    stage.put_alone([alone])
    assert stage.hopeless_at() == pytest.approx(0.7)


def test_without_devices_all_wait_until_their_deadlines() -> None:
    world = World()
    world.task(0.9)
    world.stage.behind.push(world.stage.queue.pop_lowest())
    assert world.stage.hopeless_at() == pytest.approx(0.9)
