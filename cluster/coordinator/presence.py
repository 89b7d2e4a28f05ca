"""Who is there and who is missing, judged with care: a store that was away looks like everybody's death."""

from __future__ import annotations

from collections.abc import Collection

BARELY = 1e-9
"""Seconds: missing, but not for long enough to mean anything."""


class Presence:
    """For how long each known member has been missing. Times are monotonic seconds.

    Leases end while the store is away, so after an outage (and at the beginning of a term) nobody is missing until one
    TTL has passed, in which members register again.
    """

    def __init__(self, ttl: float, now: float) -> None:
        self._ttl = ttl
        self._settles_at = now + ttl
        self._missing_since: dict[str, float] = {}
        self._expected_by: dict[str, float] = {}

    def expect(self, name: str, by: float) -> None:
        """A member was told to come (a machine that boots): until ``by`` it is not missing for long."""
        self._expected_by[name] = by

    def outage_ended(self, now: float) -> None:
        """The store is back."""
        self._settles_at = now + self._ttl
        self._missing_since.clear()

    def settled(self, now: float) -> bool:
        """Whether who is not registered may be taken for missing."""
        return now >= self._settles_at

    def update(self, now: float, known: Collection[str], present: Collection[str]) -> None:
        """``known`` are those who should be there, ``present`` those who are."""
        self._expected_by = {
            name: by for name, by in self._expected_by.items() if name not in present and now < by and name in known
        }
        if not self.settled(now):
            return
        gone = {name for name in known if name not in present}
        self._missing_since = {name: self._missing_since.get(name, now) for name in gone}

    def missing(self, now: float, name: str) -> float:
        """For how many seconds a member has been missing; 0 while it is there."""
        since = self._missing_since.get(name)
        if since is None:
            return 0.0
        if now < self._expected_by.get(name, now):
            return BARELY
        return max(now - since, BARELY)
