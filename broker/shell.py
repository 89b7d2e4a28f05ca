"""A broker shard: sockets and a clock around the scheduling engine.

One plain thread polls both ROUTERs, drains them without waiting, lets the engine decide, and sends what it
says (``zmq.asyncio`` costs eight times as much a message). Everything else (the store, signals, HTTP) lives in other
threads and hands its wishes over with :meth:`Shard.call`.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Final

import msgspec
import zmq

from broker.access import Access
from broker.agents import Agents
from broker.clients import Clients
from broker.connections import PATIENCE, Connections
from broker.endpoint import HANDSHAKE, Endpoint
from broker.engine.limits import Limits
from broker.engine.report import Report
from broker.engine.scheduler import Scheduler
from broker.figures import ShardSource
from broker.files import ShardFiles
from broker.gate import Gate
from broker.plans import build_pipeline
from broker.refusals import Refusals
from broker.reporting import tuning_of
from broker.routing import Routing
from broker.tracing import Tracer
from broker.zap import Zap
from cluster.filecache import DEFAULT_LIMIT, FileCache, default_directory
from cluster.records import FileRecord, KeyRecord, TuningRecord
from cluster.telemetry import DEFAULT_LIMIT as TELEMETRY_LIMIT
from cluster.telemetry import RequestTelemetry
from laxity import protocol
from laxity.curve import check_plain
from laxity.keys import ServerKey, read_own_key
from laxity.loop import Calls, wait
from pipelines.spec import PipelineSpec

log = logging.getLogger("laxity.broker")

OVERDUE: Final = 4
"""Heartbeats after which peers are looked after although messages go on to come."""
TURN: Final = 128
"""Messages taken from one socket before the other one and the engine get their turn."""
QUIET: Final = 0.2
"""Seconds without any request after which a draining shard takes its services to have heard of it."""


class ShardConfig(msgspec.Struct, kw_only=True, frozen=True):
    """How a shard is set up. Addresses end in ``:*`` for a port that the system chooses."""

    name: str
    frontend: str = "tcp://127.0.0.1:*"
    """Where services connect."""
    backend: str = "tcp://127.0.0.1:*"
    """Where agents connect."""
    advertise: str = ""
    """The host name or IP address by which others reach this host, where they cannot by the one that is bound to."""
    key: str = ""
    """The file of the shard's own key: then only those come in whose keys are in the store, and all that they say is
    encrypted. '' for none: plain text, on addresses of this host."""
    plain: bool = False
    """Whether to go without a key on addresses of the network, too."""
    heartbeat: float = 1.0
    """Seconds between heartbeats; a peer silent for four of them is gone."""
    max_payload: int = 64 * 1024**2
    """Bytes of one request's payload at most."""
    max_bytes: int = 4 * 1024**3
    """Bytes of payloads held at most."""
    max_requests: int = 200_000
    """Requests in flight at most."""
    max_client_requests: int = 100_000
    """Of them, those of one service (of one key's owner, where services have keys) at most."""
    max_connections: int = 10_000
    """Connections of services at most, and of agents."""
    io_threads: int = 0
    """Threads that read, write and encrypt for the sockets; 0 for what :func:`io_threads` takes."""
    drain_timeout: float = 10.0
    """Seconds that what is in flight has to end before a shard that was asked to leaves."""
    cache: str = ""
    """The directory for the files of pipelines; '' for the user's own (see ``cluster/filecache.py``)."""
    cache_bytes: int = DEFAULT_LIMIT
    """Bytes of files in it at most."""
    telemetry: str = ""
    """The directory for a row of each request (see ``cluster/telemetry.py``); '' for none."""
    telemetry_bytes: int = TELEMETRY_LIMIT
    """Bytes of rows kept there at most."""
    metrics: bool = True
    """Whether what happens to requests is counted by pipeline and stage."""
    traces: int = 20_000
    """Traces of requests that are kept, the newest ones; 0 for none."""
    trace_sample: float = 0.01
    """The part (0 to 1) of the requests without a traceparent of which one is kept whatever becomes of them."""


