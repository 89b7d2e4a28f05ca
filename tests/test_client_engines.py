"""The client's engines in virtual time: the link to a shard, and the table of requests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from laxity.link import ATTEMPT, BACKOFF, MISSED, Link, State, Step
from laxity.outcomes import Outcome
from laxity.payload import encode
from laxity.protocol import MAX_HEADER, MAX_SHARED, Answer, Request, Welcome
from laxity.requests import FRESH, GRACE, SHARED_BYTES, UNKNOWN_SLO, Pending, RequestTable
from laxity.routes import Rotation

WELCOME = Welcome(1, "shard", 1_000_000)


def opened(*endpoints, now=0.0):
    link = Link(endpoints or ("a",), 1.0, now)
    assert link.advance(now) == [Step.CONNECT]
    link.handshaked(now)
    assert link.advance(now) == [Step.GREET]
    link.welcome(now, WELCOME)
    assert link.advance(now) == [Step.RESUBMIT]
    return link


def test_a_heartbeat_is_due_where_nothing_was_sent():
    link = opened()
    assert link.due_at() == 1.0
    assert link.advance(0.9) == []
    assert link.advance(1.0) == [Step.HEARTBEAT]
    link.heard(1.1)
    link.sent(1.5)
    assert link.due_at() == pytest.approx(2.1)


def test_a_heartbeat_is_due_where_nothing_was_heard():
    link = opened()
    link.sent(0.9)
    assert link.advance(1.0) == [Step.HEARTBEAT]


def test_a_silent_shard_is_gone_after_four_intervals():
    link = opened("a", "b")
    steps = []
    now = 0.0
    while link.is_open:
        now = link.due_at()
        steps += link.advance(now)
    assert now == pytest.approx(MISSED)
    assert steps == [Step.HEARTBEAT] * (MISSED - 1) + [Step.CLOSE]
    assert link.endpoint == "b"
    assert "silent" in link.trouble


def test_after_a_freeze_of_this_process_the_shard_gets_another_interval():
    link = opened()
    assert link.advance(100.0) == [Step.HEARTBEAT]
    assert link.is_open
    link.heard(100.1)
    assert link.advance(101.0) == [Step.HEARTBEAT]


def test_a_frozen_process_is_no_excuse_for_ever():
    link = opened()
    link.advance(100.0)
    assert Step.CLOSE in link.advance(101.0)


@pytest.mark.parametrize("greeted", [False, True])
def test_an_attempt_has_its_time(greeted):
    link = Link(("a", "b"), 1.0, 0.0)
    link.advance(0.0)
    if greeted:
        link.handshaked(0.0)
        link.advance(0.0)
    assert link.due_at() == ATTEMPT
    assert link.advance(ATTEMPT) == [Step.CLOSE]
    assert ("answer to HELLO" if greeted else "connection") in link.trouble
    assert link.endpoint == "b"


def test_pauses_between_rounds_grow_to_a_bound():
    link = Link(("a", "b"), 1.0, 0.0)
    pauses = []
    now = 0.0
    for _ in range(20):
        now = max(now, link.due_at())
        assert Step.CONNECT in link.advance(now)
        link.lost(now, "refused")
        pauses.append(round(link.due_at() - now, 6))
    rounds = pauses[1::2]
    assert max(pauses[::2]) < min(rounds)
    assert rounds == sorted(rounds)
    assert rounds[0] == pytest.approx(BACKOFF[0])
    assert rounds[-1] == pytest.approx(BACKOFF[1])


def test_requests_are_given_up_once_every_endpoint_refused():
    link = Link(("a", "b"), 1.0, 0.0)
    steps = []
    for _ in range(2):
        now = link.due_at()
        link.advance(now)
        link.handshaked(now)
        link.goodbye(now, "no", retry=False)
        steps.append(link.advance(now))
    assert Step.GIVE_UP not in steps[0]
    assert Step.GIVE_UP in steps[1]


def test_many_clients_do_not_come_back_at_once():
    at = set()
    for jitter in (0.0, 0.25, 0.5, 1.0):
        link = Link(("a",), jitter, 0.0)
        link.advance(0.0)
        link.lost(0.0, "x")
        at.add(link.due_at())
    assert len(at) == 4


@pytest.mark.parametrize("heartbeat_us", [0, -5, 2**62])
def test_heartbeat_intervals_are_held_within_bounds(heartbeat_us):
    link = Link(("a",), 1.0, 0.0)
    link.advance(0.0)
    link.handshaked(0.0)
    link.welcome(0.0, Welcome(1, "shard", heartbeat_us))
    assert 0.01 <= link.heartbeat <= 60


def test_an_endpoint_that_another_connection_leads_to_is_passed_over():
    taken = {"b"}
    link = Link(("a", "b", "c"), 1.0, 0.0, taken.__contains__)
    assert link.advance(0.0) == [Step.CONNECT]
    assert link.endpoint == "a"
    link.lost(0.0, "x")
    assert link.advance(link.due_at()) == [Step.CLOSE, Step.CONNECT]
    assert link.endpoint == "c"
    link.lost(0.0, "x")
    taken |= {"a", "c"}
    now = link.due_at()
    assert link.advance(now) == [Step.CLOSE]
    assert link.state is State.DOWN
    taken.discard("b")
    assert now < link.due_at() <= now + BACKOFF[1]
    assert link.advance(link.due_at()) == [Step.CONNECT]
    assert link.endpoint == "b"


class LinkMachine(RuleBasedStateMachine):
    """Whatever happens in whatever order, the steps make sense for one socket."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.taken = set()
        self.link = Link(("a", "b"), 0.5, 0.0, self.taken.__contains__)
        self.socket = False

    @rule(endpoint=st.sampled_from("ab"))
    def take_or_leave(self, endpoint):
        self.taken ^= {endpoint}

    @rule(seconds=st.floats(0, 5))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def handshake(self):
        self.link.handshaked(self.now)

    @rule(version=st.sampled_from([1, 1, 1, 2]))
    def welcome(self, version):
        self.link.welcome(self.now, Welcome(version, "s", 1_000_000))

    @rule(retry=st.booleans())
    def goodbye(self, retry):
        self.link.goodbye(self.now, "x", retry)

    @rule()
    def lose(self):
        self.link.lost(self.now, "x")

    @rule()
    def garble(self):
        self.link.garbled(self.now, "x")

    @invariant()
    def steps_make_sense(self):
        for step in self.link.advance(self.now):
            if step is Step.CONNECT:
                assert not self.socket
                assert self.link.endpoint not in self.taken
                self.socket = True
            elif step is Step.CLOSE:
                assert self.socket
                self.socket = False
        assert self.socket is (self.link.state is not State.DOWN)
        assert self.link.due_at() > self.now


