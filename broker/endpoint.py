"""A shard's ROUTER socket: messages in without waiting, messages out with every refusal noticed."""

from __future__ import annotations

import errno
from enum import Enum
from typing import Any, Final

import zmq

from laxity.payload import Part

HIGH_WATER_MARK: Final = 10_000
"""Messages that libzmq holds for one peer before it says EAGAIN."""
BULK: Final = 65_536
"""Frames from this many bytes on are received and sent without copying them."""
_NOBLOCK: Final = int(zmq.NOBLOCK)
_SNDMORE: Final = int(zmq.SNDMORE)
_RCVMORE: Final = int(zmq.RCVMORE)


class AddressInUse(OSError):
    """The port asked for is taken; the text names it and says what to do."""


class Sent(Enum):
    """What became of a message that was to be sent."""

    YES = "yes"
    FULL = "full"
    """The peer does not read: its queue is at the high-water mark (EAGAIN)."""
    GONE = "gone"
    """There is no such peer (EHOSTUNREACH)."""


class Endpoint:
    """A bound ROUTER. ``address`` is where peers connect to, with the port that the system chose for ``:*``."""

    def __init__(self, context: zmq.Context[Any], bind: str, max_frame: int) -> None:
        self.socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        self.socket.set(zmq.ROUTER_MANDATORY, 1)
        self.socket.set(zmq.LINGER, 200)
        self.socket.set(zmq.SNDHWM, HIGH_WATER_MARK)
        self.socket.set(zmq.RCVHWM, HIGH_WATER_MARK)
        self.socket.set(zmq.MAXMSGSIZE, max_frame)
        self.socket.set(zmq.TCP_KEEPALIVE, 1)
        try:
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
        self._recv = self.socket.recv
        self._send = self.socket.send
        self._get = self.socket.get

    def receive(self) -> tuple[bytes, bytes] | None:
        """(routing id, first frame) of the next message, None where there is none. The other frames follow by
        :meth:`rest` or :meth:`skip`, one of which has to be called."""
        try:
            sender = self._recv(_NOBLOCK)
        except zmq.Again:
            return None
        return sender, self._recv() if self._get(_RCVMORE) else b""

    def rest(self, bulk: bool) -> list[Part]:
        """The frames behind the first one; ``bulk`` says that they are large, so that they are not copied."""
        frames: list[Part] = []
        while self._get(_RCVMORE):
            frames.append(self._recv(0, not bulk))
        return frames

    def skip(self) -> None:
        """Throw away the rest of the message."""
        while self._get(_RCVMORE):
            self._recv(0, False)

    def send(self, to: bytes, header: bytes, frames: list[Part]) -> Sent:
        """Send a message without waiting."""
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
            send(frame, more, len(frame) < BULK)
        return Sent.YES

    def close(self) -> None:
        self.socket.close()
