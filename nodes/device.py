"""One device of an agent: its engine, what runs its batches, and the messages about it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from laxity import protocol
from laxity.payload import Part
from laxity.protocol import DeviceReport, Done, Grant, ModelReport, Pull
from nodes import worker_protocol as wire
from nodes.engine import actions
from nodes.engine.device import READY, DeviceEngine
from nodes.runner import Died, Event, Runner
from pipelines.spec import PipelineSpec

log = logging.getLogger("laxity.node")

Send = Callable[[protocol.FromAgent, list[Part]], bool]


class Device:
    """``number`` is its index at the agent, ``type`` what profiles are keyed by (``cpu``, ``A100``, ``emulated``)."""

    def __init__(self, number: int, type: str, runner: Runner, send: Send, changed: Callable[[], None]) -> None:
        self.number = number
        self.type = type
        self.runner = runner
        self.engine = DeviceEngine()
        self.progress = ""
        """What loading is at, for people."""
        self.batches_run = 0
        self._send = send
        self._changed = changed
        self._specs: dict[str, tuple[PipelineSpec, str]] = {}
        self._grants: dict[int, tuple[Grant, list[Part], float]] = {}

    def report(self) -> DeviceReport:
        """What READY says of this device."""
        return DeviceReport(
            self.number,
            self.type,
            [
                ModelReport(model.key, "", 100, list(model.profile))
                for model in self.engine.models.values()
                if model.state == READY
            ],
        )

    # ---- in --------------------------------------------------------------------------

    def place(self, now: float, models: dict[str, tuple[PipelineSpec, str]]) -> None:
        """Hold exactly these models: (spec, stage) by model key."""
        self._specs = models
        self.engine.place(now, list(models))
        self._act(now)

    def grant(self, now: float, grant: Grant, frames: list[Part]) -> None:
        """A batch came from the shard."""
        self._grants[grant.batch] = (grant, frames, now)
        known = self._specs.get(grant.model)
        self.engine.grant(
            now,
            grant.batch,
            grant.seq,
            grant.model,
            (grant.pulled_us + grant.dwell_us) * 1e-6,
            grant.opens_us * 1e-6,
            grant.closes_us * 1e-6,
            grant.expected_us * 1e-6,
            known[0].slo if known is not None else 0.0,
        )
        self._act(now)

    def session(self, now: float, connected: bool) -> None:
        """The connection to the shard began anew or ended."""
        self.engine.session(now, connected)
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
            grant = self._grants.pop(event.batch, None)
            if engine.finished(now, event.batch):
                self.batches_run += 1
                queued = (now - grant[2]) * 1e6 - event.execution_us if grant is not None else 0.0
                self._send(
                    Done(
                        self.number,
                        event.batch,
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
        elif isinstance(event, wire.Loaded):
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
        if len(self._grants) > 2:  # those that a lost session or worker took along, of which nobody is told
            held = [grant.batch for grant in (engine.running, engine.waiting) if grant is not None]
            self._grants = {batch: self._grants[batch] for batch in held}

    def _do(self, now: float, action: actions.Action) -> None:
        if isinstance(action, actions.Start):
            grant, frames, _ = self._grants[action.batch]
            self.runner.infer(now, action.batch, grant.model, grant.tasks, frames)
        elif isinstance(action, actions.SendPull):
            self._send(Pull(self.number, action.seq, round(now * 1e6), round(action.free_in * 1e6)), [])
        elif isinstance(action, actions.Refuse):
            self._grants.pop(action.batch, None)
            self._send(Done(self.number, action.batch, action.code, detail=action.detail), [])
        elif isinstance(action, actions.StartWorker):
            self.runner.start()
        elif isinstance(action, actions.KillWorker):
            self.runner.kill()
        elif isinstance(action, actions.Load):
            spec, stage = self._specs[action.model]
            self.progress = f"loading {stage}"
            self.runner.load(action.model, spec, stage)
            self._changed()
        elif isinstance(action, actions.Unload):
            self.runner.unload(action.model)
        elif isinstance(action, actions.Announce):
            self._changed()
