"""The scheduling engine under the peers' policies: what they do beside forming batches, by worked examples.

FLAT takes 100 ms whatever the batch; EACH takes 100 ms an element.
"""

from __future__ import annotations

import itertools

import pytest

from broker.engine.devices import Batch
from broker.engine.dispatcher import RESPONSE
from broker.engine.fleet import HeldModel
from broker.engine.limits import Limits
from broker.engine.plan import FROM_REQUEST, Pipeline, StagePlan
from broker.engine.policy import make_policy
from broker.engine.request import Client, Request
from broker.engine.scheduler import Scheduler
from broker.engine.stage import NEVER, Stage
from broker.engine.upkeep import REFRESH, SWEEP
from laxity.outcomes import Outcome
from laxity.payload import encode
from pipelines.policies import POLICIES

Profile = list[tuple[int, float]]
FLAT: Profile = [(1, 0.1), (8, 0.1)]
EACH: Profile = [(1, 0.1), (8, 0.8)]
OVERHEAD = 0.001
PAYLOAD = encode("x")


class World:
    """A chain of stages under one policy with an SLO of 1 s, and devices that hold all of it, moved by hand."""

    def __init__(
        self,
        policy: str,
        *stages: str,
        profile: Profile = FLAT,
        devices: int = 1,
        max_batch: int = 8,
        rate: float = 0.0,
        preemption: bool = False,
    ) -> None:
        names = stages or ("s",)
        plans = [
            StagePlan(
                name,
                Stage(f"p@1/{name}", "", max_batch, 1000),
                [(number - 1 if number else FROM_REQUEST, "")],
                False,
                1,
            )
            for number, name in enumerate(names)
        ]
        self.pipeline = Pipeline("p", 1.0, plans, [("", len(plans) - 1, "")], make_policy(policy, {}))
        self.stages = [plan.stage for plan in plans]
        self.stage = self.stages[0]
        for stage in self.stages:
            stage.rate = rate  # others are expected, so that waiting pays
        self.scheduler = Scheduler(Limits(), overhead=OVERHEAD, preemption=preemption)
        self.scheduler.apply(self.pipeline)
        self.client = Client("service")
        self._ids = itertools.count()
        for number in range(devices):
            self.report(number, profile)
            self.pull(0.0, number)
        self.idle(0.0)

    def report(self, number: int, profile: Profile = FLAT, agent: str = "a") -> None:
        held = [HeldModel(stage.key, "", 100, profile) for stage in self.stages] if profile else []
        self.scheduler.report(agent, number, "gpu", held)

    def pull(self, now: float, number: int = 0, *, free_at: float | None = None, agent: str = "a") -> None:
        assert self.scheduler.pull(agent, number, now if free_at is None else free_at)

    def submit(self, now: float, budget: float = -1.0) -> Request:
        request = self.scheduler.submit(
            now, self.client, next(self._ids), "p", now, budget, 0, PAYLOAD, False
        )  # fmt: skip
        assert request is not None
        return request

    def grant(self, now: float) -> Batch:
        (batch,) = self.scheduler.dispatch(now)
        return batch

    def next_grant(self, now: float) -> tuple[float, Batch]:
        """The next batch, and when it is due."""
        while not (granted := self.scheduler.dispatch(now)):
            now = self.scheduler.next_wake()
        (batch,) = granted
        return now, batch

    def idle(self, now: float) -> None:
        assert self.scheduler.dispatch(now) == []

    def done(self, now: float, batch: Batch) -> None:
        results = [PAYLOAD] * len(batch.tasks)
        assert self.scheduler.done(now, batch.device.agent, batch.number, "ok", 0.1, results, {}, "")


def requests(batch: Batch) -> list[Request]:
    return [task.request for task in batch.tasks]


# ---- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_request_passes_two_stages(policy: str) -> None:
    world = World(policy, "a", "b")
    request = world.submit(0.0)
    now, batch = world.next_grant(0.0)
    world.done(now + 0.101, batch)
    world.pull(now + 0.101)
    now, batch = world.next_grant(now + 0.101)
    world.done(now + 0.101, batch)
    assert world.scheduler.take_ended() == [request]
    assert request.outcome is Outcome.OK


