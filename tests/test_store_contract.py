"""What every store must do: one suite, run against each backend."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from cluster.store import open_store, sqlite_url
from cluster.store.base import (
    CompactedError,
    Delete,
    Entry,
    Event,
    LeaseEndedError,
    Put,
    Store,
    StoreError,
    Unchanged,
    Watch,
)
from cluster.store.memory import MemoryStore
from cluster.store.sqlite import SqliteStore

HISTORY = 20
WAIT = 30.0
"""How long what must come is waited for, in seconds."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "sqlite", "plain etcd", "etcd of three"])
def store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Store]:
    if request.param == "plain etcd":
        made = emptied(request.getfixturevalue("plain_etcd"))
    elif request.param == "etcd of three":
        made = emptied(request.getfixturevalue("etcd").url)
    else:
        made = make(request.param, tmp_path, clock)
    yield made
    made.close()


@pytest.fixture(params=["memory", "sqlite"])
def timed(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Store]:
    """The stores that go by our clock and keep :data:`HISTORY` revisions."""
    made = make(request.param, tmp_path, clock)
    yield made
    made.close()


def emptied(url: str) -> Store:
    store = open_store(url)
    for entry in store.list("").entries:
        store.delete(entry.key)
    return store


def read(watch: Watch, count: int) -> list[Event]:
    """The next events, so many of them at least: some stores bring them with a delay."""
    events: list[Event] = []
    while len(events) < count:
        got = watch.get(WAIT)
        assert got, f"{events} and no more"
        events += got
    return events


def make(backend: str, directory: Path, clock: Callable[[], float], boot: str = "boot") -> Store:
    if backend == "memory":
        return MemoryStore(HISTORY, clock)
    return SqliteStore(directory / "store.db", HISTORY, clock, boot)


# ---- keys and revisions ----------------------------------------------------------------


def test_what_was_put_is_got_with_its_revisions(store: Store) -> None:
    assert store.get("/a") is None
    first = store.put("/a", b"1")
    other = store.put("/b", b"")
    second = store.put("/a", b"2")
    assert first < other < second
    assert store.get("/a") == Entry("/a", b"2", first, second)
    assert store.get("/b") == Entry("/b", b"", other, other)


def test_delete_says_whether_the_key_was_there(store: Store) -> None:
    store.put("/a", b"1")
    assert store.delete("/a")
    assert store.get("/a") is None
    before = store.list("/").revision
    assert not store.delete("/a")
    assert store.list("/").revision == before
    again = store.put("/a", b"2")
    entry = store.get("/a")
    assert entry is not None
    assert entry.create_revision == again


def test_a_listing_is_ordered_and_only_under_its_prefix(store: Store) -> None:
    for key in ["/b/2", "/b/1", "/b", "/bc", "/a", "/b/é", "/b/\U0010ffff", "/b/Z", "/b/%", "/b/_"]:
        store.put(key, key.encode())
    listing = store.list("/b/")
    assert [e.key for e in listing.entries] == [
        "/b/%",
        "/b/1",
        "/b/2",
        "/b/Z",
        "/b/_",
        "/b/é",
        "/b/\U0010ffff",
    ]
    last = store.get("/b/_")
    assert last is not None
    assert listing.revision == last.mod_revision
    assert store.list("/nothing").entries == []
    assert len(store.list("").entries) == 10


@pytest.mark.parametrize(
    ("prefix", "listed"),
    [
        (("/b/", "/a/"), ["/a/1", "/a/2", "/b/1"]),
        (("/a/", "/b/", "/a/1", "/a/"), ["/a/1", "/a/2", "/b/1"]),
        (("/a", "/a/"), ["/a", "/a/1", "/a/2", "/a0"]),
        (("/a0", "/a/", "/none"), ["/a/1", "/a/2", "/a0"]),
        (("/b", ""), ["/a", "/a/1", "/a/2", "/a0", "/b/1", "/c/1"]),
        ((), []),
    ],
)
def test_several_prefixes_are_their_keys_each_once(store: Store, prefix: tuple[str, ...], listed: list[str]) -> None:
    start = store.list("").revision + 1
    for key in ["/c/1", "/b/1", "/a0", "/a/2", "/a/1", "/a"]:
        store.put(key, b"")
    listing = store.list(prefix)
    assert [e.key for e in listing.entries] == listed
    assert listing.revision == start + 5
    watch = store.watch(prefix, start)
    assert sorted(e.key for e in read(watch, len(listed))) == listed
    store.transaction([], [Delete("/a"), Delete("/a/1"), Delete("/b/1"), Delete("/c/1")])
    gone = [(key, None) for key in ["/a", "/a/1", "/b/1", "/c/1"] if key in listed]
    assert sorted((e.key, e.entry) for e in read(watch, len(gone))) == gone
    assert watch.get(timeout=0) == []
    watch.close()


