"""A coordinator's beats beside its loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from cluster.coordinator.figures import CoordinatorCounts
from cluster.coordinator.heartbeat import Heartbeat
from cluster.coordinator.leader import CoordinatorConfig, Leader
from cluster.coordinator.provider import Provider
from cluster.election import Election, NotLeaderError
from cluster.membership import Follower, Membership
from cluster.records import NodeRecord, Paths, encode
from cluster.store.memory import MemoryStore

PATHS = Paths("c")
TTL = 1.0


def wait(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 20.0
    while not done():
        assert time.monotonic() < until
        threading.Event().wait(0.01)


def beside(store: MemoryStore, stuck: float) -> tuple[Election, Heartbeat]:
    membership = Membership(store, PATHS.coordinator("a"), TTL)
    membership.publish(b"a")
    election = Election(store, PATHS.leader, b"a", TTL)
    return election, Heartbeat(membership, election, TTL / 10, stuck)


def test_the_lease_outlasts_a_plan_that_takes_longer() -> None:
    store = MemoryStore()
    election, heartbeat = beside(store, 60.0)
    heartbeat.start()
    try:
        wait(lambda: election.is_leader(time.monotonic()))
        term = election.term
        threading.Event().wait(3 * TTL)  # what the loop does meanwhile
        heartbeat.turn()
        assert election.term == term
        assert election.is_leader(time.monotonic())
        assert election.transaction(time.monotonic(), [], []) is not None
        assert store.get(PATHS.coordinator("a")) is not None
    finally:
        heartbeat.stop()


def test_a_loop_that_is_stuck_leads_no_more() -> None:
    store = MemoryStore()
    _, heartbeat = beside(store, 2 * TTL)
    heartbeat.start()
    other = Election(store, PATHS.leader, b"b", TTL)

    def leads() -> bool:
        other.beat(time.monotonic())
        return other.is_leader(time.monotonic())

    try:
        wait(lambda: store.get(PATHS.leader) is not None)
        wait(leads)
    finally:
        heartbeat.stop()
        other.resign()


def test_what_was_planned_in_one_term_is_not_written_in_the_next() -> None:
    store = MemoryStore()
    election = Election(store, PATHS.leader, b"a", 5.0)
    now = time.monotonic()
    election.beat(now)
    leader = Leader(CoordinatorConfig(name="a"), PATHS, election, Provider("", ""), CoordinatorCounts(), now)
    election.resign()
    election.beat(now)
    assert election.is_leader(now)
    store.put(PATHS.node("n"), encode(NodeRecord(1, "h", "ready")))
    follower = Follower(store, PATHS.root)
    follower.poll(0.0)
    with pytest.raises(NotLeaderError):
        leader.step(now + 1.0, follower, True)
    assert store.get(PATHS.state("n")) is None
    assert election.is_leader(now)
