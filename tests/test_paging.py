"""Which models are loaded and which make room, in examples and in virtual time."""

from __future__ import annotations

import itertools

import pytest

from broker.engine.devices import Batch
from broker.engine.dispatcher import RESPONSE
from broker.engine.fleet import HeldModel
from broker.engine.limits import Limits
from broker.engine.paging import CLEARLY, GRACE, HORIZON, LOOK, RECENT, WINDOW, Page
from broker.engine.plan import FROM_REQUEST, Pipeline, StagePlan
from broker.engine.policy import make_policy
from broker.engine.request import Client, Request
from broker.engine.residency import BACK_OFF, HELD, LOADING, MAX_BACK_OFF, RESIDENT, UNLOADING
from broker.engine.scheduler import Scheduler
from broker.engine.stage import NEVER, Stage
from laxity.outcomes import Outcome
from laxity.payload import encode

PAYLOAD = encode("x")
RUN = 0.010
"""Seconds that a batch takes, of whatever size."""
LOAD = 0.050
"""Seconds that loading takes."""
SLO = 1.0
OVERHEAD = 0.001


def key(name: str) -> str:
    return f"{name}@1/s"


class World:
    """One-stage pipelines and devices that hold all of their models, of 100 MiB each, in their hosts' memory."""

    def __init__(self, names: str, *, slo: float = SLO, policy: str = "laxity") -> None:
        self.names = names
        self.scheduler = Scheduler(Limits(), first_batch=1000, overhead=OVERHEAD)
        self.client = Client("service")
        self._ids = itertools.count()
        for name in names:
            plan = StagePlan("s", Stage(key(name), "", 8, 1000), [(FROM_REQUEST, "")], False, 1)
            self.scheduler.apply(Pipeline(name, slo, [plan], [("", 0, "")], make_policy(policy, {})))

    def stage(self, name: str) -> Stage:
        return self.scheduler.stages[key(name)]

    def device(
        self,
        resident: str,
        *,
        room: int = 1,
        agent: str = "a",
        number: int = 0,
        names: str = "",
        pulls: bool = True,
        load: float = LOAD,
        memory: float = 100.0,
    ) -> None:
        """A device with memory for ``room`` models."""
        models = [
            HeldModel(key(name), "", 100, [(1, RUN), (8, RUN)], name in resident, memory, load)
            for name in names or self.names
        ]
        self.scheduler.report(agent, number, "gpu", models, 100.0 * room)
        if pulls:
            self.pull(0.0, agent, number)

    def pull(self, now: float, agent: str = "a", number: int = 0) -> None:
        assert self.scheduler.pull(agent, number, now)

    def submit(self, now: float, name: str, budget: float = -1.0) -> Request:
        request = self.scheduler.submit(now, self.client, next(self._ids), name, now, budget, 0, PAYLOAD, False)
        assert request is not None
        return request

    def step(self, now: float) -> tuple[list[Batch], list[Page]]:
        """What is granted and what is paged."""
        return self.scheduler.dispatch(now), self.scheduler.take_pages()

    def pages(self, now: float) -> list[str]:
        """'+a' for a LOAD, '-a' for an UNLOAD; nothing is granted."""
        batches, pages = self.step(now)
        assert batches == []
        if pages:
            self.told = pages
        return [told(page) for page in pages]

    def act(self, now: float, page: Page, code: str = "ok", seconds: float = LOAD) -> None:
        assert self.scheduler.acted(now, page.device.agent, page.action, code, seconds, "why")

    def until(self, now: float, end: float) -> None:
        """Nothing is granted or paged whenever something is due from now on until ``end``."""
        while now < end:
            assert self.pages(now) == []
            now = self.scheduler.next_wake()

    def act_all(self, now: float) -> None:
        for page in self.told:
            self.act(now, page)

    def grant(self, now: float) -> Batch:
        (batch,) = self.scheduler.dispatch(now)
        assert self.scheduler.take_pages() == []
        return batch

    def done(self, now: float, batch: Batch, code: str = "ok") -> None:
        results = [PAYLOAD] * len(batch.tasks) if code == "ok" else []
        assert self.scheduler.done(now, batch.device.agent, batch.number, code, RUN, results, {}, "why")

    def run(self, now: float, name: str) -> Request:
        """A request runs at once where its model is."""
        request = self.submit(now, name)
        batch = self.grant(now)
        self.done(now + RUN, batch)
        self.pull(now + RUN, batch.device.agent, batch.device.number)
        assert request.outcome is Outcome.OK
        return request

    def states(self, agent: str = "a", number: int = 0) -> dict[str, int]:
        memory = self.scheduler.fleet.devices[agent, number].memory
        assert memory is not None
        return {held.partition("@")[0]: model.state for held, model in memory.models.items()}

    def taken(self, agent: str = "a", number: int = 0) -> float:
        memory = self.scheduler.fleet.devices[agent, number].memory
        assert memory is not None
        return memory.taken


