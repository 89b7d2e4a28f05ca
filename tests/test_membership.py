"""A process's record in the store."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import pytest

from cluster.membership import LEASE_TTL, Follower, Membership
from cluster.store.base import Entry, StoreError
from cluster.store.memory import MemoryStore

KEY = "/laxity/c/nodes/a"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Unreliable(MemoryStore):
    """A store that can be away, or take no records."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, history: int = 100) -> None:
        super().__init__(history, clock)
        self.away = False
        self.full = False

    def put(self, key: str, value: bytes, lease: int = 0) -> int:
        if self.full:
            raise StoreError("it is full")
        return super().put(key, value, lease)

    def _begin(self) -> None:
        if self.away:
            raise StoreError("it cannot be reached")
        super()._begin()


class Interrupted(MemoryStore):
    """A store during whose first write another thread publishes: its turn comes just then."""

    def __init__(self) -> None:
        super().__init__()
        self.member: Membership | None = None

    def put(self, key: str, value: bytes, lease: int = 0) -> int:
        member, self.member = self.member, None
        if member is not None:
            member.publish(b"second")
        return super().put(key, value, lease)


def value_of(entry: Entry | None) -> bytes | None:
    return None if entry is None else entry.value


def test_what_is_published_while_the_record_is_written_is_written_next() -> None:
    store = Interrupted()
    store.member = member = Membership(store, KEY)
    member.publish(b"first")
    member.beat(0.0)
    assert value_of(store.get(KEY)) == b"first"
    member.beat(0.1)
    assert value_of(store.get(KEY)) == b"second"


def test_a_record_that_has_not_changed_is_not_written_again() -> None:
    store = MemoryStore()
    member = Membership(store, KEY)
    member.publish(b"first")
    member.beat(0.0)
    before = store.list("/laxity/").revision
    member.beat(0.1)
    assert store.list("/laxity/").revision == before


def test_who_leaves_takes_the_record_along() -> None:
    store = MemoryStore()
    member = Membership(store, KEY)
    member.publish(b"first")
    member.beat(0.0)
    member.leave()
    assert store.get(KEY) is None


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Unreliable:
    return Unreliable(clock)


def present(store: MemoryStore) -> bytes | None:
    return value_of(store.get(KEY))


def test_a_record_stays_while_it_is_kept_alive_and_not_longer(store: Unreliable, clock: Clock) -> None:
    member = Membership(store, KEY)
    member.publish(b"here")
    for _ in range(20):
        member.beat(clock.now)
        clock.now += LEASE_TTL / 4
        assert present(store) == b"here"
    clock.now += LEASE_TTL
    assert present(store) is None


def test_a_record_whose_lease_ended_is_written_again_though_it_has_not_changed(store: Unreliable, clock: Clock) -> None:
    member = Membership(store, KEY)
    member.publish(b"here")
    member.beat(clock.now)
    clock.now += 2 * LEASE_TTL  # frozen, say
    member.beat(clock.now)
    assert present(store) == b"here"


def test_a_record_is_written_after_an_outage_and_the_log_says_so_once(
    store: Unreliable, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "laxity.cluster")
    member = Membership(store, KEY)
    member.publish(b"before")
    member.beat(clock.now)
    store.away = True
    for number in range(30):
        clock.now += 1
        member.publish(b"during %d" % number)
        member.beat(clock.now)
    store.away = False
    assert present(store) is None
    member.beat(clock.now)
    assert present(store) == b"during 29"
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_a_record_that_could_not_be_written_under_a_new_lease_is_not_taken_for_written(
    store: Unreliable, clock: Clock
) -> None:
    member = Membership(store, KEY)
    member.publish(b"here")
    member.beat(clock.now)
    clock.now += LEASE_TTL
    store.full = True
    member.beat(clock.now)
    assert present(store) is None
    store.full = False
    member.beat(clock.now)
    assert present(store) == b"here"


def test_who_starts_again_under_a_name_has_the_record_at_once_and_keeps_it(store: Unreliable, clock: Clock) -> None:
    killed, again = Membership(store, KEY), Membership(store, KEY)
    killed.publish(b"killed")
    killed.beat(clock.now)
    clock.now += LEASE_TTL / 2
    again.publish(b"again")
    again.beat(clock.now)
    assert present(store) == b"again"
    clock.now += LEASE_TTL * 3 / 4  # the killed one's lease ends
    assert present(store) == b"again"
    killed.leave()
    assert present(store) == b"again"


def test_a_follower_knows_what_is_under_its_prefixes() -> None:
    store = MemoryStore()
    store.put("/a/1", b"1")
    follower = Follower(store, ("/a/", "/b/"))
    assert follower.poll(0)
    assert {key: entry.value for key, entry in follower.entries.items()} == {"/a/1": b"1"}
    assert not follower.poll(0)
    store.put("/b/1", b"2")
    store.put("/c/1", b"3")
    store.delete("/a/1")
    assert follower.poll(0)
    assert {key: entry.value for key, entry in follower.entries.items()} == {"/b/1": b"2"}
    follower.close()


def test_a_follower_that_lies_too_far_behind_lists_again() -> None:
    store = Unreliable(history=5)
    store.put("/a/stays", b"0")
    store.put("/a/goes", b"0")
    follower = Follower(store, "/a/")
    follower.poll(0)
    store.delete("/a/goes")
    for number in range(10):
        store.put("/a/stays", b"%d" % number)
    follower.poll(0)
    assert follower.poll(0)
    assert {key: entry.value for key, entry in follower.entries.items()} == {"/a/stays": b"9"}
    assert follower.away_since is None


def test_a_follower_keeps_what_it_knows_while_the_store_is_away(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "laxity.cluster")
    store = Unreliable()
    store.put("/a/1", b"1")
    follower = Follower(store, "/a/")
    begun = follower.last_contact
    follower.poll(0)
    assert follower.last_contact >= begun
    assert follower.away_since is None
    store.away = True
    contact = follower.last_contact
    for _ in range(3):
        assert not follower.poll(0)
        assert follower.away_since == follower.last_contact == contact
        assert list(follower.entries) == ["/a/1"]
    store.away = False
    store.put("/a/2", b"2")
    assert follower.poll(0)
    assert follower.away_since is None
    assert follower.last_contact > contact
    assert list(follower.entries) == ["/a/1", "/a/2"]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
