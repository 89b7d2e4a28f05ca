"""The operator's side of TAP: what requests come to the shards of a cluster, as they come."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import zmq
from zmq.utils.monitor import recv_monitor_message

from cli.recording import Recorded
from laxity import protocol
from laxity.credentials import NOT_READY, Credentials, why_failed
from laxity.payload import Unpacker
from laxity.protocol import Goodbye, Tap, Tapped

ACKNOWLEDGED: Final = protocol.TAP_WINDOW // 8
"""Bytes after which a shard is told that they have been taken in."""
FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
SILENCE: Final = 5.0
"""Seconds without a word after which a shard is said to be silent."""
_TURN: Final = 64
"""Messages of one shard before the next one's are looked at."""


class TapError(Exception):
    """A shard cannot be tapped; the text says why."""


class Seen(NamedTuple):
    """A request that came to a shard at ``at``, on this process's monotonic clock; its own offset is not set."""

    at: float
    request: Recorded


class Lost(NamedTuple):
    """So many requests were not told by a shard."""

    shard: str
    requests: int


class _Tapped:
    """One shard that is tapped, over a socket that connects by itself again and again."""

    def __init__(
        self, context: zmq.Context[Any], credentials: Credentials, shard: str, address: str, now: float
    ) -> None:
        self.shard = shard
        self.trouble = ""
        """Why it did not let this process in, when it was tried last."""
        self._context = context
        self._credentials = credentials
        self._address = address
        try:
            self._ways = credentials.ways(address, shard if shard != address else "")
        except ValueError as error:
            raise TapError(f"shard {shard} at {address}: {error}") from error
        self.connect()
        self.heard_at = -float("inf")
        self.started = now
        self.told_at = -float("inf")
        self.taken = 0
        self.told_taken = 0
        self._began_us = -1
        self._lost = 0
        self._zero = float("inf")

    def connect(self) -> None:
        """Raises :class:`TapError` for what is no address."""
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self.socket.set(zmq.LINGER, 200)
        self.socket.set(zmq.RCVHWM, 1000)
        self.socket.set(zmq.SNDHWM, 4)  # TAPs for a shard that is away
        self.socket.set(zmq.RECONNECT_IVL_MAX, 2000)
        self._credentials.prepare(self.socket, self._ways[0])
        self._monitor = self.socket.get_monitor_socket(FAILED)
        try:
            self.socket.connect(self._address)
        except zmq.ZMQError as error:
            self.close(0)
            raise TapError(f"{self._address!r} is no shard's address: {error}") from error

    def close(self, linger_ms: int | None = None) -> None:
        self.socket.disable_monitor()
        self._monitor.close(0)
        self.socket.close(linger_ms)

    def has_failed(self) -> bool:
        """Whether the shard did not let this process in: it is to be connected to anew, with its next key. Raises
        :class:`TapError` where that is no use."""
        if not self._monitor.poll(0):
            return False
        told = recv_monitor_message(self._monitor)
        event, detail = told["event"], told["value"]
        self.trouble = f"shard {self.shard}: {why_failed(event, detail, self._ways[0])}"
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and detail != NOT_READY:
            raise TapError(self.trouble)
        self._ways.append(self._ways.pop(0))
        return True

    def take(self, now: float, message: Tapped, frames: Sequence[bytes]) -> list[Seen | Lost]:
        """What a message tells."""
        self.heard_at = now
        if message.began_us != self._began_us:
            self._began_us = message.began_us
            self._lost = 0
            self._zero = float("inf")
        # Of all messages the one that was the quickest tells best how far the two clocks are apart.
        self._zero = min(self._zero, now - message.sent_us * 1e-6)
        found: list[Seen | Lost] = []
        if message.lost > self._lost:
            found.append(Lost(self.shard, message.lost - self._lost))
            self._lost = message.lost
        unpacker = Unpacker(frames)
        for request in message.requests:
            parts = [bytes(part) for part in unpacker.take(request.payload).parts] if message.payloads else None
            budget = None if request.budget_us is None else max(request.budget_us, 1) * 1e-6
            recorded = Recorded(0.0, request.pipeline, budget, request.priority, request.payload, parts)
            found.append(Seen(self._zero + request.at_us * 1e-6, recorded))
        return found


