"""Who is let in: an engine. The keys in the store say who there is, their roles what each may do.

Times are Unix seconds, as the records' are. A peer is known by its public key, which libzmq has proved that it owns.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final, Literal, NamedTuple

from cluster.logs import rfc3339
from cluster.records import KeyRecord
from laxity.keys import Role

Domain = Literal["frontend", "backend"]
PORTS: Final[dict[Domain, str]] = {"frontend": "the port for services", "backend": "the port for agents"}
"""What logs call a shard's two sockets."""


class Task(Enum):
    """What a peer wants, by the message with which it begins."""

    SUBMIT = "submit requests"
    SERVE = "work as an agent"
    FETCH = "fetch files"
    STORE = "upload files"
    TAP = "record requests"


ENTER: Final[dict[Domain, frozenset[Role]]] = {
    "frontend": frozenset({"client", "operator", "node", "shard"}),
    "backend": frozenset({"node"}),
}
"""The roles that may connect to a port."""
MAY: Final[dict[Task, frozenset[Role]]] = {
    Task.SUBMIT: frozenset({"client", "operator"}),
    Task.SERVE: frozenset({"node"}),
    Task.FETCH: frozenset({"node", "shard", "operator"}),
    Task.STORE: frozenset({"operator"}),
    Task.TAP: frozenset({"operator"}),
}
"""The roles that may do a thing, once they are connected."""


class Refused(NamedTuple):
    """Why somebody is not let in, or may not do a thing: one of the words in ``refusals.py``, and for people."""

    reason: str
    text: str


class Known(NamedTuple):
    """A public key that the store has a record of, good or not."""

    owner: str
    """The record's name."""
    until: float
    """When it ends; infinity where nobody said so."""
    record: KeyRecord


class Access:
    """The directory. Nobody is let in until it was :meth:`admit`-ted once; after that, what was admitted last holds."""

    def __init__(self) -> None:
        self.is_ready = False
        self.records: Mapping[str, KeyRecord] = {}
        self._known: dict[str, Known] = {}
        self._turned = False
        self._next_end = float("inf")

    def admit(self, records: Mapping[str, KeyRecord]) -> None:
        """Go by these records, by the names of their owners. A public key that two have is the first one's, by name,
        which is said nowhere: `laxity keys` does not write such."""
        self.records = records
        self._known = {}
        for owner in sorted(records):
            record = records[owner]
            for key in record.publics:
                until = float("inf") if key.until is None else key.until
                self._known.setdefault(key.public, Known(owner, until, record))
        self.is_ready = self._turned = True

    def turned(self, now: float) -> bool:
        """Whether those who were let in have to be looked at again: since the last call the directory became another,
        or a key ended."""
        if not self._turned and now < self._next_end:
            return False
        self._turned = False
        ends = [known.until for known in self._known.values() if known.until > now]
        self._next_end = min(ends, default=float("inf"))
        return True

    def known(self, public: str) -> Known | None:
        """Whose key this is, whether it is good or not."""
        return self._known.get(public)

    def keeps_out(self, now: float, public: str, domain: Domain) -> Refused | None:
        """Why the owner of ``public`` may not be connected to a port; None where it may."""
        known = self._known.get(public)
        if known is None:
            if not self.is_ready:
                return Refused("not_ready", "the shard has not read yet who may come in: try again")
            return Refused("unknown_key", f"the key {public} is unknown")
        if known.record.revoked:
            return Refused("revoked_key", f"key {known.owner!r} was revoked")
        if now >= known.until:
            until = f", and good until {rfc3339(known.until)}" if known.until > 0.0 else ""
            return Refused("expired_key", f"key {known.owner!r} comes with a pair that was replaced{until}")
        role = known.record.role
        if role not in ENTER[domain]:
            return Refused("role", f"key {known.owner!r} is of role {role}, which does not come to {PORTS[domain]}")
        return None

    def forbids(self, now: float, public: str, domain: Domain, task: Task) -> Refused | None:
        """Why the owner of ``public`` may not do this over its connection to a port; None where it may."""
        refused = self.keeps_out(now, public, domain)
        if refused is not None:
            return refused
        known = self._known[public]
        if known.record.role in MAY[task]:
            return None
        return Refused("role", f"key {known.owner!r} is of role {known.record.role}, which may not {task.value}")
