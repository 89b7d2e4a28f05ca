"""The I/O thread of a client: the only one that touches its sockets.

It carries requests from the user's threads to shards and answers back, and does what its engines decide:
:class:`~laxity.routes.Router`, which shard gets a request; :class:`~laxity.requests.RequestTable`, what is in flight;
and for each :class:`~laxity.connection.Connection` its :class:`~laxity.link.Link`. Requests that wait when it comes
round share one SUBMIT a shard; whatever has arrived is read before it sleeps again.

One connection, *home*, goes to the addresses that the user gave, one after the other until a shard answers. Shards tell
where the others are, and those that the requests made so far are to be spread over get a connection each, unless it is
the one at home. A shard must not be connected to twice: it would take the second connection for the first one's
successor. So endpoints known to lead where another connection leads are passed over; where a WELCOME shows that a
connection is a second one, it is given up and the first one greets again.
"""

from __future__ import annotations

import logging
import math
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import zmq

from laxity import protocol
from laxity.connection import FAILED, LOST, Connection
from laxity.credentials import Credentials
from laxity.keys import ServerKey
from laxity.link import Link, State, Step
from laxity.log_lines import worth_a_line
from laxity.node import PayloadError
from laxity.outcomes import Outcome
from laxity.payload import Unpacker, decode, pack
from laxity.protocol import Answer, ProtocolError
from laxity.requests import Lane, Pending, RequestTable, local_answer
from laxity.routes import Router, ServedPipeline
from laxity.version import __version__

log = logging.getLogger("laxity")

Ended = tuple[Pending, Answer, Any]
"""A request that ended: with its answer's header, and its value where the outcome is ``ok``."""

MOST_TROUBLES = 100
"""Reasons why shards were left that are told apart in the log."""
LINGER_MS = 200
"""How long the last words of a closing client may take, in milliseconds."""