@pytest.mark.parametrize("policy", POLICIES)
def test_who_waits_is_given_up_at_the_deadline_at_last_but_by_those_who_run_what_is_late(policy: str) -> None:
    world = World(policy, devices=0)
    world.report(0)
    request = world.submit(0.0)
    world.idle(0.0)
    world.idle(1.0 + 1e-5)
    if policy in ("naive", "clipper++"):
        assert request.outcome is None
    else:
        assert request.outcome in (Outcome.DROPPED, Outcome.EXPIRED)


# ---- what is late --------------------------------------------------------------------------------


def test_naive_runs_what_is_late_and_throws_the_result_away() -> None:
    world = World("naive")
    late = world.submit(0.0, budget=0.2)
    batch = world.grant(0.0)
    behind = world.submit(0.0, budget=0.2)
    world.idle(0.3)
    assert (late.outcome, behind.outcome) == (None, None)
    world.done(0.3, batch)
    assert late.outcome is Outcome.EXPIRED
    world.pull(0.3)
    batch = world.grant(0.3)
    assert requests(batch) == [behind]
    assert batch.closes >= NEVER
    world.done(0.4, batch)
    assert behind.outcome is Outcome.EXPIRED


def test_clipper_drops_at_its_turn_what_has_used_up_its_stages_share() -> None:
    """Two equal stages: half a second each."""
    world = World("clipper++", "a", "b", devices=0)
    world.report(0)
    world.idle(0.0)
    first, second = world.submit(0.0), world.submit(0.1)
    world.idle(0.55)
    assert world.scheduler.take_ended() == []
    world.pull(0.55)
    batch = world.grant(0.55)
    assert requests(batch) == [second]
    assert (first.outcome, first.end_stage) == (Outcome.DROPPED, "a")
    assert first.short_by == pytest.approx(0.05 + OVERHEAD)


# ---- the SLO split over the stages ---------------------------------------------------------------


@pytest.mark.parametrize("policy", ["clipper++", "nexus-split", "symphony", "shepherd", "clockwork", "pard-split"])
def test_each_stage_has_its_share_and_what_earlier_ones_left_over(policy: str) -> None:
    world = World(policy, "a", "b")
    world.submit(0.0)
    now, batch = world.next_grant(0.0)
    assert batch.tasks[0].due == pytest.approx(0.5)
    assert now <= 0.4
    world.done(now + 0.101, batch)
    world.pull(now + 0.101)
    now, batch = world.next_grant(now + 0.101)
    assert batch.tasks[0].due == pytest.approx(1.0)
    assert now <= 0.9


@pytest.mark.parametrize("policy", ["naive", "nexus", "laxity", "pard"])
def test_or_the_whole_slo(policy: str) -> None:
    world = World(policy, "a", "b")
    world.submit(0.0)
    assert world.grant(0.0).tasks[0].due == pytest.approx(1.0)


def test_nexus_early_drop_looks_at_the_whole_slo_or_at_the_share() -> None:
    """0.35 s after its arrival: alone it would be done with a at 0.451."""
    for policy, outcome in (("nexus", None), ("nexus-split", Outcome.DROPPED)):
        world = World(policy, "a", "b", devices=0)
        world.report(0)
        world.idle(0.1)
        request = world.submit(0.0, budget=0.8)
        world.pull(0.45)
        world.scheduler.dispatch(0.45)
        assert request.outcome is outcome


def test_worst_case_latencies_split_the_slo() -> None:
    """Requests took 300 ms at a and 100 ms at b."""
    world = World("pard-wcl", "a", "b")
    world.idle(0.0)
    a, b = world.stages
    assert (a.due_share, b.due_share) == pytest.approx((0.5, 1.0))
    world.submit(0.0)
    world.done(0.3, world.grant(0.0))
    world.pull(0.3)
    world.done(0.4, world.grant(0.3))
    world.idle(REFRESH)
    assert (a.due_share, b.due_share) == pytest.approx((0.75, 1.0))


# ---- overload control ----------------------------------------------------------------------------


