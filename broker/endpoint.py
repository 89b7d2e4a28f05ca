"""A shard's ROUTER socket: messages in without waiting, messages out with every refusal noticed, and what becomes of
connections."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from broker.errors import AddressInUse
from laxity.curve import secure_server
from laxity.keys import KeyPair
from laxity.payload import Part

HIGH_WATER_MARK: Final = 10_000
"""Messages that libzmq holds for one peer before it says EAGAIN."""
BULK: Final = 65_536
"""Frames from this many bytes on are received and sent without copying them."""
HANDSHAKE: Final = 5.0
"""Seconds that a peer has for the handshake after it connected."""
_WATCHED: Final = int(
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_NOBLOCK: Final = int(zmq.NOBLOCK)
_SNDMORE: Final = int(zmq.SNDMORE)
_SRCFD: Final = int(zmq.SRCFD)


class Sent(Enum):
    """What became of a message that was to be sent."""

    YES = "yes"
    FULL = "full"
    """The peer does not read: its queue is at the high-water mark (EAGAIN)."""
    GONE = "gone"
    """There is no such peer (EHOSTUNREACH)."""


class Unsent:
    """The large frames that libzmq still holds for one peer."""

    def __init__(self) -> None:
        self._frames: deque[tuple[zmq.MessageTracker, int]] = deque()
        self._bytes = 0

    def note(self, tracker: zmq.MessageTracker, size: int) -> None:
        self._frames.append((tracker, size))
        self._bytes += size

    def bytes(self) -> int:
        """How many bytes of them have not left yet."""
        frames = self._frames
        while frames and frames[0][0].done:
            self._bytes -= frames.popleft()[1]
        return self._bytes


class Endpoint:
    """A bound ROUTER. ``address`` is where peers connect to, with the port that the system chose for ``:*``. With a
    ``pair`` of keys, only those connect whom the context's ZAP handler lets into ``domain``; ``handshake`` is how many
    seconds they have for that."""

    def __init__(
        self,
        context: zmq.Context[Any],
        bind: str,
        max_frame: int,
        pair: KeyPair | None = None,
        domain: str = "",
        handshake: float = HANDSHAKE,
    ) -> None:
        self.secured = pair is not None
        """Whether each message carries its sender's public key (:func:`user_of`)."""
        self.socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        if pair is not None:
            secure_server(self.socket, pair, domain)
        self.socket.set(zmq.HANDSHAKE_IVL, int(handshake * 1000))
        self.socket.set(zmq.ROUTER_MANDATORY, 1)
        self.socket.set(zmq.LINGER, 200)
        self.socket.set(zmq.SNDHWM, HIGH_WATER_MARK)
        self.socket.set(zmq.RCVHWM, HIGH_WATER_MARK)
        self.socket.set(zmq.MAXMSGSIZE, max_frame)
        self.socket.set(zmq.TCP_KEEPALIVE, 1)
        try:
            # libzmq takes 65537 for 1.
            port = bind.rpartition(":")[2]
            if port.isdecimal() and int(port) > 65535:
                raise zmq.ZMQError(errno.EINVAL)
            self.socket.bind(bind)
        except zmq.ZMQError as error:
            self.socket.close(0)
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(
                    f"{bind} is in use by another process; end that one, or choose another port (* for any free one)"
                ) from error
            raise OSError(
                f"cannot bind {bind}: {error.strerror}; use an address of this host, as in tcp://127.0.0.1:0"
            ) from error
        self.address = self.socket.get(zmq.LAST_ENDPOINT).decode()
        # Not by get_monitor_socket: where its queue is full, libzmq's thread waits for whoever reads it.
        watched = f"inproc://monitor-{id(self):x}"
        self.socket.monitor(watched, _WATCHED)
        self.monitor: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        """Readable when :meth:`events` has something."""
        self.monitor.set(zmq.RCVHWM, 0)
        self.monitor.connect(watched)
        self._recv: Callable[..., Any] = self.socket.recv
        self._send: Callable[..., Any] = self.socket.send

    def receive(self) -> tuple[bytes, zmq.Frame] | None:
        """(routing id, header) of the next message, None where there is none. The other frames follow by
        :meth:`rest` or :meth:`skip`, one of which has to be called.

        Frames tell by themselves whether more follow; asking the socket (RCVMORE) costs more than the frame.
        """
        try:
            sender = self._recv(_NOBLOCK)
        except zmq.Again:
            return None
        header: zmq.Frame = self._recv(0, False)
        return sender, header

    def rest(self, header: zmq.Frame) -> list[Part]:
        """The frames behind the header: small ones as bytes, large ones as they lie in libzmq's memory."""
        frames: list[Part] = []
        more = header.more
        while more:
            frame: zmq.Frame = self._recv(0, False)
            more = frame.more
            frames.append(frame if len(frame) >= BULK else frame.bytes)
        return frames

    def skip(self, header: zmq.Frame) -> None:
        """Throw away the rest of the message."""
        more = header.more
        while more:
            more = self._recv(0, False).more

    def send(self, to: bytes, header: bytes, frames: list[Part], unsent: Unsent | None = None) -> Sent:
        """Send a message without waiting; its large frames are noted in ``unsent`` until they have left."""
        send = self._send
        try:
            send(to, _NOBLOCK | _SNDMORE)
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno == errno.EHOSTUNREACH:
                return Sent.GONE
            raise
        # ROUTER has accepted the peer: the other frames of the message cannot be refused any more.
        if not frames:
            send(header, _NOBLOCK)
            return Sent.YES
        send(header, _NOBLOCK | _SNDMORE)
        last = len(frames) - 1
        for index, frame in enumerate(frames):
            more = _NOBLOCK | _SNDMORE if index < last else _NOBLOCK
            size = len(frame)
            if size < BULK:
                send(frame, more)
            elif unsent is None:
                send(frame, more, False)
            else:
                # A received Frame cannot be tracked, a view of it can.
                unsent.note(send(memoryview(frame), more, False, True), size)
        return Sent.YES

    def events(self) -> list[tuple[int, int]]:
        """What became of connections since the last call: (libzmq's event, its value). For ACCEPTED and DISCONNECTED
        that is the connection's number (see :func:`connection_of`); a failed handshake is told right before its
        DISCONNECTED, with libzmq's reason."""
        events: list[tuple[int, int]] = []
        while True:
            try:
                told = recv_monitor_message(self.monitor, _NOBLOCK)
            except zmq.Again:
                return events
            events.append((int(told["event"]), int(told["value"])))

    def close(self) -> None:
        self.socket.monitor(None, 0)
        self.monitor.close(0)
        self.socket.close()


def connection_of(header: zmq.Frame) -> int:
    """The number (libzmq's file descriptor) of the connection that a message came over; numbers are used again."""
    number: int = header.get(_SRCFD)
    return number


def user_of(header: zmq.Frame) -> str:
    """The public key (Z85) of the peer that sent a message to a secured endpoint."""
    return str(header.get("User-Id"))
