"""One device of an agent: its engine, what runs its batches, and the messages about it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import msgspec

from laxity import protocol
from laxity.payload import Part
from laxity.protocol import DeviceReport, Done, Grant, ModelReport, Pull
from nodes import worker_protocol as wire
from nodes.engine import actions
from nodes.engine.device import READY, DeviceEngine
from nodes.runner import Died, Event, Runner
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


class Session(Protocol):
    """One shard, for as long as it knows this agent without a break."""

    def send(self, message: protocol.FromAgent, frames: list[Part]) -> bool:
        """Send to the shard without waiting; False where that is not possible (any more)."""
        ...


class _Granted:
    """A batch: who granted it, and when it came."""

    __slots__ = ("came", "frames", "grant", "session")

    def __init__(self, session: Session, grant: Grant, frames: list[Part], came: float) -> None:
        self.session = session
        self.grant = grant
        self.frames = frames
        self.came = came


class Device:
    """``number`` is its index at the agent. Batches are known by numbers of its own to its engine and its runner: two
    shards may well use the same one."""

    def __init__(self, number: int, config: DeviceConfig, runner: Runner, changed: Callable[[], None]) -> None:
        self.number = number
        self.config = config
        self.runner = runner
        self.engine = DeviceEngine()
        self.progress = ""
        """What loading is at, for people."""
        self.batches_run = 0
        self._changed = changed
        self._session: Session | None = None
        self._specs: Models = {}
        self._memory_mb: dict[str, float] = {}
        """What the models take that it holds, is to hold or lets go of, by key."""
        self._granted: dict[int, _Granted] = {}
        """By the batch's number here: the one that runs and the one that waits."""
        self._last_batch = 0

    def report(self) -> DeviceReport:
        """What READY says of this device."""
        return DeviceReport(
            self.number,
            self.config.type,
            [
                ModelReport(model.key, "", 100, list(model.profile))
                for model in self.engine.models.values()
                if model.state == READY
            ],
        )

    def owes(self, session: Session) -> bool:
        """Whether it has a batch of this session to answer."""
        return any(granted.session is session for granted in self._granted.values())

    # ---- in --------------------------------------------------------------------------

    def place(self, now: float, models: Models) -> None:
        """Hold exactly these models."""
        for key, (spec, stage) in models.items():
            profile = spec.stages[stage].profile
            taken = profile.on(self.config.type).memory_mb if profile is not None else None
            self._memory_mb[key] = taken or 0.0
        held = models.keys() | self.engine.models.keys() | self.engine.leaving.keys()
        self._memory_mb = {key: self._memory_mb[key] for key in held}
        room = self.config.memory_mb
        self._specs = models
        self.engine.place(now, list(models), unload_first=0.0 < room < sum(self._memory_mb.values()))
        self._act(now)

    def work_for(self, now: float, session: Session | None) -> None:
        """Take batches from this shard from now on (None: from nobody)."""
        self._session = session
        self.engine.session(now, session is not None)
        self._act(now)

    def grant(self, now: float, session: Session, grant: Grant, frames: list[Part]) -> None:
        """A batch came from the shard that it works for."""
        self._last_batch += 1
        self._granted[self._last_batch] = _Granted(session, grant, frames, now)
        known = self._specs.get(grant.model)
        self.engine.grant(
            now,
            self._last_batch,
            grant.seq,
            grant.model,
            (grant.pulled_us + grant.dwell_us) * 1e-6,
            grant.opens_us * 1e-6,
            grant.closes_us * 1e-6,
            grant.expected_us * 1e-6,
            known[0].slo if known is not None else 0.0,
        )
        self._act(now)

    def step(self, now: float) -> None:
        """Take in what the runner says, and do what is due."""
        for event, frames in self.runner.events(now):
            self._event(now, event, frames)
        self.engine.tick(now)
        self._act(now)

    def next_wake(self) -> float:
        return min(self.engine.next_wake(), self.runner.next_wake())

    def _event(self, now: float, event: Event, frames: list[Part]) -> None:
        engine = self.engine
        if isinstance(event, wire.Finished):
            granted = self._granted.pop(event.batch, None)
            if engine.finished(now, event.batch) and granted is not None:
                self.batches_run += 1
                queued = (now - granted.came) * 1e6 - event.execution_us
                granted.session.send(
                    Done(
                        self.number,
                        granted.grant.batch,
                        event.code,
                        max(round(queued), 0),
                        event.execution_us,
                        event.results,
                        event.failures,
                        event.detail,
                    ),
                    frames,
                )
        elif isinstance(event, wire.Started):
            engine.worker_started(now)
        elif isinstance(event, wire.Progress):
            self.progress = event.text
            self._changed()
        elif isinstance(event, wire.Held):
            self.progress = ""
            engine.loaded(now, event.key, event.profile)
        elif isinstance(event, wire.LoadFailed):
            self.progress = ""
            log.error("device %d: %s", self.number, event.detail)
            engine.load_failed(now, event.key, event.detail)
        elif isinstance(event, Died):
            self.progress = ""
            why = engine.worker_died(now, event.why)
            log.warning("device %d: %s; its worker will be started again", self.number, why)

    # ---- out -------------------------------------------------------------------------

    def _act(self, now: float) -> None:
        engine = self.engine
        todo = engine.take_actions()
        while todo:
            for action in todo:
                self._do(now, action)
            todo = engine.take_actions()

    def _do(self, now: float, action: actions.Action) -> None:
        if isinstance(action, actions.Start):
            granted = self._granted[action.batch]
            self.runner.infer(now, action.batch, granted.grant.model, granted.grant.tasks, granted.frames)
        elif isinstance(action, actions.SendPull):
            if self._session is not None:
                free_in = round(action.free_in * 1e6)
                self._session.send(Pull(self.number, action.seq, round(now * 1e6), free_in), [])
        elif isinstance(action, actions.Refuse):
            granted = self._granted.pop(action.batch)
            granted.session.send(Done(self.number, granted.grant.batch, action.code, detail=action.detail), [])
        elif isinstance(action, actions.StartWorker):
            self.runner.start()
        elif isinstance(action, actions.KillWorker):
            self.runner.kill()
        elif isinstance(action, actions.Load):
            spec, stage = self._specs[action.model]
            self.progress = f"loading {stage}"
            self.runner.load(now, action.model, spec, stage)
            self._changed()
        elif isinstance(action, actions.Unload):
            self.runner.unload(action.model)
        elif isinstance(action, actions.Announce):
            self._changed()
