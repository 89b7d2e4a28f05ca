"""A shard's engine pages the models of real devices' engines and lanes, in virtual time: many models, little memory."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from random import Random

import pytest

from broker.engine.devices import Batch
from broker.engine.fleet import HeldModel
from broker.engine.limits import Limits
from broker.engine.paging import Page
from broker.engine.plan import FROM_REQUEST, Pipeline, StagePlan
from broker.engine.request import Client, Request
from broker.engine.scheduler import Scheduler
from broker.engine.stage import Stage
from laxity.outcomes import Outcome
from laxity.payload import encode
from nodes.engine import actions as act
from nodes.engine.device import DeviceEngine
from nodes.engine.lanes import CopyIn, CopyOut, Execute, Lanes, Order, PageIn, PageOut, TooLate
from nodes.engine.models import HELD, READY

PAYLOAD = encode("x")
SIZE = 100.0
LOAD = 0.008
UNLOAD = 0.0005
COPY = 0.0002
PROFILE = [(1, 0.002), (8, 0.006)]
"""About a ResNet-50's on a V100 (Clockwork, table 1)."""
SLO = 0.1
WAY = 0.0003


def name_of(number: int) -> str:
    return f"m{number}"


def key_of(number: int) -> str:
    return f"m{number}@1/s"


