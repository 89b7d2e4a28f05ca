"""A model as a worker holds it: values in, nodes and parts out; and how it is brought there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from laxity import payload
from laxity.node import Node, PayloadError
from laxity.payload import Part, Payload, Unpacker
from laxity.protocol import Failure
from nodes import worker_protocol as wire
from nodes.executors.base import Executor, ItemError, MissingExtra
from nodes.executors.build import build_executor
from nodes.executors.errors import describe_error, error_code
from nodes.executors.garbage import settle
from nodes.profiling import measure_profile, stated_profile, warm_up_sizes
from nodes.worker_output import note_work
from pipelines.models import ModelNotFoundError
from pipelines.spec import PipelineSpec, StageSpec
from pipelines.usercode import UserCodeError, load_object

log = logging.getLogger(__name__)

RELOAD_UP_TO = 2.0
"""Loading that took so many seconds is measured a second time, after a first batch: the first one often pays for a
library's or a device's own start, and such a model would look far too slow to be paged in; and what loading does may
depend on what has run, as with CUDA graphs."""


class Work:
    """A batch on its way through a model."""

    __slots__ = ("answers", "good", "prepared")

    def __init__(self, values: list[Any]) -> None:
        self.answers = values
        """One an element: its input, or an :class:`ItemError`; in the end its answer."""
        self.good = [index for index, value in enumerate(values) if not isinstance(value, ItemError)]
        """The elements that the executor has."""
        self.prepared: Any = None


class HeldModel:
    """A model of this worker. ``loaded`` and ``users`` (how many batches are under way) belong to the worker's lock."""

    def __init__(self, key: str, executor: Executor, stage: StageSpec) -> None:
        self.key = key
        self.executor = executor
        self.stage = stage
        self.loaded = False
        self.users = 0
        self._names = list(stage.named_inputs())

    # ---- a batch, in the three lanes' threads ----------------------------------------------

    def decode(self, tasks: list[list[Node]], frames: Sequence[Part]) -> list[Any]:
        """The stage's input for each task, or an :class:`ItemError` where its bytes are no value. Raises PayloadError
        where the frames do not hold these tasks."""
        unpacker = Unpacker(frames)
        values: list[Any] = []
        for nodes in tasks:
            if len(nodes) != len(self._names):
                raise PayloadError(f"a task with {len(nodes)} inputs for a stage with {len(self._names)}")
            payloads = [unpacker.take(node) for node in nodes]
            try:
                decoded = [payload.decode(each) for each in payloads]
            except PayloadError as error:
                values.append(ItemError(f"the input is no value: {error}"))
                continue
            values.append(decoded[0] if len(decoded) == 1 else dict(zip(self._names, decoded, strict=True)))
        unpacker.finish()
        return values

    def inputs(self, values: list[Any]) -> Work:
        note_work(self.key)
        work = Work(values)
        if work.good:
            work.prepared = self.executor.inputs([values[index] for index in work.good])
        return work

    def execute(self, work: Work) -> None:
        if work.good:
            note_work(self.key)
            self.executor.execute(work.prepared)

    def outputs(self, work: Work) -> tuple[list[Node], list[Payload], list[Failure]]:
        """One node for each value (None where it failed), the payloads with their parts, and the failures."""
        note_work(self.key)
        answers = work.answers
        if work.good:
            outputs = self.executor.outputs(work.prepared)
            for index, output in zip(work.good, outputs, strict=True):
                answers[index] = output
        nodes: list[Node] = [None] * len(answers)
        payloads: list[Payload] = []
        failures: list[Failure] = []
        for index, answer in enumerate(answers):
            if isinstance(answer, ItemError):
                failures.append(Failure(index, answer.detail))
                continue
            try:
                encoded = payload.encode(answer)
            except PayloadError as error:
                failures.append(Failure(index, f"the stage's answer cannot be sent: {error}"))
                continue
            nodes[index] = encoded.node
            payloads.append(encoded)
        return nodes, payloads, failures

    # ---- its memory, in the weights lane's thread ------------------------------------------

    def load(self) -> None:
        note_work(self.key)
        try:
            self.executor.load()
        except BaseException:
            # What is on the device already is of no use to anybody.
            self._let_go(self.executor.unload)
            raise

    def release(self) -> None:
        """Let go of it on the device and on the host, whatever it raises at that."""
        if self.loaded:
            self.loaded = False
            self._let_go(self.executor.unload)
        self._let_go(self.executor.release)

    def _let_go(self, step: Callable[[], None]) -> None:
        try:
            step()
        except BaseException as error:
            log.warning("%s", describe_error(error, f"unloading {self.key}"))