def told(page: Page) -> str:
    return ("+" if page.load else "-") + page.model.partition("@")[0]


# ---- hit and miss --------------------------------------------------------------------------------


def test_a_hit_runs_at_once() -> None:
    world = World("ab")
    world.device("a")
    assert not world.run(0.0, "a").cold


def test_a_miss_waits_for_its_model() -> None:
    world = World("ab")
    world.device("a", room=2)
    request = world.submit(1.0, "b")
    assert world.pages(1.0) == ["+b"]
    (page,) = world.told
    assert (page.device.agent, page.device.number, page.model) == ("a", 0, key("b"))
    assert page.latest == 1.0 + WINDOW
    assert page.expected == LOAD
    assert world.states() == {"a": RESIDENT, "b": LOADING}
    assert world.pages(1.01) == []
    world.act(1.05, page)
    batch = world.grant(1.05)
    assert batch.stage.key == key("b")
    world.done(1.06, batch)
    assert request.outcome is Outcome.OK
    assert request.cold


def test_room_is_made_before_what_needs_it() -> None:
    world = World("ab")
    world.device("a")
    world.submit(5.0, "b")
    assert world.pages(5.0) == ["-a", "+b"]
    assert world.states() == {"a": UNLOADING, "b": LOADING}
    assert world.taken() == 100.0
    world.act(5.001, world.told[0])
    assert world.states() == {"a": HELD, "b": LOADING}
    world.act(5.051, world.told[1])
    assert world.states() == {"a": HELD, "b": RESIDENT}


def test_several_small_ones_make_room_for_a_large_one() -> None:
    world = World("abcd")
    sizes = {"a": 60.0, "b": 60.0, "c": 60.0, "d": 120.0}
    models = [
        HeldModel(key(name), "", 100, [(1, RUN), (8, RUN)], name != "d", size, LOAD) for name, size in sizes.items()
    ]
    world.scheduler.report("a", 0, "gpu", models, 200.0)
    world.pull(0.0)
    world.submit(5.0, "d")
    assert world.pages(5.0) == ["-a", "-b", "+d"]
    assert world.taken() == 180.0


def test_what_never_fits_is_not_loaded_and_evicts_nobody() -> None:
    world = World("ab")
    models = [
        HeldModel(key("a"), "", 100, [(1, RUN)], True, 100.0, LOAD),
        HeldModel(key("b"), "", 100, [(1, RUN)], False, 101.0, LOAD),
    ]
    world.scheduler.report("a", 0, "gpu", models, 100.0)
    world.pull(0.0)
    request = world.submit(0.0, "b")
    assert world.pages(0.0) == []
    assert request.outcome is Outcome.DROPPED
    assert "takes 101 of 100 MB" in request.detail


def test_a_model_without_a_known_size_takes_no_room() -> None:
    world = World("ab")
    world.device("a", memory=0.0)
    world.submit(0.0, "b")
    assert world.pages(0.0) == ["+b"]


def test_models_that_nobody_serves_make_room_first() -> None:
    world = World("ab")
    world.device("ax", room=2, names="axb")
    world.submit(0.0, "b")
    assert world.pages(0.0) == ["-x", "+b"]


# ---- who makes room ------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first() -> None:
    world = World("abcd")
    world.device("abc", room=3)
    for at, name in enumerate("cab"):
        world.run(1.0 + at / 10, name)
    world.submit(5.0, "d")
    assert world.pages(5.0) == ["-c", "+d"]


def test_what_has_run_of_late_goes_after_what_has_not() -> None:
    """a came to the device last; but c and b have run since."""
    world = World("abcd")
    world.device("bc", room=3)
    world.submit(1.0, "a")
    world.pages(1.0)
    world.act_all(1.05)
    world.done(1.06, world.grant(1.05))
    world.pull(1.06)
    for name in "cb":
        world.run(1.06 + RECENT, name)
    world.submit(1.1 + RECENT, "d")
    assert world.pages(1.1 + RECENT) == ["-a", "+d"]


