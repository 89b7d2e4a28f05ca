"""``memory:``: a store inside one process, for tests and simulation."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from cluster.store.base import (
    HISTORY,
    CompactedError,
    Delete,
    Entry,
    Event,
    LeaseEndedError,
    Listing,
    Operation,
    Prefix,
    Put,
    StoreError,
    Unchanged,
    check_key,
    check_operations,
    check_ttl,
)

IDLE = 3600.0
"""How long to sleep at most, in seconds, where nothing is due."""


class _Lease:
    __slots__ = ("expires", "keys", "ttl")

    def __init__(self, ttl: float, expires: float) -> None:
        self.ttl = ttl
        self.expires = expires
        self.keys: set[str] = set()


class MemoryStore:
    """The store's contract over dicts; see :class:`cluster.store.base.Store`.

    ``history`` is how many revisions a watch may lie behind, ``clock`` (seconds, monotonic)
    ends leases.
    """

    def __init__(self, history: int = HISTORY, clock: Callable[[], float] = time.monotonic) -> None:
        self._history = history
        self._clock = clock
        self._changed = threading.Condition()
        self._entries: dict[str, Entry] = {}
        self._events: deque[Event] = deque()
        self._leases: dict[int, _Lease] = {}
        self._revision = 0
        self._last_lease = 0
        self._closed = False

    def get(self, key: str) -> Entry | None:
        check_key(key)
        with self._changed:
            self._begin()
            return self._entries.get(key)

    def list(self, prefix: Prefix) -> Listing:
        with self._changed:
            self._begin()
            return Listing(
                sorted((e for k, e in self._entries.items() if k.startswith(prefix)), key=lambda e: e.key),
                self._revision,
            )

    def put(self, key: str, value: bytes, lease: int = 0) -> int:
        revision = self.transaction([], [Put(key, value, lease)])
        assert revision is not None
        return revision

    def delete(self, key: str) -> bool:
        check_key(key)
        with self._changed:
            self._begin()
            return self._apply([Delete(key)])

    def transaction(self, conditions: Sequence[Unchanged], operations: Sequence[Operation]) -> int | None:
        check_operations(operations)
        with self._changed:
            self._begin()
            for condition in conditions:
                entry = self._entries.get(condition.key)
                if (entry.mod_revision if entry else 0) != condition.mod_revision:
                    return None
            for operation in operations:
                if isinstance(operation, Put) and operation.lease and operation.lease not in self._leases:
                    raise LeaseEndedError(f"lease {operation.lease} has ended; take a new one and write again")
            self._apply(operations)
            return self._revision

    def watch(self, prefix: Prefix, from_revision: int) -> MemoryWatch:
        return MemoryWatch(self, prefix, from_revision)

    def grant_lease(self, ttl: float) -> int:
        check_ttl(ttl)
        with self._changed:
            self._begin()
            self._last_lease += 1
            self._leases[self._last_lease] = _Lease(ttl, self._clock() + ttl)
            self._changed.notify_all()
            return self._last_lease

    def keep_alive(self, lease: int) -> bool:
        with self._changed:
            self._begin()
            held = self._leases.get(lease)
            if held is None:
                return False
            held.expires = self._clock() + held.ttl
            return True

    def revoke(self, lease: int) -> None:
        with self._changed:
            self._begin()
            self._end(lease)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _begin(self) -> None:
        """What precedes every call: refuse a closed store, and end the leases that are due."""
        if self._closed:
            raise StoreError("this store has been closed")
        now = self._clock()
        for lease in [number for number, held in self._leases.items() if held.expires <= now]:
            self._end(lease)

    def _next_expiry(self) -> float:
        """In how many seconds the next lease is due."""
        now = self._clock()
        return min((max(0.0, held.expires - now) for held in self._leases.values()), default=IDLE)

    def _end(self, lease: int) -> None:
        held = self._leases.pop(lease, None)
        if held is not None:
            self._apply([Delete(key) for key in sorted(held.keys)])

    def _apply(self, operations: Sequence[Operation]) -> bool:
        """Do the operations as one revision; whether anything changed."""
        effective = [op for op in operations if isinstance(op, Put) or op.key in self._entries]
        if not effective:
            return False
        self._revision += 1
        for operation in effective:
            key = operation.key
            old = self._entries.pop(key, None)
            if old is not None and old.lease in self._leases:
                self._leases[old.lease].keys.discard(key)
            new = None
            if isinstance(operation, Put):
                created = old.create_revision if old else self._revision
                new = Entry(key, bytes(operation.value), created, self._revision, operation.lease)
                self._entries[key] = new
                if operation.lease:
                    self._leases[operation.lease].keys.add(key)
            self._events.append(Event(key, new, self._revision))
        while self._events[0].revision <= self._revision - self._history:
            self._events.popleft()
        self._changed.notify_all()
        return True


class MemoryWatch:
    """See :class:`cluster.store.base.Watch`."""

    def __init__(self, store: MemoryStore, prefix: Prefix, from_revision: int) -> None:
        self._store = store
        self._prefix = prefix
        self._next = from_revision
        self._closed = False

    def get(self, timeout: float | None = None) -> list[Event]:
        deadline = None if timeout is None else time.monotonic() + timeout
        store = self._store
        with store._changed:
            while not (store._closed or self._closed):
                store._begin()
                events = self._take()
                wait = IDLE if deadline is None else deadline - time.monotonic()
                if events or wait <= 0:
                    return events
                store._changed.wait(min(wait, IDLE, store._next_expiry()))
            return []

    def _take(self) -> list[Event]:
        store = self._store
        if self._next <= store._revision - store._history:
            raise CompactedError(f"revision {self._next} is no longer kept; list again and watch from there")
        events = [e for e in store._events if e.revision >= self._next and e.key.startswith(self._prefix)]
        self._next = max(self._next, store._revision + 1)
        return events

    def close(self) -> None:
        with self._store._changed:
            self._closed = True
            self._store._changed.notify_all()
