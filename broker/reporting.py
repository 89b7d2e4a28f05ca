"""What a shard tells the leader: the engine's figures as a record."""

from __future__ import annotations

from collections.abc import Sequence

from broker.engine.report import Report, StageFigures
from cluster.tuning.report import ReportRecord, StageReport
from cluster.tuning.sketch import sketch

PLACES = 6
"""Decimal places of seconds: microseconds."""


def report_record(report: Report, number: int, agents: Sequence[str]) -> ReportRecord:
    """The ``number``-th report, of a shard that hears these agents."""
    return ReportRecord(
        number=number,
        period=round(report.period, PLACES),
        stages=[_stage(figures) for figures in report.stages],
        in_flight=report.in_flight,
        agents=list(agents),
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
    )