def test_what_runs_stays() -> None:
    world = World("ab")
    world.device("a")
    world.submit(5.0, "a")
    batch = world.grant(5.0)
    world.submit(5.0, "b")
    assert world.pages(5.0) == []
    assert world.scheduler.next_wake() <= 5.0 + LOOK
    world.done(5.010, batch)
    assert world.pages(5.011) == ["-a", "+b"]


def test_what_has_arrivals_every_moment_stays_for_a_single_request() -> None:
    """100 a second are more within the horizon than the one that waits."""
    world = World("ab", slo=0.5)
    world.device("a")
    world.run(0.0, "a")
    world.stage("a").rate = 100.0
    assert 100.0 * (HORIZON + LOAD) * CLEARLY > 1.0
    request = world.submit(0.1, "b")
    world.until(0.1, 0.5)
    assert request.outcome is None
    world.until(0.5, 0.6)
    assert request.outcome is Outcome.DROPPED
    assert request.cold


def test_it_goes_for_many() -> None:
    world = World("ab")
    world.device("a")
    world.run(0.0, "a")
    world.stage("a").rate = 100.0
    for _ in range(40):
        world.submit(0.1, "b")
    assert world.pages(0.1) == ["-a", "+b"]


@pytest.mark.parametrize(("waiting", "pages"), [(5, []), (40, ["-a", "+b"])])
def test_what_is_waited_for_goes_only_if_that_makes_up_for_the_load(waiting: int, pages: list[str]) -> None:
    """One waits for a, whose device is busy otherwise. Of b's each takes 10 ms, and the load 50 ms."""
    world = World("abc", slo=10.0)
    world.device("ac", room=2)
    world.submit(5.0, "c")
    batch = world.grant(5.0)
    world.submit(5.0, "a")
    for _ in range(waiting):
        world.submit(5.0, "b")
    assert world.pages(5.0) == pages
    world.done(5.01, batch)


@pytest.mark.parametrize("slo", [0.3, 1.0, 4.0])
def test_two_hot_models_that_do_not_fit_together_do_not_thrash(slo: float) -> None:
    """Each of them alone keeps the device busy. Loads take a small part of its time, and it goes on to work."""
    world = World("ab", slo=slo)
    world.device("a")
    simulation = Simulation(world)
    requests = simulation.run(200.0, "ab", 20.0)
    loads = simulation.loads
    answered = sum(request.outcome is Outcome.OK for request in requests)
    assert all(request.outcome is not None for request in requests)
    assert loads * LOAD < 0.35 * 20.0
    assert answered > 0.35 * len(requests)


def test_a_model_that_is_seldom_asked_for_is_loaded_in_turn_beside_one_that_always_is() -> None:
    """The device is idle for most of its time, and whoever waits for one could wait for both loads."""
    world = World("ab", slo=0.3)
    world.device("a")
    requests = Simulation(world).run(60.0, "a" * 29 + "b", 30.0)
    ok = {
        name: [request.outcome is Outcome.OK for request in requests if request.pipeline.name == name] for name in "ab"
    }
    assert sum(ok["a"]) > 0.9 * len(ok["a"])
    assert sum(ok["b"]) > 0.15 * len(ok["b"])


class Simulation:
    """Devices that do what they are told: a batch at a time, a load at a time, both side by side."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.loads = 0

    def run(self, rate: float, names: str, seconds: float) -> list[Request]:
        world, scheduler = self.world, self.world.scheduler
        requests: list[Request] = []
        arrivals = [(index / rate, names[index % len(names)]) for index in range(int(rate * seconds))]
        running: dict[int, tuple[float, Batch]] = {}
        paging: list[tuple[float, Page]] = []
        now, at = 0.0, 0
        while at < len(arrivals) or scheduler.ledger.in_flight:
            moments = [scheduler.next_wake(), *(end for end, _ in running.values()), *(end for end, _ in paging)]
            if at < len(arrivals):
                moments.append(arrivals[at][0])
            now = max(now, min(moments))
            while at < len(arrivals) and arrivals[at][0] <= now:
                requests.append(world.submit(now, arrivals[at][1]))
                at += 1
            for index, (end, batch) in list(running.items()):
                if end <= now:
                    del running[index]
                    world.done(now, batch)
                    world.pull(now, batch.device.agent, batch.device.number)
            while paging and paging[0][0] <= now:
                world.act(now, paging.pop(0)[1])
            batches, pages = world.step(now)
            for batch in batches:
                assert batch.device.index not in running
                running[batch.device.index] = (now + RUN, batch)
            for page in pages:
                self.loads += page.load
                begins = max(now, paging[-1][0]) if paging else now
                paging.append((begins + LOAD * page.load, page))
        return requests


@pytest.mark.parametrize("during", [True, False])
def test_what_a_batch_waits_for_a_load_is_no_overhead(during: bool) -> None:
    """Where the load keeps the device's processor from it; without one under way it would be."""
    world = World("ab")
    world.device("a", room=2)
    request = world.submit(0.0, "b")
    assert world.pages(0.0) == ["+b"]
    world.scheduler.cancel(0.0, world.client, request.id)
    if not during:
        world.act_all(0.01)
    world.submit(0.01, "a")
    batch = world.grant(0.01)
    if during:
        world.act_all(0.05)
    world.done(0.06, batch)
    dispatcher = world.scheduler._dispatcher
    assert (dispatcher.travel.base > OVERHEAD) == (not during)
    assert dispatcher.response.base <= RESPONSE


