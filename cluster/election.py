"""Who leads: any number of candidates, at most one of which can write as the leader."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from cluster.membership import LEASE_TTL
from cluster.store.base import Entry, LeaseEndedError, Operation, Put, Store, StoreError, Unchanged

log = logging.getLogger("laxity.cluster")

FENCE = 2 / 3
"""After which part of the TTL without a keep-alive that succeeded a leader takes itself for none any more."""
RENEWAL = 1 / 4
"""After which part of the TTL the lease is prolonged."""


class NotLeaderError(Exception):
    """The candidate does not lead, or leads no more: nothing was written."""


class Election:
    """One candidate. Who has made ``key``, under a lease of ``ttl`` seconds, leads until it vanishes.

    What a leader writes goes through :meth:`transaction`, which the store refuses once the key is not the one that this
    candidate made: one that was frozen, and believes that it leads, can write nothing. ``now`` is monotonic time in
    seconds, taken before the call. One thread may beat while another one writes.
    """

    def __init__(self, store: Store, key: str, candidate: bytes, ttl: float = LEASE_TTL) -> None:
        self._store = store
        self._key = key
        self._candidate = candidate
        self._ttl = ttl
        self._lock = threading.RLock()
        """Of whoever takes up or ends a term."""
        self._lease = 0
        self._term = 0
        """The revision by which the key was made; 0 while another leads."""
        self._sent = float("-inf")
        """When the last keep-alive (or grant) that succeeded was sent: the lease lasts for a TTL from then at least."""
        self._away = False

    def beat(self, now: float) -> None:
        """Keep leading, or try to; to be called several times per TTL, and as often as a new leader is to be found.

        Each call asks the store one thing as a rule, and a few where the leader changes.
        """
        with self._lock:
            try:
                self._beat(now)
            except LeaseEndedError:
                self._end_term()
            except StoreError as error:
                if not self._away:
                    self._away = True
                    log.warning("the election cannot go on at present: %s", error)
            else:
                self._away = False

    def is_leader(self, now: float) -> bool:
        """Whether this candidate leads, for all that it can know without asking: it ceases to well before another one
        can begin."""
        return self._term != 0 and now < self._sent + self._ttl * FENCE

    @property
    def term(self) -> int:
        """What tells this candidate's terms apart; 0 while another leads."""
        return self._term

    def transaction(self, now: float, conditions: Sequence[Unchanged], operations: Sequence[Operation]) -> int | None:
        """A transaction of the store, done only while this candidate leads; the revision, or None where one of
        ``conditions`` did not hold.

        Raises :class:`NotLeaderError`, and what the store raises. ValueError for an operation on the election's key.
        """
        if any(operation.key == self._key for operation in operations):
            raise ValueError(f"{self._key} belongs to the election; use resign()")
        term = self._term  # another one may have begun by the time that the store answers
        if not (term and self.is_leader(now)):
            raise NotLeaderError("another may lead by now: there was no keep-alive for too long, or never a term")
        revision = self._store.transaction([Unchanged(self._key, term), *conditions], operations)
        if revision is None and _revision(self._store.get(self._key)) != term:
            with self._lock:
                if self._term == term:
                    self._end_term()
            raise NotLeaderError(f"the key {self._key} is not this leader's any more; nothing was written")
        return revision

    def resign(self) -> None:
        """Leave the lead to others at once; with the next :meth:`beat` this candidate stands again."""
        with self._lock:
            lease = self._lease
            self._end_term()
            if lease:
                try:
                    self._store.revoke(lease)
                except StoreError as error:
                    log.warning("the lead could not be given back, it ends with its lease: %s", error)

    def _beat(self, now: float) -> None:
        if self._lease and now >= self._sent + self._ttl * RENEWAL:
            if self._store.keep_alive(self._lease):
                self._sent = now
            else:
                self._end_term()
        elif self._term:
            return
        entry = self._store.get(self._key)
        if entry is None:
            self._term = 0
            self._stand(now)
        elif self._lease and entry.lease == self._lease:
            # Still, or by an earlier attempt of which the store did not say that it succeeded.
            self._term = entry.mod_revision
        else:
            self.resign()

    def _stand(self, now: float) -> None:
        if not self._lease:
            self._lease = self._store.grant_lease(self._ttl)
            self._sent = now
        revision = self._store.transaction([Unchanged(self._key, 0)], [Put(self._key, self._candidate, self._lease)])
        self._term = revision or 0

    def _end_term(self) -> None:
        self._lease = 0
        self._term = 0


def _revision(entry: Entry | None) -> int:
    return 0 if entry is None else entry.mod_revision
