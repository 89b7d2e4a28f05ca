"""Answers libzmq's question who may connect (ZAP, RFC 27): once for each handshake whose peer has proved its key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

import zmq
from zmq.utils import z85

from broker.access import Access, Domain
from broker.refusals import Refusals
from laxity.credentials import NOT_READY

ADDRESS: Final = "inproc://zeromq.zap.01"
TURN: Final = 64
"""Handshakes that are answered before the messages of those who are in get their turn."""


class Zap:
    """For all sockets of a context, which it has to be made before. The shard's own loop polls ``socket`` and calls
    :meth:`answer`; until it does, handshakes wait. ``wall`` tells the time in Unix seconds."""

    def __init__(
        self, context: zmq.Context[Any], access: Access, refusals: Refusals, wall: Callable[[], float]
    ) -> None:
        self._access = access
        self._refusals = refusals
        self._wall = wall
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.set(zmq.LINGER, 0)
        self.socket.bind(ADDRESS)

    def answer(self) -> None:
        """Answer what waits."""
        for _ in range(TURN):
            try:
                version, request, domain, address, _, mechanism, *credentials = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            code, text, user = self._judge(domain.decode(), address.decode(), mechanism, credentials)
            self.socket.send_multipart([version, request, code, text, user, b""])

    def _judge(
        self, domain: str, address: str, mechanism: bytes, credentials: list[bytes]
    ) -> tuple[bytes, bytes, bytes]:
        """(status, its text, User-Id). The peer sees no more than the status; why is in the log."""
        if mechanism != b"CURVE" or len(credentials) != 1 or len(credentials[0]) != 32:
            return b"400", b"CURVE is needed", b""
        user = z85.encode(credentials[0])
        public = user.decode()
        port = cast(Domain, domain)
        refused = self._access.keeps_out(self._wall(), public, port)
        if refused is None:
            return b"200", b"OK", user
        known = self._access.known(public)
        owner = known.owner if known is not None else ""
        self._refusals.note(refused.reason, port, address, address, owner, refused.text)
        return b"%d" % NOT_READY if refused.reason == "not_ready" else b"400", b"refused", b""

    def close(self) -> None:
        self.socket.close(0)