@pytest.mark.parametrize("key", ["", "a", "/a\0b"])
def test_what_is_no_key_is_refused(store: Store, key: str) -> None:
    for call in (
        lambda: store.put(key, b""),
        lambda: store.delete(key),
        lambda: store.get(key),
        lambda: store.transaction([], [Put("/good", b""), Delete(key)]),
    ):
        with pytest.raises(ValueError, match="is no key"):
            call()
    assert store.list("").entries == []


def test_values_are_any_bytes(store: Store) -> None:
    value = bytes(range(256)) * 5000
    store.put("/big", value)
    entry = store.get("/big")
    assert entry is not None
    assert entry.value == value


# ---- transactions ---------------------------------------------------------------------


def test_a_transaction_is_one_revision(store: Store) -> None:
    store.put("/old", b"")
    revision = store.transaction([], [Put("/a", b"1"), Delete("/old"), Put("/b", b"2")])
    assert revision == store.list("/").revision
    assert [(e.key, e.mod_revision) for e in store.list("/").entries] == [("/a", revision), ("/b", revision)]


def test_a_transaction_whose_condition_fails_does_nothing(store: Store) -> None:
    there = store.put("/a", b"1")
    before = store.list("/")
    for condition in (Unchanged("/a", 0), Unchanged("/a", there + 1), Unchanged("/absent", there)):
        assert store.transaction([Unchanged("/a", there), condition], [Put("/a", b"2"), Delete("/a2")]) is None
    assert store.list("/") == before
    assert store.transaction([Unchanged("/a", there), Unchanged("/absent", 0)], [Put("/a", b"2")]) is not None


def test_a_transaction_that_changes_nothing_returns_the_present_revision(store: Store) -> None:
    there = store.put("/a", b"1")
    assert store.transaction([], []) == there
    assert store.transaction([Unchanged("/a", there)], [Delete("/absent")]) == there


def test_a_transaction_on_one_key_twice_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="twice"):
        store.transaction([], [Put("/a", b"1"), Delete("/a")])


def test_only_one_of_racing_threads_wins(store: Store) -> None:
    won = []
    barrier = threading.Barrier(8)

    def race(number: int) -> None:
        barrier.wait()
        if store.transaction([Unchanged("/leader", 0)], [Put("/leader", b"%d" % number)]) is not None:
            won.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    entry = store.get("/leader")
    assert entry is not None
    assert int(entry.value) == won[0]


def test_counting_threads_lose_nothing(store: Store) -> None:
    def count() -> None:
        for _ in range(10):
            increment(store)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entry = store.get("/count")
    assert entry is not None
    assert int(entry.value) == 40


def increment(store: Store) -> None:
    while True:
        entry = store.get("/count")
        value = int(entry.value) + 1 if entry else 1
        condition = Unchanged("/count", entry.mod_revision if entry else 0)
        if store.transaction([condition], [Put("/count", b"%d" % value)]) is not None:
            return


# ---- watches --------------------------------------------------------------------------


def test_a_watch_sees_each_change_once_and_in_order(store: Store) -> None:
    start = store.list("/w/").revision + 1
    watch = store.watch("/w/", start)
    first = store.put("/w/a", b"1")
    store.put("/elsewhere", b"x")
    second = store.transaction([], [Put("/w/b", b"2"), Put("/other", b""), Put("/w/a", b"3")])
    store.delete("/w/a")
    third = store.list("/").revision
    assert second is not None
    assert read(watch, 4) == [
        Event("/w/a", Entry("/w/a", b"1", first, first), first),
        Event("/w/b", Entry("/w/b", b"2", second, second), second),
        Event("/w/a", Entry("/w/a", b"3", first, second), second),
        Event("/w/a", None, third),
    ]
    assert watch.get(timeout=0) == []
    fourth = store.put("/w/a", b"4")
    assert read(watch, 1) == [Event("/w/a", Entry("/w/a", b"4", fourth, fourth), fourth)]
    watch.close()
    assert watch.get() == []


