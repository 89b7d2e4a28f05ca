"""Between a shard and the leader: what the one measured, published once a second, and what the other found right."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from broker.drift import DriftWatch
from broker.engine.report import Report, StageFigures
from broker.engine.tuning import Tuning
from cluster.membership import Membership
from cluster.records import TuningRecord, encode
from cluster.store.base import LeaseEndedError, Store, StoreError
from cluster.tuning.report import ReportRecord, StageReport
from cluster.tuning.sketch import sketch
from pipelines.policies import PARAMETERS

log = logging.getLogger("laxity.broker")

PERIOD = 1.0
"""Seconds between two reports."""
PLACES = 6
"""Decimal places of seconds: microseconds."""


class Reporter:
    """Puts a shard's reports under ``key``, under the lease of its ``membership``.

    In a thread of its own: a call to the store may last, and neither the shard nor its lease is to wait for it. There
    is one push at a time; while it lasts nothing is reported, and the next report is of the whole time since.
    """

    def __init__(
        self, take: Callable[[], tuple[Report, list[str]]], store: Store, key: str, membership: Membership
    ) -> None:
        self._take = take
        self._store = store
        self._key = key
        self._membership = membership
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reports")
        self._number = 0
        self._drift = DriftWatch()
        self._away = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a push that is under way is waited for."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopping.wait(max(due - time.monotonic(), 0.0)):
            due = max(due + PERIOD, time.monotonic())
            lease = self._membership.lease
            if not lease:
                continue  # the shard is not registered (any more): nobody would look for its reports
            try:
                report, agents = self._take()
            except (RuntimeError, TimeoutError) as error:
                log.debug("no report: %s", error)
                continue
            for news in self._drift.note(report.stages):
                log.warning("%s", news)
            self._number += 1
            self._push(encode(report_record(report, self._number, agents)), lease)

    def _push(self, value: bytes, lease: int) -> None:
        try:
            self._store.put(self._key, value, lease)
        except LeaseEndedError:
            pass  # there will be another
        except StoreError as error:
            if not self._away:
                self._away = True
                log.warning("reports cannot be written at present: %s", error)
        else:
            if self._away:
                self._away = False
                log.info("reports are written again")


def report_record(report: Report, number: int, agents: Sequence[str]) -> ReportRecord:
    """The ``number``-th report, of a shard that hears these agents."""
    return ReportRecord(
        number=number,
        period=round(report.period, PLACES),
        stages=[_stage(figures) for figures in report.stages],
        in_flight=report.in_flight,
        agents=list(agents),
    )


def tuning_of(record: TuningRecord, now: float) -> Tuning:
    """What the engine is told at ``now``, within what is possible."""
    _, least, most, _ = PARAMETERS["history"]
    return Tuning(
        quantile=min(max(record.quantile, 0.0), 1.0),
        history=min(max(record.history, least), most),
        admission=min(max(record.admission, 0.0), 1.0),
        limit=record.limit,
        queued=record.queued,
        told_at=now,
    )


def _stage(figures: StageFigures) -> StageReport:
    return StageReport(
        model=figures.model,
        arrived=figures.arrived,
        started=figures.started,
        batches=figures.batches,
        dropped=figures.dropped,
        waiting=figures.waiting,
        devices=figures.devices,
        queued=round(figures.queued, PLACES),
        execution=round(figures.execution, PLACES),
        waits=sketch(figures.waits),
        latency={
            kind: [(batch, round(seconds, PLACES)) for batch, seconds in measured]
            for kind, measured in figures.latency.items()
        },
        drift={kind: round(ratio, 3) for kind, ratio in figures.drift.items()},
    )
