"""The shard's side towards node agents: who is there, pulls and results in, grants and pages out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from broker.access import Task
from broker.endpoint import Endpoint, Sent, connection_of, user_of
from broker.engine.devices import Batch
from broker.engine.fleet import HeldModel
from broker.engine.paging import Page
from broker.engine.scheduler import Scheduler
from broker.files import ShardFiles
from broker.gate import Gate
from broker.greeting import refusal
from laxity import protocol
from laxity.log_lines import worth_a_line
from laxity.node import PayloadError
from laxity.payload import Part, Payload, Unpacker, pack
from laxity.protocol import (
    Acted,
    DeviceReport,
    Done,
    Fetch,
    Goodbye,
    Grant,
    Heartbeat,
    Load,
    ModelReport,
    Pull,
    Ready,
    Unload,
    Welcome,
)

log = logging.getLogger("laxity.broker")

MAX_BATCH: Final = 4096
"""The largest batch that a pipeline may ask for (``max_batch``), and so the largest in a profile."""
LONGEST: Final = 3600.0
"""Seconds that nothing which an agent states lasts longer than: what it says goes into sums and into messages."""
MOST_MEMORY: Final = 1e9
"""MiB that no device has more than."""

MOST_MISSED: Final = 10_000
"""Lost agents whose names are kept, to know them again."""
PASSING: Final = ("ok", "busy", "too_late", "cancelled", "not_loaded", "unknown_model")
"""How a LOAD or UNLOAD ends when nothing is wrong with the model or the device."""


class Agent:
    """One connected agent and the newest PULL of each of its devices."""

    def __init__(self, name: str, routing_id: bytes, connection: int, user: str, now: float) -> None:
        self.name = name
        self.routing_id = routing_id
        self.connection = connection
        self.user = user
        """Its public key; '' where the shard serves in plain text."""
        self.heard_at = now
        self.pulls: dict[int, tuple[Pull, float]] = {}
        """By device: its newest PULL and when it came."""
        self.reports: dict[int, DeviceReport] = {}
        """By device: what it was last said to hold."""


class Agents:
    """Feeds the engine with what agents send, and agents with the engine's grants."""

    def __init__(
        self, endpoint: Endpoint, gate: Gate, scheduler: Scheduler, files: ShardFiles, shard: str, heartbeat: float
    ) -> None:
        self._endpoint = endpoint
        self._gate = gate
        self._scheduler = scheduler
        self._files = files
        self._shard = shard
        self._heartbeat = heartbeat
        self._by_routing_id: dict[bytes, Agent] = {}
        self._by_name: dict[str, Agent] = {}
        self._debug = log.isEnabledFor(logging.DEBUG)
        """Whether each batch is a line; looked at again once a heartbeat."""
        self._ended: list[Agent] = []
        """Those whose connections ended, and who are yet to be given up."""
        self.malformed = 0
        self.lost = 0
        """Agents that fell silent or vanished."""
        self.heartbeats = 0
        self.reconnects = 0
        """Greetings of agents that were here before, and had not left."""
        self._missed: set[str] = set()
        """Agents lost of late."""

    def configure(self, now: float, heartbeat: float) -> None:
        """Have agents beat in this interval, in seconds."""
        self._heartbeat = heartbeat
        for agent in self._by_name.values():
            agent.heard_at = now  # who beat more seldom until now was not silent
            self._say(agent.routing_id, self._welcome())

    def __len__(self) -> int:
        return len(self._by_name)

    def names(self) -> list[str]:
        """Who is there."""
        return list(self._by_name)

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
        agent = self._by_routing_id.get(sender)
        user = ""
        if endpoint.secured:
            user = user_of(header)
            if agent is not None and agent.user != user:
                self._gate.stolen(now, sender, header, user, f"it uses the routing id of agent {agent.name}")
                return True
        try:
            message = protocol.decode_from_agent(header.bytes)
        except protocol.ProtocolError as error:
            endpoint.skip(header)
            self.malformed += 1
            if worth_a_line(self.malformed):
                log.warning("malformed message from an agent (%d by now): %s", self.malformed, error)
            self._say(sender, Goodbye(reason=f"malformed message: {error}", retry=False))
            return True
        if isinstance(message, Done) and agent is not None:
            agent.heard_at = now
            self._done(now, agent, message, endpoint.rest(header))
            return True
        endpoint.skip(header)
        if isinstance(message, Fetch):
            if self._gate.admits(now, sender, header, user, Task.FETCH):
                self._files.fetch(endpoint, sender, message)
            return True
        if isinstance(message, Ready):
            if self._gate.admits(now, sender, header, user, Task.SERVE):
                self._ready(now, sender, connection_of(header), user, message)
        elif agent is None:
            if not isinstance(message, Goodbye):
                self._say(sender, Goodbye(reason="unknown peer: say READY first", retry=True))
        else:
            agent.heard_at = now
            if isinstance(message, Pull):
                self._pull(now, agent, message)
            elif isinstance(message, Acted):
                self._acted(now, agent, message)
            elif isinstance(message, Heartbeat):
                self.heartbeats += 1
                self._say(sender, Heartbeat())
            elif isinstance(message, Goodbye):
                self._leave(now, agent)
        return True

    def _ready(self, now: float, sender: bytes, connection: int, user: str, ready: Ready) -> None:
        refused = refusal(ready.version, ready.agent, "agent")
        if refused is not None:
            self._say(sender, refused)
            return
        if user and ready.agent != self._gate.owner(user):
            text = f"it says that it is agent {ready.agent}, and has the key of {self._gate.owner(user)!r}"
            self._gate.refuse(now, sender, connection, user, "identity", text)
            return
        agent = self._by_name.get(ready.agent)
        if agent is not None and (agent.routing_id != sender or agent.connection != connection):
            # The agent was started again (or reconnected): what it had before is not there any more.
            self._lose(now, agent, f"agent {agent.name} was started again")
            agent = None
        other = self._by_routing_id.get(sender)
        if other is not None and other is not agent:
            self._leave(now, other)  # one connection is one agent's
        if agent is None:
            self._note_ended(now)
            if ready.agent in self._missed:
                self._missed.discard(ready.agent)
                self.reconnects += 1
            agent = Agent(ready.agent, sender, connection, user, now)
            self._by_name[ready.agent] = agent
            self._by_routing_id[sender] = agent
            log.info("agent %s is here with %d devices", agent.name, len(ready.devices), extra={"agent": agent.name})
        agent.heard_at = now
        self._gate.greeted(now, connection, sender, user)
        present = {device.device for device in ready.devices}
        for number in [number for number in agent.reports if number not in present]:
            del agent.reports[number]
            agent.pulls.pop(number, None)
            self._scheduler.withdraw(agent.name, number)
        for device in ready.devices:
            if agent.reports.get(device.device) == device and device.memory_mb <= 0:
                continue  # of a device that pages, ACTEDs may have told another thing meanwhile
            agent.reports[device.device] = device
            models = [_held(model) for model in device.models]
            self._scheduler.report(agent.name, device.device, device.type, models, _memory(device.memory_mb))
        self._say(sender, self._welcome())

    def _welcome(self) -> Welcome:
        return Welcome(version=protocol.VERSION, shard=self._shard, heartbeat_us=round(self._heartbeat * 1e6))

    def _pull(self, now: float, agent: Agent, pull: Pull) -> None:
        if pull.device not in agent.reports:
            return
        newest = agent.pulls.get(pull.device)
        if newest is not None and newest[0].seq >= pull.seq:
            return
        agent.pulls[pull.device] = (pull, now)
        self._scheduler.pull(agent.name, pull.device, now + _seconds(pull.free_in_us))

    def _acted(self, now: float, agent: Agent, acted: Acted) -> None:
        code = acted.code if acted.code in protocol.DONE_CODES else "model_error"
        took = _seconds(acted.took_us)
        if not self._scheduler.acted(now, agent.name, acted.action, code, took, acted.detail):
            log.debug("agent %s answered an unknown action", agent.name, extra=_ids(agent, acted.device, acted.action))
        elif code not in PASSING:
            extra = _ids(agent, acted.device, acted.action)
            log.warning("agent %s, device %d: %s: %s", agent.name, acted.device, code, acted.detail, extra=extra)

    def _done(self, now: float, agent: Agent, done: Done, frames: list[Part]) -> None:
        unpacker = Unpacker(frames)
        code = done.code if done.code in protocol.DONE_CODES else "model_error"
        detail = done.detail
        results: list[Payload] = []
        try:
            for node in done.results:
                results.append(unpacker.take(node))
            unpacker.finish()
        except PayloadError as error:
            self.malformed += 1
            code, detail, results = "model_error", f"malformed answer from agent {agent.name}: {error}", []
        execution = _seconds(done.execution_us)
        failures = {failure.index: failure.detail for failure in done.failures}
        before, after = _seconds(done.input_us), _seconds(done.output_us)
        if not self._scheduler.done(
            now, agent.name, done.batch, code, execution, results, failures, detail, before, after
        ):
            log.debug(
                "agent %s answered an unknown batch", agent.name, extra={"agent": agent.name, "batch": done.batch}
            )
        elif self._debug:
            extra = {"agent": agent.name, "device": done.device, "batch": done.batch}
            log.debug("agent %s, device %d: %s in %.6f s", agent.name, done.device, code, execution, extra=extra)

    # ---- out -------------------------------------------------------------------------

    def grant(self, now: float, batches: list[Batch]) -> bool:
        """Send grants; whether any could not be sent (its tasks are queued again, dispatch once more)."""
        failed = False
        for batch in batches:
            device = batch.device
            agent = self._by_name.get(device.agent)
            entry = agent.pulls.get(device.number) if agent is not None else None
            if agent is None or entry is None:
                self._scheduler.grant_failed(batch.number)
                failed = True
                continue
            pull, pulled_at = entry
            tasks = batch.tasks
            header = protocol.encode(
                Grant(
                    device=device.number,
                    batch=batch.number,
                    seq=pull.seq,
                    pulled_us=pull.sent_us,
                    dwell_us=round((now - pulled_at) * 1e6),
                    model=batch.stage.model,
                    variant=batch.stage.variant,
                    opens_us=0,
                    closes_us=round(min(batch.closes - now, LONGEST) * 1e6),
                    expected_us=round(batch.expected * 1e6),
                    tasks=[[value.node for value in task.inputs] for task in tasks],
                )
            )
            if len(header) > protocol.MAX_HEADER:
                # As if the model had raised: again in halves, until they fit or one fails alone. The pull stands.
                why = protocol.too_structured("input", len(header))
                self._scheduler.done(now, agent.name, batch.number, "model_error", 0.0, [], {}, why)
                self._scheduler.pull(agent.name, device.number, device.free_at)
                failed = True
                continue
            frames = pack([value for task in tasks for value in task.inputs])
            sent = self._endpoint.send(agent.routing_id, header, frames)
            if sent is Sent.YES:
                if self._debug:
                    self._log_grant(agent.name, batch)
                continue
            failed = True
            self._scheduler.grant_failed(batch.number)
            self._give_up(now, agent, sent)
        return failed

    def _log_grant(self, agent: str, batch: Batch) -> None:
        requests = [task.request for task in batch.tasks]
        extra = {
            "agent": agent,
            "device": batch.device.number,
            "batch": batch.number,
            "model": batch.stage.model,
            "requests": [f"{request.client.name}:{request.id}" for request in requests],
        }
        log.debug("%d of %s to agent %s", len(batch.tasks), batch.stage.model, agent, extra=extra)

    def page(self, now: float, pages: list[Page]) -> bool:
        """Tell devices what to load and unload; whether some could not be told, so that other things are due."""
        failed = False
        for page in pages:
            device = page.device
            agent = self._by_name.get(device.agent)
            entry = agent.pulls.get(device.number) if agent is not None else None
            if agent is None or entry is None:
                self._scheduler.acted(now, device.agent, page.action, "cancelled", 0.0, "the agent is gone")
                failed = True
                continue
            pull, pulled_at = entry
            dwell = round((now - pulled_at) * 1e6)
            closes = round((page.latest - now) * 1e6)
            message: Load | Unload
            if page.load:
                expected = round(page.expected * 1e6)
                message = Load(device.number, page.action, pull.sent_us, dwell, page.model, 0, closes, expected)
            else:
                message = Unload(device.number, page.action, pull.sent_us, dwell, page.model, 0, closes)
            sent = self._endpoint.send(agent.routing_id, protocol.encode(message), [])
            if sent is not Sent.YES:
                failed = True
                self._give_up(now, agent, sent)
        return failed

    def _give_up(self, now: float, agent: Agent, sent: Sent) -> None:
        """Nothing can be sent to an agent. Also where it only does not read: its pulls are used up, and it would wait
        for the grants for ever."""
        self._lose(now, agent, f"agent {agent.name} {'is unreachable' if sent is Sent.GONE else 'does not read'}")

    # ---- liveness --------------------------------------------------------------------

    def check(self, now: float) -> None:
        """Give up the agents that have been silent for four heartbeats, or whose connections ended."""
        self._debug = log.isEnabledFor(logging.DEBUG)
        self.disconnected(now)
        silent = now - 4 * self._heartbeat
        for agent in [a for a in self._by_name.values() if a.heard_at < silent]:
            self._lose(now, agent, f"agent {agent.name} fell silent")

    def disconnected(self, now: float) -> None:
        """Give up the agents whose connections ended: a killed process shows at once, without waiting for its silence.
        One that only lost its connection greets again."""
        self._note_ended(now)
        ended = self._ended
        self._ended = []
        for agent in ended:
            if self._by_routing_id.get(agent.routing_id) is agent:
                self._lose(now, agent, f"agent {agent.name} lost its connection")

    def _note_ended(self, now: float) -> None:
        """Find out whose connections ended. Before an agent is taken in, whose connection may have got the number of
        one that has ended."""
        self._gate.watch(now)
        ended = {each.number for each in self._gate.ended()}
        if ended:
            self._ended += [agent for agent in self._by_name.values() if agent.connection in ended]

    def review(self, now: float) -> None:
        """Part with the agents whose keys are good no more."""
        for agent in list(self._by_name.values()):
            why = self._gate.keeps_out(agent.user)
            if why:
                self._say(agent.routing_id, Goodbye(reason=why, retry=False))
                self._lose(now, agent, f"agent {agent.name} is let go: {why}")

    def _lose(self, now: float, agent: Agent, why: str) -> None:
        self.lost += 1
        if len(self._missed) < MOST_MISSED:
            self._missed.add(agent.name)
        queued = self._forget(now, agent, why)
        log.warning("%s; %d of its batches were queued again", why, queued, extra={"agent": agent.name})

    def _leave(self, now: float, agent: Agent) -> None:
        """It has nothing to do here any more, or is shutting down."""
        why = f"agent {agent.name} left"
        queued = self._forget(now, agent, why)
        log.info("%s; %d of its batches were queued again", why, queued, extra={"agent": agent.name})

    def _forget(self, now: float, agent: Agent, why: str) -> int:
        self._gate.connections.forgotten(now, agent.connection)
        self._by_routing_id.pop(agent.routing_id, None)
        self._by_name.pop(agent.name, None)
        return self._scheduler.agent_lost(now, agent.name, why)

    def say_goodbye(self, reason: str) -> None:
        """Tell every agent that this shard leaves."""
        for agent in self._by_name.values():
            self._say(agent.routing_id, Goodbye(reason=reason, retry=True))

    def _say(self, to: bytes, message: protocol.ToAgent) -> None:
        self._endpoint.send(to, protocol.encode(message), [])


def _ids(agent: Agent, device: int, action: int) -> dict[str, object]:
    return {"agent": agent.name, "device": device, "action": action}


def _seconds(us: int) -> float:
    """A duration that an agent states, within what can be true."""
    return min(max(us, 0) * 1e-6, LONGEST)


def _memory(mb: float) -> float:
    """MiB that an agent states; 0 where it cannot be true."""
    return mb if 0.0 < mb < MOST_MEMORY else 0.0


def _held(model: ModelReport) -> HeldModel:
    return HeldModel(
        model.model,
        model.variant,
        model.share,
        _checked(model.profile),
        model.resident,
        _memory(model.memory_mb),
        _seconds(model.load_us),
    )


def _checked(profile: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The entries of a profile that can be true; a table is made of them that is as long as the largest batch."""
    return [(batch, seconds) for batch, seconds in profile if 1 <= batch <= MAX_BATCH and 0.0 <= seconds < LONGEST]
