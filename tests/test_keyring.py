"""What becomes of keys in the store: rotations with overlap, revocation, and changes by two people at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.keyring import (
    KeyRefused,
    Limits,
    limited,
    new_record,
    newest,
    owner_of,
    revoked,
    rotated,
    servers,
    state,
)
from cluster.keystore import KeyStore, Unsettled, check_free, check_unused
from cluster.records import BrokerRecord, KeyRecord, Paths, RecordError, decode, encode
from cluster.store.base import Operation, Put, StoreAwayError, Unchanged
from cluster.store.memory import MemoryStore
from laxity.keys import new_pair

PUBLICS = [new_pair().public for _ in range(8)]
PATHS = Paths("local")


def client(**limits: object) -> KeyRecord:
    return new_record("client", PUBLICS[0], 100.0, Limits(**limits), "of the test")  # type: ignore[arg-type]


def test_limits_are_a_clients() -> None:
    record = client(pipelines=["tm", "lv", "tm"], rate=5.0)
    assert (record.pipelines, record.rate, record.in_flight) == (["lv", "tm"], 5.0, 0)
    changed = limited(record, "x", Limits(pipelines=[], in_flight=3))
    assert (changed.pipelines, changed.rate, changed.in_flight) == ([], 5.0, 3)
    for role in ("node", "shard", "operator"):
        with pytest.raises(KeyRefused, match=f"limits are for clients.*{role}"):
            new_record(role, PUBLICS[0], 0.0, Limits(rate=1.0))
        assert new_record(role, PUBLICS[0], 0.0, Limits()).role == role
    for wrong in (Limits(rate=-1.0), Limits(rate=float("nan")), Limits(rate=float("inf")), Limits(in_flight=-1)):
        with pytest.raises(KeyRefused, match="0 for no limit"):
            limited(record, "x", wrong)


def test_after_a_rotation_both_keys_are_good_for_a_while() -> None:
    record = rotated(client(), "x", PUBLICS[1], 200.0, 50.0, PUBLICS[0])
    assert newest(record) == PUBLICS[1]
    assert record.good(249.9) == [PUBLICS[1], PUBLICS[0]]
    assert record.good(250.0) == [PUBLICS[1]]
    assert (state(record, 249.9), state(record, 250.0)) == ("rotating", "good")
    # Again, within the overlap: the oldest one ends when it was to end, not later.
    again = rotated(record, "x", PUBLICS[2], 240.0, 50.0, PUBLICS[1])
    assert again.good(245.0) == [PUBLICS[2], PUBLICS[1], PUBLICS[0]]
    assert again.good(260.0) == [PUBLICS[2], PUBLICS[1]]
    # At once: whatever the shards' clocks say.
    at_once = rotated(again, "x", PUBLICS[3], 241.0, 0.0, PUBLICS[2])
    assert at_once.good(1.0) == at_once.good(242.0) == [PUBLICS[3]]
    assert owner_of(PUBLICS[2], {"x": at_once}) == "x"  # logs can tell whose it was
    assert len(rotated(at_once, "x", PUBLICS[4], 300.0, 50.0, PUBLICS[3]).publics) == 2


def test_what_was_revoked_stays_so() -> None:
    record = revoked(client(), 300.0)
    assert record.good(0.0) == []
    assert state(record, 0.0) == "revoked"
    assert revoked(record, 400.0) == record
    with pytest.raises(KeyRefused, match="was revoked"):
        rotated(record, "x", PUBLICS[1], 400.0, 1.0, PUBLICS[0])
    with pytest.raises(KeyRefused, match="was revoked"):
        limited(record, "x", Limits(rate=1.0))


def test_a_rotation_that_somebody_else_has_overtaken_is_refused() -> None:
    record = rotated(client(), "x", PUBLICS[1], 200.0, 50.0, PUBLICS[0])
    with pytest.raises(KeyRefused, match="somebody else"):
        rotated(record, "x", PUBLICS[2], 200.0, 50.0, PUBLICS[0])
    with pytest.raises(KeyRefused, match="has this very key already"):
        rotated(record, "x", PUBLICS[0], 200.0, 50.0, PUBLICS[1])


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=6), st.floats(0, 1000))
def test_rotations_never_prolong_a_key_and_the_newest_is_always_good(
    steps: Sequence[tuple[float, float]], later: float
) -> None:
    now, record = 1000.0, new_record("node", PUBLICS[0], 1000.0, Limits())
    for number, (pause, overlap) in enumerate(steps):
        now += pause
        before = set(record.good(now))
        ended = {key.public: key.until for key in record.publics}
        record = rotated(record, "x", PUBLICS[number + 1], now, overlap, PUBLICS[number])
        assert record.good(now)[0] == newest(record) == PUBLICS[number + 1]
        assert set(record.good(now + later)) - {newest(record)} <= before
        for key in record.publics[1:]:
            old = ended[key.public]
            assert key.until is not None
            assert key.until <= (now + overlap if old is None else min(old, now + overlap))


def test_key_files_know_all_shards_with_good_keys() -> None:
    shards = {name: new_record("shard", PUBLICS[number], 0.0, Limits()) for number, name in enumerate("abc")}
    shards["b"] = revoked(shards["b"], 1.0)
    brokers = {"a": BrokerRecord("tcp://h:1", "tcp://h:2", 1, "h"), "b": BrokerRecord("tcp://h:3", "tcp://h:4", 1, "h")}
    found = servers({**shards, "d": client()}, brokers, 10.0)
    assert [(server.shard, server.address, server.publics) for server in found] == [
        ("a", "tcp://h:1", [PUBLICS[0]]),
        ("c", "", [PUBLICS[2]]),
    ]


# ---- in the store ------------------------------------------------------------------------------


def test_a_name_is_one_owners_until_that_one_is_revoked() -> None:
    with_keys = KeyStore(MemoryStore(), "local")
    with_keys.add("x", client(), 0.0)
    with pytest.raises(KeyRefused, match=r"there is a key 'x' already \(client, good\)"):
        with_keys.add("x", client(), 0.0)
    with pytest.raises(KeyRefused, match="there is a key 'x' already"):
        check_free("x", with_keys.read(), 0.0)
    with pytest.raises(KeyRefused, match="that of 'x' already"):
        check_unused(PUBLICS[0], with_keys.read().records)
    check_unused(PUBLICS[1], with_keys.read().records)
    with_keys.change("x", lambda record: revoked(record, 5.0))
    check_free("x", with_keys.read(), 0.0)
    with_keys.add("x", new_record("node", PUBLICS[1], 6.0, Limits()), 6.0)
    assert with_keys.read().records["x"].good(7.0) == [PUBLICS[1]]


def test_damaged_records_are_told_and_not_overwritten() -> None:
    store = MemoryStore()
    store.put(PATHS.key("bad"), b"{")
    store.put(PATHS.broker("bad"), b"nonsense")
    found = KeyStore(store, "local").read()
    assert (found.records, found.brokers) == ({}, {})
    assert "cannot be read" in found.damaged["bad"]
    with pytest.raises(RecordError):
        check_free("bad", found, 0.0)
    with pytest.raises(RecordError):
        KeyStore(store, "local").add("bad", client(), 0.0)
    with pytest.raises(RecordError):
        KeyStore(store, "local").change("bad", lambda record: record)


def test_of_many_changes_at_once_none_is_lost() -> None:
    store = MemoryStore()
    KeyStore(store, "local").add("x", client(), 0.0)
    people = 6

    def work(number: int) -> None:
        for _ in range(5):
            own = KeyStore(store, "local")
            own.change("x", lambda record: limited(record, "x", Limits(in_flight=record.in_flight + 1)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(people)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert KeyStore(store, "local").read().records["x"].in_flight == people * 5


class Overtaken(MemoryStore):
    """A store in which somebody else is faster once: what they write comes just before the first transaction."""

    def __init__(self, *first: Operation) -> None:
        super().__init__()
        self.first = list(first)

    def transaction(self, conditions: Sequence[Unchanged], operations: Sequence[Operation]) -> int | None:
        first, self.first = self.first, []
        if first:
            super().transaction([], first)
        return super().transaction(conditions, operations)


def test_a_revocation_meanwhile_is_not_undone() -> None:
    store = Overtaken()
    keys = KeyStore(store, "local")
    keys.add("x", client(), 0.0)
    store.first = [Put(PATHS.key("x"), encode(revoked(client(), 9.0)))]
    with pytest.raises(KeyRefused, match="was revoked"):
        keys.change("x", lambda record: rotated(record, "x", PUBLICS[1], 10.0, 60.0, PUBLICS[0]))
    assert keys.read().records["x"].revoked == 9.0


def test_two_who_take_a_name_at_once() -> None:
    theirs = new_record("client", PUBLICS[1], 0.0, Limits())
    keys = KeyStore(Overtaken(Put(PATHS.key("x"), encode(theirs))), "local")
    with pytest.raises(KeyRefused, match="somebody else has just made a key 'x'"):
        keys.add("x", client(), 0.0)
    assert keys.read().records["x"] == theirs


class Silent(MemoryStore):
    """A store that does not acknowledge writes; ``does`` them or not, and may not answer after that."""

    def __init__(self, does: bool, away: bool) -> None:
        super().__init__()
        self._does, self._goes_away = does, away
        self._away = False

    def get(self, key: str):  # type: ignore[no-untyped-def]
        if self._away:
            raise StoreAwayError("nobody answers")
        return super().get(key)

    def transaction(self, conditions: Sequence[Unchanged], operations: Sequence[Operation]) -> int | None:
        if self._does:
            super().transaction(conditions, operations)
        self._away = self._goes_away
        raise StoreAwayError("the answer did not come")


def test_a_change_that_was_not_acknowledged_is_looked_after() -> None:
    done = Silent(does=True, away=False)
    KeyStore(done, "local").add("x", client(), 0.0)
    entry = done.get(PATHS.key("x"))
    assert entry is not None
    assert decode(KeyRecord, entry.key, entry.value) == client()
    with pytest.raises(StoreAwayError, match="did not come"):
        KeyStore(Silent(does=False, away=False), "local").add("x", client(), 0.0)
    with pytest.raises(Unsettled, match="may have been made or not"):
        KeyStore(Silent(does=True, away=True), "local").add("x", client(), 0.0)