TestLinkMachine = LinkMachine.TestCase


# ---- the table ------------------------------------------------------------------------------


def pending(id, now=0.0, slo=1.0, payload=b"", weight=100, implicit=False, pipeline="p"):
    deadline = now + (UNKNOWN_SLO if slo is None else slo)
    request = Request(id, pipeline, None, None)
    return Pending(id, request, encode(payload), weight, now, deadline, implicit, slo is not None, sink=None)


def assign(table, shard="s"):
    """Everything goes to one shard; its lane."""
    table.unstrand()
    table.assign(lambda _: Rotation([(shard, 1.0)], 0.0))
    return table.lane(shard)


def send(table, now, shard="s"):
    batch = table.take(assign(table, shard), now)
    table.sent(batch)
    return [entry.id for entry in batch]


def fine(_pipeline):
    return ""


def test_budgets_shrink_while_requests_wait_and_when_they_are_submitted_again():
    table = RequestTable()
    entry = pending(1, now=10.0, slo=1.0)
    table.add(entry)
    assert send(table, 10.25) == [1]
    assert entry.request.budget_us == 750_000
    assert send(table, 10.3) == []
    table.resubmit(table.lane("s"))
    assert send(table, 10.5) == [1]
    assert entry.request.budget_us == 500_000


def test_an_implicit_budget_is_named_only_once_time_has_passed():
    table = RequestTable()
    table.learn(1.0, 0, {"p": 2_000_000})
    entry = pending(1, slo=2.0, implicit=True)
    table.add(entry)
    send(table, FRESH / 2)
    assert entry.request.budget_us is None
    table.resubmit(table.lane("s"))
    send(table, 0.5)
    assert entry.request.budget_us == 1_500_000


def test_an_slo_learnt_later_bounds_what_waits():
    table = RequestTable()
    table.add(pending(1, slo=None, implicit=True))
    table.learn(0.1, 0, {"p": 2_000_000, "odd": 0})
    send(table, 0.0)
    assert table.look_after(2.0 + GRACE - 0.001, fine) == []
    ((entry, answer),) = table.look_after(2.0 + GRACE + 0.02, fine)
    assert (entry.id, answer.outcome) == (1, Outcome.EXPIRED)


def test_without_any_slo_a_request_ends_after_a_minute_and_says_so():
    table = RequestTable()
    table.add(pending(1, slo=None, implicit=True))
    send(table, 0.0)
    assert table.look_after(UNKNOWN_SLO, fine) == []
    ((_, answer),) = table.look_after(UNKNOWN_SLO + 1.0, fine)
    assert "no SLO is known for 'p'" in answer.detail


@pytest.mark.parametrize(
    ("assigned", "sent", "lost", "outcome"),
    [
        (True, True, False, Outcome.EXPIRED),
        (True, True, True, Outcome.EXPIRED),
        (True, False, False, Outcome.EXPIRED),
        (True, False, True, Outcome.UNAVAILABLE),
        (False, False, False, Outcome.UNAVAILABLE),
    ],
)
def test_how_a_request_ends_that_nobody_answers(assigned, sent, lost, outcome):
    table = RequestTable()
    table.add(pending(1, slo=1.0))
    if assigned:
        assign(table)
    if sent:
        send(table, 0.0)
    if lost:
        table.lost(table.lane("s"))
    assert table.look_after(0.99, fine) == []
    ((_, answer),) = table.look_after(1.0 + 1.0, lambda pipeline: f"trouble with {pipeline}")
    assert answer.outcome is outcome
    assert answer.detail.endswith("trouble with p")
    assert len(table) == 0