# ---- what is loaded ------------------------------------------------------------------------------


def test_the_highest_demand_goes_first_and_one_load_is_under_way() -> None:
    world = World("abc")
    world.device("a", room=3)
    world.submit(0.0, "b")
    for _ in range(3):
        world.submit(0.0, "c")
    assert world.pages(0.0) == ["+c"]
    assert world.pages(0.01) == []
    world.act_all(0.05)
    batches, pages = world.step(0.05)
    assert [batch.stage.key for batch in batches] == [key("c")]
    assert [told(page) for page in pages] == ["+b"]


def test_a_demand_that_no_load_could_still_serve_is_passed_over() -> None:
    world = World("abc")
    world.device("a", room=3)
    for _ in range(3):
        world.submit(0.0, "c", budget=LOAD + RUN / 2)
    world.submit(0.0, "b")
    assert world.pages(0.0) == ["+b"]


def test_who_cannot_wait_for_the_load_is_dropped_at_once() -> None:
    world = World("ab")
    world.device("a", room=2)
    request = world.submit(0.0, "b", budget=LOAD + RUN / 2)
    assert world.pages(0.0) == []
    assert request.outcome is Outcome.DROPPED
    assert request.cold
    assert request.short_by > 0.0


def test_who_waits_is_dropped_once_the_load_would_come_too_late() -> None:
    """What runs holds on to the memory."""
    world = World("ab")
    world.device("a")
    world.submit(0.0, "a")
    world.grant(0.0)
    request = world.submit(0.0, "b", budget=0.2)
    now = 0.0
    while request.outcome is None:
        assert world.pages(now) == []
        now = world.scheduler.next_wake()
    assert request.outcome is Outcome.DROPPED
    # By then a load that begins at once would end too late; a moment before it would not have.
    stage = world.stage("b")
    assert request.ended_at == pytest.approx(0.2 - LOAD - RUN - stage.remaining, abs=LOOK)


def test_who_waits_for_a_load_under_way_is_dropped_when_that_is_late() -> None:
    world = World("ab")
    world.device("a", room=2)
    request = world.submit(0.0, "b", budget=0.2)
    assert world.pages(0.0) == ["+b"]
    now = world.scheduler.next_wake()
    while request.outcome is None:
        assert world.pages(now) == []
        now = world.scheduler.next_wake()
    assert request.outcome is Outcome.DROPPED
    assert request.ended_at == pytest.approx(0.2 - RUN - world.stage("b").remaining, abs=1e-4)
    world.act_all(now)
    world.run(now + 0.01, "b")


def test_who_comes_during_the_load_waits_for_its_end_alone() -> None:
    world = World("ab")
    world.device("a", room=2)
    world.submit(0.0, "b")
    assert world.pages(0.0) == ["+b"]
    late = world.submit(LOAD - 0.005, "b", budget=0.04)
    assert world.pages(LOAD - 0.005) == []
    assert late.outcome is None
    hopeless = world.submit(LOAD - 0.005, "b", budget=0.012)
    assert world.pages(LOAD - 0.005) == []
    assert hopeless.outcome is Outcome.DROPPED


def test_a_stage_that_drops_all_for_want_of_a_load_tries_one_now_and_then() -> None:
    """The load is said to take longer than the SLO; it takes less."""
    world = World("ab")
    world.device("a", room=2, load=2.0)
    assert world.submit(0.0, "b").outcome is None
    assert world.pages(0.0) == []
    second = world.submit(1.5, "b")
    assert world.pages(1.5) == ["+b"]
    world.act_all(1.55)
    world.done(1.6, world.grant(1.55))
    assert second.outcome is Outcome.OK