class TapClient:
    """Taps the shards at these addresses (by name) for the pipelines named, or all; for one thread."""

    def __init__(
        self,
        shards: Mapping[str, str],
        pipelines: Sequence[str],
        payloads: bool,
        credentials: Credentials | None = None,
    ) -> None:
        self._pipelines = list(pipelines)
        self._payloads = payloads
        self._context: zmq.Context[Any] = zmq.Context()
        self._poller = zmq.Poller()
        self._shards: dict[Any, _Tapped] = {}
        now = time.monotonic()
        try:
            for shard, address in shards.items():
                self._add(_Tapped(self._context, credentials or Credentials(), shard, address, now))
        except TapError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all taps."""
        for tapped in self._shards.values():
            try:
                tapped.socket.send(protocol.encode(Goodbye("the recording has ended")), zmq.NOBLOCK)
            except zmq.Again:
                pass  # it is away
            tapped.close()
        self._context.term()

    def _add(self, tapped: _Tapped) -> None:
        self._shards[tapped.socket] = tapped
        self._poller.register(tapped.socket, zmq.POLLIN)

    def poll(self, seconds: float) -> list[Seen | Lost]:
        """What came, waiting for some of it for up to so many seconds. :class:`TapError` where a shard refuses."""
        self._say()
        found: list[Seen | Lost] = []
        for socket, _ in self._poller.poll(max(int(min(seconds, protocol.TAP_EVERY) * 1000), 0)):
            tapped = self._shards[socket]
            for _ in range(_TURN):
                try:
                    header, *frames = tapped.socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                found += self._take(tapped, header, frames)
        return found

    def silent(self) -> list[str]:
        """The shards that have not been heard of for a while."""
        now = time.monotonic()
        return [
            tapped.shard for tapped in self._shards.values() if max(tapped.heard_at, tapped.started) < now - SILENCE
        ]

    def troubles(self) -> list[str]:
        """What is wrong with those that did not let this process in."""
        return [tapped.trouble for tapped in self._shards.values() if tapped.trouble and tapped.heard_at < 0]

    def heard(self) -> int:
        """How many shards are tapped by now."""
        return sum(tapped.heard_at > 0 for tapped in self._shards.values())

    def _take(self, tapped: _Tapped, header: bytes, frames: list[bytes]) -> list[Seen | Lost]:
        tapped.taken += len(header) + sum(map(len, frames))
        if tapped.taken - tapped.told_taken >= ACKNOWLEDGED:
            self._tap(tapped, time.monotonic())
        try:
            message = protocol.decode_to_client(header)
            if isinstance(message, Goodbye):
                raise TapError(f"shard {tapped.shard}: {message.reason}")
            return tapped.take(time.monotonic(), message, frames) if isinstance(message, Tapped) else []
        except ValueError as error:
            raise TapError(f"shard {tapped.shard} says what cannot be understood: {error}") from error

    def _say(self) -> None:
        now = time.monotonic()
        for socket, tapped in list(self._shards.items()):
            if tapped.heard_at < now - SILENCE and tapped.has_failed():
                del self._shards[socket]
                self._poller.unregister(socket)
                tapped.close(0)
                tapped.connect()
                self._add(tapped)
                tapped.told_at = -float("inf")
            if now - tapped.told_at >= protocol.TAP_EVERY:
                self._tap(tapped, now)

    def _tap(self, tapped: _Tapped, now: float) -> None:
        tapped.told_at = now
        tapped.told_taken = tapped.taken
        try:
            tapped.socket.send(protocol.encode(Tap(self._pipelines, self._payloads, tapped.taken)), zmq.NOBLOCK)
        except zmq.Again:
            pass  # it is away: told again in a second
