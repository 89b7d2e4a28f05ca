"""Emulated devices: they answer after the time that a stage's profile says, without running anything.

They live inside the agent, dozens of them in one process, and are what a cluster is tried on without GPUs.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from laxity.node import Node, PayloadError
from laxity.payload import Part, Payload, Unpacker, as_dict, as_list, pack
from nodes import worker_protocol as wire
from nodes.engine.lanes import Execute, Lanes, PageIn, PageOut, TooLate
from nodes.executors.errors import describe_error
from nodes.executors.options import read_options
from nodes.runner import Died, Event
from pipelines.graph import Graph
from pipelines.profile import LatencyProfile
from pipelines.spec import PipelineSpec

log = logging.getLogger("laxity.node")


class EmulatedOptions(msgspec.Struct, frozen=True):
    """The ``options`` of an emulated stage."""

    jitter: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.0
    """Standard deviation of the logarithm of the execution time; the times of one far above are no numbers any more."""
    items: Annotated[int, Meta(ge=0, le=100_000)] = 4
    """How many items the stage answers where a map stage wants a list."""
    memory_mb_per_item: Annotated[float, Meta(ge=0.0, le=1e9)] = 0.0
    """What a batch takes of the device's memory for each element while it runs."""


class EmulatedModel:
    """One stage as the emulation plays it on a device of a type: how long loading and a batch take, how much memory it
    holds (0: not known), and what shape its answers have. The options of a stage of another executor are not for it.
    ValueError where there is nothing to emulate.
    """

    def __init__(self, spec: PipelineSpec, stage: str, device_type: str = "") -> None:
        stage_spec = spec.stages[stage]
        if stage_spec.profile is None:
            raise ValueError(
                f"stage {stage!r} has no profile to emulate; write profile: {{alpha_ms: ..., beta_ms: ...}}"
            )
        stated = stage_spec.profile.on(device_type)
        self.profile = LatencyProfile.from_spec(stated)
        self.load_seconds = (stated.load_ms or 0.0) / 1e3
        self.memory_mb = stated.memory_mb or 0.0
        given = stage_spec.options if stage_spec.executor == "emulated" else {}
        options = read_options("emulated", given, EmulatedOptions)
        self.jitter = options.jitter
        self.memory_mb_per_item = options.memory_mb_per_item
        self._items = options.items
        graph = Graph(spec)
        self._fields = sorted(graph.fields_used(stage))
        self._lists = graph.list_fields(stage)
        self.echo = self._fields in ([], [""]) and "" not in self._lists and len(stage_spec.named_inputs()) == 1
        """Whether an answer is simply its input."""

    def answer(self, value: Payload) -> Payload:
        """The answer to an input: the input itself, in the shape that later stages refer to."""
        if self._fields in ([], [""]):
            return self._field("", value)
        return as_dict({field: self._field(field, value) for field in self._fields if field})

    def _field(self, field: str, value: Payload) -> Payload:
        return as_list([value] * self._items) if field in self._lists else value


def _first(unpacker: Unpacker, inputs: list[Node]) -> Payload:
    """The first of a task's inputs; the others are taken out of the frames as well."""
    first, *_ = [unpacker.take(node) for node in inputs]
    return first


class _Batch:
    """A batch that was handed over."""

    __slots__ = ("frames", "key", "number", "tasks")

    def __init__(self, number: int, key: str, tasks: list[list[Node]], frames: list[Part]) -> None:
        self.number = number
        self.key = key
        self.tasks = tasks
        self.frames = frames