def test_loads_are_expected_to_take_what_they_took() -> None:
    world = World("ab")
    world.device("a")
    assert world.pages(0.0) == []
    (model,) = world.stage("b").paged
    for number, took in enumerate((0.2, 0.1, 0.1)):
        now = 10.0 * number
        world.submit(now, "b")
        assert world.pages(now) == ["-a", "+b"]
        world.act(now, world.told[0])
        world.act(now + took, world.told[1], seconds=took)
        assert model.load_seconds == pytest.approx([0.2, 0.2, 0.1][number])
        world.done(now + 0.3, world.grant(now + took))
        world.pull(now + 0.3)
        world.submit(now + 5.0, "a")
        assert world.pages(now + 5.0) == ["-b", "+a"]
        world.act_all(now + 5.05)
        world.done(now + 5.06, world.grant(now + 5.05))
        world.pull(now + 5.06)


def test_policies_that_drop_nobody_load_as_well() -> None:
    world = World("ab", policy="naive")
    world.device("a")
    request = world.submit(0.0, "b", budget=0.01)
    assert world.pages(0.0) == ["-a", "+b"]
    world.act_all(0.05)
    world.done(0.06, world.grant(0.05))
    assert request.outcome is Outcome.EXPIRED


def test_what_a_batch_is_collected_for_stays() -> None:
    world = World("ab", policy="pard")
    world.device("a")
    world.submit(0.0, "a")
    batch = world.grant(0.0)
    collected = world.submit(0.001, "a")
    assert world.pages(0.001) == []
    world.done(0.010, batch)
    world.submit(0.010, "b")
    assert world.pages(0.010) == []
    world.pull(0.011)
    batch = world.grant(0.011)
    assert [task.request for task in batch.tasks] == [collected]
    world.done(0.021, batch)
    assert world.pages(0.022) == ["-a", "+b"]


# ---- several devices -----------------------------------------------------------------------------


def test_the_least_loaded_device_loads() -> None:
    world = World("ab")
    for number in (0, 1):
        world.device("a", room=2, number=number)
    world.submit(0.0, "a")
    assert world.grant(0.0).device.number == 0
    world.submit(0.0, "b")
    assert [page.device.number for page in world.step(0.0)[1]] == [1]


def test_a_model_is_loaded_once_unless_its_demand_asks_for_more() -> None:
    world = World("abc")
    for number in (0, 1):
        world.device("a", room=2, number=number)
    world.submit(0.0, "b")
    assert world.pages(0.0) == ["+b"]
    assert world.pages(LOOK) == []
    for _ in range(5):
        world.submit(0.01, "b")
    assert world.pages(0.01) == []
    # More than one device can run within the horizon.
    for _ in range(200):
        world.submit(0.01, "b")
    world.act_all(0.05)
    batches, pages = world.step(0.06)
    assert [batch.device.number for batch in batches] == [0]
    if not pages:
        _, pages = world.step(0.06 + LOOK)
    assert [(told(page), page.device.number) for page in pages] == [("+b", 1)]


def test_a_device_that_has_never_pulled_is_told_nothing() -> None:
    world = World("ab")
    world.device("a", room=2, pulls=False)
    world.submit(0.0, "b")
    assert world.pages(0.0) == []
    world.pull(0.002)
    assert world.pages(LOOK) == ["+b"]


def test_whoever_has_all_in_its_memory_serves_beside_those_that_page() -> None:
    world = World("ab")
    world.device("a")
    world.scheduler.report("full", 0, "gpu", [HeldModel(key("b"), "", 100, [(1, RUN)])])
    world.scheduler.pull("full", 0, 0.0)
    request = world.submit(0.0, "b")
    assert world.grant(0.0).device.agent == "full"
    assert not request.cold


def test_when_the_last_that_has_all_is_lost_those_that_page_serve() -> None:
    world = World("ab")
    world.device("a")
    world.scheduler.report("full", 0, "gpu", [HeldModel(key("b"), "", 100, [(1, RUN)])])
    assert world.pages(0.0) == []
    world.scheduler.agent_lost(0.1, "full", "lost")
    world.submit(0.1, "b")
    assert world.pages(0.1) == ["-a", "+b"]


