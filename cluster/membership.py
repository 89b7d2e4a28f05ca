"""How a process takes part in a cluster: a record of itself under a lease, and a view of the others'."""

from __future__ import annotations

import logging
import time

from cluster.store.base import CompactedError, Entry, LeaseEndedError, Prefix, Store, StoreError, Watch

log = logging.getLogger("laxity.cluster")

LEASE_TTL = 5.0
"""Seconds after which the record of a process that no longer keeps it alive vanishes."""


class Membership:
    """One record under a lease. While the store is away the record is kept here and written again afterwards.

    A process that is started again under the name of one that died takes the record over at once: the latest put
    decides whose lease a key is under. A member goes on whatever becomes of its lease; a new one is taken, and the
    record written again, when the store says that it has ended.
    """

    def __init__(self, store: Store, key: str, ttl: float = LEASE_TTL) -> None:
        self._store = store
        self._key = key
        self._ttl = ttl
        self._lease = 0
        self._value: bytes | None = None
        self._written: bytes | None = None
        self._alive_at = 0.0
        self._away = False

    @property
    def lease(self) -> int:
        """The lease that the record is under; 0 while it has none. From any thread."""
        return self._lease

    @property
    def registered(self) -> bool:
        """Whether the record was written under the present lease. From any thread."""
        return self._lease != 0 and self._written is not None

    def publish(self, value: bytes) -> None:
        """Set what the record says; :meth:`beat` writes it. From any thread."""
        self._value = value

    def beat(self, now: float) -> None:
        """Keep the lease alive and write the record where it changed; to be called several times per TTL. ``now`` is
        monotonic, in seconds."""
        try:
            self._beat(now, self._value)  # another thread may publish the next one while this one is being written
        except LeaseEndedError:
            self._lease = 0
        except StoreError as error:
            if not self._away:
                self._away = True
                log.warning("the record %s cannot be written at present: %s", self._key, error)
        else:
            if self._away:
                self._away = False
                log.info("the record %s is kept in the store again", self._key)

    def _beat(self, now: float, value: bytes | None) -> None:
        if self._lease and now >= self._alive_at + self._ttl / 4:
            if self._store.keep_alive(self._lease):
                self._alive_at = now
            else:
                self._lease = 0
        if value is None or (self._lease and self._written == value):
            return
        if not self._lease:
            self._lease = self._store.grant_lease(self._ttl)
            self._alive_at = now
            self._written = None
        self._store.put(self._key, value, self._lease)
        self._written = value

    def leave(self, pause: float = 0.0) -> None:
        """Take the record away; with ``pause`` only after so many seconds, if nobody has taken it over by then."""
        if self._lease:
            try:
                if pause > 0.0 and self._value is not None:
                    self._store.put(self._key, self._value, self._store.grant_lease(pause))
                self._store.revoke(self._lease)
            except StoreError as error:
                log.warning("the record %s could not be taken away: %s", self._key, error)
            self._lease = 0


class Follower:
    """The entries under one prefix or several, kept up to date. While the store is away the last known ones stay."""

    def __init__(self, store: Store, prefix: Prefix) -> None:
        self._store = store
        self._prefix = prefix
        self._watch: Watch | None = None
        self._away = False
        self.trouble = ""
        """What the store's last error said."""
        self.entries: dict[str, Entry] = {}
        """By key, as last seen."""
        self.revision = 0
        """The store's revision that they are as of; 0 before the first."""
        self.last_contact = time.monotonic()
        """Monotonic time when the store was last in contact, for all that is known; at first, when this was made."""

    @property
    def away_since(self) -> float | None:
        """The last contact where the store is away, None while it is there."""
        return self.last_contact if self._away else None

    def poll(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for a change; whether there was one."""
        try:
            changed = self._poll(timeout)
        except CompactedError:
            self.close()
            changed = False
        except StoreError as error:
            if not self._away:
                self._away = True
                log.warning("the store is away, going on with what is known: %s", error)
            self.trouble = str(error)
            self.close()
            # What is here waits for the store, not for another part of the program.
            time.sleep(timeout)
            return False
        if self._away:
            self._away = False
            log.info("the store is back")
        self.last_contact = time.monotonic()
        return changed

    def _poll(self, timeout: float) -> bool:
        if self._watch is None:
            listing = self._store.list(self._prefix)
            self.entries = {entry.key: entry for entry in listing.entries}
            self.revision = listing.revision
            self._watch = self._store.watch(self._prefix, listing.revision + 1)
            return True
        events = self._watch.get(timeout)
        for event in events:
            if event.entry is None:
                self.entries.pop(event.key, None)
            else:
                self.entries[event.key] = event.entry
            self.revision = max(self.revision, event.revision)
        return bool(events)

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None