class Transport:
    """See the module. ``deliver`` is called in the I/O thread with what has ended since the last call."""

    def __init__(
        self,
        endpoints: Sequence[str],
        client: str,
        deliver: Callable[[list[Ended]], None],
        credentials: Credentials,
    ) -> None:
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
        self.pipelines: Mapping[str, ServedPipeline] = {}
        """What is served, as the connected shards tell; replaced as a whole, so that any thread may look."""
        self._deliver = deliver
        self._credentials = credentials
        self._jitter = int(client[:4], 16) / 0x10000
        self._router = Router(self._jitter)
        self._seen = -1
        self._given = list(dict.fromkeys(endpoints))
        self._shard_at: dict[str, str] = {}
        """The shard that answered last at an endpoint."""
        self._left: dict[str, int] = {}
        """How often shards were left since one was reached, by why."""
        self._ended: list[Ended] = []
        self._last_words: tuple[Outcome, str] | None = None
        self._ending = threading.RLock()
        """Held while requests are ended that come too late: several threads may bring some."""
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._context: zmq.Context[Any] = zmq.Context()
        self._poller = zmq.Poller()
        self._poller.register(self._wake_read, zmq.POLLIN)
        self._connections: list[Connection] = []
        self._retired: list[Connection] = []
        """Connections to shards that get no more requests."""
        self._home = self._new_connection(self._given)

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
        """Why no shard is connected."""
        return self._home.link.trouble

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
        table = self.table
        connections = self._connections
        if self.inbox:
            self._empty_inbox()
        for connection in connections:
            for step in connection.link.advance(now):
                self._take_step(connection, step, now)
        if table.is_unassigned or self._router.changes != self._seen:
            self._assign(now)
        for connection in connections:
            if connection.greeting_due and not connection.blocked:
                self._greet(connection, now)
            if connection.lane is not None and connection.link.is_open:
                self._send_waiting(connection, connection.lane, now)
        if now >= table.due_at():
            for pending, answer in table.look_after(now, self._trouble_of):
                self._ended.append((pending, answer, None))
        if self._retired:
            self._leave_retired(now)
        self._flush()
        # From here on who adds to the inbox wakes this thread; what came before is seen now.
        self.sleeping = True
        if self.inbox or self.stopping:
            timeout = 0
        else:
            due = table.due_at()
            for connection in connections:
                due = min(due, connection.link.due_at())
            timeout = min(max(0, math.ceil((due - time.monotonic()) * 1000)), 60_000)
        ready = self._poller.poll(timeout)
        self.sleeping = False
        for source, events in ready:
            for connection in connections:
                if source is connection.dealer:
                    if events & zmq.POLLIN:
                        connection.receive(self._understand)
                    if events & zmq.POLLOUT:
                        connection.unblock()
                    break
                if source is connection.monitor:
                    self._watch(connection)
                    break
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
                table.cancel(item)

    def _flush(self) -> None:
        if self._ended:
            ended = self._ended
            self._ended = []
            self._deliver(ended)

    def _end_all(self, outcome: Outcome, detail: str) -> None:
        with self._ending:
            self._empty_inbox()
            self._ended += [(p, local_answer(p, outcome, detail), None) for p in self.table.pop_all()]
            self._flush()

    # ---- sending -----------------------------------------------------------------------

    def _send_waiting(self, connection: Connection, lane: Lane, now: float) -> None:
        table = self.table
        if (lane.cancels or lane.left_behind) and not connection.blocked:
            ids = table.take_cancels(lane)
            if ids and not connection.say(protocol.Cancel(ids), now):
                lane.cancels = ids
        while lane.waiting and not connection.blocked:
            batch = table.take(lane, now)
            if not batch:
                return
            header = protocol.encode(protocol.Submit(int(now * 1e6), [pending.request for pending in batch]))
            if not connection.send([header, *pack([pending.payload for pending in batch])], now):
                table.put_back(lane, batch)
                return
            table.sent(batch)

    # ---- receiving ---------------------------------------------------------------------

    def _understand(self, connection: Connection, header: bytes, parts: list[Any]) -> None:
        now = time.monotonic()
        link = connection.link
        try:
            message = protocol.decode_to_client(header)
        except ProtocolError as error:
            log.warning("%s sent something else than protocol version %d: %s", link.endpoint, protocol.VERSION, error)
            link.garbled(now, str(error))
            return
        link.heard(now)
        if type(message) is protocol.Result:
            if connection.lane is not None:
                self._take_answers(connection.lane, message.answers, parts)
        elif type(message) is protocol.Welcome:
            self._welcome(connection, message, now)
        elif type(message) is protocol.Goodbye:
            if not message.retry and connection.has_another_key():
                link.lost(now, message.reason)  # it may be said of the old one
            else:
                link.goodbye(now, message.reason, message.retry)

    def _take_answers(self, lane: Lane, answers: list[Answer], parts: list[Any]) -> None:
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
            pending = self.table.pop_answered(answer, lane)
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

    def _welcome(self, connection: Connection, welcome: protocol.Welcome, now: float) -> None:
        link = connection.link
        shard = welcome.shard
        if welcome.version == protocol.VERSION:
            self._shard_at[link.endpoint] = shard
            twin = next((c for c in self._connections if c is not connection and c.is_connected_to(shard)), None)
            if twin is not None:
                link.lost(now, f"it is shard {shard}, which there is a connection to already")
                twin.link.goodbye(now, "another connection took its place", retry=True)
                return
            expected = connection.shard if connection.lane is None else connection.lane.shard
            if expected not in ("", shard):
                link.lost(now, f"it is shard {shard}, not {expected}")
                return
        link.welcome(now, welcome)
        if not link.is_open:
            return
        if connection.is_secure and len(welcome.keys) == len(welcome.shards):
            for (name, address), publics in zip(welcome.shards, welcome.keys, strict=True):
                self._credentials.learn(ServerKey(name, address, publics))
        table, router = self.table, self._router
        self._left.clear()
        connection.lane = table.lane(shard)
        router.welcome(welcome)
        self.pipelines = router.pipelines
        table.learn(router.heartbeat, router.max_payload, router.slos)
        self._ended += [(pending, answer, None) for pending, answer in table.too_large()]
        self.ready.set()

    # ---- connections ----------------------------------------------------------------------

    def _new_connection(self, endpoints: Sequence[str], shard: str = "", address: str = "") -> Connection:
        def passes_over(endpoint: str) -> bool:
            return any(other is not connection and self._leads_there(other, endpoint) for other in self._connections)

        link = Link(endpoints, self._jitter, time.monotonic(), passes_over)
        connection = Connection(self._context, self._poller, self._credentials, link, shard, address)
        self._connections.append(connection)
        return connection

    def _leads_there(self, connection: Connection, endpoint: str) -> bool:
        """Whether a connection leads, or may lead in a moment, to the shard at an endpoint."""
        if connection.link.state is State.DOWN:
            return False
        if connection.link.endpoint == endpoint:
            return True
        shard = self._shard_at.get(endpoint, "")
        if connection.lane is not None or connection.shard:
            return connection.leads_to(shard)
        return shard != "" and shard == self._shard_at.get(connection.link.endpoint)

    def _watch(self, connection: Connection) -> None:
        """Tell the link what the monitor saw."""
        for kind, value in connection.events():
            if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                connection.link.handshaked(time.monotonic())
            elif kind in FAILED:
                reason = connection.why_lost(kind, value)
                if connection.connect_otherwise(kind):
                    return
                final = connection.is_final(kind, value) and not connection.has_another_key()
                ended = connection.link.refused if final else connection.link.lost
                ended(time.monotonic(), reason)
                return
            elif kind in LOST:
                while connection.receive(self._understand):
                    pass  # what a broken connection has left
                connection.link.lost(time.monotonic(), connection.why_lost(kind, value))
                return

    def _take_step(self, connection: Connection, step: Step, now: float) -> None:
        if step is Step.CLOSE:
            self._tell_left(connection.link.trouble)
            self._disconnect(connection, 0)
        elif step is Step.CONNECT:
            try:
                connection.connect()
            except zmq.ZMQError as error:
                connection.link.lost(now, f"that is no address to connect to: {error}")
            except ValueError as error:
                connection.link.refused(now, str(error))
        elif step is Step.GREET:
            connection.greeting_due = True
            if connection.lane is not None:
                self._router.lost(connection.lane.shard)
        elif step is Step.RESUBMIT:
            assert connection.lane is not None
            self.table.resubmit(connection.lane)
        elif step is Step.HEARTBEAT:
            connection.say(protocol.Heartbeat(int(now * 1e6)), now)
        elif step is Step.GIVE_UP and connection is self._home and not any(c.link.is_open for c in self._connections):
            self._end_all(Outcome.UNAVAILABLE, connection.link.trouble)

    def _tell_left(self, trouble: str) -> None:
        """The same trouble the 1st, 2nd, 4th, 8th ... time, until a shard is reached."""
        times = self._left[trouble] = self._left.pop(trouble, 0) + 1
        if worth_a_line(times):
            again = f" ({times} times by now)" if times > 1 else ""
            log.info("left a shard: %s%s", trouble, again)
        if len(self._left) > MOST_TROUBLES:
            self._left.pop(next(iter(self._left)))

    def _greet(self, connection: Connection, now: float) -> None:
        hello = protocol.Hello(protocol.VERSION, self.client, f"laxity-python {__version__}")
        connection.greeting_due = not connection.say(hello, now)

    def _disconnect(self, connection: Connection, linger_ms: int) -> None:
        connection.disconnect(linger_ms)
        lane = connection.lane
        if lane is not None:
            connection.lane = None
            self._router.lost(lane.shard)
            self.pipelines = self._router.pipelines
            self.table.lost(lane)
        if not any(other.lane is not None for other in self._connections):
            self.ready.clear()

    # ---- routes -----------------------------------------------------------------------------

    def _assign(self, now: float) -> None:
        """Say of requests which shard they go to."""
        router, table = self._router, self.table
        changed = False
        while table.is_unassigned or self._seen != router.changes:
            if self._seen != router.changes:
                self._seen = router.changes
                changed = True
                table.unstrand()
            table.assign(router.rotation)
        if changed:
            self._follow_routes(now)

    def _follow_routes(self, now: float) -> None:
        """The routing table, the shards connected or the pipelines in use are others than before."""
        router, table = self._router, self.table
        wanted = router.wanted
        home = "" if self._home.lane is None else self._home.lane.shard
        wanted.pop(home, None)
        self._retired = []
        for connection in self._connections[1:]:
            if connection.lane is None and wanted.get(connection.shard) != connection.address:
                self._leave(connection, now)
            elif connection.shard not in wanted:
                self._retired.append(connection)
        there = {connection.shard for connection in self._connections}
        for shard, address in wanted.items():
            if shard not in there:
                # The given addresses too: the client's network may know the shard under another one than the table.
                known = [endpoint for endpoint in self._given if self._shard_at.get(endpoint) == shard]
                self._new_connection(list(dict.fromkeys([*known, address, *self._given])), shard, address)
        places = {*self._given, *router.table.shards.values()}
        self._shard_at = {endpoint: shard for endpoint, shard in self._shard_at.items() if endpoint in places}
        table.forget_lanes({home, *wanted, *self._shard_at.values(), *there})

    def _leave_retired(self, now: float) -> None:
        """Leave the shards that get no more requests and have answered all."""
        for connection in list(self._retired):
            if connection.lane is None or not self.table.is_at(connection.lane):
                self._retired.remove(connection)
                self._leave(connection, now)

    def _leave(self, connection: Connection, now: float) -> None:
        self._connections.remove(connection)
        if connection.lane is not None:
            connection.say(protocol.Goodbye("the routing table names this shard no more"), now)
        self._disconnect(connection, LINGER_MS)

    def _trouble_of(self, pipeline: str) -> str:
        """What is wrong with the shards that serve a pipeline; '' where one of them is connected."""
        if self._router.table.routes.get(pipeline) == {}:
            return f"no shard serves {pipeline!r} at present"
        serving = self._router.serving(pipeline)
        concerned = [c for c in self._connections if any(c.leads_to(shard) for shard in serving)] or [self._home]
        if any(connection.link.is_open for connection in concerned):
            return ""
        return "; ".join(dict.fromkeys(connection.link.trouble for connection in concerned))

    # ---- the end ------------------------------------------------------------------------------

    def _part(self) -> None:
        """Last words to the shards: what was in flight is no longer wanted."""
        self._empty_inbox()
        now = time.monotonic()
        for connection in self._connections:
            if connection.link.is_known:
                lane = connection.lane
                ids = [] if lane is None else [*lane.cancels, *self.table.sent_ids(lane)]
                if ids:
                    connection.say(protocol.Cancel(ids), now)
                connection.say(protocol.Goodbye("the client was closed"), now)

    def _close_sockets(self) -> None:
        for connection in self._connections:
            connection.disconnect(LINGER_MS)
        self._context.term()
        self._wake_read.close()
        self._wake_write.close()
