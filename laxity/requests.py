"""The requests that a client has in flight: an engine without sockets, threads or clocks.

Each request enters once and leaves once, with exactly one answer: its shard's, or one made here when its latency
budget has run out without any, when it cannot be sent, or when the client goes away. In between it is at one shard at
a time, in that one's :class:`Lane`, or at none while none is there. What another shard says of it, which had it before,
is ignored, as is whatever comes for a request that has left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from laxity.outcomes import Outcome
from laxity.payload import Payload
from laxity.protocol import MAX_HEADER, MAX_SHARED, Answer, Request
from laxity.routes import Rotation

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
    delivers the answer to. ``implicit`` says that the caller gave no SLO, ``bounded`` that one is known. ``sent``: a
    shard, if not that of the ``lane``, may know of it.
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
    lane: Lane | None = None


class Lane:
    """The requests that are at one shard, and what is to be sent to it."""

    __slots__ = ("cancels", "left_behind", "shard", "waiting", "withdrawn")

    def __init__(self, shard: str) -> None:
        self.shard = shard
        self.waiting: deque[Pending] = deque()
        """To be submitted; those that have ended may be among them."""
        self.cancels: list[int] = []
        """To be cancelled."""
        self.left_behind: set[int] = set()
        """What the shard had when it was lost."""
        self.withdrawn: set[int] = set()
        """What it had then and is at another shard now: cancelled here, by nobody's wish but ours."""


