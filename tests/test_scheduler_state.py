"""The scheduling engine under everything that can happen, in any order and under every policy: its invariants hold,
and all ends."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from broker.engine.devices import Batch
from broker.engine.fleet import HeldModel
from broker.engine.limits import Limits
from broker.engine.metrics import Histogram, PipelineMetrics
from broker.engine.paging import Page
from broker.engine.plan import FROM_REQUEST, Pipeline, StagePlan
from broker.engine.policy import make_policy
from broker.engine.request import GRANTED, QUEUED, Client, Request, Task
from broker.engine.residency import LOADING, RESIDENT, UNLOADING
from broker.engine.scheduler import Scheduler
from broker.engine.stage import NEVER, Stage
from broker.engine.upkeep import SWEEP
from broker.tracing import Tracer
from cluster.observe.trace import TraceRecord
from laxity.outcomes import Outcome
from laxity.payload import Payload, as_list, encode
from pipelines.policies import POLICIES

MAX_REQUESTS = 60
MAX_QUEUE = 25
LISTS = {count: encode(list(range(count))) for count in range(8)}
"""What every request carries, and every stage answers: a list is good for map stages and others alike."""

PROFILES: list[list[tuple[int, float]]] = [
    [],
    [(1, 0.0), (4, 0.0)],
    [(1, 0.020), (4, 0.080)],
    [(1, 0.050), (4, 0.060)],
]

CODES = [
    "too_late", "model_error", "out_of_memory", "bad_input", "worker_died", "unavailable",
    "unknown_model", "not_loaded", "busy", "cancelled",
]  # fmt: skip
"""How a batch can end, beside ``ok``."""

SIZE = 100.0
"""MiB of each model, where memory is short."""
ROOM = 2
"""How many of its models such a device has room for."""

SHAPES: dict[str, tuple[float, list[tuple[str, list[int], bool]]]] = {
    "chain": (1.0, [("a", [FROM_REQUEST], False), ("b", [0], False), ("c", [1], False)]),
    "fork": (
        0.8,
        [("a", [FROM_REQUEST], False), ("b", [0], False), ("c", [0, FROM_REQUEST], False), ("d", [1, 2], False)],
    ),
    "map": (1.5, [("a", [FROM_REQUEST], False), ("m", [0], True), ("z", [1], False)]),
    "items": (0.5, [("m", [FROM_REQUEST], True)]),
}
"""By pipeline: its SLO, and its stages as (name, sources, map)."""


def count(histogram: Histogram) -> int:
    """How many values it has."""
    histogram.tell()
    return sum(histogram.buckets)


def total(histogram: Histogram) -> float:
    """Their sum."""
    histogram.tell()
    return histogram.sum


def make_pipeline(name: str, version: int, policy: str) -> Pipeline:
    slo, stages = SHAPES[name]
    plans = [
        StagePlan(
            stage,
            Stage(f"{name}@{version}/{stage}", "", 4, MAX_QUEUE),
            [(source, "") for source in sources],
            is_map,
            6,
        )
        for stage, sources, is_map in stages
    ]
    return Pipeline(name, slo, plans, [("", len(plans) - 1, "")], make_policy(policy, {}))


class SchedulerMachine(RuleBasedStateMachine):
    """A shard's engine, two services and two agents of two devices each, all played by hypothesis. Devices may have
    memory for a few of their models only."""

    policies: tuple[str, ...] = tuple(POLICIES)
    """What pipelines may be scheduled by."""
    pages = False
    """Whether devices begin with memory for a few of their models."""

    @initialize(
        data=st.data(),
        overhead=st.sampled_from([0.0, 0.001, 0.03]),
        preemption=st.booleans(),
        rate=st.sampled_from([0.0, 30.0, 1000.0]),
        profiles=st.tuples(st.integers(0, len(PROFILES) - 1), st.integers(0, len(PROFILES) - 1)),
    )
    def begin(
        self, data: st.DataObject, overhead: float, preemption: bool, rate: float, profiles: tuple[int, int]
    ) -> None:
        self.now = 1000.0
        limits = Limits(max_bytes=20_000, max_payload=1000, max_requests=MAX_REQUESTS)
        self.scheduler = Scheduler(limits, 7, overhead, preemption, spans=True, metrics=True)
        self.preemption = preemption
        self.rate = rate
        """The arrival rate that stages begin with: whether others are expected, so that waiting pays."""
        self.clients = [Client("one"), Client("two")]
        self.tracer = Tracer("s", 1000, 0.5, Random(0))
        self.traced = 0
        self.counted: list[PipelineMetrics] = []
        """Of all pipelines that were ever served."""
        self.requests: list[Request] = []
        self.ended: set[Request] = set()
        self.batches: dict[int, Batch] = {}
        """Granted and not answered, from the agents' side."""
        self.seen: set[int] = set()
        self.pulled: set[tuple[str, int]] = set()
        self.told: list[Page] = []
        """Told and not answered, from the agents' side."""
        self.there: dict[tuple[str, int], set[str]] = {}
        """What is in the memory of the devices that page."""
        self.agents: set[str] = set()
        self.versions: dict[str, int] = {}
        self.next_id = 0
        for name in SHAPES:
            self.apply(name, 1, data.draw(st.sampled_from(self.policies)))
        for agent in ("a", "b"):
            for number in (0, 1):
                self.report(agent, number, profiles[number], -1, self.pages)

    # ---- services ------------------------------------------------------------------------

    @rule(
        name=st.sampled_from(list(SHAPES)),
        who=st.integers(0, 1),
        count=st.integers(0, 6),
        budget=st.one_of(st.just(-1.0), st.just(-1.0), st.floats(0.05, 0.5)),
        repeats=st.integers(1, 8),
        priority=st.integers(0, 1),
        timed=st.booleans(),
    )
    def submit(self, name: str, who: int, count: int, budget: float, repeats: int, priority: int, timed: bool) -> None:
        for _ in range(repeats):
            self._submit(name, who, count, budget, 0.0, priority, timed)

    @rule(
        name=st.sampled_from([*SHAPES, "nobody"]),
        who=st.integers(0, 1),
        count=st.integers(0, 7),
        budget=st.sampled_from([-1.0, 0.0, 0.01, 3.0]),
        transit=st.sampled_from([0.0, 0.01, 0.3]),
    )
    def submit_badly(self, name: str, who: int, count: int, budget: float, transit: float) -> None:
        """More items than allowed, no budget or too much, late, or for nobody."""
        self._submit(name, who, count, budget, transit, 0, False)

    def _submit(
        self, name: str, who: int, count: int, budget: float, transit: float, priority: int, timed: bool
    ) -> None:
        self.next_id += 1
        request = self.scheduler.submit(
            self.now,
            self.clients[who],
            self.next_id,
            name,
            self.now - transit,
            budget,
            priority,
            LISTS[count],
            timed,
        )
        assert request is not None
        self.tracer.begin(request, "")
        self.requests.append(request)

    @precondition(lambda self: self.agents)
    @rule(agent=st.sampled_from(["a", "b"]), number=st.integers(0, 1), name=st.sampled_from(list(SHAPES)))
    def crowd(self, agent: str, number: int, name: str) -> None:
        """One device begins with one request; then many come."""
        self.pull(agent, number, 0.0)
        self._submit(name, 0, 1, -1.0, 0.0, 0, False)
        self._dispatch()
        for count in (1, 2, 3, 1, 2, 3):
            self._submit(name, 1, count, -1.0, 0.0, 0, False)
        self._dispatch()

    @precondition(lambda self: self._live())
    @rule(data=st.data())
    def submit_again(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self._live()))
        before = self.scheduler.ledger.submitted
        again = self.scheduler.submit(self.now, request.client, request.id, "chain", self.now, -1.0, 0, LISTS[0], False)
        assert again is None
        assert self.scheduler.ledger.submitted == before

    # ---- agents --------------------------------------------------------------------------

    @rule(
        agent=st.sampled_from(["a", "b"]),
        number=st.integers(0, 1),
        profile=st.integers(0, len(PROFILES) - 1),
        only=st.sampled_from([-1, -1, -1, 0, 1, 2, 3]),
        pages=st.booleans(),
        load=st.sampled_from([0.0, 0.03, 0.3]),
    )
    def report(self, agent: str, number: int, profile: int, only: int, pages: bool = False, load: float = 0.03) -> None:
        """The device holds the stages of one pipeline, or of all; if it ``pages`` them, in its host's memory."""
        names = list(SHAPES) if only < 0 else [list(SHAPES)[only]]
        keys = [f"{name}@{version}/{stage}" for name in names for version in (1, 2) for stage, _, _ in SHAPES[name][1]]
        there = self.there.pop((agent, number), set()).intersection(keys) if pages else set(keys)
        if pages:
            self.there[agent, number] = there
        models = [HeldModel(key, "", 100, PROFILES[profile], key in there, SIZE, load) for key in keys]
        self.agents.add(agent)
        self.scheduler.report(agent, number, "cpu" if number else "gpu", models, SIZE * ROOM if pages else 0.0)

    @precondition(lambda self: self.agents)
    @rule(agent=st.sampled_from(["a", "b"]), number=st.integers(0, 1), free_in=st.sampled_from([0.0, 0.0, 0.02, 0.4]))
    def pull(self, agent: str, number: int, free_in: float) -> None:
        known = (agent, number) in self.scheduler.fleet.devices
        assert self.scheduler.pull(agent, number, self.now + free_in) == known
        if known:
            self.pulled.add((agent, number))

    def _pull_all(self) -> None:
        for agent, number in list(self.scheduler.fleet.devices):
            self.pull(agent, number, 0.0)

    @rule(
        steps=st.integers(1, 8),
        pace=st.sampled_from([0.02, 0.1, 1.0]),
        count=st.integers(0, 6),
        codes=st.lists(st.sampled_from(["ok", "ok", "ok", "bad item", *CODES, "nothing yet"]), max_size=8),
    )
    def work(self, steps: int, pace: float, count: int, codes: list[str]) -> None:
        """All devices pull, and answer what they got; ``ok`` when ``codes`` are used up."""
        for _ in range(steps):
            self._pull_all()
            self._dispatch()
            while self.told:
                self._act(0, "ok")
            self._dispatch()
            self.now = min(self.scheduler.next_wake(), self.now + pace)
            for number in sorted(self.batches):
                code = codes.pop() if codes else "ok"
                if code == "bad item":
                    self._done(number, "ok", 0.02, [LISTS[count]] * len(self.batches[number].tasks), {0})
                elif code != "nothing yet":
                    self._done(number, code, 0.02, [LISTS[count]] * len(self.batches[number].tasks), set())
            self._dispatch()

    @precondition(lambda self: self.batches)
    @rule(
        data=st.data(),
        code=st.sampled_from(["ok", "ok", *CODES]),
        execution=st.sampled_from([0.0, 0.02, 0.05, 0.3, 20.0]),
        count=st.integers(0, 7),
        fail=st.sets(st.integers(0, 5), max_size=2),
        surplus=st.sampled_from([0, 0, 0, 1, -1]),
    )
    def done(self, data: st.DataObject, code: str, execution: float, count: int, fail: set[int], surplus: int) -> None:
        number = data.draw(st.sampled_from(sorted(self.batches)))
        results = [LISTS[count]] * (len(self.batches[number].tasks) + surplus)
        self._done(number, code, execution, results, fail)
        self._dispatch()

    def _done(self, number: int, code: str, execution: float, results: list[Payload], fail: set[int]) -> None:
        batch = self.batches.pop(number)
        if code in ("not_loaded", "unknown_model"):
            self.there.get((batch.device.agent, batch.device.number), set()).discard(batch.stage.key)
        arguments: tuple[Any, ...] = (number, code, execution, results, dict.fromkeys(fail, "bad item"), "why")
        agent = batch.device.agent
        assert not self.scheduler.done(self.now, "stranger", *arguments)
        assert self.scheduler.done(self.now, agent, *arguments)
        assert not self.scheduler.done(self.now, agent, *arguments)

    @precondition(lambda self: self.told)
    @rule(
        data=st.data(),
        code=st.sampled_from(["ok", "ok", "ok", *CODES]),
        seconds=st.sampled_from([0.0, 0.03, 1.0]),
    )
    def act(self, data: st.DataObject, code: str, seconds: float) -> None:
        """A device ends the first of what it was told to load and unload."""
        device = data.draw(st.sampled_from([page.device for page in self.told]))
        self._act([page.device for page in self.told].index(device), code, seconds)
        self._dispatch()

    def _act(self, index: int, code: str, seconds: float = 0.03) -> None:
        page = self.told.pop(index)
        device = page.device
        if page.overdue_at <= self.now:
            # It was given up, and never carried out either.
            assert not self.scheduler.acted(self.now, device.agent, page.action, code, seconds, "why")
            return
        there = self.there.get((device.agent, device.number))
        if there is not None and device.memory is not None and device.memory.models.get(page.model) is page.held:
            if code == "ok" and page.load:
                if len(there) < ROOM:
                    there.add(page.model)
                else:
                    code = "busy"
            elif not page.load and page.model not in there:
                code = "not_loaded"
            elif code in ("ok", "not_loaded", "unknown_model"):
                there.discard(page.model)
        arguments: tuple[Any, ...] = (page.action, code, seconds, "why")
        assert not self.scheduler.acted(self.now, "stranger", *arguments)
        assert self.scheduler.acted(self.now, device.agent, *arguments)
        assert not self.scheduler.acted(self.now, device.agent, *arguments)

    # ---- what seldom happens -------------------------------------------------------------

    @precondition(lambda self: self._live())
    @rule(
        data=st.data(),
        kind=st.sampled_from(["cancel", "client lost", "grant failed", "agent lost", "change", "shut down"]),
    )
    def mishap(self, data: st.DataObject, kind: str) -> None:
        if kind == "cancel":
            self._cancel(data.draw(st.sampled_from(self.requests)))
        elif kind == "client lost":
            self._client_lost(data.draw(st.integers(0, 1)))
        elif kind == "grant failed" and self.batches:
            number = data.draw(st.sampled_from(sorted(self.batches)))
            del self.batches[number]
            self.scheduler.grant_failed(number)
        elif kind == "agent lost":
            agent = data.draw(st.sampled_from(["a", "b"]))
            self._agent_lost(agent)
            for number in data.draw(st.sampled_from([[0, 1], [1], []])):
                self.report(agent, number, 3, -1)
        elif kind == "change":
            name, version = data.draw(st.sampled_from(list(SHAPES))), data.draw(st.sampled_from([1, 2, 1, 2, 0]))
            self._change(name, version, data.draw(st.sampled_from(self.policies)))

        elif kind == "shut down":
            self.scheduler.shut_down(self.now, "going")
            assert not self._live()

    @rule(highest_first=st.booleans())
    def turn(self, highest_first: bool) -> None:
        """Other ends of the queues go first: the loads behind it take too many requests to come about here."""
        for stage in self.scheduler.stages.values():
            if not stage.order.fixed:
                stage.order.highest_first = highest_first

    def _cancel(self, request: Request) -> None:
        live = request.outcome is None
        assert self.scheduler.cancel(self.now, request.client, request.id) == live
        if live:
            assert request.outcome is Outcome.CANCELLED

    def _client_lost(self, who: int) -> None:
        client = self.clients[who]
        live = [request for request in self._live() if request.client is client]
        assert self.scheduler.client_lost(self.now, client) == len(live)
        self.clients[who] = Client(client.name)

    def _agent_lost(self, agent: str) -> None:
        lost = [number for number, batch in self.batches.items() if batch.device.agent == agent]
        assert self.scheduler.agent_lost(self.now, agent, "lost") == len(lost)
        for number in lost:
            self._not_done(self.batches.pop(number))
        for page in self.told:
            if page.device.agent == agent:
                assert not self.scheduler.acted(self.now, agent, page.action, "ok", 0.03, "")
        self.told = [page for page in self.told if page.device.agent != agent]
        self.there = {slot: there for slot, there in self.there.items() if slot[0] != agent}
        self.agents.discard(agent)
        self.pulled = {slot for slot in self.pulled if slot[0] != agent}

    def _change(self, name: str, version: int, policy: str) -> None:
        """Another version, the same (which goes on under its policy), or none (0)."""
        if version:
            self.apply(name, version, policy)
        else:
            assert self.scheduler.delete(name) == (name in self.versions)
            self.versions.pop(name, None)

    def apply(self, name: str, version: int, policy: str) -> None:
        pipeline = make_pipeline(name, version, policy)
        for plan in pipeline.stages:
            plan.stage.rate = self.rate
        self.scheduler.apply(pipeline)
        self.versions[name] = version

    # ---- time ----------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.0, 0.02, 0.4, 12.0]))
    def dispatch(self, seconds: float) -> None:
        self.now += seconds
        self._dispatch()

    def _dispatch(self) -> None:
        for batch in self.scheduler.dispatch(self.now):
            slot = (batch.device.agent, batch.device.number)
            assert batch.number not in self.seen
            self.seen.add(batch.number)
            self.batches[batch.number] = batch
            assert slot in self.pulled, "no batch without a pull"
            self.pulled.remove(slot)
            assert batch.closes >= self.now
            assert 1 <= len(batch.tasks) <= 4
            self._may_run(batch)
            assert batch.expected >= 0.0
            for task in batch.tasks:
                # Another branch of the request may have been dropped behind this one's grant.
                assert task.request.outcome is None or task.request.ended_at == self.now
                assert task.request.deadline > self.now or batch.stage.policy.runs_late
                assert task.stage is batch.stage
        for page in self.scheduler.take_pages():
            self._is_told(page)
        for batch in self.scheduler.take_preempted():
            assert self.preemption
            assert batch.stage.policy.preempts
            del self.batches[batch.number]
            self._not_done(batch)
        ended = self.scheduler.take_ended()
        self.tracer.note(ended)
        self.traced, traces = self.tracer.traces(self.traced, len(ended))
        for trace in traces:
            check_trace(trace)
        for request in ended:
            assert request not in self.ended, "ended twice"
            self.ended.add(request)
            assert request.outcome is not None
            assert (request.answer is not None) == (request.outcome is Outcome.OK)
        for stage in self.scheduler.stages.values():
            queued = len(stage.queue) + len(stage.behind)
            if stage.alone or (queued and (not stage.policy.runs_late or not stage.devices)):
                assert stage.timer < NEVER, "somebody waits and nobody looks"

    def _may_run(self, batch: Batch) -> None:
        device, model = batch.device, batch.stage.key
        if device.memory is None:
            assert batch.stage.key in {key for group in batch.stage.groups for key in group.tables}
            return
        assert model in self.there[device.agent, device.number], "it is there, and not told to go"
        for page in self.told:
            # What is overdue was given up, and is not carried out either; what the device was told before it was
            # another kind of device it may answer `not_loaded` for.
            if page.device is device and page.overdue_at > self.now:
                assert page.model != model or device.memory.models[model] is not page.held
        # It may be decided already that it is to go next.
        assert device.memory.models[model].state in (RESIDENT, UNLOADING)

    def _is_told(self, page: Page) -> None:
        device = page.device
        assert self.scheduler.fleet.devices[device.agent, device.number] is device
        assert device.has_pulled
        assert page.latest > self.now
        if device.memory is None or device.memory.models.get(page.model) is not page.held:
            pass  # taken off it since
        elif page.load:
            assert page.held is device.memory.loading
            assert page.held.state == LOADING
        else:
            assert page.held.state == UNLOADING
            held = [batch.stage.key for batch in self.batches.values() if batch.device is device]
            assert page.model not in held, "what runs stays"
        self.told.append(page)

    def _not_done(self, batch: Batch) -> None:
        """A batch was taken away from its agent: what that one answers yet changes nothing."""
        results = [LISTS[0]] * len(batch.tasks)
        assert not self.scheduler.done(self.now, batch.device.agent, batch.number, "ok", 0.1, results, {}, "")

    def _live(self) -> list[Request]:
        return [request for request in self.requests if request.outcome is None]

    # ---- what always holds ----------------------------------------------------------------

    @invariant()
    def accounts_add_up(self) -> None:
        ledger = self.scheduler.ledger
        live = self._live()
        assert ledger.submitted == len(self.requests)
        assert ledger.in_flight == len(live) <= MAX_REQUESTS
        assert ledger.submitted == sum(ledger.ended_by.values()) + ledger.in_flight
        assert ledger.bytes == sum(request.nbytes for request in live)
        assert sum(len(client.requests) for client in self.clients) == len(live)

    @invariant()
    def metrics_add_up(self) -> None:
        scheduler = self.scheduler
        metrics = scheduler.metrics
        assert metrics is not None
        self.counted += [counted for counted in metrics.pipelines.values() if counted not in self.counted]
        assert sum(counted.submitted for counted in self.counted) == scheduler.ledger.submitted
        ended = Counter({"ok": sum(counted.ok for counted in self.counted)})
        for counted in self.counted:
            for (_, outcome), times in counted.not_ok.items():
                ended[outcome] += times
            assert counted.ended == counted.ok + sum(counted.not_ok.values())
            assert count(counted.latency) == counted.ok
        assert ended == Counter(scheduler.ledger.ended_by)
        for name, counted in metrics.pipelines.items():
            versions = [pipeline for pipeline in scheduler.serving() if pipeline.name == name]
            assert versions or not name, "what is served no more is forgotten"
            assert all(pipeline.metrics is counted for pipeline in versions)
            assert counted.submitted - counted.ended == sum(pipeline.in_flight for pipeline in versions)
            assert set(counted.stages) == {plan.name for pipeline in versions for plan in pipeline.stages}
            for stage in counted.stages.values():
                elements = count(stage.at_dispatch)
                assert count(stage.forced) == count(stage.chosen) == elements == total(stage.sizes)
                assert count(stage.slack) <= count(stage.sizes)
                assert count(stage.execution) == count(stage.error) == stage.batches.get("ok", 0)
                assert sum(stage.batches.values()) <= count(stage.sizes)
                assert min(total(stage.forced), total(stage.chosen), total(stage.batch_wait)) >= 0.0

    @invariant()
    def every_live_request_is_in_somebodys_hands(self) -> None:
        """A task waits in one queue (within its plan or behind it), or is collected for one device, or is in one batch,
        and the live ones are their requests'."""
        places: dict[int, list[str]] = {}
        waiting: list[Task] = []
        devices = self.scheduler.fleet.devices.values()
        for stage in self.scheduler.stages.values():
            alone = [task for batch in stage.alone for task in batch]
            queued = [*stage.queue, *stage.behind]
            collected = [task for device in devices if device.collects_for is stage for task in device.collected]
            assert stage.alone_count == len(alone)
            assert len(stage.queue) + len(stage.behind) == len(queued)
            assert not len(stage.behind) or stage.policy.name == "laxity"
            assert stage.waiting() == len(alone) + len(queued) + len(collected)
            for queue in (stage.queue, stage.behind):
                assert [task.key for task in queue] == sorted(task.key for task in queue)
            for task in alone + queued + collected:
                assert task.stage is stage
                assert task.state == QUEUED
                assert task.request.outcome is None, "a queue holds live tasks only"
                waiting.append(task)
                places.setdefault(id(task), []).append("queue")
        running: set[int] = set()
        for batch in self.scheduler.batches.values():
            for task in batch.tasks:
                places.setdefault(id(task), []).append("batch")
                if task.request.outcome is None:
                    assert task.state == GRANTED
                    running.add(id(task))
        assert all(len(where) == 1 for where in places.values())
        for request in self.requests:
            if request.outcome is None:
                assert request.tasks, "a live request has something to wait for"
                for task in request.tasks:
                    assert task.request is request
                    assert id(task) in places
        assert len(waiting) + len(running) == sum(len(r.tasks) for r in self.requests if r.outcome is None)

    @invariant()
    def devices_hold_three_batches_at_most(self) -> None:
        assert self.scheduler.batches == self.batches
        for device in self.scheduler.fleet.devices.values():
            assert len(device.batches) <= 3
            for number, batch in device.batches.items():
                assert self.batches[number] is batch
        assert {device.agent for device in self.scheduler.fleet.devices.values()} <= self.agents

    @invariant()
    def no_device_is_to_have_more_than_its_memory_takes(self) -> None:
        for slot, device in self.scheduler.fleet.devices.items():
            memory = device.memory
            if memory is None:
                continue
            assert len(self.there[slot]) <= ROOM
            there = [model for model in memory.models.values() if model.state in (RESIDENT, LOADING)]
            assert memory.taken == pytest.approx(SIZE * len(there))
            if memory.loading is None:  # else one that was to make room may have refused, and so will the load be
                assert memory.taken <= memory.budget
            assert set(memory.resident) == {model.key for model in there if model.state == RESIDENT}
            assert device.group is not None
            assert set(device.group.tables) == set(memory.resident) <= self.there[slot]
        for stage in self.scheduler.stages.values():
            assert not stage.cold() or stage.devices == 1 or self.scheduler.fleet.stale

    @invariant()
    def one_batch_is_collected_for_a_device_at_most(self) -> None:
        devices = self.scheduler.fleet.devices
        for device in devices.values():
            if device.collects_for is None:
                assert device.collected == []
            else:
                assert device.collects_for.policy.collects
                assert device.collects_for.collecting[device.index] is device
                assert len(device.collected) <= 4
        for stage in self.scheduler.stages.values():
            for device in stage.collecting.values():
                assert devices[device.agent, device.number] is device
                assert device.collects_for is stage

    @precondition(lambda self: not self._live())
    @invariant()
    def nothing_is_held_for_nobody(self) -> None:
        assert self.scheduler.ledger.bytes == 0
        assert all(stage.waiting() == 0 for stage in self.scheduler.stages.values())

    def teardown(self) -> None:
        """Left alone, everything ends at its deadline; nothing has to be asked for twice. Policies that run what is
        late need devices for that."""
        if not hasattr(self, "scheduler"):
            return
        last = max((request.deadline for request in self.requests), default=self.now)
        self._dispatch()
        for _ in range(2000):
            wake = self.scheduler.next_wake()
            assert wake > self.now
            if wake > last + 2 * SWEEP:
                break
            self.now = wake
            self._dispatch()
        assert all(request.pipeline.policy.runs_late for request in self._live())
        for _ in range(2000):
            if not self._live():
                break
            self.work(1, 0.02, 0, [])
        self.accounts_add_up()
        self.every_live_request_is_in_somebodys_hands()
        assert self.scheduler.ledger.in_flight == 0
        assert self.scheduler.ledger.bytes == 0
        assert self.ended == set(self.requests)
        # What the agents answer yet is thrown away, and retired pipelines are forgotten.
        for number, batch in list(self.batches.items()):
            del self.batches[number]
            agent = batch.device.agent
            assert self.scheduler.done(self.now, agent, number, "ok", 0.1, [as_list([])] * len(batch.tasks), {}, "")
        self.now += 1.0
        self._dispatch()
        assert self.ended == set(self.requests)
        assert {key.split("@")[0] for key in self.scheduler.stages} == set(self.versions)