class Node:
    """A device: its engine, its lanes, and a worker that does what they say in the time that it takes."""

    def __init__(self, cluster: Cluster, number: int, room: int, models: Sequence[str], overlap: bool) -> None:
        self.cluster = cluster
        self.number = number
        self.room = room
        self.engine = DeviceEngine(room * SIZE)
        self.lanes = Lanes(copies=True, overlap_loads=overlap)
        self.on_device: set[str] = set()
        """What truly is in its memory, or on its way there or away."""
        self.pages: dict[int, tuple[int, str, float, float]] = {}
        """By the engine's number: the shard's, the model, and the window."""
        self.granted: dict[int, tuple[Batch, float]] = {}
        """With the latest start."""
        self.pull = (0, 0.0, 0.0)
        """The newest: seq, sent, came to the shard."""
        self.announces = False
        self.loads = self.refused = 0
        self.engine.place(cluster.now, dict.fromkeys(models, SIZE))
        self.engine.session(cluster.now, True)
        self._announce()  # who pulls has greeted
        self.act()

    def act(self) -> None:
        now = self.cluster.now
        self.engine.tick(now)
        self.lanes.tick(now)
        while True:
            orders, actions = self.lanes.take_orders(), self.engine.take_actions()
            if not orders and not actions:
                break
            for order in orders:
                self._carry_out(now, order)
            for action in actions:
                self._do(now, action)
        assert len(self.on_device) <= self.room, "more than the memory takes"
        wake = min(self.engine.next_wake(), self.lanes.next_wake())
        if wake < 1e17:
            self.cluster.at(max(wake, now), self.act)

    def _do(self, now: float, action: act.Action) -> None:
        engine, cluster = self.engine, self.cluster
        match action:
            case act.StartWorker():
                engine.worker_started(now)
            case act.Hold():
                self.on_device.add(action.model)
                cluster.at(now + 0.001, lambda: self._then(engine.held, action.model, PROFILE, LOAD, SIZE))
            case act.Announce():
                if not self.announces:
                    self.announces = True
                    cluster.at(now + 0.2, self._announce)
            case act.SendPull():
                self._pull(now, action)
            case act.Infer():
                self.lanes.infer(now, action.batch, action.earliest, action.latest)
            case act.Drop():
                if self.lanes.drop(now, action.batch):
                    self._ended(now, action.batch, "cancelled")
            case act.Refuse():
                self._done(action.batch, action.code)
            case act.Load():
                self._window(action.number, action.latest)
                self.lanes.load(now, action.number, action.earliest, action.latest)
            case act.Unload():
                if action.number not in self.pages:
                    self.pages[action.number] = (-1, action.model, 0.0, action.latest)
                self._window(action.number, action.latest)
                self.lanes.unload(now, action.number, action.earliest, action.latest)
            case act.Answer():
                self._acted(action.number, action.code, 0.0)
            case _:
                raise AssertionError(f"{action} was not to come")

    def _window(self, number: int, latest: float) -> None:
        shard, model, opens, _ = self.pages[number]
        self.pages[number] = (shard, model, opens, latest)

    def _then(self, tell: Callable[..., object], *arguments: object) -> None:
        """Something that took time has ended."""
        tell(self.cluster.now, *arguments)
        self.act()

    def _carry_out(self, now: float, order: Order) -> None:
        cluster, lanes = self.cluster, self.lanes
        match order:
            case CopyIn():
                cluster.at(now + COPY, lambda: self._then(lanes.copied_in, order.batch))
            case Execute():
                batch, latest = self.granted[order.batch]
                assert now <= latest, "it ran after its window"
                assert batch.stage.model in self.on_device, "it ran without its model"
                self.engine.started(now, order.batch, now)
                cluster.at(now + seconds_of(batch), lambda: self._then(lanes.executed, order.batch))
            case CopyOut():
                cluster.at(now + COPY, lambda: self._copied_out(order.batch))
            case PageIn():
                _, model, opens, latest = self.pages[order.action]
                assert opens <= now <= latest, "it was loaded outside its window"
                self.on_device.add(model)
                self.loads += 1
                cluster.at(now + LOAD, lambda: self._paged(order.action, LOAD))
            case PageOut():
                _, model, opens, latest = self.pages[order.action]
                assert opens <= now <= latest, "it was unloaded outside its window"
                cluster.at(now + UNLOAD, lambda: self._unloaded(order.action, model))
            case TooLate():
                if order.is_batch:
                    self._ended(now, order.number, "too_late")
                else:
                    self.engine.acted(now, order.number, "too_late", "")
                    self._acted(order.number, "too_late", 0.0)

    def _copied_out(self, number: int) -> None:
        self.lanes.copied_out(self.cluster.now, number)
        self.engine.finished(self.cluster.now, number, "ok", COPY)
        self._done(number, "ok")
        self.act()

    def _ended(self, now: float, number: int, code: str) -> None:
        self.engine.finished(now, number, code, 0.0)
        self._done(number, code)

    def _paged(self, action: int, seconds: float) -> None:
        self.lanes.paged(self.cluster.now, action)
        self.engine.acted(self.cluster.now, action, "ok", "")
        self._acted(action, "ok", seconds)
        self.act()

    def _unloaded(self, action: int, model: str) -> None:
        self.on_device.discard(model)
        self._paged(action, UNLOAD)

    # ---- messages --------------------------------------------------------------------------

    def _announce(self) -> None:
        engine = self.engine
        self.announces = False
        models = [
            HeldModel(model.key, "", 100, model.profile, model.state == READY, model.memory, model.load_seconds)
            for model in engine.models.values()
            if model.state in (READY, HELD)
        ]
        self.cluster.to_shard(lambda shard, _: shard.report("agent", self.number, "gpu", models, self.room * SIZE))

    def _pull(self, now: float, pull: act.SendPull) -> None:
        def came(shard: Scheduler, at: float) -> None:
            self.pull = (pull.seq, now, at)
            shard.pull("agent", self.number, at + pull.free_in)

        self.cluster.to_shard(came)

    def _done(self, number: int, code: str) -> None:
        batch, _ = self.granted.pop(number)
        results = [PAYLOAD] * len(batch.tasks) if code == "ok" else []
        seconds = seconds_of(batch) if code == "ok" else 0.0
        copy = COPY if code == "ok" else 0.0
        self.refused += code != "ok"
        self.cluster.to_shard(
            lambda shard, at: shard.done(at, "agent", number, code, seconds, results, {}, code, copy, copy)
        )

    def _acted(self, number: int, code: str, seconds: float) -> None:
        action, *_ = self.pages.pop(number)
        self.refused += code != "ok"
        if action >= 0:
            self.cluster.to_shard(lambda shard, at: shard.acted(at, "agent", action, code, seconds, code))

    def grant(self, batch: Batch, left_at: float, closes: float) -> None:
        self.granted[batch.number] = (batch, left_at + closes)
        model, number = batch.stage.model, batch.number
        self.engine.grant(self.cluster.now, number, self.pull[0], model, left_at, 0.0, closes, batch.expected, SLO)
        self.act()

    def page(self, page: Page, left_at: float, closes: float) -> None:
        engine, now = self.engine, self.cluster.now
        if page.load:
            number = engine.load(now, page.model, left_at, 0.0, closes, page.expected)
        else:
            number = engine.unload(now, page.model, left_at, 0.0, closes)
        self.pages[number] = (page.action, page.model, left_at, left_at + closes)
        self.act()


