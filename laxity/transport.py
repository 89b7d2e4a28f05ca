"""The I/O thread of a client: the only one that touches its sockets.

It carries requests from the user's threads to a shard and answers back, and does what its two engines,
:class:`~laxity.link.Link` and :class:`~laxity.requests.RequestTable`, decide. Requests that wait when it comes
round share one SUBMIT; whatever has arrived is read before it sleeps again.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from laxity import protocol
from laxity.link import Link, Step
from laxity.node import PayloadError
from laxity.outcomes import Outcome
from laxity.payload import Unpacker, decode, pack
from laxity.protocol import Answer, ProtocolError
from laxity.requests import Pending, RequestTable, local_answer
from laxity.version import __version__

log = logging.getLogger("laxity")

Ended = tuple[Pending, Answer, Any]
"""A request that ended: with its answer's header, and its value where the outcome is ``ok``."""

MAX_FRAME = 256 * 1024 * 1024
"""The largest frame that a shard may send, in bytes."""
HIGH_WATER = 100
"""Messages that may lie in ZeroMQ's queue; more wait here, where they can still be cancelled or joined."""
DRAIN = 64
"""Messages that are read before it is looked whether something wants to be sent."""
COPY_BELOW = 65536
"""Frames of fewer bytes are copied; for larger ones that costs more than the bookkeeping of not doing so."""
LINGER_MS = 200
"""How long the last words of a closing client may take, in milliseconds."""
RECONNECT_MS = 60_000
"""How long libzmq waits before it reconnects, in milliseconds: for ever, as :class:`Link` sees to that."""
MONITORED = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
)
LOST = {
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the handshake failed; is that a shard's port for services?",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "it does not speak ZeroMQ; is that a shard's port for services?",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "it did not accept this client's credentials",
    zmq.EVENT_DISCONNECTED: "the connection broke",
    zmq.EVENT_CONNECT_RETRIED: "nobody listens there",
}


