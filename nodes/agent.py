"""The agent of one host: a socket to its shard, a clock, and the devices' engines.

One thread polls the shard's socket and the workers, and does what the engines say. The store, signals and
so on live in other threads and hand their wishes over with :meth:`Agent.call`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
import zmq

from laxity import protocol
from laxity.link import HEARTBEAT_BOUNDS
from laxity.loop import Calls, wait
from laxity.payload import Part
from laxity.protocol import Done, Goodbye, Grant, Heartbeat, Ready, Welcome
from nodes.device import Device
from nodes.emulated import EmulatedRunner
from nodes.engine.device import READY
from nodes.runner import WorkerRunner
from pipelines.spec import PipelineSpec

log = logging.getLogger("laxity.node")

BULK: Final = 65_536
"""Frames from this many bytes on are sent without copying them."""
STOP_WAIT: Final = 5.0
"""Seconds that a worker has to end by itself when the agent stops."""

Placement = dict[int, dict[str, tuple[PipelineSpec, str]]]
"""By device number: (spec, stage) by the model key that the device is to hold."""


class DeviceConfig(msgspec.Struct, frozen=True):
    """A device: ``kind`` is 'cpu', 'cuda:N' or 'emulated'; ``type`` what its profiles are keyed by."""

    kind: str
    type: str
    threads: int = 1
    """Threads that numerical libraries in its worker may use."""


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How an agent is set up."""

    name: str
    devices: list[DeviceConfig]
    heartbeat: float = 1.0
    """Seconds between heartbeats until the shard's WELCOME says another number."""
    seed: int = 0
    """Of the emulated devices' jitter."""


class DeviceState(msgspec.Struct, frozen=True):
    """A device as people see it: the state of each model ('ready', 'failed: why', ...)."""

    number: int
    type: str
    models: dict[str, str]
    progress: str
    batches: int
    late: int
    worker_restarts: int


class VersionRefused(Exception):
    """The shard speaks another version of the protocol; trying again is no use."""