def seconds_of(batch: Batch) -> float:
    (_, first), (size, last) = PROFILE
    return first + (last - first) * (len(batch.tasks) - 1) / (size - 1)


class Cluster:
    """A shard and its nodes; messages between them take :data:`WAY` and do not overtake one another."""

    def __init__(self, models: int, nodes: int, room: int, *, overlap: bool = True) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.scheduler = Scheduler(Limits(), overhead=2 * WAY)
        self.requests: list[Request] = []
        self._client = Client("c")
        for number in range(models):
            plan = StagePlan("s", Stage(key_of(number), "", 8, 1000), [(FROM_REQUEST, "")], False, 1)
            self.scheduler.apply(Pipeline(name_of(number), SLO, [plan], [("", 0, "")]))
        keys = [key_of(number) for number in range(models)]
        self.nodes = [Node(self, number, room, keys, overlap) for number in range(nodes)]
        self.run_until(2.0)

    def at(self, when: float, do: Callable[[], None]) -> None:
        heappush(self._events, (when, next(self._numbers), do))

    def to_shard(self, do: Callable[[Scheduler, float], object]) -> None:
        self.at(self.now + WAY, lambda: self._at_shard(do))

    def _at_shard(self, do: Callable[[Scheduler, float], object]) -> None:
        do(self.scheduler, self.now)
        self._dispatch()

    def submit(self, number: int) -> None:
        request = self.scheduler.submit(
            self.now, self._client, len(self.requests), name_of(number), self.now, -1.0, 0, PAYLOAD, False
        )
        assert request is not None
        self.requests.append(request)
        self._dispatch()

    def _dispatch(self) -> None:
        now = self.now
        for batch in self.scheduler.dispatch(now):
            node = self.nodes[batch.device.number]
            left_at = node.pull[1] + now - node.pull[2]
            self.at(now + WAY, lambda b=batch, n=node, at=left_at, c=batch.closes - now: n.grant(b, at, c))
        for page in self.scheduler.take_pages():
            node = self.nodes[page.device.number]
            left_at = node.pull[1] + now - node.pull[2]
            self.at(now + WAY, lambda p=page, n=node, at=left_at, c=page.latest - now: n.page(p, at, c))

    def run_until(self, end: float) -> None:
        while True:
            wake = self.scheduler.next_wake()
            if self._events and self._events[0][0] <= wake:
                if self._events[0][0] > end:
                    break
                when, _, do = heappop(self._events)
                self.now = max(self.now, when)
                do()
            elif wake > end:
                break
            else:
                self.now = max(self.now, wake)
                self._dispatch()
        self.now = end

    def offer(self, asked: list[tuple[float, int]]) -> None:
        """Submit all of it, and wait for the answers."""
        begin = self.now
        for when, number in asked:
            self.at(begin + when, lambda n=number: self.submit(n))
        self.run_until(begin + asked[-1][0] + 2 * SLO)
        assert all(request.outcome is not None for request in self.requests)
        ledger = self.scheduler.ledger
        assert ledger.in_flight == 0
        assert ledger.submitted == len(self.requests) == sum(ledger.ended_by.values())

    def loads(self) -> int:
        return sum(node.loads for node in self.nodes)

    def part(self, outcome: Outcome) -> float:
        return sum(request.outcome is outcome for request in self.requests) / len(self.requests)

    def hit_rate(self) -> float:
        """The part of the requests that were answered without waiting for a load."""
        return sum(r.outcome is Outcome.OK and not r.cold for r in self.requests) / len(self.requests)