def test_a_watch_starts_in_the_past_or_in_the_future(store: Store) -> None:
    first = store.put("/a", b"1")
    second = store.put("/a", b"2")
    past = store.watch("/", second)
    future = store.watch("/", second + 2)
    assert [e.revision for e in read(past, 1)] == [second]
    store.put("/a", b"3")
    fourth = store.put("/a", b"4")
    assert [e.revision for e in read(future, 1)] == [fourth]
    assert [e.revision for e in read(past, 2)] == [second + 1, fourth]
    assert first < second


def test_a_waiting_watch_wakes(store: Store) -> None:
    watch = store.watch("/", store.list("/").revision + 1)
    seen: list[list[Event]] = []
    waiting = threading.Thread(target=lambda: seen.append(watch.get()))
    waiting.start()
    store.put("/a", b"1")
    waiting.join()
    assert [event.key for event in seen[0]] == ["/a"]


def test_closing_ends_a_wait(store: Store) -> None:
    watches = [store.watch("/", store.list("/").revision + 1) for _ in range(2)]
    seen: list[list[Event]] = []
    threads = [threading.Thread(target=lambda watch=watch: seen.append(watch.get())) for watch in watches]
    for thread in threads:
        thread.start()
    watches[0].close()
    threads[0].join()
    store.close()
    threads[1].join()
    assert seen == [[], []]
    with pytest.raises(StoreError, match="closed"):
        store.get("/a")


def test_a_watch_that_lies_too_far_behind_is_told(timed: Store) -> None:
    behind = timed.watch("/", timed.put("/a", b"0"))
    for number in range(HISTORY - 1):
        timed.put("/a", b"%d" % number)
    abreast = timed.watch("/", timed.list("/").revision - HISTORY + 1)
    assert len(abreast.get(timeout=0)) == HISTORY
    timed.put("/a", b"last")
    with pytest.raises(CompactedError, match="list again"):
        behind.get(timeout=0)
    listing = timed.list("/")
    assert timed.watch("/", listing.revision + 1).get(timeout=0) == []


# ---- leases ---------------------------------------------------------------------------


def test_a_key_goes_with_its_lease(timed: Store, clock: Clock) -> None:
    lease = timed.grant_lease(5.0)
    assert lease > 0
    timed.put("/mine/a", b"", lease)
    timed.put("/mine/b", b"", lease)
    timed.put("/stays", b"")
    entry = timed.get("/mine/a")
    assert entry is not None
    assert entry.lease == lease
    clock.now += 4.9
    assert timed.keep_alive(lease)
    clock.now += 4.9
    assert len(timed.list("/mine/").entries) == 2
    watch = timed.watch("/", timed.list("/").revision + 1)
    clock.now += 0.1
    events = watch.get(timeout=0)
    assert [(e.key, e.entry) for e in events] == [("/mine/a", None), ("/mine/b", None)]
    assert events[0].revision == events[1].revision
    assert timed.get("/mine/a") is None
    assert [e.key for e in timed.list("/").entries] == ["/stays"]
    assert not timed.keep_alive(lease)
    with pytest.raises(LeaseEndedError, match="take a new one"):
        timed.put("/mine/a", b"", lease)
    with pytest.raises(LeaseEndedError):
        timed.transaction([], [Put("/other", b""), Put("/mine/a", b"", lease)])
    assert timed.get("/other") is None


@pytest.mark.parametrize("call", ["get", "list", "delete", "transaction", "keep_alive"])
def test_whatever_is_called_first_sees_the_end_of_a_lease(timed: Store, clock: Clock, call: str) -> None:
    lease = timed.grant_lease(1.0)
    timed.put("/a", b"", lease)
    clock.now += 1.0
    if call == "get":
        assert timed.get("/a") is None
    elif call == "list":
        assert timed.list("/").entries == []
    elif call == "delete":
        assert not timed.delete("/a")
    elif call == "transaction":
        assert timed.transaction([Unchanged("/a", 0)], [Put("/b", b"")]) is not None
    else:
        assert not timed.keep_alive(lease)


