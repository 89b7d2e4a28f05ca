"""Routing in virtual time: the table and the choice of a shard, and with the table of requests, all that can happen."""

from __future__ import annotations

from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from laxity.outcomes import Outcome
from laxity.payload import encode
from laxity.protocol import Answer, Request, Welcome
from laxity.requests import UNKNOWN_SLO, Pending, RequestTable
from laxity.routes import Rotation, Router, RoutingTable, ServedPipeline, table_of

SHARDS = ["a", "b", "c"]


def welcome(shard, routes=None, revision=0, pipelines=("p",), shards=SHARDS, **fields):
    return Welcome(
        1,
        shard,
        1_000_000,
        pipelines=[(name, 1_000_000) for name in pipelines],
        shards=[(name, f"tcp://{name}") for name in shards],
        routes=[
            (pipeline, [(shards.index(name), weight) for name, weight in route.items()])
            for pipeline, route in (routes or {}).items()
        ],
        revision=revision,
        **fields,
    )


def router(*welcomes, phase=0.0):
    found = Router(phase)
    for message in welcomes:
        found.welcome(message)
    return found


def choose(found, pipeline="p"):
    rotation = found.rotation(pipeline)
    return None if rotation is None else rotation.next()


def chosen(found, count, pipeline="p"):
    return Counter(choose(found, pipeline) for _ in range(count))


def test_what_is_served_is_known_from_all_connected_shards_and_from_the_table():
    routes = {"q": {"c": 1.0}, "gone": {}}
    found = router(welcome("a", routes, unready=["p"]), welcome("b", routes, unready=["p"]))
    assert found.pipelines == {
        "p": ServedPipeline(1.0, False),
        "q": ServedPipeline(None, True),
        "gone": ServedPipeline(None, False),
    }
    found.welcome(welcome("b"))
    assert found.pipelines["p"] == ServedPipeline(1.0, True)
    found.lost("b")
    assert found.pipelines["p"] == ServedPipeline(1.0, False)


# ---- by weight ----------------------------------------------------------------------------------


@given(
    st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 20), min_size=1),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 3),
)
def test_each_shard_gets_its_part(weights, phase, skipped):
    rotation = Rotation(weights.items(), phase)
    total = sum(weights.values())
    for _ in range(skipped * total):
        rotation.next()
    assert Counter(rotation.next() for _ in range(total)) == weights


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=6), st.floats(0, 1, exclude_max=True))
def test_no_shard_waits_for_long(weights, phase):
    rotation = Rotation([(str(index), weight) for index, weight in enumerate(weights)], phase)
    counts = Counter()
    for turn in range(1, 200):
        counts[rotation.next()] += 1
        for index, weight in enumerate(weights):
            assert abs(counts[str(index)] - turn * weight / sum(weights)) < len(weights)


def test_turns_are_evenly_spaced():
    rotation = Rotation([("a", 5.0), ("b", 1.0), ("c", 1.0)], 0.0)
    assert "".join(rotation.next() for _ in range(14)) == "aabacaa" * 2


def test_the_first_requests_of_many_clients_are_spread_by_weight():
    first = Counter(Rotation([("a", 1.0), ("b", 3.0)], (index + 0.5) / 100).next() for index in range(100))
    assert first == {"a": 25, "b": 75}


# ---- among those that are there --------------------------------------------------------------------


def test_without_any_table_the_first_shard_gets_everything():
    found = router(Welcome(1, "a", 1), Welcome(1, "b", 1))
    assert chosen(found, 10) == {"a": 10}
    found.lost("a")
    assert chosen(found, 10) == {"b": 10}
    found.lost("b")
    assert choose(found) is None


def test_a_pipeline_without_a_route_goes_to_a_shard_that_lists_it():
    found = router(welcome("a", {"q": {"a": 1.0}}, pipelines=["q"]), welcome("b", {"q": {"a": 1.0}}))
    assert choose(found) == "b"
    assert choose(found, "q") == "a"
    assert choose(found, "unheard of") == "a"


