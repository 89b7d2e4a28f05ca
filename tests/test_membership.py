"""A process's record in the store."""

from __future__ import annotations

from cluster.membership import Membership
from cluster.store.base import Entry
from cluster.store.memory import MemoryStore


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
    store.member = member = Membership(store, "/laxity/c/nodes/a")
    member.publish(b"first")
    member.beat(0.0)
    assert value_of(store.get("/laxity/c/nodes/a")) == b"first"
    member.beat(0.1)
    assert value_of(store.get("/laxity/c/nodes/a")) == b"second"


def test_a_record_that_has_not_changed_is_not_written_again() -> None:
    store = MemoryStore()
    member = Membership(store, "/laxity/c/nodes/a")
    member.publish(b"first")
    member.beat(0.0)
    before = store.list("/laxity/").revision
    member.beat(0.1)
    assert store.list("/laxity/").revision == before


def test_who_leaves_takes_the_record_along() -> None:
    store = MemoryStore()
    member = Membership(store, "/laxity/c/nodes/a")
    member.publish(b"first")
    member.beat(0.0)
    member.leave()
    assert store.get("/laxity/c/nodes/a") is None