def test_a_revoked_lease_takes_its_keys(store: Store) -> None:
    lease, other = store.grant_lease(5.0), store.grant_lease(5.0)
    assert lease != other
    store.put("/a", b"", lease)
    store.put("/b", b"", other)
    store.revoke(lease)
    store.revoke(lease)
    assert [e.key for e in store.list("/").entries] == ["/b"]
    assert not store.keep_alive(lease)
    assert store.keep_alive(other)


def test_the_latest_put_decides_about_the_lease(store: Store) -> None:
    first, second = store.grant_lease(5.0), store.grant_lease(5.0)
    store.put("/freed", b"", first)
    store.put("/freed", b"")
    store.put("/moved", b"", first)
    store.put("/moved", b"", second)
    store.put("/again", b"", first)
    store.delete("/again")
    store.put("/again", b"")
    store.revoke(first)
    assert [e.key for e in store.list("/").entries] == ["/again", "/freed", "/moved"]
    store.revoke(second)
    assert [e.key for e in store.list("/").entries] == ["/again", "/freed"]


@pytest.mark.parametrize("ttl", [0.0, -1.0, float("inf"), float("nan")])
def test_a_lease_needs_a_duration(store: Store, ttl: float) -> None:
    with pytest.raises(ValueError, match="ttl"):
        store.grant_lease(ttl)


@pytest.mark.parametrize("backend", ["memory", "sqlite"])
def test_a_watch_sees_a_lease_end_that_nobody_else_touches(backend: str, tmp_path: Path) -> None:
    real = MemoryStore() if backend == "memory" else SqliteStore(tmp_path / "store.db")
    lease = real.grant_lease(0.05)
    start = real.put("/a", b"", lease)
    assert [event.entry for event in real.watch("/", start + 1).get()] == [None]
    real.close()


# ---- against a model ---------------------------------------------------------------------

KEYS = st.sampled_from(["/a", "/a/b", "/a/c", "/b", "/é"])
VALUES = st.binary(max_size=3)