# ---- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["busy", "too_late", "out_of_memory", "model_error", "worker_died", "unknown_model"])
def test_a_load_that_fails_is_asked_for_again_later_and_later(code: str) -> None:
    world = World("ab", slo=100.0)
    world.device("a", room=2)
    world.submit(0.0, "b")
    now, pause = 0.0, BACK_OFF
    for _ in range(12):
        assert world.pages(now) == ["+b"]
        world.act(now, world.told[0], code)
        assert world.states() == {"a": RESIDENT, "b": HELD}
        assert world.taken() == 100.0
        assert world.pages(now + 0.9 * pause) == []
        now += pause + LOOK
        pause = min(2.0 * pause, MAX_BACK_OFF)
        if now > 50.0:
            break
    else:
        raise AssertionError("it is asked for without end")
    assert world.stage("b").trouble == "why"


def test_a_load_that_is_not_answered_is_given_up() -> None:
    world = World("ab")
    world.device("a")
    world.submit(0.0, "b")
    assert world.pages(0.0) == ["-a", "+b"]
    unload, load = world.told
    world.act(0.001, unload)
    world.until(0.001, load.latest + load.expected + GRACE)
    late = load.latest + load.expected + GRACE
    world.pages(late)
    assert world.states() == {"a": HELD, "b": HELD}
    assert world.taken() == 0.0
    assert not world.scheduler.acted(late, "a", load.action, "ok", LOAD, "")
    world.submit(late + BACK_OFF, "a")
    assert world.pages(late + BACK_OFF) == ["+a"]


def test_an_unload_that_is_not_answered_leaves_its_model_in_its_place() -> None:
    world = World("ab")
    world.device("a")
    world.submit(0.0, "b")
    assert world.pages(0.0) == ["-a", "+b"]
    world.until(0.0, WINDOW + GRACE)
    world.pages(WINDOW + LOAD + GRACE)
    assert world.states() == {"a": RESIDENT, "b": HELD}


@pytest.mark.parametrize("policy", ["naive", "clipper++"])
def test_requests_of_a_model_that_never_loads_end_under_policies_that_drop_nobody(policy: str) -> None:
    world = World("ab", policy=policy, slo=0.5)
    world.device("a", room=2)
    request = world.submit(0.0, "b")
    now = 0.0
    while request.outcome is None and now < 2.0:
        _, pages = world.step(now)
        for page in pages:
            world.act(now, page, "model_error")
        now = world.scheduler.next_wake()
    assert request.outcome is Outcome.EXPIRED
    assert request.ended_at == pytest.approx(0.5, abs=0.01)
    assert "why" in request.detail


def test_a_drop_says_why_its_model_is_not_loaded() -> None:
    world = World("ab", slo=0.3)
    world.device("a", room=2)
    request = world.submit(0.0, "b")
    now = 0.0
    while request.outcome is None:
        _, pages = world.step(now)
        for page in pages:
            world.act(now, page, "out_of_memory")
        now = world.scheduler.next_wake()
    assert request.outcome is Outcome.DROPPED
    assert "its model could not be loaded: why" in request.detail
    now = 10.0
    world.submit(now, "b")
    assert world.pages(now) == ["+b"]
    world.act_all(now + LOAD)
    assert world.stage("b").trouble == ""


def test_another_device_is_asked_when_one_fails() -> None:
    world = World("ab")
    for number in (0, 1):
        world.device("a", room=2, number=number)
    world.submit(0.0, "b")
    assert world.pages(0.0) == ["+b"]
    world.act(0.01, world.told[0], "busy")
    assert world.pages(0.01) == ["+b"]
    assert world.told[0].device.number == 1


def test_an_unload_that_is_refused_leaves_the_model_where_it_is() -> None:
    world = World("abc")
    world.device("ab", room=2)
    world.submit(5.0, "c")
    assert world.pages(5.0) == ["-a", "+c"]
    world.act(5.001, world.told[0], "busy")
    assert world.states() == {"a": RESIDENT, "b": RESIDENT, "c": LOADING}
    world.act(5.002, world.told[1], "busy")
    assert world.taken() == 200.0
    # By then b has been used longer ago, but a could be asked again as well.
    world.run(5.01, "a")
    assert world.pages(5.052 + LOOK) == ["-b", "+c"]


@pytest.mark.parametrize("code", ["not_loaded", "unknown_model"])
def test_what_is_not_there_need_not_be_unloaded(code: str) -> None:
    world = World("ab")
    world.device("a")
    world.submit(5.0, "b")
    assert world.pages(5.0) == ["-a", "+b"]
    world.act(5.001, world.told[0], code)
    assert world.states()["a"] == HELD


def test_a_batch_for_a_model_that_is_not_there_waits_for_its_load() -> None:
    world = World("ab")
    world.device("a")
    request = world.submit(0.0, "a")
    batch = world.grant(0.0)
    world.done(0.001, batch, "not_loaded")
    assert world.states()["a"] == HELD
    world.pull(0.001)
    assert world.pages(0.001) == ["+a"]
    world.act_all(0.05)
    world.done(0.06, world.grant(0.05))
    assert request.outcome is Outcome.OK


