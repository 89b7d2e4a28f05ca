"""A coordinator's beats in a thread of their own: a plan may take longer than its lease lasts."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

from cluster.election import Election
from cluster.membership import Membership

STUCK = 60.0
"""Seconds without a :meth:`Heartbeat.turn` after which the coordinator is taken to be stuck, and another is to lead."""


class Heartbeat:
    """Keeps a coordinator's record and its lead, every ``period`` seconds from :meth:`start` to :meth:`stop`, for as
    long as its loop goes on turning."""

    def __init__(self, membership: Membership, election: Election, period: float, stuck: float = STUCK) -> None:
        self._membership = membership
        self._election = election
        self._period = period
        self._stuck = stuck
        self._turned_at = time.monotonic()
        self._stopping = threading.Event()
        self._ended: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def turn(self) -> None:
        """The loop goes on. Raises what ended the thread, if something did."""
        self._turned_at = time.monotonic()
        if self._ended.done():
            self._ended.result()

    def stop(self) -> None:
        """End the thread; a beat that is under way is waited for."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                if time.monotonic() < self._turned_at + self._stuck:
                    self._membership.beat(time.monotonic())
                    self._election.beat(time.monotonic())
                self._stopping.wait(self._period)
        except BaseException as error:
            self._ended.set_exception(error)