class Against(RuleBasedStateMachine):
    """A store beside the plainest thing that could be right: dicts and a list of events."""

    backend = "memory"
    ttl = 1.0
    """A lease's shortest, in seconds."""
    compacts = True
    """Whether only :data:`HISTORY` revisions are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()

    def open(self, directory: Path) -> Store:
        return make(self.backend, directory, self.clock)

    @initialize()
    def begin(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.store = self.open(Path(self.directory.name))
        self.entries: dict[str, tuple[bytes, int, int, int]] = {}
        self.leases: dict[int, tuple[float, float]] = {}
        self.granted: list[int] = []
        self.events: list[tuple[int, str, bytes | None]] = []
        self.revision = self.watched = self.store.list("").revision
        self.watch = self.store.watch("/a", self.revision + 1)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.directory.cleanup()

    def expire(self) -> None:
        for lease in sorted(self.leases):
            if self.leases[lease][1] <= self.clock.now:
                self.end(lease)

    def end(self, lease: int) -> None:
        self.leases.pop(lease, None)
        self.apply([Delete(key) for key in sorted(self.entries) if self.entries[key][3] == lease])

    def apply(self, operations: list[Put | Delete]) -> None:
        done = [op for op in operations if isinstance(op, Put) or op.key in self.entries]
        self.revision += bool(done)
        for op in done:
            if isinstance(op, Put):
                created = self.entries[op.key][1] if op.key in self.entries else self.revision
                self.entries[op.key] = (op.value, created, self.revision, op.lease)
                self.events.append((self.revision, op.key, op.value))
            else:
                del self.entries[op.key]
                self.events.append((self.revision, op.key, None))

    @rule(
        keys=st.lists(KEYS, min_size=1, max_size=3, unique=True),
        value=VALUES,
        deletes=st.integers(0, 3),
        lease=st.integers(0, 4),
        stale=st.booleans(),
    )
    def transact(self, keys: list[str], value: bytes, deletes: int, lease: int, stale: bool) -> None:
        self.expire()
        number = self.granted[lease - 1] if 0 < lease <= len(self.granted) else 0
        operations: list[Put | Delete] = [
            Delete(key) if index < deletes else Put(key, value, number) for index, key in enumerate(keys)
        ]
        present = self.entries[keys[0]][2] if keys[0] in self.entries else 0
        conditions = [Unchanged(keys[0], present + stale)]
        if stale:
            assert self.store.transaction(conditions, operations) is None
        elif number and number not in self.leases and any(isinstance(op, Put) for op in operations):
            with pytest.raises(LeaseEndedError):
                self.store.transaction(conditions, operations)
        else:
            self.apply(operations)
            assert self.store.transaction(conditions, operations) == self.revision

    @rule(longer=st.sampled_from([1, 3]))
    def grant(self, longer: int) -> None:
        self.expire()
        ttl = self.ttl * longer
        lease = self.store.grant_lease(ttl)
        assert lease not in self.granted
        self.granted.append(lease)
        self.leases[lease] = (ttl, self.clock.now + ttl)

    @rule(which=st.integers(0, 3))
    def keep(self, which: int) -> None:
        self.expire()
        if which < len(self.granted):
            lease = self.granted[which]
            assert self.store.keep_alive(lease) == (lease in self.leases)
            if lease in self.leases:
                ttl = self.leases[lease][0]
                self.leases[lease] = (ttl, self.clock.now + ttl)

    @rule(which=st.integers(0, 3))
    def revoke(self, which: int) -> None:
        self.expire()
        if which < len(self.granted):
            self.end(self.granted[which])
            self.store.revoke(self.granted[which])

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]))
    def pass_time(self, seconds: float) -> None:
        # Leases that end at once in one call end in the order of their numbers in both, so look often.
        self.clock.now += seconds

    @rule()
    def look(self) -> None:
        self.expire()
        expected = [e for e in self.events if e[0] > self.watched and e[1].startswith("/a")]
        if self.compacts and self.watched < self.revision - HISTORY:
            with pytest.raises(CompactedError):
                self.watch.get(timeout=0)
            self.watch = self.store.watch("/a", self.revision + 1)
        else:
            seen = [(e.revision, e.key, e.entry and e.entry.value) for e in read(self.watch, len(expected))]
            assert seen == expected
            assert self.watch.get(timeout=0) == []
        self.watched = self.revision

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "store"):
            return
        self.expire()
        listing = self.store.list("/a")
        assert listing.revision == self.revision
        assert [(e.key, e.value, e.create_revision, e.mod_revision, e.lease) for e in listing.entries] == [
            (key, *self.entries[key]) for key in sorted(self.entries) if key.startswith("/a")
        ]


class AgainstSqlite(Against):
    backend = "sqlite"


class AgainstEtcd(Against):
    ttl = 1000.0  # etcd does not go by our clock
    compacts = False

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url

    def open(self, directory: Path) -> Store:
        return emptied(self.url)


TestMemoryAgainstModel = Against.TestCase
TestMemoryAgainstModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestSqliteAgainstModel = AgainstSqlite.TestCase
TestSqliteAgainstModel.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


def test_etcd_against_model(plain_etcd: str) -> None:
    run_state_machine_as_test(
        lambda: AgainstEtcd(plain_etcd), settings=settings(max_examples=15, stateful_step_count=30, deadline=None)
    )


# ---- SQLite alone: several processes, and files that are not as they should be ---------------------


COUNT = """
import sys
from cluster.store import open_store
from cluster.store.base import Put, Unchanged
store = open_store(sys.argv[1])
done = 0
while done < 15:
    entry = store.get("/count")
    condition = Unchanged("/count", entry.mod_revision if entry else 0)
    value = int(entry.value) + 1 if entry else 1
    done += store.transaction([condition], [Put("/count", b"%d" % value)]) is not None
