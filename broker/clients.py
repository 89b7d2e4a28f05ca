"""The shard's side towards services: greetings, requests in, answers out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Final

from broker.access import Task
from broker.answers import answer_to, out_of_range
from broker.endpoint import Endpoint, Sent, connection_of, user_of
from broker.engine.quota import Quota
from broker.engine.request import Client
from broker.engine.request import Request as EngineRequest
from broker.engine.scheduler import Scheduler
from broker.files import ShardFiles
from broker.gate import Gate
from broker.greeting import refusal
from broker.routing import Routing
from broker.service import MAX_UNREAD, Service, size_of
from broker.taps import Taps
from broker.tracing import Tracer
from cluster.records import KeyRecord
from cluster.telemetry import RequestTelemetry
from laxity import protocol
from laxity.log_lines import worth_a_line
from laxity.node import PayloadError
from laxity.outcomes import Outcome
from laxity.payload import Part, Unpacker, pack
from laxity.protocol import (
    Answer,
    Cancel,
    Fetch,
    Goodbye,
    Heartbeat,
    Hello,
    Request,
    Result,
    Store,
    Submit,
    Tap,
    Welcome,
)

log = logging.getLogger("laxity.broker")

MOST_REQUESTS: Final = 16 * protocol.MAX_SHARED
"""A SUBMIT with more is not answered request by request: that would hold up everybody else."""
MOST_CANCELS: Final = 1 << 17
"""A CANCEL of more is not looked at: nobody has so many requests in flight."""


class Clients:
    """Feeds the engine with what services send, and services with what the engine ends."""

    def __init__(
        self,
        endpoint: Endpoint,
        gate: Gate,
        scheduler: Scheduler,
        files: ShardFiles,
        shard: str,
        heartbeat: float,
        telemetry: RequestTelemetry | None,
        tracer: Tracer | None,
    ) -> None:
        self._endpoint = endpoint
        self._gate = gate
        self._scheduler = scheduler
        self._files = files
        self._shard = shard
        self._heartbeat = heartbeat
        self._telemetry = telemetry
        self._tracer = tracer
        self._by_routing_id: dict[bytes, Service] = {}
        self._by_name: dict[str, Service] = {}
        self._full: set[str] = set()
        self._quotas: dict[str, Quota] = {}
        """By the name of a key's owner: of all in the directory."""
        self._routing = Routing()
        self._shares: dict[str, float] = {}
        """The part of a pipeline's requests that comes to this shard, of those in the routing table."""
        self._taps: Taps | None = None
        """Those who record what comes; None while there is nobody."""
        self._ended: list[Service] = []
        """Those whose connections ended, and who have not greeted again since."""
        self._turns = 0
        self._unready: list[str] = []
        self._draining = False
        self.undeliverable = 0
        """Answers whose service was gone."""
        self.malformed = 0
        """Messages that were none of this protocol."""
        self.heartbeats = 0
        self.reconnects = 0
        """Greetings of services that are known."""

    def configure(self, now: float, heartbeat: float, telemetry: RequestTelemetry | None) -> None:
        """Go on with this interval, in seconds, and these rows; to be announced where the interval is another."""
        self._telemetry = telemetry
        if heartbeat != self._heartbeat:
            self._heartbeat = heartbeat
            for connection in self._by_name.values():
                connection.heard_at = now  # who beat more seldom until now was not silent

    def __len__(self) -> int:
        return len(self._by_name)

    # ---- in --------------------------------------------------------------------------

    def take(self, clock: Callable[[], float], most: int) -> bool:
        """Take in up to ``most`` messages; whether there may be more. Each is stamped as it is taken: a stamp from
        before would make a PULL seem to have dwelt here longer than it did."""
        return all(self._receive(clock()) for _ in range(most))

    def _receive(self, now: float) -> bool:
        """Take in one message; False where there is none."""
        endpoint = self._endpoint
        received = endpoint.receive()
        if received is None:
            return False
        sender, header = received
        connection = self._by_routing_id.get(sender)
        user = ""
        if endpoint.secured:
            user = user_of(header)
            if connection is not None and connection.user != user:
                name, owner = connection.client.name, self._gate.owner(connection.user)
                text = f"it uses the routing id of service {name}, whose key is that of {owner!r}"
                self._gate.stolen(now, sender, header, user, text)
                return True
        try:
            message = protocol.decode_from_client(header.bytes)
        except protocol.ProtocolError as error:
            endpoint.skip(header)
            self.malformed += 1
            if worth_a_line(self.malformed):
                log.warning("malformed message from a service (%d by now): %s", self.malformed, error)
            self._say(sender, Goodbye(reason=f"malformed message: {error}", retry=False))
            return True
        if isinstance(message, Submit) and connection is not None:
            connection.heard_at = now
            if len(message.requests) > MOST_REQUESTS:
                endpoint.skip(header)
                self.malformed += 1
                reason = f"{len(message.requests)} requests in one SUBMIT, at most {protocol.MAX_SHARED} are allowed"
                self._say(sender, Goodbye(reason=reason, retry=False))
                return True
            self._submit(now, connection, message, endpoint.rest(header))
            return True
        if isinstance(message, Store):
            frames = endpoint.rest(header)
            if self._gate.admits(now, sender, header, user, Task.STORE):
                self._files.store(endpoint, sender, message, frames)
            return True
        endpoint.skip(header)
        if isinstance(message, Fetch):
            if self._gate.admits(now, sender, header, user, Task.FETCH):
                self._files.fetch(endpoint, sender, message)
            return True
        if isinstance(message, Hello):
            if self._gate.admits(now, sender, header, user, Task.SUBMIT):
                self._hello(now, sender, connection_of(header), user, message)
        elif isinstance(message, Tap):
            if not self._gate.admits(now, sender, header, user, Task.TAP):
                return True
            if self._taps is None:
                self._taps = Taps(endpoint)
            self._taps.tap(now, sender, message)
        elif connection is None:
            if isinstance(message, Goodbye):
                if self._taps is not None:
                    self._taps.leave(sender)
            else:
                self._say(sender, Goodbye(reason="unknown peer: say HELLO first", retry=True))
        else:
            connection.heard_at = now
            if isinstance(message, Heartbeat):
                self.heartbeats += 1
                self._say(sender, Heartbeat())
            elif isinstance(message, Cancel):
                if len(message.ids) > MOST_CANCELS:
                    self.malformed += 1
                    reason = f"{len(message.ids)} requests in one CANCEL, at most {MOST_CANCELS} are looked at"
                    self._say(sender, Goodbye(reason=reason, retry=False))
                    return True
                for request in message.ids:
                    self._scheduler.cancel(now, connection.client, request)
            elif isinstance(message, Goodbye):
                self._forget(now, connection)
        return True

    def _hello(self, now: float, sender: bytes, number: int, user: str, hello: Hello) -> None:
        refused = refusal(hello.version, hello.client, "client")
        if refused is not None:
            self._say(sender, refused)
            return
        self._note_ended(now)  # whose number this connection may have got
        connection = self._by_name.get(hello.client)
        if connection is not None and connection.user != user:
            owner = self._gate.owner(connection.user)
            if self._gate.owner(user) != owner:
                text = f"service {hello.client} has the key of {owner!r}, and not this one"
                told = "a service of another key has this name"
                self._gate.refuse(now, sender, number, user, "identity", text, told)
                return
            connection.user = user  # the owner's key was replaced
        other = self._by_routing_id.get(sender)
        if other is not None and other is not connection:
            self._forget(now, other)  # one connection is one service's
        if connection is None:
            quota = self._quota(user)
            client = Client(hello.client, quota.account if quota is not None else None)
            connection = Service(sender, number, client, user, quota, now)
            self._by_name[hello.client] = connection
        else:
            self.reconnects += 1
        if connection.routing_id != sender:
            self._by_routing_id.pop(connection.routing_id, None)
            connection.reconnect(sender, now)
        self._ended = [each for each in self._ended if each is not connection]
        connection.number = number
        self._gate.greeted(now, number, sender, user)
        connection.heard_at = now
        self._by_routing_id[sender] = connection
        self._say(sender, self._welcome())

    def _quota(self, user: str) -> Quota | None:
        return self._quotas.get(self._gate.owner(user)) if user else None

    def _welcome(self) -> Welcome:
        scheduler = self._scheduler
        return Welcome(
            version=protocol.VERSION,
            shard=self._shard,
            heartbeat_us=round(self._heartbeat * 1e6),
            max_payload=scheduler.ledger.limits.max_payload,
            pipelines=[(name, round(pipeline.slo * 1e6)) for name, pipeline in scheduler.pipelines.items()],
            unready=self._not_ready(),
            shards=self._routing.shards,
            routes=self._routing.routes,
            revision=self._routing.revision,
            keys=self._routing.keys,
        )

    def _not_ready(self) -> list[str]:
        """The pipelines that services had better submit to another shard, if there is one."""
        return list(self._scheduler.pipelines) if self._draining else self._scheduler.unready()

    def drain(self) -> None:
        """Tell every service to submit to other shards from now on, where there are any."""
        self._draining = True
        self.announce()

    def announce(self) -> None:
        """Tell every service that the pipelines served, or the routes to them, have changed."""
        welcome = self._welcome()
        self._unready = welcome.unready
        header = protocol.encode(welcome)
        for connection in self._by_name.values():
            self._deliver(connection, header, [], 0)

    def announce_readiness(self) -> None:
        """Tell every service when the devices of a pipeline's stage have come, or the last one has gone."""
        turns = self._scheduler.fleet.turns
        if turns == self._turns:
            return
        self._turns = turns
        if self._not_ready() != self._unready:
            self.announce()

    def route(self, routing: Routing) -> None:
        """Tell every service from now on, and those that are here where it is another one, this routing table."""
        same = routing.says_the_same(self._routing)
        self._routing = routing
        self._shares = routing.shares(self._shard)
        if not same:
            self.announce()

    def hold(self, now: float, records: Mapping[str, KeyRecord]) -> None:
        """Go by these limits of owners of keys, by name, from now on."""
        self._quotas = {owner: self._quotas.get(owner) or Quota(owner) for owner in records}
        for owner, quota in self._quotas.items():
            record = records[owner]
            quota.limit(now, record.pipelines, record.rate, record.in_flight)

    def review(self, now: float) -> None:
        """Part with the services whose keys are good no more; what they have in flight is cancelled."""
        for connection in list(self._by_name.values()):
            why = self._gate.keeps_out(connection.user)
            if why:
                self._say(connection.routing_id, Goodbye(reason=why, retry=False))
                self._forget(now, connection)

    def _submit(self, now: float, connection: Service, submit: Submit, frames: list[Part]) -> None:
        requests = submit.requests
        arrival = now - connection.transit(now, submit.sent_us)
        unpacker = Unpacker(frames)
        client = connection.client
        tracer = self._tracer
        scheduler = self._scheduler
        taps = self._taps
        quota = connection.quota
        if quota is not None and not quota.is_limited:
            quota = None
        malformed = ""
        for index, request in enumerate(requests):
            if index >= protocol.MAX_SHARED:
                malformed = malformed or f"more than {protocol.MAX_SHARED} requests in one SUBMIT"
            if not malformed:
                try:
                    payload = unpacker.take(request.payload)
                except PayloadError as error:
                    malformed = f"malformed payload: {error}"
            wrong = malformed or out_of_range(request)
            if wrong:
                self._reject(now, connection, request, wrong)
                continue
            if taps is not None:
                taps.note(client.requests, arrival, request, payload)
            refused = ""
            if quota is not None and request.id not in client.requests:
                refused = quota.refusal(now, request.pipeline, self._shares.get(request.pipeline, 1.0))
            budget = request.budget_us
            taken = scheduler.submit(
                now,
                client,
                request.id,
                request.pipeline,
                arrival,
                -1.0 if budget is None else budget * 1e-6 if budget > 0 else 0.0,
                request.priority,
                payload,
                request.timings,
                refused,
            )
            if tracer is not None and taken is not None:
                tracer.begin(taken, request.traceparent)
        if taps is not None:
            taps.send(now)
        if not malformed:
            try:
                unpacker.finish()
            except PayloadError as error:
                self.malformed += 1
                if worth_a_line(self.malformed):
                    log.warning("from service %s: %s", client.name, error, extra={"client": client.name})

    def _reject(self, now: float, connection: Service, request: Request, detail: str) -> None:
        """Answer a request that never reached the engine."""
        self.malformed += 1
        if request.id in connection.client.requests:
            return
        if self._telemetry is not None:
            budget = request.budget_us or 0
            client = connection.client.name
            self._telemetry.ended(now, client, request.id, request.pipeline, 0, budget, 0, "rejected", 0, "", 0, detail)
        if self._tracer is not None:
            pipeline, budget_s = request.pipeline[: protocol.MAX_NAME], (request.budget_us or 0) * 1e-6
            name = connection.client.name
            self._tracer.rejected(now, name, request.id, pipeline, request.traceparent, budget_s, detail)
        answer = Answer(request.id, Outcome.REJECTED, None, 0, "", detail)
        self._deliver(connection, protocol.encode(Result([answer])), [], 1)

    # ---- out -------------------------------------------------------------------------

    def answer(self, ended: list[EngineRequest]) -> None:
        """Send the answers of requests that ended, several in one RESULT where one service gets several."""
        self.note(ended)
        if len(ended) == 1:
            request = ended[0]
            connection = self._by_name.get(request.client.name)
            if connection is None:
                self.undeliverable += 1
            else:
                self._deliver_all(connection, ended)
            return
        by_client: dict[str, list[EngineRequest]] = {}
        for request in ended:
            group = by_client.get(request.client.name)
            if group is None:
                by_client[request.client.name] = [request]
            else:
                group.append(request)
        for name, requests in by_client.items():
            connection = self._by_name.get(name)
            if connection is None:
                self.undeliverable += len(requests)
                continue
            for start in range(0, len(requests), protocol.MAX_SHARED):
                self._deliver_all(connection, requests[start : start + protocol.MAX_SHARED])

    def note(self, ended: list[EngineRequest]) -> None:
        """Have the tracer and telemetry note what became of these requests."""
        if self._tracer is not None:
            self._tracer.note(ended)
        telemetry = self._telemetry
        if telemetry is None:
            return
        for request in ended:
            outcome = request.outcome
            assert outcome is not None
            arrival = request.arrival
            pipeline = request.pipeline
            telemetry.ended(
                arrival,
                request.client.name,
                request.id,
                pipeline.name,
                int(pipeline.slo * 1e6 + 0.5),
                int((request.deadline - arrival) * 1e6 + 0.5),
                int((request.ended_at - arrival) * 1e6 + 0.5),
                outcome,
                1 if outcome is Outcome.OK else 0,
                request.end_stage,
                1 if request.cold else 0,
                request.detail,
            )

    def _deliver_all(self, connection: Service, requests: list[EngineRequest]) -> None:
        """Send answers in one RESULT, or in more where their structure is too large for one."""
        answers = [answer_to(request) for request in requests]
        header = protocol.encode(Result(answers))
        if len(header) <= protocol.MAX_HEADER:
            payloads = [request.answer for request in requests if request.answer is not None]
            self._deliver(connection, header, pack(payloads), len(answers))
        elif len(answers) > 1:
            half = len(answers) // 2
            self._deliver_all(connection, requests[:half])
            self._deliver_all(connection, requests[half:])
        else:
            answer = answers[0]
            answer.outcome, answer.payload = Outcome.FAILED, None
            answer.detail = protocol.too_structured("answer", len(header))
            self._deliver(connection, protocol.encode(Result(answers)), [], 1)

    def _deliver(self, connection: Service, header: bytes, frames: list[Part], answers: int) -> None:
        sent = self._send(connection, header, frames) if not connection.outbox else Sent.FULL
        if sent is Sent.FULL and connection.keep(header, frames):
            self._full.add(connection.client.name)
        elif sent is not Sent.YES:
            self.undeliverable += answers

    def _send(self, connection: Service, header: bytes, frames: list[Part]) -> Sent:
        if connection.unsent.bytes() > MAX_UNREAD:
            return Sent.FULL
        return self._endpoint.send(connection.routing_id, header, frames, connection.unsent)

    def flush(self) -> None:
        """Try again what services were too slow to take."""
        for name in list(self._full):
            connection = self._by_name.get(name)
            while connection is not None and connection.outbox:
                header, frames = connection.outbox[0]
                sent = self._send(connection, header, frames)
                if sent is Sent.FULL:
                    break
                if sent is Sent.GONE:
                    self.undeliverable += len(connection.outbox)
                    connection.outbox.clear()
                    connection.outbox_bytes = 0
                    break
                connection.outbox.popleft()
                connection.outbox_bytes -= size_of(header, frames)
            if connection is None or not connection.outbox:
                self._full.discard(name)

    @property
    def stuck(self) -> bool:
        """Whether answers wait for a service that does not read."""
        return bool(self._full)

    # ---- liveness --------------------------------------------------------------------

    def check(self, now: float) -> None:
        """Forget the services that have been silent for four heartbeats."""
        silent = now - 4 * self._heartbeat
        for connection in [c for c in self._by_name.values() if c.heard_at < silent]:
            name = connection.client.name
            log.info("service %s is silent: forgetting it", name, extra={"client": name})
            self._forget(now, connection)
        if self._taps is not None:
            self._taps.check(now)
            if not self._taps:
                self._taps = None

    def disconnected(self, now: float) -> None:
        """Know nobody any more by the routing ids of connections that have ended: somebody else may take them, and
        would get the answers. The services have some heartbeats to connect and greet again."""
        self._note_ended(now)
        ended = self._ended
        self._ended = []
        for connection in ended:
            if self._by_routing_id.get(connection.routing_id) is connection:
                del self._by_routing_id[connection.routing_id]
                self.undeliverable += len(connection.outbox)
                connection.reconnect(b"", now)

    def _note_ended(self, now: float) -> None:
        """Find out whose connections ended. Before a service is taken in, whose connection may have got the number of
        one that has ended; what those said last may lie unread still."""
        self._gate.watch(now)
        for ended in self._gate.ended():
            connection = self._by_routing_id.get(ended.sender)
            if connection is not None and connection.number == ended.number:
                self._ended.append(connection)
            if self._taps is not None:
                self._taps.leave(ended.sender)

    def _forget(self, now: float, connection: Service) -> None:
        self._gate.connections.forgotten(now, connection.number)
        self._by_routing_id.pop(connection.routing_id, None)
        self._by_name.pop(connection.client.name, None)
        self._scheduler.client_lost(now, connection.client)

    def say_goodbye(self, reason: str) -> None:
        """Tell every service that this shard leaves."""
        for connection in self._by_name.values():
            self._say(connection.routing_id, Goodbye(reason=reason, retry=True))

    def _say(self, to: bytes, message: protocol.ToClient) -> None:
        self._endpoint.send(to, protocol.encode(message), [])
