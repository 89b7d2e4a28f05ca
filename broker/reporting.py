"""Between a shard and the leader: what the one measured, published once a second, and what the other found right."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from broker.drift import DriftWatch
from broker.engine.metrics import Lost
from broker.engine.report import PipelineFigures, Report, StageFigures
from broker.engine.tuning import Tuning
from cluster.membership import Membership
from cluster.publisher import Publisher
from cluster.records import TuningRecord, encode
from cluster.store.base import Store
from cluster.tuning.report import LONGEST_DETAIL, MOST_DROPS, DropReport, PipelineReport, ReportRecord, StageReport
from cluster.tuning.sketch import sketch
from pipelines.policies import PARAMETERS

log = logging.getLogger("laxity.broker")

PERIOD = 1.0
"""Seconds between two reports."""
PLACES = 6
"""Decimal places of seconds: microseconds."""


class _Reports:
    """A shard's reports one after the other, each of the whole time since the last one."""

    def __init__(self, take: Callable[[], tuple[Report, list[str]]]) -> None:
        self._take = take
        self._number = 0
        self._drift = DriftWatch()

    def next(self) -> bytes:
        report, agents = self._take()
        for news in self._drift.note(report.stages):
            log.warning("%s", news)
        self._number += 1
        return encode(report_record(report, self._number, agents))


def reporter(take: Callable[[], tuple[Report, list[str]]], store: Store, key: str, membership: Membership) -> Publisher:
    """Puts a shard's reports under ``key``; ``take`` asks the shard. While a put lasts nothing is reported."""
    return Publisher("reports", _Reports(take).next, store, key, membership, period=PERIOD, retry=PERIOD)


def report_record(report: Report, number: int, agents: Sequence[str]) -> ReportRecord:
    """The ``number``-th report, of a shard that hears these agents."""
    return ReportRecord(
        number=number,
        period=round(report.period, PLACES),
        stages=[_stage(figures) for figures in report.stages],
        in_flight=report.in_flight,
        agents=list(agents),
        pipelines=[_pipeline(figures) for figures in report.pipelines],
        drops=[_drop(lost, report.at) for lost in reversed(report.lost[-MOST_DROPS:])],
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
        slack=_rounded(figures.slack),
        load_factor=round(figures.load_factor, 3),
        order=figures.order,
    )


def _pipeline(figures: PipelineFigures) -> PipelineReport:
    return PipelineReport(
        pipeline=figures.name,
        submitted=figures.submitted,
        outcomes=figures.outcomes,
        latency=_rounded(figures.latency),
    )


def _drop(lost: Lost, now: float) -> DropReport:
    return DropReport(
        request=f"{lost.client}-{lost.id}",
        pipeline=lost.pipeline,
        stage=lost.stage,
        outcome=lost.outcome,
        detail=lost.detail[:LONGEST_DETAIL],
        ago=round(now - lost.at, PLACES),
    )


def _rounded(seconds: tuple[float, float]) -> tuple[float, float]:
    return round(seconds[0], PLACES), round(seconds[1], PLACES)
