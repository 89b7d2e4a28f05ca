"""Emulated devices: they answer after the time that a stage's profile says, without running anything.

They live inside the agent, dozens of them in one process, and are what a cluster is tried on without GPUs.
"""

from __future__ import annotations

import random
from heapq import heappop, heappush
from typing import Any

from laxity.node import Node, PayloadError
from laxity.payload import Part, Payload, Unpacker, as_dict, as_list, pack
from nodes import worker_protocol as wire
from nodes.runner import Died, Event
from pipelines.graph import Graph
from pipelines.profile import LatencyProfile
from pipelines.spec import PipelineSpec

ITEMS = 4
"""How many items an emulated stage answers where a map stage wants a list (option ``items``)."""


class EmulatedModel:
    """One stage as the emulation plays it on a device of a type: how long loading and a batch take, how much memory it
    holds (0: not known), and what shape its answers have.

    Options: ``jitter`` (standard deviation of the logarithm of the execution time, 0 by default) and ``items``.
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
        self.jitter = float(stage_spec.options.get("jitter", 0.0))
        self._items = int(stage_spec.options.get("items", ITEMS))
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


class EmulatedRunner:
    """Plays one device of a type; ``memory_mb`` is 0 where it has room for everything. ``seed`` makes its jitter the
    same in every run."""

    def __init__(self, type: str, memory_mb: float, seed: int) -> None:
        self._type = type
        self._memory_mb = memory_mb
        self._random = random.Random(seed)
        self._models: dict[str, EmulatedModel] = {}
        self._due: list[tuple[float, int, Event, list[Part]]] = []
        """What is to happen, as a heap: (when, count, event, frames)."""
        self._count = 0

    def start(self) -> None:
        self._happen(0.0, wire.Started(0), [])

    def kill(self) -> None:
        self._due.clear()
        self._models.clear()
        self._happen(0.0, Died("the emulated worker was killed"), [])

    def load(self, now: float, key: str, spec: PipelineSpec, stage: str) -> None:
        try:
            model = EmulatedModel(spec, stage, self._type)
            self._check_room(key, model)
        except (KeyError, ValueError) as error:
            self._happen(now, wire.LoadFailed(key, str(error)), [])
            return
        self._models[key] = model
        largest = spec.stages[stage].max_batch
        sizes = sorted({min(2**power, largest) for power in range(largest.bit_length() + 1)})
        profile = [(batch, model.profile.latency(batch)) for batch in sizes]
        self._happen(
            now + model.load_seconds,
            wire.Held(key, profile, model.load_seconds, model.load_seconds, model.memory_mb),
            [],
        )

    def _check_room(self, key: str, model: EmulatedModel) -> None:
        held = sum(other.memory_mb for other in self._models.values())
        if self._memory_mb and held + model.memory_mb > self._memory_mb:
            raise ValueError(
                f"{key} takes {model.memory_mb:g} MB, but of this device's {self._memory_mb:g} MB other models hold "
                f"{held:g}; place fewer of them on it, or mend memory_mb in the profile"
            )

    def unload(self, key: str) -> None:
        self._models.pop(key, None)

    def infer(self, now: float, batch: int, key: str, tasks: list[list[Node]], frames: list[Part]) -> None:
        model = self._models.get(key)
        if model is None:
            finished = wire.Finished(batch, "unknown_model", 0, detail=f"the model {key} is not loaded here")
            self._happen(now, finished, [])
            return
        seconds = model.profile.latency(len(tasks))
        if model.jitter:
            seconds *= self._random.lognormvariate(0.0, model.jitter)
        if model.echo:
            finished = wire.Finished(batch, "ok", 0, results=[inputs[0] for inputs in tasks])
        else:
            try:
                unpacker = Unpacker(frames)
                answers = [model.answer(_first(unpacker, inputs)) for inputs in tasks]
            except PayloadError as error:
                finished = wire.Finished(batch, "model_error", 0, detail=f"malformed input: {error}")
                frames = []
            else:
                finished = wire.Finished(batch, "ok", 0, results=[answer.node for answer in answers])
                frames = pack(answers)
        # What the emulated model took, not what this process was late by: that is no part of a model.
        finished.execution_us = round(seconds * 1e6)
        self._happen(now + seconds, finished, frames)

    def _happen(self, when: float, event: Event, frames: list[Part]) -> None:
        self._count += 1
        heappush(self._due, (when, self._count, event, frames))

    def events(self, now: float) -> list[tuple[Event, list[Part]]]:
        events: list[tuple[Event, list[Part]]] = []
        due = self._due
        while due and due[0][0] <= now:
            _, _, event, frames = heappop(due)
            events.append((event, frames))
        return events

    def next_wake(self) -> float:
        return self._due[0][0] if self._due else 1e18

    def waitables(self) -> list[Any]:
        return []

    def close(self, timeout: float) -> None:
        self._due.clear()