def test_a_stage_that_is_slow_has_the_one_before_it_admit_less() -> None:
    world = World("pard-oc", "a", "b", "c")
    world.idle(0.0)
    a, b, c = world.stages
    c.waits.note_queued(0.030, 1)
    b.waits.note_queued(0.010, 1)
    world.idle(REFRESH)
    assert (a.admits, b.admits, c.admits) == (1.0, 0.6, 1.0)
    world.idle(2 * REFRESH)
    assert (a.admits, b.admits, c.admits) == (1.0, 1.0, 1.0)


def test_the_first_stage_thins_its_own_arrivals() -> None:
    world = World("pard-oc")
    world.idle(0.0)
    world.stage.waits.note_queued(0.030, 1)
    world.idle(REFRESH)
    sent = [world.submit(REFRESH) for _ in range(100)]
    dropped = [request for request in sent if request.outcome is Outcome.DROPPED]
    assert len(dropped) == pytest.approx(40, abs=1)
    assert dropped[0].detail == "overload control: stage 's' admits 60% at present"


def test_others_do_not_shed() -> None:
    world = World("pard")
    world.idle(0.0)
    world.stage.waits.note_queued(0.030, 1)
    world.idle(REFRESH)
    assert world.stage.admits == 1.0


# ---- batches collected while their device is busy -------------------------------------------------


def busy(profile: Profile = FLAT, devices: int = 1) -> World:
    """Each device runs one request from 0 on, until 0.101."""
    world = World("pard", profile=profile, devices=devices)
    for _ in range(devices):
        world.submit(0.0)
        world.grant(0.0)
    return world


def test_the_next_batch_is_collected_while_the_device_is_busy() -> None:
    world = busy()
    sent = [world.submit(0.02), world.submit(0.03)]
    world.idle(0.03)
    (device,) = world.scheduler.fleet.devices.values()
    assert [task.request for task in device.collected] == sent
    assert len(world.stage.queue) == 0
    assert world.stage.waiting() == 2
    sent.append(world.submit(0.05))
    world.pull(0.05, free_at=0.101)
    batch = world.grant(0.05)
    # The pull ends the collecting: the last one is for the batch after this.
    assert requests(batch) == sent[:2]
    assert batch.start == pytest.approx(0.101)
    assert batch.closes == pytest.approx(1.02)
    assert [task.request for task in device.collected] == sent[2:]


def test_what_waited_is_told_apart_from_the_wait_for_the_batch() -> None:
    """Who came at 0.02 was taken at 0.04, and starts at 0.101 on a device that pulled at 0.05. The one before it was
    taken at once, and started when its grant had got there."""
    world = busy()
    world.submit(0.02)
    world.idle(0.04)
    world.pull(0.05, free_at=0.101)
    world.grant(0.05)
    world.stage.waits.end_period()
    assert world.stage.waits.queued == pytest.approx((0.0 + 0.02) / 2)
    bins = world.stage.waits.distribution(0.002)
    assert {at: p for at, p in enumerate(bins) if p} == {0: 0.5, 30: 0.5}


def test_it_is_decided_when_they_are_collected() -> None:
    """Batches would start at 0.101 and end at 0.201: who is due before is dropped while the device is still busy."""
    world = busy()
    late, early = world.submit(0.02, budget=0.181 + RESPONSE + 1e-4), world.submit(0.02, budget=0.181)
    world.idle(0.02)
    assert late.outcome is None
    assert early.outcome is Outcome.DROPPED
    assert early.short_by == pytest.approx(RESPONSE)


def test_the_device_that_ends_first_is_filled_first() -> None:
    """Batches of 8 at most, nine wait: eight for the one, one for the other."""
    world = World("pard", devices=2)
    for now in (0.0, 0.05):
        world.submit(now)
        world.grant(now)
    for _ in range(9):
        world.submit(0.06)
    world.idle(0.06)
    assert {number: len(device.collected) for (_, number), device in world.scheduler.fleet.devices.items()} == {
        0: 8,
        1: 1,
    }
    world.submit(0.07)
    world.idle(0.07)
    assert world.stage.waiting() == 10
    world.pull(0.1)
    assert len(world.grant(0.1).tasks) == 8


