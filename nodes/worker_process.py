"""A worker process as its agent holds it: started, talked to, and ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
import zmq

from laxity.node import Node
from laxity.payload import Part
from nodes import worker_protocol as wire
from nodes.under_way import UnderWay
from nodes.worker_output import log_output
from pipelines.spec import PipelineSpec

_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "OPENCV_FOR_THREADS_NUM",
)


class WorkerProcess:
    """One device's worker. No threads and no policy: the owner polls ``socket`` and ``sentinel``, and calls.

    ``device`` is 'cpu' or 'cuda:N'; ``threads`` is how many threads numerical libraries in it may use. Create
    it in a thread that lives as long as the agent: the kernel kills the worker when that thread ends.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], device: str, threads: int) -> None:
        self.device = device
        self.started = False
        """Whether the worker has said that it is there; nothing may be sent before."""
        kind, _, number = device.partition(":")
        self._directory = tempfile.mkdtemp(prefix="laxity-worker-")
        self.socket = context.socket(zmq.PAIR)
        """Readable when :meth:`recv` has something."""
        self.socket.setsockopt(zmq.LINGER, 0)
        address = f"ipc://{self._directory}/agent"
        self.socket.bind(address)
        lanes = Path(self._directory, "lanes")
        self._under_way = UnderWay.create(lanes)
        environment = os.environ | dict.fromkeys(_THREADS, str(threads))
        # CUDA counts the fastest device first unless it is told otherwise; everybody else counts as the bus does.
        environment |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": number}
        # -P: the working directory must not shadow modules; a pipeline's own code comes last on the path.
        command = [sys.executable, "-P", "-m", "nodes.worker", "--connect", address]
        command += ["--under-way", str(lanes), "--device", kind, "--parent", str(os.getpid())]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        log_output(self._process.stdout, self.pid, device)
        self.sentinel = os.pidfd_open(self.pid)
        """A file descriptor that becomes readable when the process has ended."""

    def send_hold(
        self, key: str, spec: PipelineSpec, stage: str, device_type: str, profile: Sequence[tuple[int, float]] = ()
    ) -> None:
        """Answered by Held or LoadFailed; send no batch before. With ``profile``, nothing is measured."""
        self._send(wire.Hold(key, stage, msgspec.json.encode(spec), device_type, list(profile)))

    def send_release(self, key: str) -> None:
        self._send(wire.Release(key))

    def send_load(self, action: int, key: str, earliest: float, latest: float) -> None:
        """Answered by Acted, as is :meth:`send_unload`."""
        self._send(wire.Load(action, key, earliest, latest))

    def send_unload(self, action: int, key: str, earliest: float, latest: float) -> None:
        self._send(wire.Unload(action, key, earliest, latest))

    def send_infer(
        self, batch: int, key: str, earliest: float, latest: float, tasks: list[list[Node]], frames: Sequence[Part]
    ) -> None:
        """``frames`` hold the parts of ``tasks`` as in a GRANT, without its header. Answered by Executing, where it
        came to that, and by Finished."""
        self._send(wire.Infer(batch, key, earliest, latest, tasks), frames)

    def send_drop(self, batch: int) -> None:
        """Answered by the batch's Finished: 'cancelled' if it did not execute yet."""
        self._send(wire.Drop(batch))

    def recv(self) -> list[tuple[wire.FromWorker, list[zmq.Frame]]]:
        """What the worker has said since the last call, each with its payload frames; never waits."""
        received: list[tuple[wire.FromWorker, list[zmq.Frame]]] = []
        while True:
            try:
                header, *frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return received
            message = wire.decode_from_worker(header.buffer)
            if isinstance(message, wire.Started):
                self.started = True
            received.append((message, frames))

    def alive(self) -> bool:
        return self._process.poll() is None

    def exit_description(self) -> str:
        """How the process ended: 'killed by signal 9 (SIGKILL)', 'exited with status 1'; '' while it runs."""
        status = self._process.poll()
        if status is None:
            return ""
        if status >= 0:
            return f"exited with status {status}"
        return f"killed by signal {-status} ({signal.Signals(-status).name})"

    def suspects(self) -> list[int]:
        """Of a process that has died: the batches of which one may have killed it."""
        return self._under_way.suspects()

    def stop(self) -> None:
        """Ask the worker to end after what it is doing. :meth:`close` ends it for good."""
        if self.started:
            self._send(wire.Stop())

    def kill(self) -> None:
        """End the process at once, whatever it is doing."""
        self._process.kill()

    def close(self, timeout: float) -> None:
        """Wait up to ``timeout`` seconds for the process, kill it if it is still there, and clean up."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self.sentinel)
        self._under_way.close()
        self.socket.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _send(self, message: wire.ToWorker, frames: Sequence[Part] = ()) -> None:
        if not self.started:
            raise RuntimeError("the worker has not said that it is there yet: wait for its Started message")
        try:
            self.socket.send_multipart([wire.encode(message), *frames], zmq.NOBLOCK, copy=False)
        except zmq.Again:
            # The process has just died: its owner learns that from the sentinel, this message is void.
            pass
