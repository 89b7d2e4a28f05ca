"""The worker process of one device, started as ``python -P -m nodes.worker`` (see ``--help``).

It loads models, profiles them and runs one batch at a time, as its agent tells it over a PAIR socket
(:mod:`nodes.worker_protocol`). It decides nothing: what runs, and when, is the agent's business. It ends when
it is told to, and whenever its agent dies.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq

from laxity import payload
from laxity.node import Node, PayloadError
from laxity.payload import Part, Payload, Unpacker
from laxity.protocol import Failure
from nodes import worker_protocol as wire
from nodes.executors.base import Executor, ItemError, MissingExtra
from nodes.executors.build import build_executor
from nodes.executors.errors import describe_error
from nodes.profiling import measure_profile, stated_profile
from pipelines.models import ModelNotFoundError
from pipelines.spec import PipelineSpec, StageSpec
from pipelines.usercode import UserCodeError, load_object

log = logging.getLogger(__name__)

PARENT_CHECK_MS = 1000
_PR_SET_PDEATHSIG = 1


class Worker:
    """The models of one device, and what is asked of them; ``send`` takes a message and its frames."""

    def __init__(self, device: str, send: Callable[[wire.FromWorker, Sequence[Part]], None]) -> None:
        self._device = device
        self._send = send
        self._models: dict[str, _Model] = {}

    def handle(self, message: wire.Load | wire.Unload | wire.Infer, frames: Sequence[Part]) -> None:
        if isinstance(message, wire.Infer):
            self._send(*self._infer(message, frames))
        elif isinstance(message, wire.Load):
            self._send(self._load(message), ())
        else:
            self._unload(message.key)

    def unload_all(self) -> None:
        for key in list(self._models):
            self._unload(key)

    def _load(self, message: wire.Load) -> wire.Loaded | wire.LoadFailed:
        key = message.key
        begun = time.perf_counter()
        try:
            spec = msgspec.json.decode(message.spec, type=PipelineSpec)
            self._unload(key)
            self._progress(key, "loading")
            model = _Model(build_executor(spec, message.stage, self._device), spec.stages[message.stage])
            model.executor.load()
            profile = self._profile(message, model, spec)
        except (MissingExtra, ModelNotFoundError, UserCodeError) as error:
            return wire.LoadFailed(key, str(error))
        except (Exception, SystemExit) as error:
            log.warning("loading %s failed", key, exc_info=error)
            return wire.LoadFailed(key, describe_error(error, f"loading {key}"))
        self._models[key] = model
        return wire.Loaded(key, profile, time.perf_counter() - begun)

    def _profile(self, load: wire.Load, model: _Model, spec: PipelineSpec) -> list[tuple[int, float]]:
        stage = model.stage
        if stage.sample is None:
            return stated_profile(stage, load.device_type)
        # By way of the wire's form, so that the stage's code meets what it will meet when it serves.
        sample = payload.decode(payload.encode(load_object(stage.sample, spec.root)()))

        def run(size: int) -> None:
            try:
                failures = model.run([sample] * size)[2]
            except Exception as error:
                raise RuntimeError(
                    f"a batch of {size} of {stage.sample}'s samples (max_batch is {stage.max_batch}) "
                    f"failed with {type(error).__name__}: {error}"
                ) from error
            if failures:
                raise ValueError(f"the sample of {stage.sample} fails: {failures[0].detail}")

        return measure_profile(
            run,
            max_batch=stage.max_batch,
            longest=spec.slo / 2,
            clock=time.perf_counter,
            progress=lambda size: self._progress(load.key, f"profiling batch {size}"),
        )

    def _progress(self, key: str, text: str) -> None:
        self._send(wire.Progress(key, text), ())

    def _unload(self, key: str) -> None:
        model = self._models.pop(key, None)
        if model is not None:
            model.executor.unload()

    def _infer(self, message: wire.Infer, frames: Sequence[Part]) -> tuple[wire.Finished, list[Part]]:
        begun = time.perf_counter_ns()
        model = self._models.get(message.key)
        if model is None:
            detail = f"{message.key} is not loaded in this worker"
            return wire.Finished(message.batch, "unknown_model", 0, detail=detail), []
        try:
            results, parts, failures = model.run(model.inputs(message.tasks, frames))
        except (Exception, SystemExit) as error:
            log.warning("a batch of %d of %s failed", len(message.tasks), message.key, exc_info=error)
            detail = describe_error(error, f"model of {message.key}")
            return wire.Finished(message.batch, "model_error", _us_since(begun), detail=detail), []
        return wire.Finished(message.batch, "ok", _us_since(begun), results, failures), payload.pack(parts)


class _Model:
    """A loaded model: values in, nodes and parts out."""

    def __init__(self, executor: Executor, stage: StageSpec) -> None:
        self.executor = executor
        self.stage = stage
        self._names = list(stage.named_inputs())

    def inputs(self, tasks: list[list[Node]], frames: Sequence[Part]) -> list[Any]:
        """The stage's input for each task, or an :class:`ItemError` where its bytes are no value."""
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

    def run(self, values: list[Any]) -> tuple[list[Node], list[Payload], list[Failure]]:
        """One node for each value (None where it failed), the payloads with their parts, and the failures."""
        good = [index for index, value in enumerate(values) if not isinstance(value, ItemError)]
        answers = list(values)
        if good:
            outputs = self.executor.infer([values[index] for index in good])
            for index, output in zip(good, outputs, strict=True):
                answers[index] = output
        nodes: list[Node] = [None] * len(values)
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


def serve(address: str, device: str, parent: int) -> None:
    """Talk to the agent at ``address`` until it says Stop or process ``parent`` is gone."""
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(address)

    def send(message: wire.FromWorker, frames: Sequence[Part]) -> None:
        socket.send_multipart([wire.encode(message), *frames], copy=False)

    worker = Worker(device, send)
    send(wire.Started(os.getpid()), ())
    while os.getppid() == parent:
        if not socket.poll(PARENT_CHECK_MS):
            continue
        header, *frames = socket.recv_multipart(copy=False)
        message = wire.decode_to_worker(header.buffer)
        if isinstance(message, wire.Stop):
            break
        worker.handle(message, frames)
    worker.unload_all()
    context.destroy(linger=0)


def _us_since(begun_ns: int) -> int:
    return (time.perf_counter_ns() - begun_ns) // 1000


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="nodes.worker", description="The worker process of one device.")
    parser.add_argument("--connect", required=True, metavar="ADDRESS")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--parent", type=int, required=True, metavar="PID")
    options = parser.parse_args(arguments)
    # A Ctrl-C in the terminal reaches the whole process group; the agent decides what becomes of its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    logging.basicConfig(level=logging.WARNING, format=f"%(levelname)s worker {os.getpid()}: %(message)s")
    serve(options.connect, options.device, options.parent)


if __name__ == "__main__":
    main()
