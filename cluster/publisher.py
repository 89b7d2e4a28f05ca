"""Keeps a record of a process in the store up to date, once a period, under the process's lease."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from cluster.membership import Membership
from cluster.store.base import LeaseEndedError, Store, StoreError

log = logging.getLogger("laxity.cluster")


class Publisher:
    """Puts what ``take`` answers under ``key``, under the lease of ``membership``, every ``period`` seconds, or
    looks every ``retry`` seconds whether the process is registered. ``what`` names it in the log and its thread.

    In a thread of its own: a call to the store may last, and neither the process's work nor its lease is to wait for
    it. There is one put at a time. ``take`` raises RuntimeError or TimeoutError where there is nothing to be had.
    """

    def __init__(
        self,
        what: str,
        take: Callable[[], bytes],
        store: Store,
        key: str,
        membership: Membership,
        *,
        period: float,
        retry: float,
    ) -> None:
        self._what = what
        self._take = take
        self._store = store
        self._key = key
        self._membership = membership
        self._period = period
        self._retry = retry
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=what)
        self._away = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a put that is under way is waited for."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopping.wait(max(due - time.monotonic(), 0.0)):
            lease = self._membership.lease
            due = max(due + (self._period if lease else self._retry), time.monotonic())
            if not lease:
                continue  # not registered (any more): nobody would look for it
            try:
                value = self._take()
            except (RuntimeError, TimeoutError) as error:
                log.debug("no %s: %s", self._what, error)
                continue
            self._put(value, lease)

    def _put(self, value: bytes, lease: int) -> None:
        try:
            self._store.put(self._key, value, lease)
        except LeaseEndedError:
            pass  # there will be another
        except StoreError as error:
            if not self._away:
                self._away = True
                log.warning("%s cannot be written at present: %s", self._what, error)
        else:
            if self._away:
                self._away = False
                log.info("%s are written again", self._what)
