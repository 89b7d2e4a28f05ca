"""How the process that speaks HTTP asks the one that it speaks for: length-prefixed MessagePack over a socketpair."""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Final, Literal

import msgspec

from cluster.observe.figures import Figures
from cluster.observe.source import Source
from cluster.observe.trace import TraceRecord

log = logging.getLogger("laxity.observe")

MOST_ASKED: Final = 4096
"""Bytes of a question at most."""
MOST_ANSWERED: Final = 64 * 1024**2
"""Bytes of an answer at most."""
PATIENCE: Final = 2.0
"""Seconds within which a process that lives answers."""
MOST_UNANSWERED: Final = 64
"""Questions that may be on their way: with more, what sends the next one could have to wait for ever."""

_LENGTH = struct.Struct("!I")


class Question(msgspec.Struct, array_like=True, frozen=True):
    """A call of one of :class:`Source`'s methods; ``number`` is the answer's, too."""

    number: int
    what: Literal["figures", "trace", "traces"]
    request: str = ""
    after: int = 0
    limit: int = 0


class Answer(msgspec.Struct, array_like=True, frozen=True):
    """What the method returned, or why it could not be called."""

    number: int
    value: msgspec.Raw = msgspec.Raw(b"\xc0")
    error: str = ""


def answer(source: Source, asked: bytes) -> bytes:
    """The answer to a question. ValueError where it is none."""
    try:
        question = msgspec.msgpack.decode(asked, type=Question)
    except msgspec.MsgspecError as error:
        raise ValueError(f"no question: {error}") from error
    value: Any
    try:
        if question.what == "figures":
            value = source.figures()
        elif question.what == "trace":
            value = source.trace(question.request)
        else:
            value = source.traces(question.after, question.limit)
        encoded = msgspec.msgpack.encode(value)
    except (RuntimeError, TimeoutError) as error:
        return msgspec.msgpack.encode(Answer(question.number, error=str(error) or type(error).__name__))
    except Exception:
        # The thread goes on, whatever it was: others may be answered.
        log.exception("%s cannot be told", question.what)
        return msgspec.msgpack.encode(Answer(question.number, error="internal error; the log has more"))
    answered = msgspec.msgpack.encode(Answer(question.number, msgspec.Raw(encoded)))
    if len(answered) > MOST_ANSWERED:
        why = f"the answer has {len(answered)} bytes, more than {MOST_ANSWERED}"
        return msgspec.msgpack.encode(Answer(question.number, error=why))
    return answered


def send(link: socket.socket, message: bytes) -> None:
    """Send one message. OSError where the other end is gone, TimeoutError where it does not read."""
    link.sendall(_LENGTH.pack(len(message)) + message)


def receive(link: socket.socket, most: int) -> bytes:
    """The next message; b'' once the other end is gone. ValueError for one of more than ``most`` bytes."""
    head = _exactly(link, _LENGTH.size)
    if not head:
        return b""
    (length,) = _LENGTH.unpack(head)
    if length > most:
        raise ValueError(f"a message of {length} bytes, more than {most}")
    return _exactly(link, length)


def _exactly(link: socket.socket, size: int) -> bytes:
    """So many bytes, or b'' where the other end is gone before they are all there."""
    data = bytearray(size)
    view = memoryview(data)
    while len(view):
        try:
            read = link.recv_into(view)
        except ConnectionError:
            return b""
        if not read:
            return b""
        view = view[read:]
    return bytes(data)


class RemoteSource:
    """A :class:`Source` at the other end of a link, from any thread. Each call may raise RuntimeError (the text says
    why there is no answer), and TimeoutError after :data:`PATIENCE`. Once the other end is gone this process ends."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._lock = threading.Lock()
        """Of who sends, and of the fields below."""
        self._last = 0
        self._answered = 0
        """The number of the latest answer; they come in the questions' order."""
        self._waiting: dict[int, Future[Answer]] = {}
        self._thread = threading.Thread(target=self._receive, name="link", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the other end to be gone: this process ends with it."""
        self._thread.join()

    def figures(self) -> Figures:
        return msgspec.msgpack.decode(self._ask("figures"), type=Figures)

    def trace(self, request: str) -> TraceRecord | None:
        return msgspec.msgpack.decode(self._ask("trace", request=request), type=TraceRecord | None)

    def traces(self, after: int, limit: int) -> tuple[int, list[TraceRecord]]:
        answered = self._ask("traces", after=after, limit=limit)
        return msgspec.msgpack.decode(answered, type=tuple[int, list[TraceRecord]])

    def _ask(
        self, what: Literal["figures", "trace", "traces"], request: str = "", after: int = 0, limit: int = 0
    ) -> msgspec.Raw:
        future: Future[Answer] = Future()
        with self._lock:
            if self._last - self._answered >= MOST_UNANSWERED:
                raise TimeoutError(f"the process has not answered the last {MOST_UNANSWERED} questions")
            asked = msgspec.msgpack.encode(Question(self._last + 1, what, request, after, limit))
            if len(asked) > MOST_ASKED:
                raise RuntimeError(f"a question of {len(asked)} bytes; at most {MOST_ASKED} are allowed")
            self._last = number = self._last + 1
            self._waiting[number] = future
            send(self._link, asked)
        try:
            answered = future.result(PATIENCE)
        except (FutureTimeout, CancelledError):
            raise TimeoutError(f"the process does not answer within {PATIENCE:g} s") from None
        finally:
            with self._lock:
                self._waiting.pop(number, None)
        if answered.error:
            raise RuntimeError(answered.error)
        return answered.value

    def _receive(self) -> None:
        try:
            while message := receive(self._link, MOST_ANSWERED):
                answered = msgspec.msgpack.decode(message, type=Answer)
                with self._lock:
                    self._answered = answered.number
                    future = self._waiting.pop(answered.number, None)
                if future is not None:
                    future.set_result(answered)
        finally:
            # At once, whatever is going on here: the address that both listen at is wanted for the next one.
            os._exit(0)
