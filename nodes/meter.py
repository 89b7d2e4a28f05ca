"""Measures stages on a device of this host, by the way that batches take when the stage serves: a worker process, and
its lanes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import msgspec
import zmq

from laxity import payload
from laxity.node import Node
from nodes import worker_protocol as wire
from nodes.device import DeviceConfig
from nodes.executors.errors import describe_error
from nodes.profiling import batch_sizes, measure_batch
from nodes.worker_process import WorkerProcess
from pipelines.fit import LinearFit, fit_line
from pipelines.spec import PipelineSpec, StageSpec
from pipelines.usercode import UserCodeError, load_object

PATIENCE = 3600.0
"""Seconds within which a batch begins; nothing else runs on the device."""
STOP_TIMEOUT = 5.0
"""Seconds that a worker has to let go of its models."""


class MeasureError(Exception):
    """A stage cannot be measured; the text says why."""


class BatchTimes(msgspec.Struct, frozen=True):
    """What runs of one batch size took, in seconds, run by run: ``latency`` from the start of the execution until the
    answers are there (what profiles mean), and before it ``inputs``, until they were on the device."""

    batch: int
    latency: list[float]
    inputs: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.latency)

    @property
    def p99(self) -> float:
        """The 99th percentile, by nearest rank: the worst of up to 100 runs."""
        return sorted(self.latency)[math.ceil(0.99 * len(self.latency)) - 1]

    @property
    def worst(self) -> float:
        return max(self.latency)

    @property
    def inputs_median(self) -> float:
        return statistics.median(self.inputs)

    @property
    def throughput(self) -> float:
        """Elements per second at the median latency."""
        return self.batch / self.median if self.median else math.inf


class StageTimes(msgspec.Struct, frozen=True):
    """A stage on a device: what loading takes in seconds, the memory in MB (0 where nobody knows) with the largest
    batch, and the batches by size."""

    stage: str
    device_type: str
    load_seconds: float
    memory_mb: float
    batches: list[BatchTimes]

    def fit(self) -> LinearFit:
        """The line nearest to the medians."""
        return fit_line([(each.batch, each.median) for each in self.batches])


class DeviceMeter:
    """The worker of one real device, for as long as the ``with`` block lasts."""

    def __init__(self, device: DeviceConfig) -> None:
        self._device = device
        self._context: zmq.Context[Any] = zmq.Context()
        self._process = WorkerProcess(self._context, device.kind, device.threads)
        self._batch = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._process.stop()
        else:
            self._process.kill()
        self._process.close(STOP_TIMEOUT)
        self._context.destroy(linger=0)

    def measure(
        self,
        spec: PipelineSpec,
        stage: str,
        *,
        sizes: Sequence[int] = (),
        repeats: int,
        seconds: float,
        progress: Callable[[str], None],
    ) -> StageTimes:
        """Load a stage, run batches of its sample, and let go of it again.

        ``sizes``: the batch sizes, ascending; by default 1, 2, 4, ... and ``max_batch``, up to the first one that takes
        more than half of the SLO, which no scheduler would want. Each runs ``repeats`` times, or fewer within
        ``seconds``. ``progress`` hears what is being done. Raises :class:`MeasureError` where the model cannot be
        loaded, or does not take its sample.
        """
        what = spec.stages[stage]
        if what.sample is None:
            raise MeasureError(f"the stage {stage!r} has no sample to run")
        inputs = _inputs(what, _sample(what.sample, spec.root))
        chosen = list(sizes) or batch_sizes(what.max_batch)
        held = self._hold(spec, stage, chosen, progress)
        times: list[BatchTimes] = []
        for size in chosen:
            progress(f"batch {size}")
            fed: list[float] = []

            def run(size: int = size, fed: list[float] = fed) -> float:
                finished = self._infer(held.key, [[each.node for each in inputs]] * size, payload.pack(inputs * size))
                fed.append(finished.input_us / 1e6)
                return (finished.execution_us + finished.output_us) / 1e6

            latency = measure_batch(run, repeats=repeats, ends=time.monotonic() + seconds, clock=time.monotonic)
            times.append(BatchTimes(size, latency, fed[-len(latency) :]))
            if not sizes and times[-1].median > spec.slo / 2:
                break
        self._process.send_release(held.key)
        return StageTimes(stage, self._device.type, held.load_seconds, held.memory_mb, times)

    def _hold(self, spec: PipelineSpec, stage: str, sizes: Sequence[int], progress: Callable[[str], None]) -> wire.Held:
        if not self._process.started:
            self._wait(wire.Started, progress)
        # Told that these sizes take no time the worker measures nothing, and warms up with the least and the largest:
        # the memory that it reports is what the largest batch takes.
        told = [(size, 0.0) for size in sizes]
        self._process.send_hold(spec.model_key(stage), spec, stage, self._device.type, told)
        held: wire.Held = self._wait(wire.Held, progress)
        return held

    def _infer(self, key: str, tasks: list[list[Node]], frames: list[payload.Part]) -> wire.Finished:
        self._batch += 1
        now = time.monotonic()
        self._process.send_infer(self._batch, key, now, now + PATIENCE, tasks, frames)
        finished: wire.Finished = self._wait(wire.Finished, lambda _: None)
        if finished.code != "ok":
            raise MeasureError(f"a batch of {len(tasks)} ended with {finished.code}: {finished.detail}")
        if finished.failures:
            raise MeasureError(f"the sample fails: {finished.failures[0].detail}")
        return finished

    def _wait(self, kind: type[Any], progress: Callable[[str], None]) -> Any:
        """The next message of a kind; what comes before it is told, or raised."""
        poller = zmq.Poller()
        poller.register(self._process.socket, zmq.POLLIN)
        poller.register(self._process.sentinel, zmq.POLLIN)
        while True:
            # Looked at before the messages: what the process said before it ended counts.
            dead = not self._process.alive()
            for message, _ in self._process.recv():
                if isinstance(message, kind):
                    return message
                if isinstance(message, wire.Progress):
                    progress(message.text)
                elif isinstance(message, wire.LoadFailed):
                    raise MeasureError(message.detail)
            if dead:
                raise MeasureError(f"the worker process ended: {self._process.exit_description()}")
            poller.poll()


def _sample(reference: str, root: str) -> Any:
    try:
        return load_object(reference, root)()
    except UserCodeError as error:
        raise MeasureError(str(error)) from error
    except (Exception, SystemExit) as error:
        raise MeasureError(describe_error(error, f"sample {reference}")) from error


def _inputs(stage: StageSpec, sample: Any) -> list[payload.Payload]:
    """The payload of each of a stage's inputs."""
    names = list(stage.named_inputs())
    if len(names) == 1:
        return [payload.encode(sample)]
    if not isinstance(sample, dict) or set(sample) != set(names):
        raise MeasureError(f"{stage.sample} must return a dict with {', '.join(map(repr, names))}: the stage's inputs")
    return [payload.encode(sample[name]) for name in names]
