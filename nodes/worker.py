"""The worker process of one device, started as ``python -P -m nodes.worker`` (see ``--help``).

It holds models and runs batches, each within its window, as its agent tells it over a PAIR socket
(:mod:`nodes.worker_protocol`). It decides nothing: what runs, and when, is the agent's business. It ends when
it is told to, and whenever its agent dies.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zmq

from laxity.payload import Part
from nodes import worker_protocol as wire
from nodes.under_way import UnderWay
from nodes.worker_actions import Actions
from nodes.worker_lanes import CRASHED
from nodes.worker_output import speak_in_lines

log = logging.getLogger(__name__)

PARENT_CHECK = 1.0
"""Seconds."""
SWITCH_INTERVAL = 1e-4
"""Seconds after which a thread that computes in Python lets another one go on. With the usual 5 ms a batch that has
just been executed would wait as long for the ``after`` of the one before it."""
_PR_SET_PDEATHSIG = 1
_libc = ctypes.PyDLL(None)
"""Unlike os.eventfd_write, a call keeps the interpreter's lock: who is about to execute a batch would lose it there to
a thread that has just become busy, and start that much later."""


class Outbox:
    """Messages that any thread puts and the main thread, which alone touches the socket, sends."""

    def __init__(self, socket: zmq.Socket[Any]) -> None:
        self._socket = socket
        self._messages: deque[tuple[wire.FromWorker, Sequence[Part]]] = deque()
        self._asleep = False
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable when the main thread, having slept, has something to do."""

    def put(self, message: wire.FromWorker, frames: Sequence[Part] = ()) -> None:
        self._messages.append((message, frames))
        self.wake()

    def wake(self) -> None:
        if self._asleep:
            self._asleep = False
            _libc.eventfd_write(self.fd, ctypes.c_uint64(1))

    def send(self) -> None:
        """Send everything."""
        while self._messages:
            message, frames = self._messages.popleft()
            self._socket.send_multipart([wire.encode(message), *frames], copy=False)

    def fall_asleep(self) -> bool:
        """From now on whoever puts something makes ``fd`` readable. False, and not so, if there is something."""
        self._asleep = True
        if self._messages:
            self._asleep = False
        return self._asleep

    def woken(self) -> None:
        self._asleep = False
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            pass


def serve(address: str, device: str, parent: int, under_way: UnderWay) -> None:
    """Talk to the agent at ``address`` until it says Stop or process ``parent`` is gone."""
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(address)
    outbox = Outbox(socket)
    actions = Actions(device, outbox, under_way)
    outbox.put(wire.Started(os.getpid()))
    # zmq_poll counts in milliseconds, select in microseconds; windows open on the latter.
    readable = [socket.fileno(), outbox.fd]
    going = True
    while going and os.getppid() == parent:
        outbox.send()
        # Last before waiting: the socket's descriptor tells of what came since it was last found empty.
        going = _receive(socket, actions)
        if going and outbox.fall_asleep():
            due = actions.next_wake() - time.monotonic()
            if due > 0:
                select.select(readable, [], [], min(due, PARENT_CHECK))
        outbox.woken()
        actions.tick()
    actions.close()
    context.destroy(linger=0)


def _receive(socket: zmq.Socket[Any], actions: Actions) -> bool:
    """Handle all that has come; False where Stop was among it."""
    while True:
        try:
            header, *frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return True
        message = wire.decode_to_worker(header.buffer)
        if isinstance(message, wire.Stop):
            return False
        actions.handle(message, frames)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="nodes.worker", description="The worker process of one device.")
    parser.add_argument("--connect", required=True, metavar="ADDRESS")
    parser.add_argument("--under-way", type=Path, required=True, metavar="FILE", help="see nodes.under_way")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--parent", type=int, required=True, metavar="PID")
    options = parser.parse_args(arguments)
    # A Ctrl-C in the terminal reaches the whole process group, a service manager's SIGTERM all processes of a service:
    # the agent decides what becomes of its workers. What models start shall still end of a SIGTERM: no SIG_IGN there.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    speak_in_lines()
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        serve(options.connect, options.device, options.parent, UnderWay(options.under_way))
    except BaseException:
        log.critical("the worker failed", exc_info=True)
        os._exit(CRASHED)  # the lanes' threads would keep the process, and nobody would hear of it


if __name__ == "__main__":
    main()