Run = Callable[[HeldModel, list[Any]], tuple[float, list[Failure]]]
"""Takes a batch of values through a loaded model by way of the lanes: (seconds from the start of its execution until
its answers were there, failures)."""


class ModelHolder:
    """Brings models into a worker for ``device`` ('cpu' or 'cuda'); ``say`` tells the agent how far it is."""

    def __init__(self, device: str, run: Run, say: Callable[[wire.FromWorker], None]) -> None:
        self._device = device
        self._run = run
        self._say = say
        self._released = False

    def release(self, model: HeldModel) -> None:
        """Let go of a model. Cycles that it leaves are collected when the next one is held, for nothing runs then."""
        model.release()
        self._released = True

    def hold(self, message: wire.Hold) -> tuple[HeldModel | None, wire.Held | wire.LoadFailed]:
        """Hold, load, warm up and profile a model; None where that failed."""
        key = message.key
        note_work(key)
        begun = time.perf_counter()
        model: HeldModel | None = None
        try:
            spec = msgspec.json.decode(message.spec, type=PipelineSpec)
            self._say(wire.Progress(key, "loading"))
            stage = spec.stages[message.stage]
            model = HeldModel(key, build_executor(spec, message.stage, self._device), stage)
            model.executor.hold()
            settle(thorough=self._released)
            self._released = False
            load_seconds = self._timed_load(model)
            run = self._sample_run(model, spec)
            if run is not None:
                run(1)
            if load_seconds < RELOAD_UP_TO:
                model.loaded = False
                model.executor.unload()
                load_seconds = self._timed_load(model)
            profile = self._profile(message, stage, spec, run)
            held = wire.Held(key, profile, time.perf_counter() - begun, load_seconds, model.executor.memory_mb())
            return model, held
        except BaseException as error:
            said = isinstance(error, (MissingExtra, ModelNotFoundError, UserCodeError))
            if not said:
                log.warning("loading %s failed", key, exc_info=error)
            detail = str(error) if said else describe_error(error, f"loading {key}")
            failed = wire.LoadFailed(key, detail, error_code(error))
        if model is not None:
            self.release(model)
        return None, failed

    def _timed_load(self, model: HeldModel) -> float:
        begun = time.perf_counter()
        model.load()
        model.loaded = True
        return time.perf_counter() - begun

    def _sample_run(self, model: HeldModel, spec: PipelineSpec) -> Callable[[int], float] | None:
        """Runs a batch of so many samples, and returns the seconds; None where the stage has no sample."""
        stage = model.stage
        if stage.sample is None:
            return None
        # By way of the wire's form, so that the stage's code meets what it will meet when it serves.
        sample = payload.decode(payload.encode(load_object(stage.sample, spec.root)()))

        def run(size: int) -> float:
            try:
                seconds, failures = self._run(model, [sample] * size)
            except BaseException as error:
                raise RuntimeError(
                    f"a batch of {size} of {stage.sample}'s samples (max_batch is {stage.max_batch}) "
                    f"failed with {type(error).__name__}: {error}"
                ) from error
            if failures:
                raise ValueError(f"the sample of {stage.sample} fails: {failures[0].detail}")
            return seconds

        return run

    def _profile(
        self, message: wire.Hold, stage: StageSpec, spec: PipelineSpec, run: Callable[[int], float] | None
    ) -> list[tuple[int, float]]:
        known = message.profile
        if run is None:
            return known or stated_profile(stage, message.device_type)
        if known:
            for size in warm_up_sizes(known):
                self._say(wire.Progress(message.key, f"warming up batch {size}"))
                run(size)
            return known
        return measure_profile(
            run,
            max_batch=stage.max_batch,
            longest=spec.slo / 2,
            clock=time.perf_counter,
            progress=lambda size: self._say(wire.Progress(message.key, f"profiling batch {size}")),
        )