def check_trace(trace: TraceRecord) -> None:
    """Moments are in order, waiting adds up, and so does the reckoning of a drop."""
    for span in trace.spans:
        assert 0.0 <= span.queued <= trace.latency + 1e-9
        if span.granted < 0.0:
            assert (span.opens, span.device, span.batch, span.size) == (-1.0, "", -1, 0)
        else:
            assert span.queued <= span.opens <= span.granted <= trace.latency + 1e-9
            assert -1e-9 <= span.forced <= span.granted - span.queued + 1e-9
            assert span.closes == -1.0 or span.closes >= span.granted
            assert span.attempts >= 1
            assert 1 <= span.size <= 4
        if span.started >= 0.0:
            assert span.started >= span.granted
        if span.ended >= 0.0:
            assert span.granted <= span.started <= span.ended <= trace.latency + 1e-9
            assert span.batches >= 1
    if trace.outcome == "ok":
        assert all(span.ended >= 0.0 for span in trace.spans)
    estimate = trace.estimate
    if estimate is not None:
        assert trace.outcome == "dropped"
        assert estimate.stage == trace.stage
        total = estimate.wait + estimate.execution + estimate.downstream
        assert total == pytest.approx(estimate.remaining + estimate.short, abs=1e-9)
        assert estimate.wait >= -1e-9
        assert estimate.short >= -1e-9


def run(machine: type[SchedulerMachine], examples: int) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=40, deadline=None))


def test_pipelines_of_any_policies_beside_one_another() -> None:
    run(SchedulerMachine, 300)


def test_devices_that_page_their_models() -> None:
    class WithLittleMemory(SchedulerMachine):
        pages = True

    run(WithLittleMemory, 150)


@pytest.mark.parametrize("policy", POLICIES)
def test_pipelines_of_one_policy(policy: str) -> None:
    class OfOnePolicy(SchedulerMachine):
        policies = (policy,)

    run(OfOnePolicy, 60)