class EmulatedRunner:
    """Plays one device of a type; ``memory_mb`` is 0 where it has room for everything. ``seed`` makes its jitter the
    same in every run.

    What it plays happens at its own times, as in a worker process: a batch begins as the one before ends, also where
    the agent looks later.
    """

    def __init__(self, type: str, memory_mb: float, seed: int) -> None:
        self._type = type
        self._memory_mb = memory_mb
        self._random = random.Random(seed)
        self._lanes = _lanes()
        self._held: dict[str, EmulatedModel] = {}
        self._resident: dict[str, EmulatedModel] = {}
        """Those of ``_held`` that are in the device's memory, or being loaded."""
        self._batches: dict[int, _Batch] = {}
        self._pages: dict[int, str] = {}
        """The models of LOADs and UNLOADs, by action."""
        self._due: list[tuple[float, int, Callable[[float], None]]] = []
        """What is to happen, as a heap: (when, count, what)."""
        self._count = 0
        self._clock = 0.0
        """Up to when everything has happened."""
        self._said: list[tuple[Event, list[Part]]] = []

    def start(self) -> None:
        self._say(wire.Started(0))

    def kill(self) -> None:
        self._lanes = _lanes()
        for there in (self._due, self._said, self._held, self._resident, self._batches, self._pages):
            there.clear()
        self._say(Died("the emulated worker was killed"))

    # ---- models ----------------------------------------------------------------------------

    def hold(self, now: float, key: str, spec: PipelineSpec, stage: str, profile: list[tuple[int, float]]) -> None:
        self._play(now)
        try:
            model = EmulatedModel(spec, stage, self._type)
        except Exception as error:
            said = isinstance(error, ValueError)
            if not said:
                log.warning("emulating %s failed", key, exc_info=error)
            self._say(wire.LoadFailed(key, str(error) if said else describe_error(error, f"emulating {key}")))
            return
        full = self._no_room(key, model)
        if full:
            self._say(wire.LoadFailed(key, full, "out_of_memory"))
            return
        self._held[key] = self._resident[key] = model
        largest = spec.stages[stage].max_batch
        sizes = sorted({min(2**power, largest) for power in range(largest.bit_length() + 1)})
        points = [(batch, model.profile.latency(batch)) for batch in sizes]
        held = wire.Held(key, points, model.load_seconds, model.load_seconds, model.memory_mb)
        self._happen(now + model.load_seconds, lambda when: self._say(held))

    def release(self, key: str) -> None:
        self._held.pop(key, None)
        self._resident.pop(key, None)

    def load(self, now: float, action: int, key: str, earliest: float, latest: float) -> None:
        self._play(now)
        self._pages[action] = key
        self._lanes.load(now, action, earliest, latest)
        self._carry_out(now)

    def unload(self, now: float, action: int, key: str, earliest: float, latest: float) -> None:
        self._play(now)
        self._pages[action] = key
        self._lanes.unload(now, action, earliest, latest)
        self._carry_out(now)

    def _page_in(self, now: float, action: int) -> None:
        key = self._pages[action]
        model = self._held.get(key)
        if model is None:
            self._paged(now, wire.Acted(action, "unknown_model", 0, f"the model {key} is not held here"))
            return
        full = self._no_room(key, model)
        if full:
            self._paged(now, wire.Acted(action, "out_of_memory", 0, full))
            return
        self._resident[key] = model
        acted = wire.Acted(action, "ok", round(model.load_seconds * 1e6), at=now)
        self._happen(now + model.load_seconds, lambda when: self._paged(when, acted))

    def _page_out(self, now: float, action: int) -> None:
        self._resident.pop(self._pages[action], None)
        self._paged(now, wire.Acted(action, "ok", 0, at=now))

    def _paged(self, now: float, acted: wire.Acted) -> None:
        del self._pages[acted.action]
        self._lanes.paged(now, acted.action)
        self._say(acted)

    def _taken(self) -> float:
        return sum(model.memory_mb for model in self._resident.values())

    def _no_room(self, key: str, model: EmulatedModel) -> str:
        """Why there is no room for a model; '' where there is."""
        held = self._taken()
        if not self._memory_mb or held + model.memory_mb <= self._memory_mb:
            return ""
        there = f"of this device's {self._memory_mb:g} MB other models hold {held:g}"
        return f"{key} takes {model.memory_mb:g} MB, but {there}"

    # ---- batches ---------------------------------------------------------------------------

    def infer(
        self,
        now: float,
        batch: int,
        key: str,
        earliest: float,
        latest: float,
        tasks: list[list[Node]],
        frames: list[Part],
    ) -> None:
        self._play(now)
        self._batches[batch] = _Batch(batch, key, tasks, frames)
        self._lanes.infer(now, batch, earliest, latest)
        self._carry_out(now)

    def drop(self, now: float, batch: int) -> None:
        self._play(now)
        if self._lanes.drop(now, batch):
            self._end(batch, "cancelled", "the batch was taken back")
        self._carry_out(now)

    def _execute(self, now: float, batch: _Batch) -> None:
        model = self._resident.get(batch.key)
        if model is None:
            self._lanes.executed(now, batch.number)
            self._end(batch.number, "not_loaded", f"the model {batch.key} is not loaded here")
            return
        self._say(wire.Executing(batch.number, now))
        needed = self._taken() + model.memory_mb_per_item * len(batch.tasks)
        if model.memory_mb_per_item and 0.0 < self._memory_mb < needed:
            self._lanes.executed(now, batch.number)
            self._end(batch.number, "out_of_memory", f"the device has {self._memory_mb:g} MB, not {needed:g}")
            return
        seconds = model.profile.latency(len(batch.tasks))
        if model.jitter:
            seconds *= self._random.lognormvariate(0.0, model.jitter)
        finished, frames = _answered(model, batch)
        # What the emulated model took, not what this process was late by: that is no part of a model.
        finished.execution_us = round(seconds * 1e6)

        def end(when: float) -> None:
            del self._batches[batch.number]
            self._lanes.executed(when, batch.number)
            self._said.append((finished, frames))

        self._happen(now + seconds, end)

    def _end(self, batch: int, code: str, detail: str) -> None:
        """A batch ends without having run."""
        del self._batches[batch]
        self._say(wire.Finished(batch, code, 0, detail=detail))

    # ---- time ------------------------------------------------------------------------------

    def _play(self, now: float) -> None:
        """Let happen what was to happen up to ``now``."""
        while self._next_due() <= now:
            due = self._due
            if due and due[0][0] <= self._lanes.next_wake():
                when, _, happen = heappop(due)
                self._clock = max(self._clock, when)
                happen(self._clock)
            else:
                self._clock = max(self._clock, self._lanes.next_wake())
                self._lanes.tick(self._clock)
            self._carry_out(self._clock)
        self._clock = max(self._clock, now)

    def _carry_out(self, now: float) -> None:
        orders = self._lanes.take_orders()
        while orders:
            for order in orders:
                if isinstance(order, Execute):
                    self._execute(now, self._batches[order.batch])
                elif isinstance(order, PageIn):
                    self._page_in(now, order.action)
                elif isinstance(order, PageOut):
                    self._page_out(now, order.action)
                elif isinstance(order, TooLate):
                    self._too_late(order)
            orders = self._lanes.take_orders()

    def _too_late(self, order: TooLate) -> None:
        why = "the window closed before the device was free"
        if order.is_batch:
            self._end(order.number, "too_late", why)
        else:
            del self._pages[order.number]
            self._say(wire.Acted(order.number, "too_late", 0, why))

    def _happen(self, when: float, what: Callable[[float], None]) -> None:
        self._count += 1
        heappush(self._due, (when, self._count, what))

    def _say(self, event: Event) -> None:
        self._said.append((event, []))

    def events(self, now: float) -> list[tuple[Event, list[Part]]]:
        self._play(now)
        said = self._said
        if said:
            self._said = []
        return said

    def _next_due(self) -> float:
        """When something happens next."""
        return min(self._due[0][0], self._lanes.next_wake()) if self._due else self._lanes.next_wake()

    def next_wake(self) -> float:
        return 0.0 if self._said else self._next_due()

    def waitables(self) -> list[Any]:
        return []

    def stop(self) -> None:
        """Nothing that it is at outlasts the agent."""

    def close(self, timeout: float) -> None:
        self._due.clear()


def _lanes() -> Lanes:
    return Lanes(copies=False, overlap_loads=True)


def _answered(model: EmulatedModel, batch: _Batch) -> tuple[wire.Finished, list[Part]]:
    """What a batch is answered, but for the time that it takes."""
    number = batch.number
    if not all(batch.tasks):
        return wire.Finished(number, "bad_input", 0, detail="malformed input: a task without any"), []
    if model.echo:
        return wire.Finished(number, "ok", 0, results=[inputs[0] for inputs in batch.tasks]), batch.frames
    try:
        unpacker = Unpacker(batch.frames)
        answers = [model.answer(_first(unpacker, inputs)) for inputs in batch.tasks]
    except PayloadError as error:
        return wire.Finished(number, "bad_input", 0, detail=f"malformed input: {error}"), []
    return wire.Finished(number, "ok", 0, results=[answer.node for answer in answers]), pack(answers)