class Transport:
    """See the module. ``deliver`` is called in the I/O thread with what has ended since the last call."""

    def __init__(self, endpoints: Sequence[str], client: str, deliver: Callable[[list[Ended]], None]) -> None:
        self.client = client
        self.table = RequestTable()
        self.inbox: deque[Pending | int] = deque()
        """From the user's threads: requests to submit, and ids of requests to cancel."""
        self.sleeping = False
        """Whether the I/O thread has to be woken to look into its inbox."""
        self.stopping = False
        """Whether it takes no more requests."""
        self.ready = threading.Event()
        """Whether a shard is connected and has said what it serves; also set once the thread has ended."""
        self._deliver = deliver
        self._link = Link(endpoints, jitter=int(client[:4], 16) / 0xFFFF, now=time.monotonic())
        self._cancels: list[int] = []
        self._ended: list[Ended] = []
        self._blocked = False
        self._greeting_due = False
        self._last_words: tuple[Outcome, str] | None = None
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._context = zmq.Context()
        self._dealer: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._poller = zmq.Poller()
        self._poller.register(self._wake_read, zmq.POLLIN)

    # ---- called by the user's threads ------------------------------------------------------

    def wake(self) -> None:
        """Have the I/O thread look into its inbox. Needed only while it is ``sleeping``."""
        if self._last_words is not None:
            self._end_all(*self._last_words)
            return
        self.sleeping = False
        try:
            self._wake_write.send(b"\0")
        except OSError:
            pass  # full: it is being woken already; closed: it is gone, and so is what it was to do

    def stop(self) -> None:
        """Have the I/O thread cancel what is in flight and end."""
        self.stopping = True
        self.wake()

    @property
    def trouble(self) -> str:
        """Why no shard is connected; '' while one is."""
        return self._link.trouble

    # ---- the I/O thread ------------------------------------------------------------------

    def run(self) -> None:
        """The thread's body: until :meth:`stop`."""
        detail = "the client was closed"
        outcome = Outcome.CANCELLED
        try:
            while not self.stopping:
                self._turn()
            self._part()
        except Exception as error:
            log.exception("the client's I/O thread failed")
            outcome = Outcome.UNAVAILABLE
            detail = f"the client's I/O thread failed: {error!r}; make a new client"
        finally:
            self.stopping = True
            self.ready.set()
            self._close_sockets()
            # A request that comes too late to be seen here is ended by the thread that brought it.
            self._last_words = (outcome, detail)
            self.sleeping = True
            self._end_all(outcome, detail)

    def _turn(self) -> None:
        now = time.monotonic()
        if self.inbox:
            self._empty_inbox()
        for step in self._link.advance(now):
            self._take_step(step, now)
        if self._greeting_due and not self._blocked:
            self._greet(now)
        if self._link.is_open:
            self._send_waiting(now)
        if now >= self.table.due_at():
            for pending, answer in self.table.look_after(now, self._link.is_open, self._link.trouble):
                self._ended.append((pending, answer, None))
        self._flush()
        # From here on who adds to the inbox wakes this thread; what came before is seen now.
        self.sleeping = True
        if self.inbox or self.stopping:
            timeout = 0
        else:
            due = min(self._link.due_at(), self.table.due_at())
            timeout = min(max(0, math.ceil((due - time.monotonic()) * 1000)), 60_000)
        ready = self._poller.poll(timeout)
        self.sleeping = False
        for source, events in ready:
            if source is self._dealer:
                if events & zmq.POLLIN:
                    self._receive()
                if events & zmq.POLLOUT:
                    self._unblock()
            elif source is self._monitor:
                self._watch()
            else:
                self._wake_read.recv(4096)

    def _empty_inbox(self) -> None:
        inbox = self.inbox
        table = self.table
        while inbox:
            item = inbox.popleft()
            if isinstance(item, Pending):
                table.add(item)
            else:
                pending = table.pop(item)
                if pending is not None and pending.sent:
                    self._cancels.append(item)

    def _flush(self) -> None:
        if self._ended:
            ended = self._ended
            self._ended = []
            self._deliver(ended)

    def _end_all(self, outcome: Outcome, detail: str) -> None:
        self._empty_inbox()
        self._ended += [(p, local_answer(p, outcome, detail), None) for p in self.table.pop_all()]
        self._flush()

    # ---- sending -----------------------------------------------------------------------

    def _send_waiting(self, now: float) -> None:
        if self._cancels and not self._blocked and self._send([protocol.encode(protocol.Cancel(self._cancels))], now):
            self._cancels = []
        table = self.table
        while table.is_waiting and not self._blocked:
            batch = table.take(now)
            if not batch:
                return
            header = protocol.encode(protocol.Submit(int(now * 1e6), [pending.request for pending in batch]))
            if not self._send([header, *pack([pending.payload for pending in batch])], now):
                table.put_back(batch)
                return
            table.sent(batch)

    def _send(self, frames: list[Any], now: float) -> bool:
        """False where the socket takes nothing now; it is then polled for when it does."""
        dealer = self._dealer
        if dealer is None:
            return False
        last = len(frames) - 1
        try:
            for index, frame in enumerate(frames):
                flags = zmq.NOBLOCK if index == last else zmq.NOBLOCK | zmq.SNDMORE
                dealer.send(frame, flags, copy=len(frame) < COPY_BELOW)
        except zmq.Again:
            self._blocked = True
            self._poller.modify(dealer, zmq.POLLIN | zmq.POLLOUT)
            return False
        self._link.sent(now)
        return True

    def _unblock(self) -> None:
        self._blocked = False
        if self._dealer is not None:
            self._poller.modify(self._dealer, zmq.POLLIN)

    # ---- receiving ---------------------------------------------------------------------

    def _receive_all(self) -> None:
        """Read what a broken connection has left."""
        while self._receive():
            pass

    def _receive(self) -> bool:
        """Read what has come in; whether there may be more."""
        dealer = self._dealer
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
            self._understand(header, parts, time.monotonic())
        return True

    def _understand(self, header: bytes, parts: list[Any], now: float) -> None:
        link = self._link
        try:
            message = protocol.decode_to_client(header)
        except ProtocolError as error:
            log.warning("%s sent something else than protocol version %d: %s", link.endpoint, protocol.VERSION, error)
            link.garbled(now, str(error))
            return
        link.heard(now)
        if type(message) is protocol.Result:
            self._take_answers(message.answers, parts)
        elif type(message) is protocol.Welcome:
            link.welcome(now, message)
            self.table.learn(link.heartbeat, message.max_payload, message.pipelines)
            self._ended += [(pending, answer, None) for pending, answer in self.table.too_large()]
            if link.is_open:
                self.ready.set()
        elif type(message) is protocol.Goodbye:
            link.goodbye(now, message.reason, message.retry)

    def _take_answers(self, answers: list[Answer], parts: list[Any]) -> None:
        unpacker = Unpacker(parts)
        broken: PayloadError | None = None
        for answer in answers:
            value = None
            try:
                if broken is not None:
                    raise broken
                payload = unpacker.take(answer.payload)
            except PayloadError as error:
                broken = error  # where the next answer's parts begin is unknown
            pending = self.table.pop(answer.id)
            if pending is None:
                continue
            try:
                if broken is not None:
                    raise broken
                if answer.outcome is Outcome.OK:
                    value = decode(payload)
            except PayloadError as error:
                answer = local_answer(pending, Outcome.FAILED, f"the shard's answer cannot be read: {error}")
            self._ended.append((pending, answer, value))

    # ---- the link ----------------------------------------------------------------------

    def _watch(self) -> None:
        """Tell the link what the monitor saw."""
        monitor = self._monitor
        while monitor is not None and monitor is self._monitor:
            try:
                event, _ = monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            kind = struct.unpack_from("=H", event)[0]
            if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._link.handshaked(time.monotonic())
            elif kind in LOST:
                self._receive_all()
                reason = LOST[kind]
                if kind == zmq.EVENT_CONNECT_RETRIED and _is_named(self._link.endpoint):
                    reason += ", or the name does not resolve"  # libzmq does not tell the two apart
                self._link.lost(time.monotonic(), reason)
                return

    def _take_step(self, step: Step, now: float) -> None:
        if step is Step.CLOSE:
            log.info("left a shard: %s", self._link.trouble)
            self.ready.clear()
            self._disconnect(0)
        elif step is Step.CONNECT:
            self._connect()
        elif step is Step.GREET:
            self._greeting_due = True
        elif step is Step.RESUBMIT:
            self.table.resubmit()
        elif step is Step.HEARTBEAT:
            self._send([protocol.encode(protocol.Heartbeat(int(now * 1e6)))], now)
        elif step is Step.GIVE_UP:
            self._end_all(Outcome.UNAVAILABLE, self._link.trouble)

    def _greet(self, now: float) -> None:
        hello = protocol.Hello(protocol.VERSION, self.client, f"laxity-python {__version__}")
        self._greeting_due = not self._send([protocol.encode(hello)], now)

    def _connect(self) -> None:
        dealer: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        # Not IMMEDIATE: with it libzmq throws unread answers away when the connection breaks. Nothing is sent
        # before the handshake, and this socket is closed before it would connect a second time.
        dealer.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        dealer.setsockopt(zmq.SNDHWM, HIGH_WATER)
        dealer.setsockopt(zmq.RCVHWM, HIGH_WATER)
        dealer.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
        self._dealer = dealer
        self._monitor = dealer.get_monitor_socket(MONITORED)
        self._poller.register(dealer, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._blocked = self._greeting_due = False
        dealer.connect(self._link.endpoint)

    def _disconnect(self, linger_ms: int) -> None:
        if self._dealer is None or self._monitor is None:
            return
        self._poller.unregister(self._dealer)
        self._poller.unregister(self._monitor)
        self._dealer.disable_monitor()
        self._monitor.close(0)
        self._dealer.close(linger_ms)
        self._dealer = self._monitor = None

    def _part(self) -> None:
        """Last words to the shard: what was in flight is no longer wanted."""
        if self._link.is_known:
            self._empty_inbox()
            now = time.monotonic()
            ids = [*self._cancels, *self.table.sent_ids()]
            if ids:
                self._send([protocol.encode(protocol.Cancel(ids))], now)
            self._send([protocol.encode(protocol.Goodbye("the client was closed"))], now)

    def _close_sockets(self) -> None:
        self._disconnect(LINGER_MS)
        self._context.term()
        self._wake_read.close()
        self._wake_write.close()


def _is_named(endpoint: str) -> bool:
    """Whether an endpoint is a host's name, and not a numeric address or a file."""
    scheme, _, rest = endpoint.partition("://")
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return scheme == "tcp"
    return False
