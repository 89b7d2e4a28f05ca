"""One connection of a client: to which endpoint, and whether a shard is there. An engine without sockets or clocks.

The shell reports what happens (a handshake, a message, a loss) and asks :meth:`Link.advance` what to do.
Every (re)connection is a new socket to one endpoint. An endpoint that is lost or silent makes room for the
next one; an endpoint that *refuses* (a wrong protocol version, say) does so too, and once all of them have
refused, requests are told why instead of waiting for their deadlines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto

from laxity.protocol import VERSION, Welcome

ATTEMPT = 2.0
"""Seconds that one endpoint gets from connecting to WELCOME."""
BACKOFF = (0.05, 1.0)
"""The first and the longest pause in seconds before all endpoints are tried once more."""
NEXT = 0.01
"""The pause in seconds before another endpoint is tried."""
HEARTBEAT_BOUNDS = (0.01, 60.0)
"""Heartbeat intervals in seconds are held within these, whatever a WELCOME says."""
MISSED = 4
"""A shard that sent nothing for this many heartbeat intervals is gone."""


class Step(Enum):
    """What the shell has to do next."""

    CLOSE = auto()
    """Close the socket and forget what lies in it."""
    CONNECT = auto()
    """Open a socket to :attr:`Link.endpoint`."""
    GREET = auto()
    """Send HELLO."""
    RESUBMIT = auto()
    """The shard is ready: submit every request that is its own and has not ended."""
    HEARTBEAT = auto()
    """Send HEARTBEAT."""
    GIVE_UP = auto()
    """Every endpoint refused: where there is no other shard, end all requests as unavailable, for the reason in
    :attr:`Link.trouble`."""


class State(Enum):
    DOWN = auto()
    CONNECTING = auto()
    GREETING = auto()
    OPEN = auto()


class Link:
    """The connection to one of several endpoints. ``jitter`` (0 to 1) spreads the reconnections of many clients;
    ``passes_over`` says which endpoints are not to be tried at present, as another connection leads there."""

    def __init__(
        self, endpoints: Sequence[str], jitter: float, now: float, passes_over: Callable[[str], bool] = lambda _: False
    ) -> None:
        self.state = State.DOWN
        self.trouble = "no shard was reached yet"
        self.heartbeat = 1.0
        self._endpoints = endpoints
        self._passes_over = passes_over
        self._jitter = 0.5 + jitter / 2
        self._index = 0
        self._failures = 0
        self._refused_by: set[str] = set()
        self._retry_at = now
        self._give_up_at = 0.0
        self._heard = now
        self._sent = now
        self._asked = now
        self._steps: list[Step] = []

    @property
    def endpoint(self) -> str:
        """Where the shard is that is being talked to, or is tried next."""
        return self._endpoints[self._index]

    @property
    def is_open(self) -> bool:
        """Whether requests may be sent."""
        return self.state is State.OPEN

    @property
    def is_known(self) -> bool:
        """Whether the shard may know of this client."""
        return self.state in (State.GREETING, State.OPEN)

    # ---- what happened ------------------------------------------------------------------

    def handshaked(self, now: float) -> None:
        """The socket is connected."""
        if self.state is State.CONNECTING:
            self._greet(now)

    def heard(self, now: float) -> None:
        """A message came in."""
        self._heard = now

    def sent(self, now: float) -> None:
        """A message went out."""
        self._sent = now

    def welcome(self, now: float, welcome: Welcome) -> None:
        """The shard answered HELLO, or has news of itself."""
        if welcome.version != VERSION:
            versions = f"the shard speaks protocol version {welcome.version}, this client {VERSION}"
            self._refused(now, f"{versions}; upgrade the older of the two")
            return
        self.heartbeat = heartbeat_of(welcome)
        if self.state is State.GREETING:
            self.state = State.OPEN
            self.trouble = ""
            self._failures = 0
            self._refused_by.clear()
            self._steps.append(Step.RESUBMIT)

    def goodbye(self, now: float, reason: str, retry: bool) -> None:
        """The shard leaves, refuses this client, or (``retry``) does not know it any more."""
        reason = reason or "it said goodbye"
        if not retry:
            self._refused(now, reason)
        elif self.state is State.OPEN:
            # Each SUBMIT that was under way is answered by a GOODBYE of its own; one HELLO answers them all.
            self.trouble = f"{self.endpoint}: {reason}"
            self._greet(now)

    def garbled(self, now: float, reason: str) -> None:
        """What came in is not of this protocol."""
        if self.state is State.OPEN:
            self.lost(now, reason)
        else:
            self._refused(now, reason)

    def refused(self, now: float, reason: str) -> None:
        """The endpoint does not let this client in, or must not be connected to."""
        self._refused(now, reason)

    def lost(self, now: float, reason: str) -> None:
        """The connection broke, or none came about."""
        if self.state is State.DOWN:
            return
        self._leave(now, reason)

    # ---- what to do ---------------------------------------------------------------------

    def advance(self, now: float) -> list[Step]:
        """What to do by ``now``, in order."""
        if self.state is State.OPEN:
            self._watch(now)
        elif self.state is not State.DOWN and now >= self._give_up_at:
            missing = "connection" if self.state is State.CONNECTING else "answer to HELLO"
            self.lost(now, f"no {missing} within {ATTEMPT:g} s")
        if self.state is State.DOWN and now >= self._retry_at:
            if self._find_endpoint():
                self.state = State.CONNECTING
                self._give_up_at = now + ATTEMPT
                self._steps.append(Step.CONNECT)
            else:
                self._retry_at = now + BACKOFF[1] * self._jitter
        steps = self._steps
        self._steps = []
        return steps

    def due_at(self) -> float:
        """When :meth:`advance` has something to do, if nothing happens before."""
        if self.state is State.OPEN:
            return min(self._sent, max(self._heard, self._asked)) + self.heartbeat
        return self._retry_at if self.state is State.DOWN else self._give_up_at

    def _watch(self, now: float) -> None:
        if now - self.due_at() > self.heartbeat:
            # This process itself stood still: what the shard sent meanwhile may not have been read yet.
            self._heard = max(self._heard, now - (MISSED - 1) * self.heartbeat)
        if now - self._heard >= MISSED * self.heartbeat:
            self.lost(now, f"silent for {now - self._heard:.1f} s")
        elif now - min(self._sent, max(self._heard, self._asked)) >= self.heartbeat:
            # Also while requests go out and nothing comes in: a HEARTBEAT is answered, a SUBMIT may take long.
            self._asked = self._sent = now
            self._steps.append(Step.HEARTBEAT)

    def _find_endpoint(self) -> bool:
        """Turn to the next endpoint that is not passed over; whether there is one."""
        count = len(self._endpoints)
        for index in range(self._index, self._index + count):
            if not self._passes_over(self._endpoints[index % count]):
                self._index = index % count
                return True
        return False

    def _greet(self, now: float) -> None:
        self.state = State.GREETING
        self._give_up_at = now + ATTEMPT
        self._steps.append(Step.GREET)

    def _refused(self, now: float, reason: str) -> None:
        if self.state is State.DOWN:
            return
        self._refused_by.add(self.endpoint)
        if len(self._refused_by) == len(self._endpoints):
            self._refused_by.clear()
            self._steps.append(Step.GIVE_UP)
        self._leave(now, reason)

    def _leave(self, now: float, reason: str) -> None:
        self.state = State.DOWN
        self.trouble = f"{self.endpoint}: {reason}"
        self._index = (self._index + 1) % len(self._endpoints)
        self._steps.append(Step.CLOSE)
        self._failures += 1
        rounds, rest = divmod(self._failures, len(self._endpoints))
        first, longest = BACKOFF
        pause = NEXT if rest else min(first * 2.0 ** min(rounds - 1, 10), longest)
        self._retry_at = now + pause * self._jitter


def heartbeat_of(welcome: Welcome) -> float:
    """The heartbeat interval in seconds that a WELCOME asks for, within bounds."""
    shortest, longest = HEARTBEAT_BOUNDS
    return min(max(welcome.heartbeat_us / 1e6, shortest), longest)