def zipf(models: int, rate: float, seconds: float, seed: int) -> list[tuple[float, int]]:
    """(when, model) of Poisson arrivals; the k-th model is asked for in proportion to 1/k."""
    random = Random(seed)
    sums = list(itertools.accumulate(1.0 / (k + 1) for k in range(models)))
    asked, now = [], random.expovariate(rate)
    while now < seconds:
        asked.append((now, bisect_right(sums, random.random() * sums[-1])))
        now += random.expovariate(rate)
    return asked


def least_recently_used(asked: list[tuple[float, int]], room: int) -> float:
    """The hit rate of keeping those used last, if loads took no time."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for _, number in asked:
        hits += number in held
        held[number] = None
        held.move_to_end(number)
        if len(held) > room:
            held.popitem(last=False)
    return hits / len(asked)


def optimum(asked: list[tuple[float, int]], room: int) -> float:
    """The best hit rate (Belady): whoever is asked for last of all goes."""
    following = [len(asked)] * len(asked)
    last: dict[int, int] = {}
    for index in range(len(asked) - 1, -1, -1):
        following[index] = last.get(asked[index][1], len(asked))
        last[asked[index][1]] = index
    held: dict[int, int] = {}
    hits = 0
    for index, (_, number) in enumerate(asked):
        hits += number in held
        if number not in held and len(held) >= room:
            del held[max(held, key=held.__getitem__)]
        held[number] = following[index]
    return hits / len(asked)


@pytest.mark.parametrize("overlap", [True, False])
def test_ten_times_the_models_that_fit(overlap: bool) -> None:
    """400 models, memory for 40, and loads that take less than the link has."""
    cluster = Cluster(400, 1, 40, overlap=overlap)
    assert cluster.scheduler.unready() == []
    asked = zipf(400, 150.0, 8.0, 1)
    cluster.offer(asked)
    plain, best = least_recently_used(asked, 40), optimum(asked, 40)
    assert cluster.part(Outcome.OK) > 0.97
    assert plain - 0.05 < cluster.hit_rate() <= best + 0.01
    assert cluster.loads() < (1.05 - plain) * len(asked)


def test_more_loads_than_the_link_has() -> None:
    """What most is asked for stays, and gets its answers; nobody is kept waiting in vain for long."""
    cluster = Cluster(400, 1, 40)
    asked = zipf(400, 600.0, 3.0, 2)
    cluster.offer(asked)
    assert cluster.hit_rate() > least_recently_used(asked, 40) - 0.05
    assert cluster.part(Outcome.OK) > cluster.hit_rate() + 0.05
    popular = [request for request, (_, number) in zip(cluster.requests, asked, strict=True) if number < 10]
    assert sum(request.outcome is Outcome.OK for request in popular) > 0.95 * len(popular)
    assert cluster.part(Outcome.EXPIRED) < 0.02


def test_two_devices_share_the_models() -> None:
    cluster = Cluster(200, 2, 20)
    asked = zipf(200, 200.0, 5.0, 3)
    cluster.offer(asked)
    assert cluster.part(Outcome.OK) > 0.97
    assert cluster.hit_rate() > least_recently_used(asked, 20)
    assert all(node.loads > 0 for node in cluster.nodes)


def test_devices_refuse_next_to_nothing() -> None:
    """What the shard believes of their memory is true."""
    cluster = Cluster(100, 2, 10)
    cluster.offer(zipf(100, 200.0, 5.0, 4))
    assert cluster.loads() > 50
    assert sum(node.refused for node in cluster.nodes) <= 0.01 * len(cluster.requests)
