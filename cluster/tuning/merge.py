"""The shards' reports as one state per pipeline and stage.

Reports are rates over their own period, so that one that is seen twice, or comes late, or is left out counts for no
more than its time. One that says impossible things (another version of laxity, a broken disk) is left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Final

import msgspec

from cluster.records import LONGEST
from cluster.tuning.report import ReportRecord, StageReport
from cluster.tuning.sketch import BINS, Sketch, merged

log = logging.getLogger("laxity.coordinator")

MOST: Final = 1e12
"""What no count is above."""


class StageState(msgspec.Struct, frozen=True):
    """One stage over all shards. ``arrived``, ``started``, ``batches`` and ``dropped`` are per second (elements, save
    for the batches), ``busy`` the devices that run for it on average, ``waiting`` elements, ``queued`` the mean
    queueing delay and ``execution`` a batch's mean in seconds, ``waits`` the batch waits (sketch.py), ``latency`` the
    mean measured (batch, seconds) by device type."""

    arrived: float
    started: float
    batches: float
    dropped: float
    waiting: int
    devices: int
    busy: float
    queued: float
    execution: float
    waits: Sketch
    latency: dict[str, list[tuple[int, float]]]


def merge(reports: Iterable[ReportRecord]) -> dict[str, dict[str, StageState]]:
    """By 'pipeline@version', then by stage name, in the order in which the shards report them (topological)."""
    found: dict[str, list[tuple[float, StageReport]]] = {}
    for report in reports:
        if not (math.isfinite(report.period) and 0.0 < report.period < LONGEST):
            continue  # a shard's first report is about no time at all
        for stage in report.stages:
            if sound(stage):
                found.setdefault(stage.model, []).append((report.period, stage))
    states: dict[str, dict[str, StageState]] = {}
    for model, parts in found.items():
        version, _, name = model.rpartition("/")
        states.setdefault(version, {})[name] = _merged(parts)
    return states


def busiest(states: dict[str, dict[str, StageState]]) -> dict[str, dict[str, StageState]]:
    """By pipeline name the stages of the version that most requests go to: others are on their way out."""
    chosen: dict[str, dict[str, StageState]] = {}
    for version, stages in states.items():
        name = version.partition("@")[0]
        if name not in chosen or _first(stages).arrived > _first(chosen[name]).arrived:
            chosen[name] = stages
    return chosen


def believed(shard: str, report: ReportRecord) -> ReportRecord:
    """A shard's report without the stages whose figures cannot be true, which is said."""
    stages = [stage for stage in report.stages if sound(stage)]
    if len(stages) == len(report.stages):
        return report
    wrong = ", ".join(stage.model for stage in report.stages if not sound(stage))
    log.error("%s reports what cannot be true of %s; that is left out", shard, wrong)
    return msgspec.structs.replace(report, stages=stages)


def sound(stage: StageReport) -> bool:
    """Whether these figures can be true."""
    version, slash, name = stage.model.rpartition("/")
    if not (slash and name and version.partition("@")[0]):
        return False
    counts = [stage.arrived, stage.started, stage.batches, stage.dropped, stage.waiting, stage.devices, *stage.waits]
    times = [stage.queued, stage.execution]
    for measured in stage.latency.values():
        if any(batch < 1 for batch, _ in measured):
            return False
        counts += [batch for batch, _ in measured]
        times += [seconds for _, seconds in measured]
    return (
        len(stage.waits) <= BINS
        and all(0 <= count < MOST for count in counts)
        and all(0.0 <= seconds < LONGEST for seconds in times)
    )


def _merged(parts: list[tuple[float, StageReport]]) -> StageState:
    stages = [stage for _, stage in parts]
    return StageState(
        arrived=sum(stage.arrived / period for period, stage in parts),
        started=sum(stage.started / period for period, stage in parts),
        batches=sum(stage.batches / period for period, stage in parts),
        dropped=sum(stage.dropped / period for period, stage in parts),
        waiting=sum(stage.waiting for stage in stages),
        devices=sum(stage.devices for stage in stages),
        busy=sum(stage.batches * stage.execution / period for period, stage in parts),
        queued=_mean([(stage.queued, stage.started) for stage in stages]),
        execution=_mean([(stage.execution, stage.batches) for stage in stages]),
        waits=merged([stage.waits for stage in stages]),
        latency=_latency(stages),
    )


def _mean(weighted: list[tuple[float, int]]) -> float:
    total = sum(weight for _, weight in weighted)
    return sum(value * weight for value, weight in weighted) / total if total else 0.0


def _latency(stages: list[StageReport]) -> dict[str, list[tuple[int, float]]]:
    measured: dict[str, dict[int, list[float]]] = {}
    for stage in stages:
        for kind, points in stage.latency.items():
            for batch, seconds in points:
                measured.setdefault(kind, {}).setdefault(batch, []).append(seconds)
    return {
        kind: [(batch, sum(seconds) / len(seconds)) for batch, seconds in sorted(sizes.items())]
        for kind, sizes in measured.items()
    }


def _first(stages: dict[str, StageState]) -> StageState:
    return next(iter(stages.values()))
