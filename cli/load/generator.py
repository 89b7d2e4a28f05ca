"""The load generator's engine: sends what is due, or what a free slot takes, and keeps the books.

It has no sockets and no clock of its own: a :class:`Port` sends, tells how requests ended, and lets time pass.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from cli.load.tally import StepTally
from cli.load.traffic import Call, Traffic
from laxity.outcomes import Outcome
from simulation.metrics import Floats

TICK: Final = 0.25
"""Seconds between two looks at how far it is."""
HEAD_START: Final = 0.05
"""Seconds until time 0 of the arrivals, so that the first ones are not late already."""
MOST_BYTES: Final = 1024**3
"""Bytes of payloads that may be under way at once."""
_CHUNK: Final = 65_536


class Sent(NamedTuple):
    """A request under way; its latency counts from ``since`` and it belongs to the arrival at ``at`` (seconds from the
    step's begin)."""

    call: Call
    since: float
    at: float


class Ended(NamedTuple):
    """How one ended, ``now`` on the port's clock."""

    sent: Sent
    now: float
    outcome: Outcome
    stage: str
    detail: str


class Port(Protocol):
    """Where requests go."""

    ended: deque[Ended]
    """Those that ended; the generator takes them away."""

    def clock(self) -> float: ...

    def send(self, sent: Sent) -> None:
        """Send a request; its end is appended to ``ended``, once, sooner or later."""

    def wait(self, seconds: float, for_answers: bool) -> None:
        """Let so much time pass; ``for_answers``: only until a request has ended."""


class Generator:
    """Sends the requests of one step after another. ``watch`` is called some times a second with the seconds since the
    step's begin, and ends the step by saying so (True)."""

    def __init__(self, port: Port, traffic: Traffic, most_in_flight: int) -> None:
        self._port = port
        self._traffic = traffic
        self._most = most_in_flight
        self._bytes = 0
        self._start = 0.0
        self._next_tick = 0.0
        self._tally = StepTally(0)
        self._freed: deque[float] = deque()
        self.in_flight = 0

    def open_loop(self, arrivals: Floats, tally: StepTally, watch: Callable[[float], bool]) -> float:
        """Send at ``arrivals`` (ascending), whatever became of those before, and wait until all have ended. What would
        be too many at once is not sent. Returns the seconds at which it ended, inf where that was at the end."""
        clock, wait, take = self._port.clock, self._port.wait, self._traffic.next
        start = self._begin(tally, clock() + HEAD_START)
        freed = self._freed
        for first in range(0, len(arrivals), _CHUNK):
            for arrival in arrivals[first : first + _CHUNK].tolist():
                call = take()  # before it is due: a payload may have to be read
                due = start + arrival
                while True:
                    self._take_ended()
                    freed.clear()
                    now = clock()
                    if now >= self._next_tick and self._tick(now, watch):
                        self._finish(watch)
                        return now - start
                    if now >= due:
                        break
                    wait(min(due, self._next_tick) - now, False)
                if self.in_flight >= self._most or (self._bytes and self._bytes + call.nbytes > MOST_BYTES):
                    tally.unsent(call.kind, arrival)
                else:
                    tally.sent(call.kind, arrival, now - due)
                    self._send(Sent(call, due, arrival))
        self._finish(watch)
        return math.inf

    def closed_loop(
        self, concurrency: int, seconds: float, tally: StepTally, watch: Callable[[float], bool], most: float = math.inf
    ) -> float:
        """Keep ``concurrency`` requests under way for so many seconds, or until ``most`` were sent, and wait until all
        have ended. A request's latency counts from when it was sent; the generator's lag is the time from the end of
        one to the sending of the next. Returns as :meth:`open_loop`."""
        clock = self._port.clock
        start = self._begin(tally, clock())
        freed = self._freed
        freed.extend([start] * concurrency)
        sent = 0
        while sent < most:
            self._take_ended()
            now = clock()
            if now >= self._next_tick and self._tick(now, watch):
                self._finish(watch)
                return now - start
            if now >= start + seconds:
                break
            if freed:
                call = self._traffic.next()
                now = clock()
                tally.sent(call.kind, now - start, now - freed.popleft())
                self._send(Sent(call, now, now - start))
                sent += 1
            else:
                self._port.wait(min(start + seconds, self._next_tick) - now, True)
        self._finish(watch)
        return math.inf

    def _begin(self, tally: StepTally, start: float) -> float:
        self._tally = tally
        self._start = start
        self._next_tick = start + TICK
        self._freed.clear()
        return start

    def _tick(self, now: float, watch: Callable[[float], bool]) -> bool:
        self._next_tick = now + TICK
        return watch(now - self._start)

    def _send(self, sent: Sent) -> None:
        self.in_flight += 1
        self._bytes += sent.call.nbytes
        self._port.send(sent)

    def _take_ended(self) -> None:
        ended = self._port.ended
        tally = self._tally
        while ended:
            sent, now, outcome, stage, detail = ended.popleft()
            self.in_flight -= 1
            self._bytes -= sent.call.nbytes
            self._freed.append(now)
            tally.ended(sent.call.kind, sent.at, now - self._start, now - sent.since, outcome, stage, detail)

    def _finish(self, watch: Callable[[float], bool]) -> None:
        """Wait until all have ended; each does, as its latency budget is bounded."""
        while True:
            self._take_ended()
            if not self.in_flight:
                return
            now = self._port.clock()
            if now >= self._next_tick:
                self._tick(now, watch)
            self._port.wait(max(self._next_tick - now, 0.0), True)