def test_requests_are_spread_among_connected_shards():
    routes = {"p": {"a": 0.25, "b": 0.75}}
    found = router(welcome("a", routes))
    assert chosen(found, 8) == {"a": 8}
    assert found.wanted == {"a": "tcp://a", "b": "tcp://b"}
    found.welcome(welcome("b", routes))
    assert chosen(found, 8) == {"a": 2, "b": 6}
    found.lost("a")
    assert chosen(found, 8) == {"b": 8}


def test_a_shard_that_the_route_does_not_name_gets_nothing():
    found = router(welcome("c", {"p": {"a": 1.0, "b": 0.0}}))
    assert choose(found) is None
    assert found.wanted == {"a": "tcp://a"}
    found.welcome(welcome("b", {"p": {"a": 1.0, "b": 0.0}}))
    # Rather the one that is to get none than nobody at all.
    assert choose(found) == "b"
    found.welcome(welcome("a", {"p": {"a": 1.0, "b": 0.0}}))
    assert chosen(found, 4) == {"a": 4}


def test_a_pipeline_that_nobody_serves_waits():
    found = router(welcome("a", {"p": {}}))
    assert choose(found) is None
    assert found.serving("p") == []
    assert found.wanted == {}


def test_a_shard_that_has_not_heard_of_the_pipeline_yet_is_spared():
    routes = {"p": {"a": 1.0, "b": 1.0}}
    found = router(welcome("a", routes), welcome("b", routes, pipelines=[]))
    assert chosen(found, 4) == {"a": 4}
    found.lost("a")
    assert chosen(found, 4) == {"b": 4}
    found.welcome(welcome("a", routes))
    found.welcome(welcome("b", routes))
    assert chosen(found, 4) == {"a": 2, "b": 2}


def test_a_shard_without_devices_gets_requests_only_where_no_other_can():
    routes = {"p": {"a": 1.0, "b": 1.0}}
    found = router(welcome("a", routes), welcome("b", routes, unready=["p"]))
    assert chosen(found, 4) == {"a": 4}
    found.welcome(welcome("a", routes, unready=["p"]))
    assert chosen(found, 4) == {"a": 2, "b": 2}
    found.welcome(welcome("b", routes, unready=["q"]))
    assert chosen(found, 4) == {"b": 4}


def test_shards_are_wanted_for_pipelines_in_use_only():
    found = router(welcome("a", {"p": {"a": 1.0, "b": 1.0}, "q": {"c": 1.0}}))
    assert found.wanted == {}
    before = found.changes
    choose(found, "q")
    assert found.changes > before
    assert found.wanted == {"c": "tcp://c"}
    before = found.changes
    choose(found, "q")
    assert found.changes == before


# ---- which table holds --------------------------------------------------------------------------


def test_the_newest_table_of_the_connected_shards_holds():
    old, new = {"p": {"a": 1.0}}, {"p": {"b": 1.0}}
    found = router(welcome("a", new, revision=7), welcome("b", old, revision=3))
    assert choose(found) == "b"
    found.welcome(welcome("b", old, revision=7))
    assert choose(found) == "a"
    found.welcome(welcome("a", new, revision=7))
    assert choose(found) == "b"
    # A store that begins anew counts from one again.
    found.welcome(welcome("a", old, revision=1))
    found.welcome(welcome("b", old, revision=2))
    assert choose(found) == "a"


def test_a_shard_without_a_table_does_not_take_away_that_of_another():
    found = router(welcome("a", {"p": {"a": 1.0}}, revision=7), Welcome(1, "b", 1))
    assert chosen(found, 4) == {"a": 4}


def test_the_last_table_stays_while_nobody_is_connected():
    found = router(welcome("a", {"p": {"a": 1.0, "b": 1.0}}, revision=7))
    choose(found)
    found.lost("a")
    assert found.wanted == {"a": "tcp://a", "b": "tcp://b"}


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_what_makes_no_sense_in_a_table_is_left_out(weight):
    message = Welcome(1, "a", 1, shards=[("a", "x"), ("b", "y")], routes=[("p", [(0, 1.0), (1, weight), (2, 1.0)])])
    assert table_of(message) == RoutingTable(0, {"a": "x", "b": "y"}, {"p": {"a": 1.0, "b": 0.0}})
    message.routes = [("p", [(-1, 1.0)])]
    assert table_of(message).routes == {"p": {}}


