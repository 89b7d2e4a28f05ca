"""Shards' reports for people: which of them still count, and what pipelines and stages did per second over all of them.

Whatever a report says comes out as a number that can be drawn: what cannot be true is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import msgspec

from cluster.records import LONGEST
from cluster.tuning.merge import MOST, sound
from cluster.tuning.report import PipelineReport, ReportRecord, StageReport

SILENT = 3.5
"""Seconds without a new report after which a shard's last one counts no more."""


class Freshness:
    """When each shard's report was last seen to change. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[ReportRecord, float]] = {}

    def note(self, now: float, reports: Mapping[str, ReportRecord]) -> list[str]:
        """The shards of which there is another report than the last time."""
        fresh = []
        seen: dict[str, tuple[ReportRecord, float]] = {}
        for shard, report in reports.items():
            before = self._seen.get(shard)
            if before is not None and before[0] is report:
                seen[shard] = before
                continue
            seen[shard] = (report, now)
            if before is None or before[0].number != report.number:
                fresh.append(shard)
        self._seen = seen
        return fresh

    def forgive(self, now: float) -> None:
        """None could be seen of late: their silence counts from now on."""
        self._seen = {shard: (report, now) for shard, (report, _) in self._seen.items()}

    def current(self, now: float) -> dict[str, ReportRecord]:
        """The reports that count, by shard: of those that speak, about a time that can be."""
        return {
            shard: report
            for shard, (report, at) in self._seen.items()
            if now < at + SILENT and 0.0 < report.period < LONGEST
        }


class PipelineRates(msgspec.Struct):
    """One pipeline over all shards, per second; ``latency`` is (p50, p99) in seconds."""

    offered: float = 0.0
    outcomes: dict[str, float] = {}
    latency: tuple[float, float] | None = None

    @property
    def good(self) -> float:
        return self.outcomes.get("ok", 0.0)

    @property
    def lost(self) -> float:
        """What was accepted and did not make it."""
        return sum(self.outcomes.get(how, 0.0) for how in ("dropped", "expired", "failed", "unavailable"))


def pipeline_rates(reports: Iterable[ReportRecord]) -> dict[str, PipelineRates]:
    """By pipeline name. The quantiles of several shards are averaged by what each answered: theirs together cannot be
    known."""
    found: dict[str, PipelineRates] = {}
    latencies: dict[str, list[tuple[float, float, float]]] = {}
    for report in reports:
        for one in report.pipelines:
            if not _plausible(one):
                continue
            rates = found.setdefault(one.pipeline, PipelineRates())
            rates.offered += one.submitted / report.period
            for outcome, count in one.outcomes.items():
                rates.outcomes[outcome] = rates.outcomes.get(outcome, 0.0) + count / report.period
            if one.outcomes.get("ok") and 0.0 <= one.latency[0] < LONGEST and 0.0 <= one.latency[1] < LONGEST:
                latencies.setdefault(one.pipeline, []).append((one.outcomes["ok"], *one.latency))
    for name, several in latencies.items():
        total = sum(weight for weight, _, _ in several)
        p50 = sum(weight * p50 for weight, p50, _ in several) / total
        found[name].latency = (p50, sum(weight * p99 for weight, _, p99 in several) / total)
    return found


def _plausible(one: PipelineReport) -> bool:
    return 0 <= one.submitted < MOST and all(0 <= count < MOST for count in one.outcomes.values())


class Pressure(msgspec.Struct):
    """What a stage's windows and load are like: (10th percentile, median) of the slack in seconds, μ and the order of
    the most loaded shard."""

    slack: tuple[float, float] | None = None
    load_factor: float = 0.0
    order: str = ""


def pressures(reports: Iterable[ReportRecord]) -> dict[str, Pressure]:
    """By model key. Of the slack, the median is averaged over shards by their batches, the percentile is the least."""
    stages: dict[str, list[StageReport]] = {}
    for report in reports:
        for stage in report.stages:
            if sound(stage):
                stages.setdefault(stage.model, []).append(stage)
    return {model: _pressure(several) for model, several in stages.items()}


def _pressure(several: list[StageReport]) -> Pressure:
    pressed = max(several, key=_load)
    pressure = Pressure(load_factor=_load(pressed), order=pressed.order)
    granted = [stage for stage in several if stage.batches and _told(stage.slack)]
    if granted:
        total = sum(stage.batches for stage in granted)
        median = sum(stage.slack[1] * stage.batches for stage in granted) / total
        pressure.slack = (min(stage.slack[0] for stage in granted), median)
    return pressure


def _told(slack: tuple[float, float]) -> bool:
    return slack != (-1.0, -1.0) and all(-LONGEST < value < LONGEST for value in slack)


def _load(stage: StageReport) -> float:
    return stage.load_factor if math.isfinite(stage.load_factor) and 0.0 <= stage.load_factor < MOST else 0.0
