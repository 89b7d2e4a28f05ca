"""What runs a device's batches: a worker process, or the emulation of one inside the agent."""

from __future__ import annotations

from typing import Any, Protocol, Union

import msgspec
import zmq

from laxity.node import Node
from laxity.payload import Part
from laxity.protocol import Message
from nodes import worker_protocol as wire
from nodes.worker_process import WorkerProcess
from pipelines.spec import PipelineSpec


class Died(Message, tag=20):
    """The worker process ended by itself, or was killed."""

    why: str
    suspects: list[int] = msgspec.field(default_factory=list)
    """The batches of which one may have killed it, where that is known."""


Event = Union[wire.FromWorker, Died]  # noqa: UP007


class Runner(Protocol):
    """Carries out what a device's engine says and tells what came of it; never waits."""

    def start(self) -> None:
        """Bring up the worker; ``Started`` follows."""
        ...

    def kill(self) -> None:
        """End the worker at once; ``Died`` follows."""
        ...

    def hold(self, now: float, key: str, spec: PipelineSpec, stage: str, profile: list[tuple[int, float]]) -> None:
        """Hold a model for the first time; ``profile`` is what is known of it already. ``Held`` or ``LoadFailed``
        follows."""
        ...

    def release(self, key: str) -> None:
        """Let go of a model that is held."""
        ...

    def load(self, now: float, action: int, key: str, earliest: float, latest: float) -> None:
        """Page a model in within the window; ``Acted`` follows."""
        ...

    def unload(self, now: float, action: int, key: str, earliest: float, latest: float) -> None:
        """Page a model out within the window; ``Acted`` follows."""
        ...

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
        """Execute a batch within the window; ``Executing``, where it comes to that, and ``Finished`` follow."""
        ...

    def drop(self, now: float, batch: int) -> None:
        """Take back a batch that does not execute yet; ``Finished`` then says ``cancelled``."""
        ...

    def events(self, now: float) -> list[tuple[Event, list[Part]]]:
        """What happened since the last call, each with its payload frames."""
        ...

    def next_wake(self) -> float:
        """When ``events`` has something without any of ``waitables`` becoming readable."""
        ...

    def waitables(self) -> list[Any]:
        """Sockets and file descriptors to poll."""
        ...

    def stop(self) -> None:
        """Ask the worker to end after what it is doing."""
        ...

    def close(self, timeout: float) -> None:
        """Wait for the worker to end, and end it by force after ``timeout`` seconds. Call :meth:`stop` before."""
        ...


class WorkerRunner:
    """A worker process for a real device (see :class:`nodes.device.DeviceConfig`), started again by :meth:`start` after
    it died."""

    def __init__(self, context: zmq.Context[Any], device: str, type: str, threads: int) -> None:
        self._context = context
        self._device = device
        self._type = type
        self._threads = threads
        self._process: WorkerProcess | None = None

    def start(self) -> None:
        self._process = WorkerProcess(self._context, self._device, self._threads)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def hold(self, now: float, key: str, spec: PipelineSpec, stage: str, profile: list[tuple[int, float]]) -> None:
        if self._process is not None:
            self._process.send_hold(key, spec, stage, self._type, profile)

    def release(self, key: str) -> None:
        if self._process is not None:
            self._process.send_release(key)

    def load(self, now: float, action: int, key: str, earliest: float, latest: float) -> None:
        if self._process is not None:
            self._process.send_load(action, key, earliest, latest)

    def unload(self, now: float, action: int, key: str, earliest: float, latest: float) -> None:
        if self._process is not None:
            self._process.send_unload(action, key, earliest, latest)

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
        if self._process is not None:
            self._process.send_infer(batch, key, earliest, latest, tasks, frames)

    def drop(self, now: float, batch: int) -> None:
        if self._process is not None:
            self._process.send_drop(batch)

    def events(self, now: float) -> list[tuple[Event, list[Part]]]:
        process = self._process
        if process is None:
            return []
        # Looked at before the messages: what the process said before it ended counts.
        dead = not process.alive()
        events: list[tuple[Event, list[Part]]] = [*process.recv()]
        if dead:
            why = f"worker process {process.pid}: {process.exit_description()}"
            suspects = process.suspects()
            process.close(0.0)
            self._process = None
            events.append((Died(why, suspects), []))
        return events

    def next_wake(self) -> float:
        return 1e18

    def waitables(self) -> list[Any]:
        return [] if self._process is None else [self._process.socket, self._process.sentinel]

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()

    def close(self, timeout: float) -> None:
        if self._process is not None:
            self._process.close(timeout)
            self._process = None
