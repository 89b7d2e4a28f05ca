"""What is right for each pipeline's drop, from what all shards report: the coordinator's, and the simulator's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cluster.records import TuningRecord
from cluster.tuning.admission import AdmissionTuner
from cluster.tuning.merge import StageState, busiest, merge
from cluster.tuning.quantile import QuantileTuner
from cluster.tuning.report import ReportRecord
from cluster.tuning.window import WindowTuner

HELD: Final = 3.0
"""Seconds for which a shard's last report goes on to count when no other follows."""
FORGOTTEN: Final = 60.0
"""Seconds after which a pipeline that no shard reports is forgotten."""
SMOOTHING: Final = 0.3
"""Weight of the newest second in the queueing delays that are told."""


class PipelineTuner:
    """One pipeline."""

    def __init__(self) -> None:
        self.window = WindowTuner()
        self.quantile = QuantileTuner()
        self.admission = AdmissionTuner()
        self.queued: dict[str, float] = {}
        self.seen_at = 0.0

    def observe(self, now: float, stages: Mapping[str, StageState]) -> None:
        """Another second; the stages in topological order."""
        self.seen_at = now
        in_order = list(stages.values())
        self.window.observe(in_order[0].arrived)
        self.quantile.observe(in_order)
        self.admission.observe(stages)
        queued = {}
        for name, stage in stages.items():
            before = self.queued.get(name)
            if stage.started > 0.0:
                queued[name] = stage.queued if before is None else before + SMOOTHING * (stage.queued - before)
            elif before is not None:
                queued[name] = before
        self.queued = queued

    def record(self) -> TuningRecord:
        """What the shards are to know."""
        return TuningRecord(
            quantile=round(self.quantile.quantile, 4),
            history=round(self.window.seconds, 2),
            admission=round(self.admission.admission, 4),
            queued={name: round(seconds, 5) for name, seconds in self.queued.items()},
            limit=self.admission.limit,
        )


class Tuner:
    """``now`` is monotonic, in seconds; :meth:`observe` is to be called once a second."""

    def __init__(self) -> None:
        self._numbers: dict[str, tuple[int, float]] = {}
        """By shard the number of its last report, and when that came."""
        self._pipelines: dict[str, PipelineTuner] = {}

    def observe(self, now: float, reports: Mapping[str, ReportRecord]) -> None:
        """``reports`` has the last one of each shard; one that was there before counts for a while."""
        numbers = {}
        for shard, report in reports.items():
            known = self._numbers.get(shard)
            numbers[shard] = known if known is not None and known[0] == report.number else (report.number, now)
        self._numbers = numbers
        current = [report for shard, report in reports.items() if now < numbers[shard][1] + HELD]
        for name, stages in busiest(merge(current)).items():
            self._pipelines.setdefault(name, PipelineTuner()).observe(now, stages)
        for name in [name for name, tuner in self._pipelines.items() if now > tuner.seen_at + FORGOTTEN]:
            del self._pipelines[name]

    def tuning(self, now: float) -> dict[str, TuningRecord]:
        """By pipeline name, for those that are reported at present: what was right for others may not be any more."""
        return {name: tuner.record() for name, tuner in self._pipelines.items() if now < tuner.seen_at + HELD}