def test_what_the_connected_shards_say_is_joined():
    found = router()
    assert (found.heartbeat, found.max_payload, found.slos) == (1.0, 0, {})
    found = router(
        Welcome(1, "a", 50_000, 100, [("p", 1), ("q", 2)]),
        Welcome(1, "b", 2_000_000, 0, [("q", 3)]),
        Welcome(1, "c", 1, 200),
    )
    assert (found.heartbeat, found.max_payload, found.slos) == (2.0, 100, {"p": 1, "q": 3})


# ---- everything at once -------------------------------------------------------------------------


class Shard:
    """A shard as a client sees one: it holds requests, answers each once, and takes a repeat for what it is. What it
    says lies in a connection until the client reads it."""

    def __init__(self):
        self.holding = set()
        self.connected = False
        self.answers = deque()

    def end(self, id, outcome):
        self.holding.discard(id)
        if self.connected:
            self.answers.append(Answer(id, outcome, None))


class RoutingMachine(RuleBasedStateMachine):
    """Shards come, go and come back with what they had; tables change; answers are late. Each request ends exactly
    once, by an answer of the shard that it is at, and none as cancelled that nobody cancelled."""

    @initialize()
    def start(self):
        self.now = 0.0
        self.table = RequestTable()
        self.router = Router(0.3)
        self.shards = {name: Shard() for name in SHARDS}
        self.routes = {"p": {"a": 1.0, "b": 1.0}, "q": {"a": 1.0, "b": 1.0}}
        self.revision = 0
        self.entered = 0
        self.at = {}
        self.left = {}
        for name in SHARDS:
            self.connect(name)

    def leave(self, id, outcome):
        assert id not in self.left
        self.left[id] = outcome

    def connected(self):
        return [name for name, shard in self.shards.items() if shard.connected]

    def connect(self, name):
        self.shards[name].connected = True
        self.tell(name)
        self.table.resubmit(self.table.lane(name))

    def disconnect(self, name):
        shard = self.shards[name]
        shard.connected = False
        shard.answers.clear()
        self.router.lost(name)
        self.table.lost(self.table.lane(name))
        self.at = {number: at for number, at in self.at.items() if at != name}

    def tell(self, name):
        self.router.welcome(welcome(name, self.routes, self.revision, pipelines="pq"))

    # ---- the client's user

    @rule(
        count=st.integers(1, 3), pipeline=st.sampled_from("pq"), slo=st.sampled_from([0.5, 30.0]), sends=st.booleans()
    )
    def submit(self, count, pipeline, slo, sends):
        for _ in range(count):
            self.entered += 1
            request = Request(self.entered, pipeline, None, None)
            deadline = self.now + slo
            self.table.add(Pending(self.entered, request, encode(b""), 100, self.now, deadline, False, True, sink=None))
        if sends:
            self.send(False)

    @precondition(lambda self: len(self.table))
    @rule(data=st.data())
    def cancel(self, data):
        number = data.draw(st.sampled_from([n for n in range(1, self.entered + 1) if n not in self.left]))
        self.table.cancel(number)
        self.leave(number, "by the caller")

    # ---- shards

    @rule(name=st.sampled_from("ab"), forgets=st.booleans(), sends=st.booleans())
    def lose_or_find(self, name, forgets, sends):
        if self.shards[name].connected:
            self.disconnect(name)
            if forgets:
                self.shards[name].holding.clear()
        else:
            self.connect(name)
        if sends:
            self.send(False)

    @rule(name=st.sampled_from(SHARDS))
    def greet_again(self, name):
        if self.shards[name].connected:
            self.shards[name].holding.clear()
            self.table.resubmit(self.table.lane(name))

    @precondition(lambda self: self.connected())
    @rule(routes=st.dictionaries(st.sampled_from("pq"), st.dictionaries(st.sampled_from("ab"), st.just(1.0))))
    def change_routes(self, routes):
        self.routes = routes
        self.revision += 1
        self.tell(self.connected()[0])
        self.table.forget_lanes({"a", *self.connected()})

    @precondition(lambda self: any(shard.holding for shard in self.shards.values()))
    @rule(data=st.data(), outcome=st.sampled_from([Outcome.OK, Outcome.DROPPED]))
    def answer(self, data, outcome):
        shard = self.shards[data.draw(st.sampled_from([n for n, shard in self.shards.items() if shard.holding]))]
        shard.end(data.draw(st.sampled_from(sorted(shard.holding))), outcome)

    # ---- between the two

    @rule(fails=st.sampled_from([False, False, True]))
    def send(self, fails):
        self.table.unstrand()
        self.table.assign(self.router.rotation)
        for name in self.connected():
            shard, lane = self.shards[name], self.table.lane(name)
            cancels = self.table.take_cancels(lane)
            batch = self.table.take(lane, self.now)
            assert not {entry.id for entry in batch} & self.left.keys()
            assert all(entry.request.budget_us >= 1 for entry in batch)
            if fails:
                lane.cancels = cancels
                self.table.put_back(lane, batch)
                continue
            for number in cancels:
                if number in shard.holding:
                    shard.end(number, Outcome.CANCELLED)
            self.table.sent(batch)
            for entry in batch:
                assert self.at.setdefault(entry.id, name) == name
                shard.holding.add(entry.id)

    @precondition(lambda self: any(shard.answers for shard in self.shards.values()))
    @rule(data=st.data())
    def receive(self, data):
        name = data.draw(st.sampled_from([name for name, shard in self.shards.items() if shard.answers]))
        answer = self.shards[name].answers.popleft()
        if self.table.pop_answered(answer, self.table.lane(name)) is not None:
            assert self.at[answer.id] == name
            self.leave(answer.id, answer.outcome)

    @rule(seconds=st.sampled_from([0.1, 1.0]))
    def time_passes(self, seconds):
        self.now += seconds
        for entry, answer in self.table.look_after(self.now, lambda _: ""):
            self.leave(entry.id, answer.outcome)

    # ---- what always holds

    @invariant()
    def each_is_in_or_out(self):
        assert len(self.left) + len(self.table) == self.entered
        assert Outcome.CANCELLED not in self.left.values()

    def teardown(self):
        for name in self.connected():
            self.disconnect(name)
        self.now += UNKNOWN_SLO
        for entry, answer in self.table.look_after(self.now, lambda _: ""):
            self.leave(entry.id, answer.outcome)
        assert self.left.keys() == set(range(1, self.entered + 1))
        assert len(self.table) == 0


