"""The gate of one port: who of those who are connected may do what, and who is cut. It carries out what
:class:`~broker.connections.Connections` and :class:`~broker.access.Access` decide.

libzmq closes no single connection of a ROUTER, but it notices when somebody else does: the gate shuts a duplicate of
its file descriptor down.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from typing import Final

import zmq

from broker.access import Access, Domain, Task
from broker.connections import Connections, Cut, Ended
from broker.endpoint import Endpoint, connection_of
from broker.refusals import Refusals
from laxity import protocol
from laxity.curve import ROUTING_ID
from laxity.protocol import Goodbye

FAILED: Final[dict[int, str]] = {
    zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH: "it has no key",
    zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC: "it has another public key of this shard, an old one or another shard's",
}
"""What a failed handshake means, where the peer's own doing shows it."""
LEFT: Final = "it left without a message, or does not speak ZeroMQ's protocol"
FAILED_PLAIN: Final[dict[int, str]] = {
    zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH: "it has a key, and this shard serves in plain text"
}


class Gate:
    """Of an endpoint. ``access`` is None where the port is open to all. ``wall`` tells the time in Unix seconds; the
    other times are monotonic."""

    def __init__(
        self,
        endpoint: Endpoint,
        domain: Domain,
        access: Access | None,
        refusals: Refusals,
        connections: Connections,
        wall: Callable[[], float],
    ) -> None:
        self.connections = connections
        self.access = access
        self._endpoint = endpoint
        self._domain: Domain = domain
        self._refusals = refusals
        self._wall = wall
        self._ended: list[Ended] = []
        self._failed = LEFT
        """Why the connection that ends next has, if nothing was heard of it."""

    # ---- what peers want ----------------------------------------------------------------------

    def admits(self, now: float, sender: bytes, header: zmq.Frame, user: str, task: Task) -> bool:
        """Whether the peer that sent a message may do this; it is told and cut where it may not. Of one that has
        greeted, :meth:`greeted` is to be told."""
        number = connection_of(header)
        if self.access is not None:
            if len(sender) < ROUTING_ID:
                text = f"its routing id has {len(sender)} bytes; set one of {ROUTING_ID} random bytes or more"
                self.refuse(now, sender, number, user, "routing_id", text)
                return False
            refused = self.access.forbids(self._wall(), user, self._domain, task)
            if refused is not None:
                self.refuse(now, sender, number, user, refused.reason, refused.text)
                return False
        if task is not Task.SUBMIT and task is not Task.SERVE:
            self.connections.heard(now, number, sender, user, False)
        return True

    def greeted(self, now: float, number: int, sender: bytes, user: str) -> None:
        """The peer is known from now on, until it is forgotten (:meth:`Connections.forgotten`)."""
        self.connections.heard(now, number, sender, user, True)

    def refuse(self, now: float, sender: bytes, number: int, user: str, reason: str, text: str, told: str = "") -> None:
        """A peer does what it may not: say so (``text``) in the log, and to itself (``told``, where that is another
        thing), and cut it in a moment."""
        self._part(now, number, user, reason, text)
        self._endpoint.send(sender, protocol.encode(Goodbye(reason=told or text, retry=False)), [])

    def stolen(self, now: float, sender: bytes, header: zmq.Frame, user: str, text: str) -> None:
        """A message came with the routing id of one peer and the key of another: throw it away. ``text`` says whose id
        it is."""
        self._endpoint.skip(header)
        self.refuse(now, sender, connection_of(header), user, "identity", text, "this routing id is another peer's")

    def owner(self, user: str) -> str:
        """The name of a key's owner; '' where it is unknown or the port is open to all."""
        known = self.access.known(user) if self.access is not None else None
        return known.owner if known is not None else ""

    def keeps_out(self, user: str) -> str:
        """Why somebody who was let in may stay no longer; '' where it may."""
        refused = self.access.keeps_out(self._wall(), user, self._domain) if self.access is not None else None
        return refused.text if refused is not None else ""

    # ---- looking after connections ------------------------------------------------------------

    def review(self, now: float) -> None:
        """Part with those who may not stay, after the directory or the time has changed."""
        if self.access is None:
            return
        for number, user in self.connections.users().items():
            refused = self.access.keeps_out(self._wall(), user, self._domain)
            if refused is not None:
                self._part(now, number, user, refused.reason, refused.text)

    def watch(self, now: float) -> None:
        """Take in what the endpoint's monitor tells, and cut who is due."""
        for event, value in self._endpoint.events():
            if event == zmq.EVENT_ACCEPTED:
                self.connections.accepted(now, value, _peer(value))
            elif event == zmq.EVENT_DISCONNECTED:
                self._end(value)
            else:
                self._failed = self._why(event, value)
        for cut in self.connections.take_cuts(now):
            if cut.text:
                self._note(cut.reason, cut.address, "", cut.text)
            _shut_down(cut)

    def ended(self) -> list[Ended]:
        """The connections that have ended since the last call, as :meth:`watch` found out."""
        ended, self._ended = self._ended, []
        return ended

    def _end(self, number: int) -> None:
        ended = self.connections.ended(number)
        failed, self._failed = self._failed, LEFT
        if failed and not (ended.sender or ended.was_cut or ended.was_told):
            self._note("handshake", ended.address, "", failed)
        self._ended.append(ended)

    def _why(self, event: int, value: int) -> str:
        """What a failed handshake means; '' where it was said already (ZAP refused the peer)."""
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return ""
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            reasons = FAILED if self.access is not None else FAILED_PLAIN
            return reasons.get(value, "it does not speak ZeroMQ's protocol")
        if value == errno.EAGAIN:
            return "it did not finish the handshake in time"
        broke = "it broke off the handshake"
        return f"{broke}, as peers without a key do" if self.access is not None else broke

    def _part(self, now: float, number: int, user: str, reason: str, text: str) -> None:
        self._note(reason, self.connections.address(number), user, text)
        self.connections.part(now, number)

    def _note(self, reason: str, address: str, user: str, text: str) -> None:
        host = address.rpartition(":")[0]
        self._refusals.note(reason, self._domain, address or "a peer that has gone", host, self.owner(user), text)


def _peer(number: int) -> str:
    """Who is at the other end of libzmq's file descriptor: HOST:PORT; '' where it is gone, or has no address."""
    try:
        with socket.socket(fileno=os.dup(number)) as duplicate:
            return _address(duplicate)
    except OSError:
        return ""


def _address(connected: socket.socket) -> str:
    """HOST:PORT of a socket's peer; '' of one on the same host that has no address."""
    peer = connected.getpeername()
    return f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else ""


def _shut_down(cut: Cut) -> None:
    """End a connection. By the time, its number may be that of another file: the peer's address tells."""
    try:
        with socket.socket(fileno=os.dup(cut.number)) as duplicate:
            if _address(duplicate) == cut.address:
                duplicate.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it has ended by itself
