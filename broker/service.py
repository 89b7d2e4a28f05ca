"""One service as its shard knows it: where it is, what waits for it, and how long its messages take."""

from __future__ import annotations

from collections import deque
from typing import Final

from broker.endpoint import Unsent
from broker.engine.quota import Quota
from broker.engine.request import Client
from laxity.payload import Part

OUTBOX: Final = 1000
"""Messages kept for a service that does not read, beside those that libzmq holds; answers beyond them are lost."""
MAX_UNREAD: Final = 256 * 1024**2
"""Bytes of large frames that libzmq holds for a service, and bytes that are kept for it here, at most."""
LONGEST_TRANSIT: Final = 3600.0
"""Seconds on the way that a stamp can make a message look to have taken; a budget is shorter."""
ZERO_SPAN: Final = 30.0
"""Seconds over which a connection's smallest (received - sent) is kept: clocks drift apart."""


class Service:
    """One service instance, wherever its messages come from at present."""

    def __init__(
        self, routing_id: bytes, number: int, client: Client, user: str, quota: Quota | None, now: float
    ) -> None:
        self.routing_id = routing_id
        self.number = number
        """The connection's at present (see :func:`~broker.endpoint.connection_of`)."""
        self.client = client
        self.user = user
        """The public key of the service; '' where the shard serves in plain text."""
        self.quota = quota
        """What its owner may ask for, likewise."""
        self.heard_at = now
        self.outbox: deque[tuple[bytes, list[Part]]] = deque()
        self.outbox_bytes = 0
        self.unsent = Unsent()
        self._zero = float("inf")
        self._next_zero = float("inf")
        self._zero_until = now + ZERO_SPAN

    def reconnect(self, routing_id: bytes, now: float) -> None:
        """The service speaks from another connection: another path, another zero. b'' where it has none."""
        self.routing_id = routing_id
        self.outbox.clear()
        self.outbox_bytes = 0
        self.unsent = Unsent()
        self._zero = self._next_zero = float("inf")
        self._zero_until = now + ZERO_SPAN

    def keep(self, header: bytes, frames: list[Part]) -> bool:
        """Keep a message that cannot be sent at present; False where the service has too many already."""
        size = size_of(header, frames)
        if len(self.outbox) >= OUTBOX or self.outbox_bytes + size > MAX_UNREAD:
            return False
        self.outbox.append((header, frames))
        self.outbox_bytes += size
        return True

    def transit(self, now: float, sent_us: int) -> float:
        """Seconds that a message sent at ``sent_us`` (the service's clock) took beyond the fastest one of late."""
        offset = now - sent_us * 1e-6
        if now >= self._zero_until:
            self._zero = self._next_zero
            self._next_zero = offset
            self._zero_until = now + ZERO_SPAN
        if offset < self._next_zero:
            self._next_zero = offset
        if offset < self._zero:
            self._zero = offset
        return min(offset - self._zero, LONGEST_TRANSIT)


def size_of(header: bytes, frames: list[Part]) -> int:
    """Bytes of a message."""
    return len(header) + sum([len(frame) for frame in frames])
