"""One connection of a client: its socket, and the :class:`~laxity.link.Link` that says what becomes of it."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable, Iterator
from typing import Any, Final

import zmq

from laxity import protocol
from laxity.credentials import NOT_READY, PLAIN, Credentials, why_failed
from laxity.keys import KeyFile
from laxity.link import Link
from laxity.requests import Lane

MAX_FRAME: Final = 256 * 1024 * 1024
"""The largest frame that a shard may send, in bytes."""
HIGH_WATER: Final = 100
"""Messages that may lie in ZeroMQ's queue; more wait here, where they can still be cancelled or joined."""
DRAIN: Final = 64
"""Messages that are read before it is looked whether something wants to be sent."""
COPY_BELOW: Final = 65536
"""Frames of fewer bytes are copied; for larger ones that costs more than the bookkeeping of not doing so."""
RECONNECT_MS: Final = 60_000
"""How long libzmq waits before it reconnects, in milliseconds: for ever, as :class:`Link` sees to that."""
MONITORED: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
)
FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
)
LOST: Final = {
    zmq.EVENT_DISCONNECTED: "the connection broke",
    zmq.EVENT_CONNECT_RETRIED: "nobody listens there",
}


class Connection:
    """A DEALER to one endpoint at a time, with its monitor, both registered at ``poller`` while there is one.

    ``shard`` is the one that it is for ('' for any), ``address`` where the routing table says that it is. ``lane`` is
    the lane of the shard that it is connected to, None while it is not.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        poller: zmq.Poller,
        credentials: Credentials,
        link: Link,
        shard: str = "",
        address: str = "",
    ) -> None:
        self.link = link
        self.shard = shard
        self.address = address
        self.lane: Lane | None = None
        self.blocked = False
        """Whether the socket takes nothing at present."""
        self.greeting_due = False
        self.dealer: zmq.Socket[bytes] | None = None
        self.monitor: zmq.Socket[bytes] | None = None
        self._context = context
        self._poller = poller
        self._credentials = credentials
        self._way = PLAIN
        self._key: KeyFile | None = None
        """Its own, at the time that it was made."""
        self._ways: list[str] = []
        """The shard's keys that are still to be tried."""

    def has_another_key(self) -> bool:
        """Whether this client's key was replaced since the connection was made."""
        self._credentials.refresh()
        return self._key is not self._credentials.key

    @property
    def is_secure(self) -> bool:
        """Whether the shard there has a key that is known."""
        return self._way != PLAIN

    def is_connected_to(self, shard: str) -> bool:
        """Whether it is connected to this shard."""
        return self.lane is not None and self.lane.shard == shard

    def leads_to(self, shard: str) -> bool:
        """Whether it is connected to this shard, or is to be."""
        return shard == (self.shard if self.lane is None else self.lane.shard)

    def connect(self) -> None:
        """Open a socket to the link's endpoint; raises ``zmq.ZMQError`` for what is no address, and ValueError where
        there is no key to connect there with."""
        self._credentials.refresh()
        self._ways = self._credentials.ways(self.link.endpoint, self.shard)
        self._open()

    def connect_otherwise(self, failed: zmq.Event) -> bool:
        """After a failed handshake, try the shard's next key; False where there is none."""
        if failed == zmq.EVENT_HANDSHAKE_FAILED_AUTH or failed not in FAILED or not self._ways:
            return False
        self.disconnect()
        self._open()
        return True

    @staticmethod
    def is_final(failed: zmq.Event, value: int) -> bool:
        """Whether a failed handshake says that this client is not let in, and not only that something is amiss now."""
        return failed == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL or (
            failed == zmq.EVENT_HANDSHAKE_FAILED_AUTH and value != NOT_READY
        )

    def _open(self) -> None:
        self._way = self._ways.pop(0)
        self._key = self._credentials.key
        dealer: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        # Not IMMEDIATE: with it libzmq throws unread answers away when the connection breaks. Nothing is sent
        # before the handshake, and this socket is closed before it would connect a second time.
        dealer.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        dealer.setsockopt(zmq.SNDHWM, HIGH_WATER)
        dealer.setsockopt(zmq.RCVHWM, HIGH_WATER)
        dealer.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
        self._credentials.prepare(dealer, self._way)
        self.dealer = dealer
        self.monitor = dealer.get_monitor_socket(MONITORED)
        self._poller.register(dealer, zmq.POLLIN)
        self._poller.register(self.monitor, zmq.POLLIN)
        self.blocked = self.greeting_due = False
        dealer.connect(self.link.endpoint)

    def disconnect(self, linger_ms: int = 0) -> None:
        """Close the socket, which may go on sending for ``linger_ms``."""
        if self.dealer is None or self.monitor is None:
            return
        self._poller.unregister(self.dealer)
        self._poller.unregister(self.monitor)
        self.dealer.disable_monitor()
        self.monitor.close(0)
        self.dealer.close(linger_ms)
        self.dealer = self.monitor = None

    def say(self, message: Any, now: float) -> bool:
        """Send a message of a header alone; see :meth:`send`."""
        return self.send([protocol.encode(message)], now)

    def send(self, frames: list[Any], now: float) -> bool:
        """False where the socket takes nothing now; it is then polled for when it does."""
        dealer = self.dealer
        if dealer is None:
            return False
        last = len(frames) - 1
        try:
            for index, frame in enumerate(frames):
                flags = zmq.NOBLOCK if index == last else zmq.NOBLOCK | zmq.SNDMORE
                dealer.send(frame, flags, copy=len(frame) < COPY_BELOW)
        except zmq.Again:
            self.blocked = True
            self._poller.modify(dealer, zmq.POLLIN | zmq.POLLOUT)
            return False
        self.link.sent(now)
        return True

    def unblock(self) -> None:
        """The socket takes something again."""
        self.blocked = False
        if self.dealer is not None:
            self._poller.modify(self.dealer, zmq.POLLIN)

    def receive(self, understand: Callable[[Connection, bytes, list[Any]], None]) -> bool:
        """Hand over what has come in, each message's header and other frames; whether there may be more."""
        dealer = self.dealer
        if dealer is None:
            return False
        for _ in range(DRAIN):
            try:
                frame = dealer.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return False
            parts: list[Any] = []
            header = frame.bytes
            while frame.more:
                frame = dealer.recv(copy=False)
                parts.append(frame if len(frame) >= COPY_BELOW else frame.bytes)
            understand(self, header, parts)
        return True

    def events(self) -> Iterator[tuple[zmq.Event, int]]:
        """What the monitor saw, with the event's value."""
        monitor = self.monitor
        while monitor is not None:
            try:
                event, _ = monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            kind, value = struct.unpack_from("=HI", event)
            yield zmq.Event(kind), value

    def why_lost(self, event: zmq.Event, value: int) -> str:
        """What an event in :data:`LOST` or :data:`FAILED` means here."""
        if event in FAILED:
            return why_failed(event, value, self._way)
        reason = LOST[event]
        if event == zmq.EVENT_CONNECT_RETRIED and _is_named(self.link.endpoint):
            reason += ", or the name does not resolve"  # libzmq does not tell the two apart
        return reason


def _is_named(endpoint: str) -> bool:
    """Whether an endpoint is a host's name, and not a numeric address or a file."""
    scheme, _, rest = endpoint.partition("://")
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return scheme == "tcp"
    return False