class RequestTable:
    """All requests of one client that have not ended."""

    def __init__(self) -> None:
        self.heartbeat = 1.0
        self.max_payload = 0
        self.slos: dict[str, float] = {}
        self._pending: dict[int, Pending] = {}
        self._lanes: dict[str, Lane] = {}
        self._arrived: deque[Pending] = deque()
        self._stranded: deque[Pending] = deque()
        self._earliest = float("inf")
        self._looked = float("-inf")

    def __len__(self) -> int:
        return len(self._pending)

    # ---- in and out --------------------------------------------------------------------

    def add(self, pending: Pending) -> None:
        """A new request."""
        self._pending[pending.id] = pending
        self._arrived.append(pending)
        if pending.deadline < self._earliest:
            self._earliest = pending.deadline

    def pop(self, id: int) -> Pending | None:
        """The request leaves; None where it left before."""
        return self._pending.pop(id, None)

    def pop_answered(self, answer: Answer, lane: Lane) -> Pending | None:
        """The request leaves, as its shard has answered it; None where the answer is to be ignored."""
        pending = self._pending.get(answer.id)
        if pending is None or pending.lane is not lane:
            return None
        if lane.withdrawn and answer.outcome is Outcome.CANCELLED and answer.id in lane.withdrawn:
            # The answer to our CANCEL, which crossed with its coming back to this shard.
            lane.withdrawn.discard(answer.id)
            return None
        del self._pending[pending.id]
        return pending

    def cancel(self, id: int) -> None:
        """The request leaves, for its caller does not want it any more; its shard is to be told."""
        pending = self.pop(id)
        if pending is not None and pending.sent and pending.lane is not None:
            pending.lane.cancels.append(id)

    def pop_all(self) -> list[Pending]:
        """All requests leave."""
        everything = list(self._pending.values())
        self._pending.clear()
        self._arrived.clear()
        self._stranded.clear()
        for lane in self._lanes.values():
            lane.waiting.clear()
            lane.cancels = []
        return everything

    # ---- between shards -----------------------------------------------------------------

    def lane(self, shard: str) -> Lane:
        """The lane of a shard."""
        lane = self._lanes.get(shard)
        if lane is None:
            lane = self._lanes[shard] = Lane(shard)
        return lane

    @property
    def is_unassigned(self) -> bool:
        """Whether :meth:`assign` has something to do."""
        return bool(self._arrived)

    def assign(self, rotation_of: Callable[[str], Rotation | None]) -> None:
        """Say which shard each request goes to, as the rotation of its pipeline does. Those of pipelines that have none
        wait for :meth:`unstrand`."""
        pipeline = None
        rotation: Rotation | None = None
        only: Lane | None = None
        for pending in self._arrived:
            if pending.id not in self._pending:
                continue
            if pending.request.pipeline != pipeline:
                pipeline = pending.request.pipeline
                rotation = rotation_of(pipeline)
                only = self.lane(rotation.only) if rotation is not None and rotation.only is not None else None
            if rotation is None:
                self._stranded.append(pending)
                continue
            lane = only or self.lane(rotation.next())
            lane.waiting.append(pending)
            pending.lane = lane
        self._arrived.clear()

    def unstrand(self) -> None:
        """There may be a shard now for those that had none."""
        self._arrived.extendleft(reversed(self._stranded))
        self._stranded.clear()

    def lost(self, lane: Lane) -> None:
        """The shard is gone: its requests are to be submitted to another one, or to itself when it is back."""
        moved = self._at(lane)
        for pending in moved:
            pending.lane = None
        lane.left_behind.update(lane.cancels, [pending.id for pending in moved if pending.sent])
        lane.withdrawn.clear()
        lane.cancels = []
        lane.waiting.clear()
        self._arrived.extendleft(reversed(moved))

    def resubmit(self, lane: Lane) -> None:
        """The shard is there, and may know nothing: what is at it is to be sent (again), under the same ids."""
        lane.waiting = deque(self._at(lane))

    def forget_lanes(self, keep: set[str]) -> None:
        """Forget the lanes of all other shards; they must be :meth:`lost <lost>` or unused."""
        for shard in self._lanes.keys() - keep:
            del self._lanes[shard]

    def is_at(self, lane: Lane) -> bool:
        """Whether any request is at the shard of the lane."""
        return any(pending.lane is lane for pending in self._pending.values())

    def _at(self, lane: Lane) -> list[Pending]:
        return [pending for pending in self._pending.values() if pending.lane is lane]

    def sent_ids(self, lane: Lane) -> list[int]:
        """The requests that the shard of the lane may know of."""
        return [pending.id for pending in self._at(lane) if pending.sent]

    # ---- sending -----------------------------------------------------------------------

    def learn(self, heartbeat: float, max_payload: int, slos: Mapping[str, int]) -> None:
        """What WELCOMEs said: the heartbeat interval (seconds), the payload limit (bytes), SLOs (µs) by pipeline."""
        self.heartbeat = heartbeat
        self.max_payload = max_payload
        self.slos = {name: slo_us / 1e6 for name, slo_us in slos.items() if slo_us > 0}
        for pending in self._pending.values():
            if not pending.bounded and pending.request.pipeline in self.slos:
                pending.deadline = pending.submitted + self.slos[pending.request.pipeline]
                pending.bounded = True
                self._earliest = min(self._earliest, pending.deadline)

    def take_cancels(self, lane: Lane) -> list[int]:
        """What is to be cancelled at a shard that is there: what callers do not want any more, and what it still has
        from before it was lost while it is elsewhere by now."""
        if lane.left_behind:
            for number in sorted(lane.left_behind):
                pending = self._pending.get(number)
                if pending is None:
                    lane.cancels.append(number)
                elif pending.lane is not lane:
                    lane.cancels.append(number)
                    lane.withdrawn.add(number)
            lane.left_behind.clear()
        cancels = lane.cancels
        lane.cancels = []
        return cancels

    def take(self, lane: Lane, now: float) -> list[Pending]:
        """The requests of the shard's next SUBMIT, their budgets being what is left now. They leave the queue, not
        the table; :meth:`put_back` those that could not be sent."""
        batch: list[Pending] = []
        waiting = lane.waiting
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
        """These went out: from now on their shard may know of them."""
        for pending in batch:
            pending.sent = True

    def put_back(self, lane: Lane, batch: list[Pending]) -> None:
        """These could not be sent; they are the next to be taken."""
        lane.waiting.extendleft(reversed(batch))

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

    def look_after(self, now: float, trouble: Callable[[str], str]) -> list[tuple[Pending, Answer]]:
        """Requests leave whose budget has run out without an answer: ``expired`` if a shard may have had it,
        ``unavailable`` if none was ever reached. ``trouble`` says by pipeline what is wrong with its shards ('':
        nothing)."""
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
        return list(self._end(over, now, trouble))

    def _end(self, over: list[Pending], now: float, trouble: Callable[[str], str]) -> Iterator[tuple[Pending, Answer]]:
        for pending in over:
            self.pop(pending.id)
            if pending.sent or pending.lane is not None:
                outcome = Outcome.EXPIRED
                detail = "the deadline passed without an answer from the shard"
            else:
                outcome = Outcome.UNAVAILABLE
                detail = "no shard could be reached before the deadline"
            if not pending.bounded:
                detail += f" (no SLO is known for {pending.request.pipeline!r}: {UNKNOWN_SLO:g} s were waited)"
            why = trouble(pending.request.pipeline)
            answer = local_answer(pending, outcome, f"{detail}; {why}" if why else detail)
            answer.remaining_us = int((pending.deadline - now) * 1e6)
            yield pending, answer


def local_answer(pending: Pending, outcome: Outcome, detail: str) -> Answer:
    """An answer that no shard gave."""
    return Answer(pending.id, outcome, None, detail=detail)


def above_limit(nbytes: int, limit: int) -> str:
    """What to tell about a payload above the shard's limit."""
    return f"the payload has {nbytes} bytes; the shard takes {limit} at most"