def test_messages_are_bounded_in_requests_bytes_and_header():
    table = RequestTable()
    for number in range(MAX_SHARED + 1):
        table.add(pending(number))
    assert len(send(table, 0.0)) == MAX_SHARED
    assert len(send(table, 0.0)) == 1
    for number in range(3):
        table.add(pending(1000 + number, payload=bytes(SHARED_BYTES // 2)))
    assert [len(send(table, 0.0)) for _ in range(2)] == [2, 1]
    for number in range(3):
        table.add(pending(2000 + number, weight=MAX_HEADER // 2))
    assert [len(send(table, 0.0)) for _ in range(2)] == [2, 1]


def test_what_could_not_be_sent_comes_first_and_was_not_sent():
    table = RequestTable()
    for number in (1, 2):
        table.add(pending(number))
    lane = assign(table)
    table.put_back(lane, table.take(lane, 0.0))
    table.add(pending(3))
    assert table.sent_ids(lane) == []
    assert send(table, 0.0) == [1, 2, 3]
    assert table.sent_ids(lane) == [1, 2, 3]


@given(st.lists(st.integers(0, 3 * SHARED_BYTES // 2), max_size=8))
def test_everything_is_sent_in_order_once(sizes):
    table = RequestTable()
    for number, size in enumerate(sizes):
        entry = pending(number)
        entry.payload.nbytes = size
        table.add(entry)
    sent = []
    while table.is_unassigned or table.lane("s").waiting:
        sent += send(table, 0.0)
    assert sent == list(range(len(sizes)))


# ---- between shards ---------------------------------------------------------------------------


def test_what_a_lost_shard_had_goes_elsewhere_before_what_came_later():
    table = RequestTable()
    for number in (1, 2):
        table.add(pending(number))
        send(table, 0.0, "a")
    table.lost(table.lane("a"))
    table.add(pending(3))
    assert send(table, 0.0, "b") == [1, 2, 3]
    assert not table.is_at(table.lane("a"))
    assert table.is_at(table.lane("b"))


def test_without_a_shard_requests_wait_in_order():
    table = RequestTable()
    table.add(pending(1))
    table.assign(lambda _: None)
    table.add(pending(2))
    table.assign(lambda _: None)
    assert not table.is_unassigned
    assert send(table, 0.0) == [1, 2]


def test_only_the_shard_that_has_a_request_answers_it():
    table = RequestTable()
    table.add(pending(1))
    send(table, 0.0, "a")
    answer = Answer(1, Outcome.EXPIRED, None)
    assert table.pop_answered(answer, table.lane("b")) is None
    table.lost(table.lane("a"))
    assert table.pop_answered(answer, table.lane("a")) is None
    send(table, 0.0, "b")
    assert table.pop_answered(answer, table.lane("a")) is None
    assert table.pop_answered(answer, table.lane("b")).id == 1
    assert table.pop_answered(answer, table.lane("b")) is None


def test_what_was_left_behind_is_cancelled_there_without_ending_here():
    table = RequestTable()
    for number in (1, 2, 3, 4):
        table.add(pending(number))
    send(table, 0.0, "a")
    a, b = table.lane("a"), table.lane("b")
    table.cancel(4)  # not told yet
    table.lost(a)
    send(table, 0.0, "b")
    table.cancel(3)
    assert table.take_cancels(b) == [3]
    # 1 comes back to its first shard, before that one's answer to the CANCEL.
    assert table.take_cancels(a) == [1, 2, 3, 4]
    table.pop(2)
    table.lost(b)
    assert send(table, 0.0, "a") == [1]
    cancelled = Answer(1, Outcome.CANCELLED, None)
    assert table.pop_answered(cancelled, a) is None
    assert table.pop_answered(cancelled, a).id == 1


def test_a_cancelled_request_is_cancelled_at_its_shard_alone():
    table = RequestTable()
    table.add(pending(1))
    send(table, 0.0, "a")
    table.add(pending(2))
    assign(table, "b")
    table.cancel(1)
    table.cancel(2)  # never sent
    table.cancel(2)
    assert table.take_cancels(table.lane("b")) == []
    assert table.take_cancels(table.lane("a")) == [1]
    assert table.take_cancels(table.lane("a")) == []
    assert table.take(table.lane("b"), 0.0) == []


def test_lanes_of_shards_long_gone_are_forgotten():
    table = RequestTable()
    table.add(pending(1))
    send(table, 0.0, "a")
    a = table.lane("a")
    table.lost(a)
    table.forget_lanes({"a"})
    assert table.lane("a") is a
    table.forget_lanes(set())
    assert table.lane("a") is not a
