"""The requests that a client has in flight: an engine without sockets, threads or clocks.

Each request enters once and leaves once, with exactly one answer: the shard's, or one made here when its
latency budget has run out without any, when it cannot be sent, or when the client goes away. Whatever comes
for a request that has left (a second answer after it was submitted again, say) is ignored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from laxity.outcomes import Outcome
from laxity.payload import Payload
from laxity.protocol import MAX_HEADER, MAX_SHARED, Answer, Request

SHARED_BYTES = 1024 * 1024
"""Requests share a SUBMIT up to this many payload bytes, so that a large one does not hold up others."""
UNKNOWN_SLO = 60.0
"""Seconds after which a request ends here when neither the caller nor the shard named an SLO."""
GRACE = 0.25
"""The shard answers ``expired`` at the deadline itself; so many seconds more are left for that to arrive."""
RESOLUTION = 0.01
"""Deadlines are looked after no more often than this, in seconds."""
FRESH = 0.05
"""A request without an explicit SLO that is younger than this (seconds) leaves its budget to the shard."""


class Pending(msgspec.Struct, eq=False, gc=False):
    """A request in flight. Times are the client's monotonic clock in seconds.

    ``request`` is its wire form, ``weight`` about how many header bytes that takes, ``sink`` whatever the shell
    delivers the answer to. ``implicit`` says that the caller gave no SLO, ``bounded`` that one is known.
    """

    id: int
    request: Request
    payload: Payload
    weight: int
    submitted: float
    deadline: float
    implicit: bool
    bounded: bool
    sink: Any
    sent: bool = False


class RequestTable:
    """All requests of one client that have not ended."""

    def __init__(self) -> None:
        self.heartbeat = 1.0
        self.max_payload = 0
        self.slos: dict[str, float] = {}
        self._pending: dict[int, Pending] = {}
        self._waiting: deque[Pending] = deque()
        self._earliest = float("inf")
        self._looked = float("-inf")

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def is_waiting(self) -> bool:
        """Whether something wants to be sent."""
        return bool(self._waiting)

    def add(self, pending: Pending) -> None:
        """A new request."""
        self._pending[pending.id] = pending
        self._waiting.append(pending)
        if pending.deadline < self._earliest:
            self._earliest = pending.deadline

    def pop(self, id: int) -> Pending | None:
        """The request leaves; None where it left before."""
        return self._pending.pop(id, None)

    def pop_all(self) -> list[Pending]:
        """All requests leave."""
        everything = list(self._pending.values())
        self._pending.clear()
        self._waiting.clear()
        return everything

    def sent_ids(self) -> list[int]:
        """The requests that a shard may know of."""
        return [pending.id for pending in self._pending.values() if pending.sent]

    def learn(self, heartbeat: float, max_payload: int, slos: Iterable[tuple[str, int]]) -> None:
        """What a WELCOME said: the heartbeat interval (seconds), the payload limit (bytes), SLOs (µs)."""
        self.heartbeat = heartbeat
        self.max_payload = max_payload
        self.slos = {name: slo_us / 1e6 for name, slo_us in slos if slo_us > 0}
        for pending in self._pending.values():
            if not pending.bounded and pending.request.pipeline in self.slos:
                pending.deadline = pending.submitted + self.slos[pending.request.pipeline]
                pending.bounded = True
                self._earliest = min(self._earliest, pending.deadline)

    def resubmit(self) -> None:
        """A shard was reached (again): everything is to be sent to it, under the same ids."""
        self._waiting = deque(self._pending.values())

    def take(self, now: float) -> list[Pending]:
        """The requests of the next SUBMIT, their budgets being what is left now. They leave the queue, not
        the table; :meth:`put_back` those that could not be sent."""
        batch: list[Pending] = []
        waiting = self._waiting
        pending_by_id = self._pending
        size = weight = 0
        while waiting and len(batch) < MAX_SHARED:
            pending = waiting[0]
            remaining = pending.deadline - now
            if remaining <= 0.0 or pending.id not in pending_by_id:
                waiting.popleft()  # look_after() ends it, or it has ended
                continue
            size += pending.payload.nbytes
            weight += pending.weight
            if batch and (size > SHARED_BYTES or weight > MAX_HEADER):
                break
            waiting.popleft()
            if not pending.implicit or (pending.bounded and now - pending.submitted > FRESH):
                pending.request.budget_us = max(1, int(remaining * 1e6))
            batch.append(pending)
        return batch

    def sent(self, batch: list[Pending]) -> None:
        """These went out: from now on a shard may know of them."""
        for pending in batch:
            pending.sent = True

    def put_back(self, batch: list[Pending]) -> None:
        """These could not be sent; they are the next to be taken."""
        self._waiting.extendleft(reversed(batch))

    def too_large(self) -> list[tuple[Pending, Answer]]:
        """Requests above the payload limit leave: sending one would break the connection."""
        limit = self.max_payload
        if not limit:
            return []
        found = [pending for pending in self._pending.values() if pending.payload.nbytes > limit]
        return [
            (p, local_answer(p, Outcome.REJECTED, above_limit(p.payload.nbytes, limit)))
            for p in found
            if self.pop(p.id) is not None
        ]

    def due_at(self) -> float:
        """When :meth:`look_after` may have something to do."""
        return max(self._earliest, self._looked + RESOLUTION)

    def look_after(self, now: float, reachable: bool, trouble: str) -> list[tuple[Pending, Answer]]:
        """Requests leave whose budget has run out without an answer: ``expired`` if a shard may have had it,
        ``unavailable`` (because of ``trouble``) if none was ever reached."""
        if now < self.due_at():
            return []
        grace = max(GRACE, self.heartbeat)
        self._looked = now
        earliest = float("inf")
        over: list[Pending] = []
        for pending in self._pending.values():
            limit = pending.deadline + grace if pending.sent else pending.deadline
            if limit <= now:
                over.append(pending)
            elif limit < earliest:
                earliest = limit
        self._earliest = earliest
        return list(self._end(over, now, reachable, trouble))

    def _end(self, over: list[Pending], now: float, reachable: bool, trouble: str) -> Iterator[tuple[Pending, Answer]]:
        for pending in over:
            del self._pending[pending.id]
            if pending.sent or reachable:
                outcome = Outcome.EXPIRED
                detail = "the deadline passed without an answer from the shard"
            else:
                outcome = Outcome.UNAVAILABLE
                detail = "no shard could be reached before the deadline"
            if not pending.bounded:
                detail += f" (no SLO is known for {pending.request.pipeline!r}: {UNKNOWN_SLO:g} s were waited)"
            answer = local_answer(pending, outcome, f"{detail}; {trouble}" if trouble else detail)
            answer.remaining_us = int((pending.deadline - now) * 1e6)
            yield pending, answer


def local_answer(pending: Pending, outcome: Outcome, detail: str) -> Answer:
    """An answer that no shard gave."""
    return Answer(pending.id, outcome, None, detail=detail)


def above_limit(nbytes: int, limit: int) -> str:
    """What to tell about a payload above the shard's limit."""
    return f"the payload has {nbytes} bytes; the shard takes {limit} at most"
