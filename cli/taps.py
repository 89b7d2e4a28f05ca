"""The operator's side of TAP: what requests come to the shards of a cluster, as they come."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import zmq

from cli.recording import Recorded
from laxity import protocol
from laxity.payload import Unpacker
from laxity.protocol import Goodbye, Tap, Tapped

ACKNOWLEDGED: Final = protocol.TAP_WINDOW // 8
"""Bytes after which a shard is told that they have been taken in."""
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
    """One shard that is tapped."""

    def __init__(self, context: zmq.Context[Any], shard: str, address: str, now: float) -> None:
        self.shard = shard
        self.socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self.socket.set(zmq.LINGER, 200)
        self.socket.set(zmq.RCVHWM, 1000)
        self.socket.set(zmq.SNDHWM, 4)  # TAPs for a shard that is away
        self.socket.set(zmq.RECONNECT_IVL_MAX, 2000)
        try:
            self.socket.connect(address)
        except zmq.ZMQError as error:
            self.socket.close(0)
            raise TapError(f"{address!r} is no shard's address: {error}") from error
        self.heard_at = -float("inf")
        self.started = now
        self.told_at = -float("inf")
        self.taken = 0
        self.told_taken = 0
        self._began_us = -1
        self._lost = 0
        self._zero = float("inf")

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

    def __init__(self, shards: Mapping[str, str], pipelines: Sequence[str], payloads: bool) -> None:
        self._pipelines = list(pipelines)
        self._payloads = payloads
        self._context: zmq.Context[Any] = zmq.Context()
        self._poller = zmq.Poller()
        self._shards: dict[Any, _Tapped] = {}
        now = time.monotonic()
        try:
            for shard, address in shards.items():
                tapped = _Tapped(self._context, shard, address, now)
                self._shards[tapped.socket] = tapped
                self._poller.register(tapped.socket, zmq.POLLIN)
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
            tapped.socket.close()
        self._context.term()

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
        for tapped in self._shards.values():
            if now - tapped.told_at >= protocol.TAP_EVERY:
                self._tap(tapped, now)

    def _tap(self, tapped: _Tapped, now: float) -> None:
        tapped.told_at = now
        tapped.told_taken = tapped.taken
        try:
            tapped.socket.send(protocol.encode(Tap(self._pipelines, self._payloads, tapped.taken)), zmq.NOBLOCK)
        except zmq.Again:
            pass  # it is away: told again in a second
