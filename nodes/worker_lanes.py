"""The threads of a worker: one for each lane of its device (:mod:`nodes.engine.lanes`)."""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

log = logging.getLogger(__name__)

_PR_SET_NAME = 15
CRASHED = 70
"""Status with which the process ends where one of its threads did, which no message tells the agent."""

T = TypeVar("T")


class Job:
    """What a lane is to do; returns what the same lane does next if that is known already."""

    __slots__ = ("_do",)

    def __init__(self, do: Callable[[], Job | None]) -> None:
        self._do = do

    def __call__(self) -> Job | None:
        return self._do()


class LaneThread:
    """A thread that does one job after another. An error that leaves a job ends the whole process, for a device with a
    dead lane would hang in silence; what a job's own code may raise, the job itself must catch."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        self._jobs.put(job)

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in the thread and wait for what it returns, or raises."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)

        self._jobs.put(Job(run))
        return done.result()

    def end(self) -> None:
        """End the thread after the jobs that it has, and wait for that."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._name_thread()
            job = self._jobs.get()
            while job is not None:
                following = job()
                job = None  # with all that its batch has in memory, however long the next one takes to come
                job = following or self._jobs.get()
                following = None
        except BaseException:
            log.critical("the thread for %s failed; the worker ends", self._name, exc_info=True)
            os._exit(CRASHED)

    def _name_thread(self) -> None:
        if sys.platform == "linux":
            # What top and perf show; threading names its threads for Python alone.
            ctypes.CDLL(None).prctl(_PR_SET_NAME, self._name.encode()[:15])