def test_those_for_whom_no_batch_has_room_wait() -> None:
    world = busy()
    for _ in range(10):
        world.submit(0.02)
    world.idle(0.02)
    assert len(world.stage.queue) == 2
    assert world.stage.waiting() == 10
    world.pull(0.09, free_at=0.101)
    assert len(world.grant(0.09).tasks) == 8
    assert len(world.stage.queue) == 0
    assert world.stage.waiting() == 2


def test_collected_ones_wait_again_when_their_device_is_gone() -> None:
    world = busy()
    sent = [world.submit(0.02), world.submit(0.02)]
    world.idle(0.02)
    assert world.scheduler.agent_lost(0.03, "a", "gone") == 1
    assert len(world.stage.queue) == 3
    world.report(0, agent="b")
    world.pull(0.04, agent="b")
    assert set(sent) < set(requests(world.grant(0.04)))


def test_collected_ones_wait_again_when_their_device_lets_go_of_the_model() -> None:
    world = busy()
    sent = world.submit(0.02)
    world.idle(0.02)
    world.report(0, [])
    world.pull(0.03)
    world.idle(0.03)
    assert world.stage.waiting() == len(world.stage.queue) == 1
    world.report(0)
    assert requests(world.grant(0.04)) == [sent]


def test_a_collected_one_that_is_cancelled_is_not_run() -> None:
    world = busy()
    gone, stays = world.submit(0.02), world.submit(0.02)
    world.idle(0.02)
    assert world.scheduler.cancel(0.03, world.client, gone.id)
    assert world.stage.waiting() == 1
    world.pull(0.1)
    assert requests(world.grant(0.1)) == [stays]


def test_a_device_whose_collected_ones_have_all_ended_is_free() -> None:
    world = busy()
    gone = world.submit(0.02)
    world.idle(0.02)
    world.scheduler.cancel(0.03, world.client, gone.id)
    world.pull(0.1)
    world.idle(0.1)
    after = world.submit(0.2)
    assert requests(world.grant(0.2)) == [after]


def test_collected_ones_end_at_their_deadline_when_the_device_hangs() -> None:
    world = busy()
    request = world.submit(0.02, budget=0.5)
    world.idle(0.02)
    assert world.scheduler.next_wake() <= 0.52 + SWEEP
    world.idle(0.52 + 1e-9)
    assert request.outcome is Outcome.EXPIRED
    assert world.stage.waiting() == 0


def test_what_expired_a_moment_ago_is_not_granted() -> None:
    """Two deadlines within a sweep's time."""
    world = busy()
    first, second, third = (world.submit(0.02, budget=budget) for budget in (0.5, 0.5 + SWEEP / 2, 0.9))
    world.idle(0.02)
    world.idle(0.52)
    assert (first.outcome, second.outcome) == (Outcome.EXPIRED, None)
    world.pull(0.52 + SWEEP * 0.6)
    assert requests(world.grant(0.52 + SWEEP * 0.6)) == [third]
    assert second.outcome is Outcome.EXPIRED


def test_shutting_down_ends_collected_ones_too() -> None:
    world = busy()
    sent = [world.submit(0.02), world.submit(0.02)]
    world.idle(0.02)
    world.scheduler.shut_down(0.03, "going")
    assert {request.outcome for request in sent} == {Outcome.UNAVAILABLE}
    assert world.scheduler.ledger.in_flight == 0


# ---- pre-emption ---------------------------------------------------------------------------------


def two_running(preemption: bool = True) -> tuple[World, Batch]:
    """shepherd; a batch of 2 runs."""
    world = World("shepherd", preemption=preemption)
    world.submit(0.0)
    world.submit(0.0)
    return world, world.grant(0.0)