"""


def test_processes_count_without_loss_and_are_watched(tmp_path: Path) -> None:
    (tmp_path / "a dir?").mkdir()
    url = sqlite_url(tmp_path / "a dir?" / "store.db")
    # Not opened before the children start: creating the file is part of the race.
    children = [subprocess.Popen([sys.executable, "-c", COUNT, url]) for _ in range(3)]
    store = open_store(url)
    watch = store.watch("/count", 1)
    values: list[int] = []
    while len(values) < 45 and any(child.poll() in (None, 0) for child in children):
        values += [int(event.entry.value) for event in watch.get(timeout=10) if event.entry]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert values == list(range(1, 46))
    store.close()


HOLD = """
import sys
from cluster.store import open_store
store = open_store(sys.argv[1])
store.put("/mine", b"", store.grant_lease(1.0))
print("held", flush=True)
sys.stdin.read()
"""


def test_the_lease_of_a_killed_process_ends(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "store.db")
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    child.kill()
    child.communicate()
    store = open_store(url)
    watch = store.watch("/mine", 1)
    events: list[Event] = []
    while len(events) < 2:
        events += watch.get()
    assert [event.entry is None for event in events] == [False, True]
    assert store.get("/mine") is None
    store.close()


def test_what_was_stored_outlives_its_process_but_leases_not_the_boot(tmp_path: Path, clock: Clock) -> None:
    store = make("sqlite", tmp_path, clock)
    revision = store.put("/stays", b"1")
    store.put("/leased", b"2", store.grant_lease(60.0))
    store.close()
    clock.now = 1.0
    same = make("sqlite", tmp_path, clock)
    assert len(same.list("/").entries) == 2
    same.close()
    rebooted = make("sqlite", tmp_path, clock, boot="another")
    assert rebooted.list("/").entries == [Entry("/stays", b"1", revision, revision)]
    rebooted.close()


def test_a_locked_file_says_so(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "store.db"
    store = SqliteStore(path, HISTORY, clock, "boot", busy=0.05)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="another process has held it"):
        store.put("/a", b"")
    assert store.get("/a") is None
    holder.execute("ROLLBACK")
    holder.close()
    store.put("/a", b"")
    store.close()


def test_a_full_disk_says_so_and_harms_nothing(tmp_path: Path, clock: Clock) -> None:
    store = SqliteStore(tmp_path / "store.db", HISTORY, clock, "boot")
    store.put("/a", b"before")
    # SQLite's own bound on the file gives the same error as a disk that is full.
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="disk is full; make room"):
        store.put("/a", bytes(1_000_000))
    entry = store.get("/a")
    assert entry is not None
    assert entry.value == b"before"
    store._db.execute("PRAGMA max_page_count = 100000")
    store.put("/a", b"after")
    store.close()


def test_a_file_that_is_no_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database at all, but long enough to be looked at" * 50)
    with pytest.raises(StoreError, match=r"text: it is no store"):
        open_store(sqlite_url(tmp_path / "text"))
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE theirs (x)")
    other.close()
    with pytest.raises(StoreError, match="another program's database"):
        open_store(sqlite_url(tmp_path / "other.db"))
    newer = sqlite3.connect(tmp_path / "newer.db")
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(StoreError, match="format 99"):
        open_store(sqlite_url(tmp_path / "newer.db"))


def test_a_damaged_file_says_so(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "store.db"
    store = make("sqlite", tmp_path, clock)
    for number in range(200):
        store.put(f"/key/{number}", b"x" * 500)
    store.close()
    raw = bytearray(path.read_bytes())
    raw[4096 * 2 :] = b"\xa5" * (len(raw) - 4096 * 2)
    path.write_bytes(raw)
    with pytest.raises(StoreError, match="damaged"):
        make("sqlite", tmp_path, clock).list("/")


def test_a_file_that_is_moved_away_is_noticed(tmp_path: Path, clock: Clock) -> None:
    store = make("sqlite", tmp_path, clock)
    (tmp_path / "store.db").rename(tmp_path / "elsewhere.db")
    with pytest.raises(StoreError, match="moved or removed"):
        store.put("/a", b"")
    store.close()


def test_a_child_may_not_use_the_store_of_its_parent(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from cluster.store import open_store\n"
        "store = open_store(sys.argv[1])\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    try:\n"
        "        store.put('/a', b'')\n"
        "    except Exception as error:\n"
        "        print(error, flush=True)\n"
        "    os._exit(0)\n"
        "os.waitpid(pid, 0)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, sqlite_url(tmp_path / "store.db")], capture_output=True, text=True, check=True
    )
    assert "opened by the parent process" in ended.stdout


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://localhost:6379", "write sqlite:///path/to/store.db or etcd://host:2379"),
        ("memory", "unknown store"),
        ("", "unknown store"),
        ("sqlite://relative.db", "absolute path"),
        ("sqlite:///", "absolute path"),
        ("sqlite:///no/such/directory/at/all/store.db", "does not exist; create it"),
        ("sqlite:///dev", "cannot be opened"),
    ],
)
def test_an_address_that_leads_nowhere_says_what_to_write(url: str, says: str) -> None:
    with pytest.raises(StoreError, match=says):
        open_store(url)


def test_memory_is_private() -> None:
    first, second = open_store("memory:"), open_store("memory:")
    first.put("/a", b"")
    assert second.get("/a") is None
