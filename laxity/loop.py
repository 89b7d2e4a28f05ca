"""What the polling threads of shards and agents share: calls from other threads, and waiting exactly enough."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeVar

import zmq

T = TypeVar("T")

NAP: Final = 100e-6
"""How long to sleep, in seconds, before looking again where less than a millisecond is left (poll knows only those)."""
PATIENCE: Final = 10.0
"""Seconds that a polling thread may take to answer another one."""


class Calls:
    """Functions that other threads hand to a polling thread, which polls ``fd`` and calls :meth:`run`."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object]] = deque()
        self._lock = threading.Lock()
        self._open = True
        self.fd, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def add(self, function: Callable[[], object]) -> bool:
        """Have ``function`` run in the polling thread, soon; False once that has ended, and nothing happens."""
        with self._lock:
            if not self._open:
                return False
            self._waiting.append(function)
            try:
                os.write(self._write, b"x")
            except BlockingIOError:
                pass  # the pipe is full of wake-ups already
        return True

    def ask(self, question: Callable[[], T]) -> T:
        """What ``question`` says in the polling thread, which is waited for (from another thread only).

        RuntimeError once that has ended, TimeoutError where it does not come to it.
        """
        found: list[T] = []
        done = threading.Event()

        def answer() -> None:
            found.append(question())
            done.set()

        if not self.add(answer):
            raise RuntimeError("the thread has ended")
        ends = time.monotonic() + PATIENCE
        while not done.wait(0.1):
            if not self._open:
                raise RuntimeError("the thread has ended")
            if time.monotonic() > ends:
                raise TimeoutError("the thread does not answer")
        return found[0]

    def clear_wakeups(self) -> None:
        """Take the wake-ups away after ``fd`` was readable."""
        os.read(self.fd, 4096)

    def run(self) -> None:
        """Call what waits."""
        while self._waiting:
            self._waiting.popleft()()

    def close(self) -> None:
        """Take no more calls."""
        with self._lock:
            if self._open:
                self._open = False
                os.close(self.fd)
                os.close(self._write)


def wait(poller: zmq.Poller, seconds: float) -> list[tuple[Any, int]]:
    """What is ready within ``seconds``, as ``poller.poll`` tells it; may come back a little early with nothing."""
    if seconds >= 0.001:
        return poller.poll(int(min(seconds, 60.0) * 1000))
    events = poller.poll(0)
    if not events and seconds > 0.0:
        time.sleep(min(seconds, NAP))
    return events
