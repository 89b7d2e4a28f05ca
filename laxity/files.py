"""Files to and from shards, by digest: what the command line uploads and agents fetch.

A connection of its own, to either side of a shard for fetching and to its frontend for uploading; it says no HELLO and
no HEARTBEAT (docs/protocol.md). Whoever uses it checks the digest of what comes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import zmq
from zmq.utils.monitor import recv_monitor_message

from laxity import protocol
from laxity.credentials import Credentials, why_failed
from laxity.protocol import MAX_CHUNK, NOT_HERE, NOT_YET, Chunk, Fetch, Goodbye, Message, Store, Stored

SILENCE: Final = 10.0
"""Seconds that a shard may take for an answer; a slow disk is waited for, a dead shard is not."""
WINDOW: Final = 2
"""Chunks asked for and not received: one is on its way while the next is read."""
PAUSE: Final = 0.25
"""Seconds before an upload that was put off is tried again."""
PATIENCE: Final = 30.0
"""Seconds for which an upload is put off before it is given up."""
MAX_RESTARTS: Final = 5
"""How often an upload may begin again (others upload the same file, the shard was started again)."""
WRAPPING: Final = 64
"""Bytes that encryption adds to a frame, at most."""
TURN_MS: Final = 200
"""How often it is looked whether to stop, in milliseconds."""

M = TypeVar("M", bound=Message)


class TransferError(Exception):
    """A file did not come or go; the text says why."""


class FileNotHere(TransferError):
    """The shard does not have the file."""


class FileNotYet(TransferError):
    """The shard may have the file in a while: it is being uploaded, or the shard is busy."""


class FileClient:
    """A connection to one shard, for one thread; ``credentials`` has the keys that it may have. Once ``stopped`` says
    so, calls end with :class:`TransferError`, as they do where the shard cannot be connected to."""

    def __init__(
        self, address: str, stopped: Callable[[], bool] = lambda: False, credentials: Credentials | None = None
    ) -> None:
        self.address = address
        self._stopped = stopped
        self._credentials = credentials or Credentials()
        try:
            ways = self._credentials.ways(address)
        except ValueError as error:
            raise TransferError(f"{address}: {error}") from error
        self._context: zmq.Context[Any] = zmq.Context()
        try:
            while not self._connected(ways.pop(0), last=not ways):
                pass
        except BaseException:
            self._context.destroy(0)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)
        self._context.term()

    def fetch(self, digest: str, size: int) -> Iterator[bytes]:
        """The content of a file of ``size`` bytes, in pieces."""
        asked = got = 0
        while got < size:
            while asked < size and asked - got < WINDOW * MAX_CHUNK:
                self._send(Fetch(digest, asked, min(MAX_CHUNK, size - asked)))
                asked += MAX_CHUNK
            chunk, data = self._answer(Chunk, digest, got)
            if chunk.total == NOT_HERE:
                raise FileNotHere(f"{self.address}: {chunk.detail or 'the file is not there'}")
            if chunk.total == NOT_YET:
                raise FileNotYet(f"{self.address}: {chunk.detail or 'not at present'}")
            if chunk.total != size or len(data) != min(MAX_CHUNK, size - got):
                raise TransferError(
                    f"{self.address}: {len(data)} bytes at {got} of {chunk.total}, where the file has {size} bytes"
                )
            got += len(data)
            yield data

    def upload(self, digest: str, size: int, file: Path, progress: Callable[[int], None] = lambda _: None) -> None:
        """Bring a file to the shard, which checks it; ``progress`` is told how many bytes it has."""
        put_off_since = None
        restarts = 0
        have = 0
        data = b""
        with file.open("rb") as stream:
            while True:
                self._send(Store(digest, have, size), data)
                stored, _ = self._answer(Stored, digest, None)
                if stored.detail and not stored.retry:
                    raise TransferError(f"{self.address}: {stored.detail}")
                if stored.detail:
                    now = time.monotonic()
                    put_off_since = put_off_since if put_off_since is not None else now
                    if now > put_off_since + PATIENCE:
                        raise TransferError(f"{self.address}: {stored.detail}")
                    self._pause()
                else:
                    put_off_since = None
                    progress(min(stored.have, size))
                    if stored.have == size:
                        return
                restarts += stored.have < have
                if restarts > MAX_RESTARTS or not 0 <= stored.have < size:
                    raise TransferError(f"{self.address}: the upload does not advance")
                have = stored.have
                stream.seek(have)
                data = stream.read(MAX_CHUNK)
                if not data:
                    raise TransferError(f"{file} has become shorter; apply the pipeline again")

    def _connected(self, way: str, last: bool) -> bool:
        """Connect with one of the keys that the shard may have; False where it does not, and this is not the last."""
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.MAXMSGSIZE, MAX_CHUNK + WRAPPING)
        self._socket.set(zmq.RECONNECT_IVL, 60_000)  # a connection that breaks is the end of this
        self._credentials.prepare(self._socket, way)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_DISCONNECTED
            | zmq.EVENT_CONNECT_RETRIED
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        )
        try:
            self._socket.connect(self.address)
        except zmq.ZMQError as error:
            raise TransferError(f"{self.address!r} is no shard's address: {error}") from error
        ends = time.monotonic() + SILENCE
        while not self._monitor.poll(TURN_MS):
            self._check_stopped()
            if time.monotonic() > ends:
                raise TransferError(f"{self.address}: no answer within {SILENCE:g} s")
        told = recv_monitor_message(self._monitor)
        event = told["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._poller = zmq.Poller()
            self._poller.register(self._socket, zmq.POLLIN)
            self._poller.register(self._monitor, zmq.POLLIN)
            return True
        why = why_failed(event, told["value"], way)
        if last or not why or event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise TransferError(f"{self.address}: {why or 'no shard answers there'}")
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)
        return False

    def _send(self, message: Fetch | Store, *frames: bytes) -> None:
        self._socket.send_multipart([protocol.encode(message), *frames])

    def _answer(self, kind: type[M], digest: str, offset: int | None) -> tuple[M, bytes]:
        """The answer about this file (and place in it), and its frame. Those to earlier questions are passed over."""
        ends = time.monotonic() + SILENCE
        while True:
            header, frames = self._receive(ends)
            try:
                message: Any = protocol.decode_to_client(header)
            except protocol.ProtocolError as error:
                raise TransferError(f"{self.address}: {error}; is that a shard?") from error
            if isinstance(message, Goodbye):
                raise TransferError(f"{self.address}: {message.reason}")
            if (
                isinstance(message, kind)
                and getattr(message, "digest", None) == digest
                and (offset is None or getattr(message, "offset", None) == offset)
            ):
                return message, b"".join(frames)

    def _receive(self, ends: float) -> tuple[bytes, list[bytes]]:
        while True:
            self._check_stopped()
            ready = dict(self._poller.poll(TURN_MS))
            if self._socket in ready:
                header, *frames = self._socket.recv_multipart()
                return header, frames
            if self._monitor in ready:
                raise TransferError(f"{self.address}: the connection broke")
            if time.monotonic() > ends:
                raise TransferError(f"{self.address}: no answer within {SILENCE:g} s")

    def _pause(self) -> None:
        self._check_stopped()
        threading.Event().wait(PAUSE)

    def _check_stopped(self) -> None:
        if self._stopped():
            raise TransferError("interrupted")
