"""One device of an agent: its engine, what runs its batches, and the messages about it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from cluster.observe.families import SECONDS
from cluster.observe.figures import HistogramFigures
from cluster.observe.histogram import Histogram
from cluster.telemetry import ActionTelemetry
from laxity.payload import Part
from laxity.protocol import Acted, DeviceReport, Done, Grant, Load, ModelReport, Pull, Unload
from nodes import worker_protocol as wire
from nodes.action_record import ActionRecord, Session
from nodes.engine import actions
from nodes.engine.device import DeviceEngine
from nodes.engine.models import HELD, READY
from nodes.measured import Known, Measured, memory_needed
from nodes.remeasure import Remeasure
from nodes.runner import Died, Event, Runner
from nodes.telemetry import note
from pipelines.spec import PipelineSpec

log = logging.getLogger("laxity.node")

Models = dict[str, tuple[PipelineSpec, str]]
"""(spec, stage) by model key."""


class DeviceConfig(msgspec.Struct, frozen=True):
    """A device: ``kind`` is 'cpu', 'cuda:N' or 'emulated'; ``type`` what its profiles are keyed by."""

    kind: str
    type: str
    threads: int = 1
    """Threads that numerical libraries in its worker may use."""
    memory_mb: float = 0.0
    """The memory that models may take; 0 where it is not known, which is taken for enough."""


class DeviceLoad(msgspec.Struct, frozen=True):
    """What a device has executed until now, in seconds, and what is resident on it."""

    number: int
    busy: float
    models: int
    memory_mb: float
    budget_mb: float


class DeviceCounts(msgspec.Struct, frozen=True):
    """What has become of a device until now: how its actions ended, by (kind, code), and what LOADs took."""

    load: DeviceLoad
    actions: dict[tuple[str, str], int]
    worker_deaths: int
    loads: HistogramFigures


class _Granted:
    """A batch that is to be answered."""

    __slots__ = ("frames", "grant", "record", "session")

    def __init__(self, session: Session, grant: Grant, frames: list[Part], record: ActionRecord) -> None:
        self.session = session
        self.grant = grant
        self.frames = frames
        self.record = record


class Device:
    """``number`` is its index at the agent. Batches are known by numbers of its own to its engine and its runner: two
    shards may well use the same one; LOADs and UNLOADs are by the engine's.

    ``known`` is what was found out about models, here and elsewhere: the device adds what it measures, when it holds a
    model and while that serves, and calls ``measured`` then, with the model's key. ``changed`` is called when there is
    something new to be told to people or to a shard.
    """

    def __init__(
        self,
        number: int,
        config: DeviceConfig,
        runner: Runner,
        known: Known,
        changed: Callable[[], None],
        measured: Callable[[str, str, Measured], None],
        telemetry: ActionTelemetry | None,
    ) -> None:
        self.number = number
        self.config = config
        self.runner = runner
        self.engine = DeviceEngine(config.memory_mb)
        self.progress = ""
        """What loading is at, for people."""
        self.batches_run = 0
        self._ended_by: dict[tuple[str, str], int] = {("INFER", "ok"): 0}
        """Actions by kind and code."""
        self._loads = Histogram(SECONDS)
        self._executed = 0.0
        """Seconds of all executions until now."""
        self.telemetry = telemetry
        self._known = known
        self._remeasure = Remeasure()
        self._changed = changed
        self._measured = measured
        self._session: Session | None = None
        self._specs: Models = {}
        self._granted: dict[int, _Granted] = {}
        """By the batch's number here."""
        self._pages: dict[int, ActionRecord] = {}
        """LOADs and UNLOADs under way, by number."""
        self._hold: ActionRecord | None = None
        """The one under way."""
        self._last_batch = 0

    def report(self) -> DeviceReport:
        """What READY says of this device."""
        return DeviceReport(
            self.number,
            self.config.type,
            [
                ModelReport(
                    model.key,
                    "",
                    100,
                    list(model.profile),
                    model.state == READY,
                    model.memory,
                    round(model.load_seconds * 1e6),
                )
                for model in self.engine.models.values()
                if model.state in (READY, HELD)
            ],
            self.config.memory_mb,
        )

    def load_now(self) -> DeviceLoad:
        """How busy and how full it is."""
        models = self.engine.paging.models
        budget = self.config.memory_mb
        return DeviceLoad(self.number, self._executed, len(models.on_device), self.engine.paging.taken(), budget)

    def counts(self) -> DeviceCounts:
        """Everything that is counted."""
        deaths = self.engine.health.deaths
        return DeviceCounts(self.load_now(), dict(self._ended_by), deaths, self._loads.figures())

    def owes(self, session: Session) -> bool:
        """Whether it has a batch, a LOAD or an UNLOAD of this session to answer."""
        return any(granted.session is session for granted in self._granted.values()) or any(
            record.session is session for record in self._pages.values()
        )

    # ---- in --------------------------------------------------------------------------

    def place(self, now: float, models: Models) -> None:
        """Hold exactly these models."""
        self._specs = models
        self._remeasure.keep(set(models))
        played = self.config.type
        needed = {
            key: memory_needed(spec, stage, played, self._known.get((key, played)))
            for key, (spec, stage) in models.items()
        }
        self.engine.place(now, needed)
        self._act(now)

    def work_for(self, now: float, session: Session | None) -> None:
        """Take batches from this shard from now on (None: from nobody)."""
        self._session = session
        self.engine.session(now, session is not None)
        self._act(now)

    def grant(self, now: float, session: Session, grant: Grant, frames: list[Part]) -> None:
        """A batch came from the shard that it works for."""
        self._last_batch += 1
        record = ActionRecord("INFER", grant.model, now, session, grant.batch)
        left_at = record.window(grant)
        record.elements = len(grant.tasks)
        record.expected = grant.expected_us * 1e-6
        running = self.engine.running
        if running is not None:
            record.expected_start = max(record.expected_start, running.free_at())
        self._granted[self._last_batch] = _Granted(session, grant, frames, record)
        known = self._specs.get(grant.model)
        self.engine.grant(
            now,
            self._last_batch,
            grant.seq,
            grant.model,
            left_at,
            grant.opens_us * 1e-6,
            grant.closes_us * 1e-6,
            record.expected,
            known[0].slo if known is not None else 0.0,
        )
        self._act(now)

    def load(self, now: float, session: Session, load: Load) -> None:
        """The shard that it works for wants a model in the device's memory."""
        record = ActionRecord("LOAD", load.model, now, session, load.action)
        left_at = record.window(load)
        record.expected = load.expected_us * 1e-6
        opens, closes = load.opens_us * 1e-6, load.closes_us * 1e-6
        self._pages[self.engine.load(now, load.model, left_at, opens, closes, record.expected)] = record
        self._act(now)

    def unload(self, now: float, session: Session, unload: Unload) -> None:
        """The shard that it works for wants a model out of the device's memory."""
        record = ActionRecord("UNLOAD", unload.model, now, session, unload.action)
        left_at = record.window(unload)
        opens, closes = unload.opens_us * 1e-6, unload.closes_us * 1e-6
        self._pages[self.engine.unload(now, unload.model, left_at, opens, closes)] = record
        self._act(now)

    def step(self, now: float) -> None:
        """Take in what the runner says, and do what is due."""
        self._listen(now)
        self.engine.tick(now)
        self._act(now)

    def next_wake(self) -> float:
        return min(self.engine.next_wake(), self.runner.next_wake())

    def _listen(self, now: float) -> None:
        for event, frames in self.runner.events(now):
            self._event(now, event, frames)

    def _event(self, now: float, event: Event, frames: list[Part]) -> None:
        engine = self.engine
        if isinstance(event, wire.Executing):
            granted = self._granted.get(event.batch)
            if granted is not None:
                granted.record.started = event.at
            engine.started(now, event.batch, event.at)
        elif isinstance(event, wire.Finished):
            if engine.finished(now, event.batch, event.code, event.input_us * 1e-6, event.copying):
                self._finished(now, event, frames)
        elif isinstance(event, wire.CopiedIn):
            engine.copied_in(now, event.batch)
        elif isinstance(event, wire.Acted):
            if engine.acted(now, event.action, event.code, event.detail):
                if event.code != "too_late":
                    record = self._pages[event.action]
                    record.duration = event.took_us * 1e-6
                    record.started = event.at or None
                self._acted(event.action, event.code, event.took_us, event.detail)
        elif isinstance(event, wire.Started):
            engine.worker_started(now)
        elif isinstance(event, wire.Progress):
            engine.progress(now)
            self.progress = event.text
            self._changed()
        elif isinstance(event, wire.Held):
            self._held(now, event)
        elif isinstance(event, wire.LoadFailed):
            log.error("device %d: %s", self.number, event.detail, extra={"device": self.number, "model": event.key})
            engine.hold_failed(now, event.key, event.detail)
            self._hold_ended(now, event.code, event.detail)
        elif isinstance(event, Died):
            why = engine.worker_died(now, event.why, event.suspects)
            self._lost(now, why)
            extra = {"device": self.number}
            log.warning("device %d: %s; its worker will be started again", self.number, why, extra=extra)

    # ---- how actions end -------------------------------------------------------------

    def _ended(self, record: ActionRecord, code: str, detail: str) -> None:
        """An action has ended: its record is complete."""
        record.code = code
        record.detail = detail
        record.memory_mb = self.engine.paging.taken()
        self._ended_by[record.kind, code] = self._ended_by.get((record.kind, code), 0) + 1
        if record.kind == "INFER":
            self._executed += record.duration
        elif record.kind == "LOAD" and code == "ok":
            self._loads.observe(record.duration)
        if self.telemetry is not None:
            note(self.telemetry, self.number, record)

    def _finished(self, now: float, event: wire.Finished, frames: list[Part]) -> None:
        """A batch that the worker had has ended."""
        granted = self._granted.pop(event.batch)
        record = granted.record
        record.duration = event.execution_us * 1e-6
        record.input = event.input_us * 1e-6
        record.output = event.output_us * 1e-6
        self.batches_run += record.started is not None
        busy_us = event.input_us + event.execution_us + event.output_us
        done = Done(
            self.number,
            granted.grant.batch,
            event.code,
            max(round((now - record.came) * 1e6) - busy_us, 0),
            event.execution_us,
            event.results,
            event.failures,
            event.detail,
            event.input_us,
            event.output_us,
        )
        granted.session.send(done, frames)
        self._ended(record, event.code, event.detail)
        if event.code == "ok":
            self._compare(now, record)

    def _compare(self, now: float, record: ActionRecord) -> None:
        """See whether what is known of a model still holds. One that takes as long as its inputs are large tells
        nothing."""
        at = (record.model, self.config.type)
        known = self._known.get(at)
        placed = self._specs.get(record.model)
        if known is None or placed is None or placed[0].stages[placed[1]].cost is not None:
            return
        seconds = record.duration + record.output
        news = self._remeasure.note(now, record.model, record.elements, seconds, known)
        if news is not None:
            what = "device %d: %s takes another time than its profile says; it is written anew"
            log.info(what, self.number, at[0], extra={"device": self.number, "model": at[0]})
            self._know(at, news)

    def _know(self, at: tuple[str, str], measured: Measured) -> None:
        self._known[at] = measured
        self._measured(*at, measured)

    def _refuse(self, batch: int, code: str, detail: str) -> None:
        granted = self._granted.pop(batch)
        granted.session.send(Done(self.number, granted.grant.batch, code, detail=detail), [])
        self._ended(granted.record, code, detail)

    def _acted(self, number: int, code: str, took_us: int, detail: str) -> None:
        """A LOAD or an UNLOAD has ended, or never began."""
        record = self._pages.pop(number)
        self._ended(record, code, detail)
        session = record.session
        if session is None:
            return
        said = session.send(Acted(self.number, record.asked, code, took_us, detail), [])
        model = self.engine.models.get(record.model)
        if said and session is self._session and model is not None and model.state in (READY, HELD):
            session.told(self.number, record.model, model.state == READY)
        else:
            self._changed()

    def _held(self, now: float, event: wire.Held) -> None:
        self.engine.held(now, event.key, event.profile, event.load_seconds, event.memory_mb)
        self._hold_ended(now, "ok", "")
        at = (event.key, self.config.type)
        if at not in self._known:
            self._know(at, Measured(event.profile, event.load_seconds, event.memory_mb))

    def _hold_ended(self, now: float, code: str, detail: str) -> None:
        self.progress = ""
        record = self._hold
        if record is not None:
            self._hold = None
            record.duration = now - record.came
            self._ended(record, code, detail)

    def _lost(self, now: float, why: str) -> None:
        """The worker died: so did what the agent itself wanted of it. What shards did, the engine answers."""
        self._hold_ended(now, "worker_died", why)
        for number, record in list(self._pages.items()):
            if record.session is None:
                del self._pages[number]
                self._ended(record, "worker_died", why)

    # ---- out -------------------------------------------------------------------------

    def _act(self, now: float) -> None:
        engine = self.engine
        todo = engine.take_actions()
        while todo:
            for action in todo:
                self._do(now, action)
            if self.runner.next_wake() <= now:
                self._listen(now)
            todo = engine.take_actions()

    def _do(self, now: float, action: actions.Action) -> None:
        runner = self.runner
        if isinstance(action, actions.Infer):
            granted = self._granted[action.batch]
            grant = granted.grant
            runner.infer(now, action.batch, grant.model, action.earliest, action.latest, grant.tasks, granted.frames)
            granted.frames = []
        elif isinstance(action, actions.SendPull):
            if self._session is not None:
                free_in = round(action.free_in * 1e6)
                self._session.send(Pull(self.number, action.seq, round(now * 1e6), free_in), [])
        elif isinstance(action, actions.Refuse):
            self._refuse(action.batch, action.code, action.detail)
        elif isinstance(action, actions.Drop):
            runner.drop(now, action.batch)
        elif isinstance(action, actions.Load):
            runner.load(now, action.number, action.model, action.earliest, action.latest)
        elif isinstance(action, actions.Unload):
            if action.number not in self._pages:
                record = ActionRecord("UNLOAD", action.model, now, None, action.number)
                record.latest = action.latest
                self._pages[action.number] = record
            runner.unload(now, action.number, action.model, action.earliest, action.latest)
        elif isinstance(action, actions.Answer):
            self._acted(action.number, action.code, 0, action.detail)
        elif isinstance(action, actions.Hold):
            self._start_hold(now, action.model)
        elif isinstance(action, actions.Release):
            runner.release(action.model)
        elif isinstance(action, actions.StartWorker):
            runner.start()
        elif isinstance(action, actions.KillWorker):
            runner.kill()
        elif isinstance(action, actions.Announce):
            self._changed()

    def _start_hold(self, now: float, key: str) -> None:
        spec, stage = self._specs[key]
        known = self._known.get((key, self.config.type))
        self.progress = f"loading {stage}"
        self._hold = ActionRecord("HOLD", key, now, None, 0)
        self._hold.started = now
        self.runner.hold(now, key, spec, stage, known.profile if known is not None else [])
        self._changed()