LIVE: Final = frozenset(
    {"heartbeat", "max_payload", "max_bytes", "max_requests", "max_client_requests", "max_connections"}
    | {"drain_timeout", "cache_bytes", "telemetry", "telemetry_bytes", "trace_sample"}
)
"""What :meth:`Shard.configure` changes while it runs."""


def io_threads(secured: bool, processors: int) -> int:
    """How many threads a shard's sockets get. Plain ones do with one; encrypting takes 0.6 ms a MB, each
    way, so those with keys get a quarter of the host's processors, 4 at most."""
    return max(1, min(processors // 4, 4)) if secured else 1


class ShardStatus(msgspec.Struct, frozen=True):
    """A shard's counters at one moment; ``ended`` counts by outcome, and submitted = Σ ended + in_flight."""

    submitted: int
    in_flight: int
    ended: dict[str, int]
    clients: int
    agents: int
    devices: int
    queued: dict[str, int]
    """Waiting elements by ``pipeline@version/stage``."""
    malformed: int
    undeliverable: int
    agents_lost: int


class Shard:
    """Binds on construction (raising :class:`~broker.errors.AddressInUse`, OSError,
    :class:`~laxity.curve.PlainRefused`, or :class:`~laxity.keys.InvalidKey`); ``run`` serves until ``stop``.

    One with a key lets nobody in until :meth:`admit` has told it whom. ``wall`` tells it the time in Unix seconds;
    peers have ``handshake`` seconds for that, and ``patience`` seconds until they greet.
    """

    def __init__(
        self,
        config: ShardConfig,
        *,
        wall: Callable[[], float] = time.time,
        handshake: float = HANDSHAKE,
        patience: float = PATIENCE,
    ) -> None:
        self.config = config
        self.key = read_own_key(config.key, "shard", config.name) if config.key else None
        """The shard's own; None where it serves in plain text."""
        self._wall = wall
        threads = config.io_threads or io_threads(self.key is not None, os.cpu_count() or 1)
        self._context: zmq.Context[Any] = zmq.Context(threads)
        self._largest_payload = config.max_payload
        """That the bound sockets let in."""
        self.refusals = Refusals()
        self._access = Access() if self.key is not None else None
        self._zap = Zap(self._context, self._access, self.refusals, wall) if self._access is not None else None
        max_frame = config.max_payload + protocol.MAX_HEADER
        pair = self.key.pair if self.key is not None else None
        opened: list[Endpoint] = []
        try:
            for address, domain, most, whose in (
                (config.frontend, "frontend", max_frame, "services"),
                (config.backend, "backend", max(max_frame, 2**30), "agents"),
            ):
                opened.append(Endpoint(self._context, address, most, pair, domain, handshake))
                if pair is None:
                    check_plain(opened[-1].address, config.plain, f"{whose} connect to", "shard", "LAXITY_BROKER_KEY")
        except (OSError, ValueError):
            for endpoint in opened:
                endpoint.close()
            if self._zap is not None:
                self._zap.close()
            self._context.term()
            raise
        self._frontend, self._backend = opened
        self.frontend = self._frontend.address
        self.backend = self._backend.address
        self._scheduler = Scheduler(
            Limits(config.max_bytes, config.max_payload, config.max_requests, config.max_client_requests),
            first_batch=secrets.randbits(28) << 32,
            spans=config.traces > 0,
            metrics=config.metrics,
        )
        self.tracer = Tracer(config.name, config.traces, config.trace_sample, Random()) if config.traces > 0 else None
        """The newest requests' traces, for other threads to read; None where none are kept."""
        self._cache = FileCache(Path(config.cache) if config.cache else default_directory(), config.cache_bytes)
        self._files = ShardFiles(self._cache, self.call, self.key, config.plain)
        self._telemetry = (
            RequestTelemetry(config.telemetry, config.name, config.telemetry_bytes) if config.telemetry else None
        )
        shared = (self._access, self.refusals)
        self._front = Gate(self._frontend, "frontend", *shared, Connections(config.max_connections, patience), wall)
        self._back = Gate(self._backend, "backend", *shared, Connections(config.max_connections, patience), wall)
        self._clients = Clients(
            self._frontend,
            self._front,
            self._scheduler,
            self._files,
            config.name,
            config.heartbeat,
            self._telemetry,
            self.tracer,
        )
        self._agents = Agents(self._backend, self._back, self._scheduler, self._files, config.name, config.heartbeat)
        self._calls = Calls()
        self._stopping = False
        self.waits_for = "the shard has not begun"
        """Why it does not serve; '' while it does."""
        self.source = ShardSource(
            config.name,
            self._scheduler,
            self._clients,
            self._agents,
            self._files,
            (self._front, self._back),
            self.refusals,
            self.tracer,
            lambda: self.waits_for,
        )
        """What it counts, for whoever observes it."""
        self.draining = False
        """Whether it was asked to leave, and finishes what it has."""
        self._drain_by = float("inf")
        self._quiet_at = 0.0
        self._submitted = 0

    # ---- from other threads ----------------------------------------------------------------

    def configure(self, config: ShardConfig) -> None:
        """Go on with these settings, of which those in :data:`LIVE` may be others than before. Waits for the shard's
        thread (from another thread only); RuntimeError once that has ended."""
        before = self.config
        rows = self._telemetry
        if (config.telemetry, config.telemetry_bytes) != (before.telemetry, before.telemetry_bytes):
            rows = RequestTelemetry(config.telemetry, config.name, config.telemetry_bytes) if config.telemetry else None
            if rows is not None:
                rows.start()
        largest = self._largest_payload
        if config.max_payload > largest:
            log.warning("payloads above %d bytes are taken after a restart only", largest)

        def configure() -> RequestTelemetry | None:
            now = time.monotonic()
            limits = self._scheduler.ledger.limits
            limits.max_bytes, limits.max_requests = config.max_bytes, config.max_requests
            limits.max_client_requests = config.max_client_requests
            for gate in (self._front, self._back):
                gate.connections.most = config.max_connections
            told = (limits.max_payload, before.heartbeat)
            limits.max_payload = min(config.max_payload, largest)
            if self.tracer is not None:
                self.tracer.resample(config.trace_sample)
            self.config = config
            previous, self._telemetry = self._telemetry, rows
            self._clients.configure(now, config.heartbeat, rows)
            if told != (limits.max_payload, config.heartbeat):
                self._clients.announce()
            if before.heartbeat != config.heartbeat:
                self._agents.configure(now, config.heartbeat)
            return previous

        self._cache.limit = config.cache_bytes
        previous = self._calls.ask(configure)
        if previous is not None and previous is not rows:
            previous.stop()

    def call(self, function: Callable[[], None]) -> None:
        """Have ``function`` run in the shard's thread, soon; nothing once :meth:`run` has ended."""
        self._calls.add(function)

    def apply(self, spec: PipelineSpec) -> None:
        """Serve a pipeline; a running version takes no more requests and finishes what it has."""
        pipeline = build_pipeline(spec)

        def apply() -> None:
            self._scheduler.apply(pipeline)
            self._clients.announce()

        self.call(apply)

    def delete(self, name: str) -> None:
        """Stop serving a pipeline; what is in flight finishes."""

        def delete() -> None:
            if self._scheduler.delete(name):
                self._clients.announce()

        self.call(delete)

    def route(self, routing: Routing) -> None:
        """Tell services which shards serve what; called again when that changes."""
        self.call(lambda: self._clients.route(routing))

    def keep_files(self, files: Sequence[FileRecord], others: Sequence[str], servers: Sequence[ServerKey] = ()) -> None:
        """Keep the files of pipelines and give them to whoever asks, getting them from the shards whose frontends
        are ``others``, and whose keys ``servers`` have, where they are not uploaded here."""
        self._files.keep(files, others, servers)

    def admit(self, records: Mapping[str, KeyRecord]) -> None:
        """Let those in whose keys these are, by the names of their owners, and nobody else from now on: who is
        connected and not among them is told so and cut. Of a shard without a key it changes nothing."""

        def admit() -> None:
            if self._access is not None:
                self._access.admit(records)
                self._clients.hold(time.monotonic(), records)
                self._review(time.monotonic())

        self.call(admit)

    def tune(self, name: str, record: TuningRecord) -> None:
        """Have a pipeline go by what the leader found to be right."""
        self.call(lambda: self._scheduler.tune(time.monotonic(), name, tuning_of(record, time.monotonic())))

    def status(self) -> ShardStatus:
        """The counters now. As for :meth:`report`."""
        return self._calls.ask(self._status)

    def report(self) -> tuple[Report, list[str]]:
        """What there is to tell since the last call, and the agents that are heard. Waits for the shard's thread (from
        another thread only); RuntimeError once it has ended."""
        return self._calls.ask(lambda: (self._scheduler.take_report(time.monotonic()), self._agents.names()))

    def drain(self) -> None:
        """Have services submit to other shards, finish what is in flight (and what still comes, where there is no
        other one) for up to ``drain_timeout`` seconds; then :meth:`stop`."""

        def drain() -> None:
            if not self.draining:
                now = time.monotonic()
                self.draining = True
                left, seconds = self._scheduler.ledger.in_flight, self.config.drain_timeout
                log.info("leaving: %d requests are in flight, which have %g s to end", left, seconds)
                self.waits_for = "the shard is draining"
                self._drain_by = now + self.config.drain_timeout
                self._quiet_at = now + QUIET
                self._submitted = self._scheduler.ledger.submitted
                self._clients.drain()
                self._calls.add(lambda: None)  # another turn, which looks whether there is anything to wait for

        self.call(drain)

    def stop(self) -> None:
        """Say goodbye and leave :meth:`run`; what is in flight is left to the services to submit elsewhere."""

        def stop() -> None:
            self._stopping = True

        self.call(stop)

    def _status(self) -> ShardStatus:
        scheduler = self._scheduler
        return ShardStatus(
            submitted=scheduler.ledger.submitted,
            in_flight=scheduler.ledger.in_flight,
            ended=dict(scheduler.ledger.ended_by),
            clients=len(self._clients),
            agents=len(self._agents),
            devices=len(scheduler.fleet.devices),
            queued={key: stage.all_waiting() for key, stage in scheduler.stages.items()},
            malformed=self._clients.malformed + self._agents.malformed + self._files.malformed,
            undeliverable=self._clients.undeliverable,
            agents_lost=self._agents.lost,
        )

    # ---- the shard's thread ------------------------------------------------------------------

    def run(self) -> None:
        """Serve until :meth:`stop`; then the sockets are closed."""
        self._files.start()
        if self._telemetry is not None:
            self._telemetry.start()
        try:
            self.waits_for = ""
            self._serve()
        finally:
            self.waits_for = "the shard has ended"
            self._calls.close()
            self._files.stop()
            if self._telemetry is not None:
                self._telemetry.stop()
            self._frontend.close()
            self._backend.close()
            if self._zap is not None:
                self._zap.close()
            self._context.term()

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._frontend.socket, zmq.POLLIN)
        poller.register(self._backend.socket, zmq.POLLIN)
        poller.register(self._frontend.monitor, zmq.POLLIN)
        poller.register(self._backend.monitor, zmq.POLLIN)
        if self._zap is not None:
            poller.register(self._zap.socket, zmq.POLLIN)
        poller.register(self._calls.fd, zmq.POLLIN)
        clock = time.monotonic
        next_check = clock() + self.config.heartbeat
        due = float("inf")
        """When a connection is to be cut."""
        more = ended = False
        while not self._stopping:
            if not more:
                due = min(self._front.connections.due(), self._back.connections.due())
                wake = min(self._scheduler.next_wake(), next_check, due)
                if self._clients.stuck:
                    wake = min(wake, clock() + 0.01)
                if self.draining:
                    wake = min(wake, self._quiet_at, self._drain_by)
                ended = self._wait(poller, wake - clock()) or ended
            self._calls.run()  # first: a pipeline that was applied before a request was made is known to it
            if self._zap is not None:
                self._zap.answer()
            more = self._take(clock)
            now = clock()
            # Not while messages lie unread: they may be a gone agent's last results, or the very signs of life (after
            # a freeze of this process). Those of an overload come without end: what is older has been read by then.
            read = not more or now >= next_check + OVERDUE * self.config.heartbeat
            if (ended or now >= due) and read:
                ended = False
                self._agents.disconnected(now)
                self._clients.disconnected(now)
            if now >= next_check and read:
                next_check = now + self.config.heartbeat
                self._agents.check(now)
                self._clients.check(now)
                self._review(now)
            self._clients.flush()
            self._act(clock)
            self._clients.announce_readiness()
            if self.draining and self._drained(clock(), more):
                self._stopping = True
        now = clock()
        left = self._scheduler.ledger.in_flight
        if left:
            log.warning("%d requests are in flight: their services submit them elsewhere", left)
        # Their services are not told one by one: after GOODBYE they submit them again, to a shard that stays.
        self._scheduler.shut_down(now, f"shard {self.config.name} is shutting down")
        self._clients.note(self._scheduler.take_ended())
        self._clients.say_goodbye(f"shard {self.config.name} is shutting down")
        self._agents.say_goodbye(f"shard {self.config.name} is shutting down")

    def _drained(self, now: float, more: bool) -> bool:
        """Whether there is nothing left to do, or no more time for it. ``more``: messages lie unread, which a flood of
        them never ends to."""
        if now >= self._drain_by:
            return True
        if more:
            return False
        ledger = self._scheduler.ledger
        busy = ledger.in_flight > 0 or self._clients.stuck
        if busy or ledger.submitted != self._submitted:
            self._submitted = ledger.submitted
            self._quiet_at = now + QUIET
        return not busy and (len(self._clients) == 0 or now >= self._quiet_at)

    def _wait(self, poller: zmq.Poller, seconds: float) -> bool:
        """Wait for messages, calls or ``seconds``; whether something became of a connection."""
        ended = False
        for source, _ in wait(poller, seconds):
            if source == self._calls.fd:
                self._calls.clear_wakeups()
            elif source is self._backend.monitor or source is self._frontend.monitor:
                ended = True
        return ended

    def _review(self, now: float) -> None:
        """Part with those who may not stay, where that may have changed."""
        if self._access is not None and self._access.turned(self._wall()):
            self._clients.review(now)
            self._agents.review(now)
            self._front.review(now)
            self._back.review(now)

    def _take(self, clock: Callable[[], float]) -> bool:
        """Take in what has come; whether there may be more."""
        more = self._agents.take(clock, TURN)
        return self._clients.take(clock, TURN) or more

    def _act(self, clock: Callable[[], float]) -> None:
        """Let the engine decide, and carry it out."""
        scheduler = self._scheduler
        while True:
            now = clock()
            grants = scheduler.dispatch(now)
            again = self._agents.grant(now, grants) if grants else False
            pages = scheduler.take_pages()
            if pages:
                again = self._agents.page(now, pages) or again
            ended = scheduler.take_ended()
            if ended:
                self._clients.answer(ended)
            if not again:
                return