class Agent:
    """``run`` serves until ``stop``. ``changed`` is called (in the agent's thread) with the devices' states whenever
    one of them changed."""

    def __init__(self, config: AgentConfig, changed: Callable[[list[DeviceState]], None]) -> None:
        self.config = config
        self._context: zmq.Context[Any] = zmq.Context()
        self._changed_hook = changed
        self._socket: zmq.Socket[bytes] | None = None
        self._backend = ""
        self._heartbeat = config.heartbeat
        self._heard_at = 0.0
        self._said_at = 0.0
        self._welcomed = False
        self._ready_due = False
        """READY is to be said as soon as the connection stands (IMMEDIATE: the socket is writable then)."""
        self._dirty = False
        self._calls = Calls()
        self._stopping = False
        self._poller = zmq.Poller()
        self._polled: list[tuple[Any, int]] = []
        self._devices = [
            Device(number, device.type, self._runner(number, device), self._send, self._mark_changed)
            for number, device in enumerate(config.devices)
        ]

    def _runner(self, number: int, device: DeviceConfig) -> EmulatedRunner | WorkerRunner:
        if device.kind == "emulated":
            return EmulatedRunner(self.config.seed * 1_000_003 + number)
        return WorkerRunner(self._context, device.kind, device.threads)

    # ---- from other threads --------------------------------------------------------------------

    def call(self, function: Callable[[], None]) -> None:
        """Have ``function`` run in the agent's thread, soon; nothing once :meth:`run` has ended."""
        self._calls.add(function)

    def connect(self, backend: str) -> None:
        """Work for the shard at this address from now on ('' for none)."""

        def connect() -> None:
            if backend != self._backend:
                self._backend = backend
                self._reconnect(time.monotonic())

        self.call(connect)

    def place(self, placement: Placement) -> None:
        """Hold these models; devices that are not named hold none."""

        def place() -> None:
            now = time.monotonic()
            for device in self._devices:
                device.place(now, placement.get(device.number, {}))
            self._mark_changed()

        self.call(place)

    def stop(self) -> None:
        """Say goodbye, end the workers and leave :meth:`run`."""

        def stop() -> None:
            self._stopping = True

        self.call(stop)

    # ---- the agent's thread ----------------------------------------------------------------------

    def run(self) -> None:
        """Serve until :meth:`stop`. Raises :class:`VersionRefused`."""
        try:
            self._serve()
        finally:
            self._calls.close()
            if self._socket is not None:
                if self._welcomed:
                    self._send(Goodbye(reason=f"agent {self.config.name} is shutting down"), [])
                self._socket.close(200)
            for device in self._devices:
                device.runner.close(STOP_WAIT)
            self._context.term()

    def _serve(self) -> None:
        clock = time.monotonic
        while not self._stopping:
            self._wait(clock)
            self._calls.run()
            self._receive(clock)
            now = clock()
            for device in self._devices:
                if device.runner.waitables() or device.next_wake() <= now:
                    device.step(now)
            if self._dirty:
                self._dirty = False
                self._announce()
            self._keep_alive(clock())

    def _wait(self, clock: Callable[[], float]) -> None:
        wake = self._said_at + self._heartbeat if self._socket is not None else clock() + self._heartbeat
        for device in self._devices:
            wake = min(wake, device.next_wake())
        seconds = wake - clock()
        poller = self._poller_now()
        if any(source == self._calls.fd for source, _ in wait(poller, seconds)):
            self._calls.clear_wakeups()

    def _poller_now(self) -> zmq.Poller:
        """What is to be polled at present; made anew only when that changes."""
        wanted: list[tuple[Any, int]] = [(self._calls.fd, zmq.POLLIN)]
        if self._socket is not None:
            wanted.append((self._socket, zmq.POLLIN | zmq.POLLOUT if self._ready_due else zmq.POLLIN))
        for device in self._devices:
            wanted += [(waitable, zmq.POLLIN) for waitable in device.runner.waitables()]
        if wanted != self._polled:
            self._polled = wanted
            self._poller = zmq.Poller()
            for waitable, events in wanted:
                self._poller.register(waitable, events)
        return self._poller

    def _receive(self, clock: Callable[[], float]) -> None:
        socket = self._socket
        while socket is not None and socket is self._socket:
            try:
                frames: list[Any] = socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            now = clock()
            self._heard_at = now
            try:
                message = protocol.decode_to_agent(frames[0].buffer)
            except protocol.ProtocolError as error:
                log.warning("malformed message from the shard: %s", error)
                continue
            self._message(now, message, frames)

    def _message(self, now: float, message: protocol.ToAgent, frames: list[Part]) -> None:
        if isinstance(message, Grant):
            if 0 <= message.device < len(self._devices):
                self._devices[message.device].grant(now, message, frames[1:])
            else:
                log.warning("the shard granted a batch to device %d, which is not here", message.device)
        elif isinstance(message, Welcome):
            if message.version != protocol.VERSION:
                raise VersionRefused(
                    f"the shard at {self._backend} speaks protocol version {message.version}, this agent "
                    f"{protocol.VERSION}: upgrade the older of the two"
                )
            shortest, longest = HEARTBEAT_BOUNDS
            self._heartbeat = min(max(message.heartbeat_us * 1e-6, shortest), longest)
            if not self._welcomed:
                self._welcomed = True
                self._dirty = True  # what changed since READY was said has to be said as well
                log.info("connected to shard %s", message.shard)
                for device in self._devices:
                    device.session(now, True)
        elif isinstance(message, Goodbye):
            if not message.retry:
                raise VersionRefused(f"the shard at {self._backend} refused this agent: {message.reason}")
            log.warning("the shard said goodbye: %s", message.reason)
            self._end_session(now)
            self._say_ready()

    def _keep_alive(self, now: float) -> None:
        if self._ready_due:
            self._say_ready()
        if self._socket is None or now < self._said_at + self._heartbeat:
            return
        if now > self._heard_at + 4 * self._heartbeat:
            log.warning("the shard at %s is silent: connecting anew", self._backend)
            self._reconnect(now)
        elif self._welcomed:
            self._send(Heartbeat(round(now * 1e6)), [])
        else:
            self._say_ready()

    # ---- the connection ----------------------------------------------------------------------------

    def _reconnect(self, now: float) -> None:
        if self._socket is not None:
            self._socket.close(0)
            self._socket = None
        self._end_session(now)
        self._heard_at = self._said_at = now
        if not self._backend:
            return
        socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        socket.set(zmq.LINGER, 200)
        socket.set(zmq.IMMEDIATE, 1)
        socket.set(zmq.SNDHWM, 10_000)
        socket.set(zmq.RCVHWM, 10_000)
        socket.set(zmq.RECONNECT_IVL, 50)
        socket.set(zmq.RECONNECT_IVL_MAX, 1000)
        socket.set(zmq.TCP_KEEPALIVE, 1)
        socket.connect(self._backend)
        self._socket = socket
        self._ready_due = True

    def _end_session(self, now: float) -> None:
        if self._welcomed:
            self._welcomed = False
            for device in self._devices:
                device.session(now, False)

    def _say_ready(self) -> None:
        reports = [device.report() for device in self._devices]
        self._ready_due = not self._send(Ready(protocol.VERSION, self.config.name, reports), [])

    def _send(self, message: protocol.FromAgent, frames: list[Part]) -> bool:
        """Send to the shard without waiting; whether it could be sent."""
        socket = self._socket
        self._said_at = time.monotonic()
        if socket is None:
            return False
        header = protocol.encode(message)
        if len(header) > protocol.MAX_HEADER and isinstance(message, Done):
            why = protocol.too_structured("answer", len(header))
            header = protocol.encode(Done(message.device, message.batch, "model_error", detail=why))
            frames = []
        try:
            if not frames:
                socket.send(header, zmq.NOBLOCK)
                return True
            socket.send(header, zmq.NOBLOCK | zmq.SNDMORE)
            last = len(frames) - 1
            for index, frame in enumerate(frames):
                socket.send(frame, zmq.SNDMORE if index < last else 0, copy=len(frame) < BULK)
        except zmq.Again:
            # No connection (IMMEDIATE) or a shard that does not read. What it does not hear of it takes
            # for lost with this agent's silence; a READY or a heartbeat is said again.
            log.debug("the shard does not take a %s", type(message).__name__)
            return False
        return True

    # ---- what is held ------------------------------------------------------------------------------

    def _mark_changed(self) -> None:
        self._dirty = True

    def _announce(self) -> None:
        if self._welcomed:
            self._say_ready()
        self._changed_hook(self.states())

    def states(self) -> list[DeviceState]:
        """The devices as they are (in the agent's thread)."""
        return [
            DeviceState(
                number=device.number,
                type=device.type,
                models={
                    model.key: model.state
                    if not model.detail or model.state == READY
                    else f"{model.state}: {model.detail}"
                    for model in device.engine.models.values()
                },
                progress=device.progress,
                batches=device.batches_run,
                late=device.engine.late,
                worker_restarts=device.engine.restarts,
            )
            for device in self._devices
        ]