TestRoutingMachine = RoutingMachine.TestCase


@given(st.data())
def test_nothing_is_lost_while_one_shard_stays(data):
    """However often the others are lost, every request is answered by a shard once everything sent is answered."""
    routes = {"p": {"a": 1.0, "b": 2.0, "c": 0.5}}
    found, table = Router(0.0), RequestTable()
    shards = {name: Shard() for name in SHARDS}

    def connect(name):
        shards[name].connected = True
        found.welcome(welcome(name, routes))

    def send():
        table.unstrand()
        table.assign(found.rotation)
        for name, shard in shards.items():
            if shard.connected:
                for number in table.take_cancels(table.lane(name)):
                    shard.end(number, Outcome.CANCELLED)
                while batch := table.take(table.lane(name), 0.0):
                    table.sent(batch)
                    shard.holding.update(entry.id for entry in batch)

    for name in SHARDS:
        connect(name)
    answered = []
    for number in range(30):
        request = Request(number, "p", None, None)
        table.add(Pending(number, request, encode(b""), 100, 0.0, 60.0, False, True, sink=None))
        if data.draw(st.booleans()):
            send()
        name = data.draw(st.sampled_from(["", "b", "c"]))
        if name and shards[name].connected:
            shards[name].connected = False
            found.lost(name)
            table.lost(table.lane(name))
        elif name:
            connect(name)
    send()
    for name, shard in shards.items():
        for number in sorted(shard.holding):
            if table.pop_answered(Answer(number, Outcome.OK, None), table.lane(name)) is not None:
                answered.append(number)
    assert sorted(answered) == list(range(30))
