"""The connection of an agent to one shard: greeting, heartbeats, connecting anew, and the batches that come over it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from laxity import protocol
from laxity.credentials import PLAIN, Credentials, why_failed
from laxity.link import HEARTBEAT_BOUNDS, MISSED
from laxity.log_lines import worth_a_line
from laxity.payload import Part
from laxity.protocol import Acted, DeviceReport, Done, Goodbye, Grant, Heartbeat, Load, Ready, Unload, Welcome
from nodes.device import Device

log = logging.getLogger("laxity.node")

BULK: Final = 65_536
"""Frames from this many bytes on are sent without copying them."""
LINGER_MS: Final = 1000
"""Milliseconds that the last messages have to leave once a connection is given up in good order."""
FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
"""What the monitor tells of a connection that does not come about."""
STALE: Final = "it has another key than the store tells (is it just starting?)"
FAILED_PAUSE: Final = 1.0
"""Seconds after which a shard that did not let this agent in is tried again: keys may be made or replaced."""
REFUSED_PAUSE: Final = 60.0
"""Seconds after which a shard that refused this agent is tried again: it may have been upgraded."""


class LinkCounts:
    """Of all connections of an agent, also of those that it gave up."""

    def __init__(self) -> None:
        self.heartbeats = 0
        """Sent."""
        self.reconnects = 0
        """Sessions with a shard that followed another one over the same connection."""


class ShardSession:
    """The time from a shard's WELCOME until either side lets go of the other: what was granted in it cannot be answered
    after it."""

    def __init__(self, link: ShardLink) -> None:
        self._link = link
        self.shard = link.shard
        self.open = True

    def send(self, message: protocol.FromAgent, frames: list[Part]) -> bool:
        """See :class:`nodes.action_record.Session`."""
        return self.open and self._link.send(message, frames)

    def told(self, device: int, model: str, resident: bool) -> None:
        """See :class:`nodes.action_record.Session`."""
        self._link.told(device, model, resident)


class ShardLink:
    """Works for one shard with ``devices``, the ones that it owns, by number.

    The owner polls ``socket``, calls :meth:`receive` when it is readable and :meth:`keep_alive` at ``next_wake``. A
    link that has lost its last device lets go in good order, and is ``closed`` then.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        shard: str,
        agent: str,
        heartbeat: float,
        owing: Callable[[ShardSession], bool],
        counts: LinkCounts,
        credentials: Credentials,
    ) -> None:
        """``heartbeat`` in seconds, until WELCOME says another. ``owing`` tells whether any device of the agent, also
        one that works for another shard by now, has a batch of a session to answer. ``credentials`` are those of all
        links of the agent."""
        self.shard = shard
        self.devices: dict[int, Device] = {}
        self.session: ShardSession | None = None
        self.refused = ""
        """Why the shard does not talk to this agent, where it said so."""
        self.locked_out = False
        """Whether the shard did not accept the agent's key; set anew each time."""
        self.closed = False
        self.socket: zmq.Socket[bytes] | None = None
        self.monitor: zmq.Socket[bytes] | None = None
        """Tells why a connection does not come about; to be polled beside ``socket``."""
        self._context = context
        self._credentials = credentials
        self._way: str | None = None
        """The shard's key; None where it cannot be connected to."""
        self._trouble = ""
        self._failures = 0
        self._resting = False
        """Whether the devices take no batches until the connection is made anew, with another key."""
        self._agent = agent
        self._fields = {"shard": shard}
        """Of lines in the log."""
        self._heartbeat = heartbeat
        self._owing = owing
        self._counts = counts
        self._sessions = 0
        self._address = ""
        self._heard_at = 0.0
        self._said_at = 0.0
        self._retry_at = 0.0
        self._reported: list[DeviceReport] = []
        """What the last READY said."""
        self._unanswered = 0
        """READYs that no WELCOME has answered yet."""
        self._ready_due = False
        """READY is to be said as soon as the connection stands (IMMEDIATE: the socket is writable then)."""

    @property
    def working(self) -> ShardSession | None:
        """The session in which devices may take batches."""
        return None if self._resting else self.session

    # ---- what the agent wants --------------------------------------------------------------

    def connect(self, now: float, address: str) -> None:
        """The shard is at this address, if it is not there already; the credentials know its key."""
        way = self._way_to(address)
        if (address, way) != (self._address, self._way):
            self._address, self._way = address, way
            self._reconnect(now)

    def renew(self, now: float) -> None:
        """The agent has another key: connect anew with it. No more batches are taken until those that were granted are
        answered, over the connection that there is."""
        self.refused = ""
        if self._address:
            self._way = self._way_to(self._address)
            self._resting = True
            for device in self.devices.values():
                device.work_for(now, None)
            self.report()

    def report(self) -> None:
        """Tell the shard what the devices hold, where that changed."""
        if self.session is not None and self._reports() != self._reported:
            self._say_ready()

    def told(self, device: int, model: str, resident: bool) -> None:
        """An ACTED has told where a model is: READY need not."""
        for report in self._reported:
            if report.device == device:
                for held in report.models:
                    if held.model == model:
                        held.resident = resident

    def events(self) -> int:
        """What to poll ``socket`` for."""
        return zmq.POLLIN | zmq.POLLOUT if self._ready_due else zmq.POLLIN

    def next_wake(self) -> float:
        """When :meth:`keep_alive` has something to do."""
        if (self._resting or not self.devices) and self._is_done():
            return 0.0
        if self.socket is None:
            return self._retry_at if self.refused or self._trouble else 1e18
        return 1e18 if self._ready_due else self._said_at + self._heartbeat

    def keep_alive(self, now: float) -> None:
        """Do what is due; before anything else is said after a wait: to an agent that was frozen for so long that it
        was taken for gone, a HEARTBEAT is answered with GOODBYE, while a READY would look like a first one."""
        if not self.devices and self._is_done():
            self.close()
        elif self._resting and self._is_done():
            self.send(Goodbye(reason=f"agent {self._agent} has another key"), [])
            self._reconnect(now, LINGER_MS)
        elif self.socket is None:
            if (self.refused or self._trouble) and now >= self._retry_at:
                self._reconnect(now)
        elif self._ready_due:
            if self._has_failed(now):
                return
            if int(self.socket.get(zmq.EVENTS)) & zmq.POLLOUT:
                self._say_ready()
        elif now < self._said_at + self._heartbeat:
            return
        elif now > self._heard_at + MISSED * self._heartbeat:
            log.warning("shard %s at %s is silent: connecting anew", self.shard, self._address, extra=self._fields)
            self._reconnect(now)
        elif self.session is None:
            self._say_ready()
        else:
            self._counts.heartbeats += self.send(Heartbeat(round(now * 1e6)), [])

    def close(self) -> None:
        """Say goodbye and close the connection for good."""
        self.closed = True
        if self.socket is not None:
            self.send(Goodbye(reason=f"agent {self._agent} leaves"), [])
            self._close_socket(LINGER_MS)
        if self.session is not None:
            self.session.open = False
            self.session = None

    def _is_done(self) -> bool:
        """Whether the shard knows that it has no device here, and has all its answers."""
        session = self.session
        return session is None or (not self._reported and not self._unanswered and not self._owing(session))

    # ---- in --------------------------------------------------------------------------------

    def receive(self, clock: Callable[[], float]) -> None:
        """Take in what has come."""
        socket = self.socket
        while socket is not None and socket is self.socket:
            try:
                frames: list[Any] = socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            now = clock()
            self._heard_at = now
            try:
                message = protocol.decode_to_agent(frames[0].buffer)
            except protocol.ProtocolError as error:
                log.warning("malformed message from shard %s: %s", self.shard, error, extra=self._fields)
                continue
            self._message(now, message, frames)

    def _message(self, now: float, message: protocol.ToAgent, frames: list[Part]) -> None:
        if isinstance(message, Grant):
            if self.session is None:
                return
            device = self.devices.get(message.device)
            if device is not None:
                device.grant(now, self.session, message, frames[1:])
            else:
                self.send(Done(message.device, message.batch, "cancelled", detail=_not_ours(message.device)), [])
        elif isinstance(message, Load | Unload):
            if self.session is not None:
                self._page(now, self.session, message)
        elif isinstance(message, Welcome):
            self._welcome(now, message)
        elif isinstance(message, Goodbye):
            if not message.retry:
                self._refuse(now, f"shard {self.shard} at {self._address} refused this agent: {message.reason}")
                return
            log.warning("shard %s said goodbye: %s", self.shard, message.reason, extra=self._fields)
            self._end_session(now)
            self._say_ready()

    def _page(self, now: float, session: ShardSession, message: Load | Unload) -> None:
        device = self.devices.get(message.device)
        if device is None:
            self.send(Acted(message.device, message.action, "cancelled", 0, _not_ours(message.device)), [])
        elif isinstance(message, Load):
            device.load(now, session, message)
        else:
            device.unload(now, session, message)

    def _welcome(self, now: float, welcome: Welcome) -> None:
        if welcome.version != protocol.VERSION:
            self._refuse(
                now,
                f"shard {self.shard} at {self._address} speaks protocol version {welcome.version}, this agent "
                f"{protocol.VERSION}: upgrade the older of the two",
            )
            return
        shortest, longest = HEARTBEAT_BOUNDS
        self._heartbeat = min(max(welcome.heartbeat_us * 1e-6, shortest), longest)
        self._unanswered = max(self._unanswered - 1, 0)
        if self.session is None:
            self.refused = ""
            self.session = ShardSession(self)
            self._sessions += 1
            self._counts.reconnects += self._sessions > 1
            self._trouble = ""
            self._failures = 0
            log.info("connected to shard %s", welcome.shard, extra=self._fields)
            self.report()  # what changed since READY was said; before the devices pull
            if not self._resting:
                for device in self.devices.values():
                    device.work_for(now, self.session)

    # ---- the connection ----------------------------------------------------------------------

    def _refuse(self, now: float, why: str) -> None:
        """The shard cannot be worked for: try again, but not soon."""
        log.error("%s", why, extra=self._fields)
        self._disconnect(now)
        self.refused = why
        self._retry_at = now + REFUSED_PAUSE

    def _way_to(self, address: str) -> str | None:
        """The key of the shard at an address; None, and a line in the log, where there is none to connect with."""
        try:
            return self._credentials.ways(address, self.shard)[0]
        except ValueError as error:
            self._fail(f"shard {self.shard} at {address} cannot be connected to: {error}")
            return None

    def _has_failed(self, now: float) -> bool:
        """Whether the shard did not let this agent in; it is tried again in a while."""
        monitor = self.monitor
        if monitor is None or not monitor.poll(0):
            return False
        told = recv_monitor_message(monitor)
        why = why_failed(told["event"], told["value"], self._way or PLAIN, STALE)
        self._fail(f"shard {self.shard} at {self._address}: {why}")
        self._disconnect(now)
        self._retry_at = now + FAILED_PAUSE
        self.locked_out = told["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH
        return True

    def _fail(self, why: str) -> None:
        """Log what is in the way: at once if it is something else than before, then ever more seldom."""
        self._failures = self._failures + 1 if why == self._trouble else 1
        self._trouble = why
        if worth_a_line(self._failures):
            log.error("%s", why, extra=self._fields)

    def _reconnect(self, now: float, linger_ms: int = 0) -> None:
        self._disconnect(now, linger_ms)
        self._resting = False
        if self._way is None:
            self._retry_at = 1e18
            return
        self._heard_at = self._said_at = now
        socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        socket.set(zmq.LINGER, LINGER_MS)
        socket.set(zmq.IMMEDIATE, 1)
        socket.set(zmq.SNDHWM, 10_000)
        socket.set(zmq.RCVHWM, 10_000)
        socket.set(zmq.RECONNECT_IVL, 50)
        socket.set(zmq.RECONNECT_IVL_MAX, 1000)
        socket.set(zmq.TCP_KEEPALIVE, 1)
        self._credentials.prepare(socket, self._way)
        monitor = socket.get_monitor_socket(FAILED)
        try:
            socket.connect(self._address)
        except zmq.ZMQError as error:
            socket.disable_monitor()
            monitor.close(0)
            socket.close(0)
            log.error("the address %r of shard %s cannot be used: %s", self._address, self.shard, error)
            return
        self.socket = socket
        self.monitor = monitor
        self._ready_due = True

    def _disconnect(self, now: float, linger_ms: int = 0) -> None:
        self._close_socket(linger_ms)
        self._ready_due = False
        self._end_session(now)

    def _close_socket(self, linger_ms: int) -> None:
        if self.socket is not None:
            self._stop_watching()
            self.socket.close(linger_ms)
            self.socket = None

    def _stop_watching(self) -> None:
        if self.socket is not None and self.monitor is not None:
            self.socket.disable_monitor()
            self.monitor.close(0)
            self.monitor = None

    def _end_session(self, now: float) -> None:
        session = self.session
        self._unanswered = 0
        if session is not None:
            session.open = False
            self.session = None
            for device in self.devices.values():
                device.work_for(now, None)

    def _reports(self) -> list[DeviceReport]:
        return [] if self._resting else [self.devices[number].report() for number in sorted(self.devices)]

    def _say_ready(self) -> None:
        self._reported = self._reports()
        said = self.send(Ready(protocol.VERSION, self._agent, self._reported), [])
        if said and self._ready_due:
            self._heard_at = self._said_at  # only now can it answer
            self._stop_watching()
        self._ready_due = not said
        self._unanswered += said

    def send(self, message: protocol.FromAgent, frames: list[Part]) -> bool:
        """Send to the shard without waiting; whether it could be sent."""
        socket = self.socket
        self._said_at = time.monotonic()
        if socket is None:
            return False
        header = protocol.encode(message)
        if len(header) > protocol.MAX_HEADER and isinstance(message, Done):
            why = protocol.too_structured("answer", len(header))
            header = protocol.encode(Done(message.device, message.batch, "model_error", detail=why))
            frames = []
        try:
            if not frames:
                socket.send(header, zmq.NOBLOCK)
                return True
            socket.send(header, zmq.NOBLOCK | zmq.SNDMORE)
            last = len(frames) - 1
            for index, frame in enumerate(frames):
                socket.send(frame, zmq.SNDMORE if index < last else 0, copy=len(frame) < BULK)
        except zmq.Again:
            # No connection (IMMEDIATE) or a shard that does not read. What it does not hear of it takes
            # for lost with this agent's silence; a READY or a heartbeat is said again.
            log.debug("shard %s does not take a %s", self.shard, type(message).__name__)
            return False
        return True


def _not_ours(device: int) -> str:
    return f"device {device} does not work for this shard"