@pytest.mark.parametrize("answered", ["by its ACTED", "by a batch"])
def test_a_model_that_was_asked_for_while_it_was_unloaded_comes_back(answered: str) -> None:
    """Another device, with which it has nothing to do, could be told to load meanwhile."""
    world = World("ab")
    world.device("a")
    world.device("c", names="cd", agent="z")
    world.step(0.0)
    first = None
    if answered == "by a batch":
        world.submit(0.0, "a")
        first = world.grant(0.0)
        world.scheduler.cancel(0.0, world.client, 0)
        first.device.batches.clear()  # the shard believes that it has ended
    world.submit(0.0, "b")
    assert world.pages(0.0) == ["-a", "+b"]
    unload, load = world.told
    request = world.submit(0.002, "a")
    assert world.pages(0.002) == []
    if first is None:
        world.act(0.01, unload)
    else:
        world.done(0.01, first, "not_loaded")
    assert world.pages(0.01) == []
    world.act(0.05, load)
    world.pull(0.05)
    world.done(0.06, world.grant(0.05))
    assert world.pages(0.06) == ["-b", "+a"]
    assert request.outcome is None


def test_a_lost_agent_answers_nothing_and_others_serve() -> None:
    world = World("ab")
    world.device("a", room=2)
    request = world.submit(0.0, "b")
    assert world.pages(0.0) == ["+b"]
    (page,) = world.told
    assert world.scheduler.agent_lost(0.01, "a", "lost") == 0
    assert not world.scheduler.acted(0.02, "a", page.action, "ok", LOAD, "")
    assert world.pages(0.02) == []
    assert not world.stage("b").devices
    world.device("", agent="z", room=2)
    assert world.pages(0.03) == ["+b"]
    world.act_all(0.08)
    world.done(0.09, world.grant(0.08))
    assert request.outcome is Outcome.OK


def test_without_anybody_who_has_the_model_a_request_ends_unavailable() -> None:
    world = World("ab")
    world.device("a", names="a")
    request = world.submit(0.0, "b")
    assert world.pages(0.0) == []
    world.scheduler.dispatch(SLO + 1e-3)
    assert request.outcome is Outcome.UNAVAILABLE
    assert not request.cold


def test_who_could_be_served_after_a_load_is_ready() -> None:
    world = World("ab")
    world.pages(0.0)
    assert world.scheduler.unready() == ["a", "b"]
    turns = world.scheduler.fleet.turns
    world.device("a")
    world.pages(0.0)
    assert world.scheduler.unready() == []
    assert world.scheduler.fleet.turns > turns


def test_answers_of_others_change_nothing() -> None:
    world = World("ab")
    world.device("a", room=2)
    world.submit(0.0, "b")
    world.pages(0.0)
    (page,) = world.told
    assert not world.scheduler.acted(0.01, "stranger", page.action, "ok", LOAD, "")
    assert not world.scheduler.acted(0.01, "a", page.action + 1, "ok", LOAD, "")
    assert world.states()["b"] == LOADING
    world.act(0.05, page)
    assert not world.scheduler.acted(0.05, "a", page.action, "ok", LOAD, "")


# ---- what agents report --------------------------------------------------------------------------


def test_models_come_and_go_one_by_one() -> None:
    world = World("abc")
    world.device("a", room=2, names="ab")
    world.pages(0.0)
    stages = world.scheduler.fleet
    turns = stages.turns
    world.device("a", room=2, names="ab")
    world.pages(0.1)
    assert stages.turns == turns
    world.device("a", room=2, names="ac")
    world.pages(0.1)
    assert world.states() == {"a": RESIDENT, "c": HELD}
    assert world.scheduler.unready() == ["b"]
    assert world.stage("c").devices == 1
    world.submit(0.2, "c")
    assert world.pages(0.2) == ["+c"]


def test_what_is_under_way_is_not_what_a_report_of_before_says() -> None:
    world = World("abc")
    world.device("a", names="ab")
    world.submit(5.0, "b")
    assert world.pages(5.0) == ["-a", "+b"]
    world.device("a", names="abc", pulls=False)
    assert world.states() == {"a": UNLOADING, "b": LOADING, "c": HELD}
    world.act_all(5.05)
    assert world.states() == {"a": HELD, "b": RESIDENT, "c": HELD}