def test_a_batch_is_stopped_for_one_of_more_than_three_times_its_size() -> None:
    world, running = two_running()
    for _ in range(6):
        world.submit(0.02)
    world.idle(0.02)
    assert world.scheduler.take_preempted() == []
    seventh = world.submit(0.03)
    world.idle(0.03)
    assert world.scheduler.take_preempted() == [running]
    assert world.scheduler.take_preempted() == []
    assert world.stage.waiting() == 9
    assert not world.scheduler.done(0.04, "a", running.number, "ok", 0.1, [PAYLOAD] * 2, {}, "")
    world.pull(0.05)
    batch = world.grant(0.05)
    assert len(batch.tasks) == 8
    assert set(requests(running)) < set(requests(batch))
    assert seventh not in requests(batch)


def test_only_those_who_would_make_it_count() -> None:
    """One of the seven is so urgent that a batch of two, after 0.2 s, would be too late."""
    world = World("shepherd", profile=EACH, preemption=True)
    world.submit(0.0)
    world.grant(0.0)
    for _ in range(6):
        world.submit(0.02)
    world.submit(0.02, budget=0.15)
    world.idle(0.02)
    assert world.scheduler.take_preempted() == []


def test_a_device_that_has_its_next_batch_already_goes_on() -> None:
    world, _ = two_running()
    world.pull(0.01, free_at=0.101)
    world.submit(0.01)
    world.grant(0.01)
    for _ in range(8):
        world.submit(0.02)
    world.idle(0.02)
    assert world.scheduler.take_preempted() == []


def test_without_it_nothing_is_stopped() -> None:
    world, _ = two_running(preemption=False)
    for _ in range(8):
        world.submit(0.02)
    world.idle(0.02)
    assert world.scheduler.take_preempted() == []
    assert world.stage.waiting() == 8


def test_only_shepherd_stops_batches() -> None:
    world = World("nexus", preemption=True)
    world.submit(0.0)
    world.grant(0.0)
    for _ in range(8):
        world.submit(0.02)
    world.idle(0.02)
    assert world.scheduler.take_preempted() == []


# ---- forced waiting ------------------------------------------------------------------------------


def test_a_deferrals_wait_is_not_counted() -> None:
    world = World("laxity", rate=10.0)
    world.submit(0.0)
    world.idle(0.0)
    opens = world.scheduler.next_wake()
    assert opens > 0.5
    world.grant(opens + 1e-9)
    world.stage.waits.end_period()
    assert world.stage.waits.queued == pytest.approx(0.0, abs=1e-6)


def test_waiting_for_a_device_is_counted_from_the_windows_opening() -> None:
    world = World("laxity", devices=0, rate=10.0)
    world.report(0)
    world.submit(0.0)
    world.idle(0.0)
    opens = world.scheduler.next_wake()
    assert opens > 0.5
    world.idle(opens)
    world.pull(opens + 0.005)
    world.grant(opens + 0.005)
    world.stage.waits.end_period()
    assert world.stage.waits.queued == pytest.approx(0.005)


def test_a_deferral_behind_a_time_without_devices_is_not_counted() -> None:
    """One waits for a device until the end of its window, the next one by choice."""
    world = World("laxity", devices=0, rate=10.0)
    world.report(0)
    world.submit(0.0)
    world.idle(0.0)
    opens = world.scheduler.next_wake()
    world.idle(opens)
    world.pull(opens + 0.005)
    world.done(opens + 0.01, world.grant(opens + 0.005))
    world.pull(opens + 0.01)
    world.submit(opens + 0.01)
    world.idle(opens + 0.01)
    again, _ = world.next_grant(opens + 0.01)
    assert again > opens + 0.1
    world.stage.waits.end_period()
    assert world.stage.waits.queued <= 0.005 + 1e-6


def test_who_comes_while_no_device_is_free_waits_from_then_on() -> None:
    """One at 0.1, one at 0.3; devices at 0.4 and 0.5: (0.3 + 0.2) / 2."""
    world = World("laxity", profile=EACH, devices=0, max_batch=1)
    world.report(0)
    for now in (0.1, 0.3):
        world.submit(now)
        world.idle(now)
    for now in (0.4, 0.5):
        world.pull(now)
        assert len(world.grant(now).tasks) == 1
        world.idle(now)
    world.stage.waits.end_period()
    assert world.stage.waits.queued == pytest.approx(0.25)