def test_a_model_that_is_taken_off_while_it_is_loaded() -> None:
    world = World("ab")
    world.device("a", room=2)
    world.submit(0.0, "b")
    assert world.pages(0.0) == ["+b"]
    world.device("a", room=2, names="a", pulls=False)
    world.pages(0.01)
    world.act_all(0.05)
    assert world.states() == {"a": RESIDENT}
    assert world.taken() == 100.0
    assert world.scheduler.unready() == ["b"]


def test_a_device_that_reports_all_to_be_there_still_pages() -> None:
    """What it was told meanwhile, it has not heard."""
    world = World("ab")
    world.device("a", room=2)
    world.device("ab", room=2, pulls=False)
    assert world.states() == {"a": RESIDENT, "b": RESIDENT}
    world.device("", room=2, pulls=False)
    assert world.states() == {"a": HELD, "b": HELD}
    assert world.taken() == 0.0


def test_a_size_that_becomes_known_counts() -> None:
    world = World("ab")
    world.device("a", room=2)
    world.device("a", room=2, memory=150.0, pulls=False)
    assert world.taken() == 150.0
    world.submit(5.0, "b")
    assert world.pages(5.0) == ["-a", "+b"]


def test_a_pipeline_that_comes_later_finds_its_model_and_one_that_goes_leaves_it() -> None:
    world = World("a")
    world.device("a", names="ab")
    world.pages(0.0)
    plan = StagePlan("s", Stage(key("b"), "", 8, 1000), [(FROM_REQUEST, "")], False, 1)
    world.scheduler.apply(Pipeline("b", SLO, [plan], [("", 0, "")]))
    world.submit(5.0, "b")
    assert world.pages(5.0) == ["-a", "+b"]
    world.scheduler.delete("b")
    world.act_all(5.05)
    world.done(5.06, world.grant(5.05))
    world.pull(5.06)
    world.pages(5.06)
    assert key("b") not in world.scheduler.stages
    world.submit(5.07, "a")
    assert world.pages(5.07) == ["-b", "+a"]


def test_a_withdrawn_device_is_told_nothing_more() -> None:
    world = World("ab")
    world.device("a", room=2)
    world.submit(0.0, "b")
    assert world.pages(0.0) == ["+b"]
    (page,) = world.told
    world.scheduler.withdraw("a", 0)
    assert world.pages(0.01) == []
    assert not world.scheduler.acted(0.05, "a", page.action, "ok", LOAD, "")
    assert world.scheduler.unready() == ["a", "b"]


# ---- pipelines that nobody asks for --------------------------------------------------------------


@pytest.mark.parametrize("code", ["unknown_model", "not_loaded"])
def test_what_a_withdrawn_device_says_of_its_models_is_of_no_interest(code: str) -> None:
    world = World("a")
    world.device("a", names="ab")
    request = world.submit(0.0, "a")
    batch = world.grant(0.0)
    world.scheduler.withdraw("a", 0)
    world.device("", agent="b", names="ab")
    world.done(0.01, batch, code)
    assert world.pages(0.01) == ["+a"]
    assert request.outcome is None


def test_a_device_that_pages_nothing_has_what_is_resident_alone() -> None:
    world = World("ab")
    models = [HeldModel(key(name), "", 100, [(1, RUN)], name == "a", 0.0, LOAD) for name in "ab"]
    world.scheduler.report("a", 0, "gpu", models)
    world.pull(0.0)
    world.submit(0.0, "b")
    assert world.pages(0.0) == []
    assert world.stage("b").devices == 0
    world.run(0.1, "a")


def test_a_type_that_reads_like_a_device_is_none() -> None:
    world = World("ab")
    world.device("a")
    world.step(0.0)
    world.scheduler.report("z", 0, "a|0", [])
    world.pull(0.0, "z")
    world.step(0.0)
    assert world.submit(0.0, "a").outcome is None
    assert world.grant(0.0).device.agent == "a"
    assert len(world.scheduler.fleet.groups()) == 2


def test_nothing_is_due_for_what_nobody_waits_for() -> None:
    world = World("ab")
    world.device("a")
    world.run(0.0, "a")
    for second in range(1, 8):
        assert world.pages(float(second)) == []
        assert world.scheduler.next_wake() == pytest.approx(second + 1.0)
    assert all(world.scheduler.pipelines[name].asleep for name in "ab")
    assert world.stage("a").timer >= NEVER
    world.run(8.5, "a")
    assert not world.scheduler.pipelines["a"].asleep
    assert world.scheduler.pipelines["b"].asleep
