"""The leader's tuning in a simulation: the very tuner, fed with the very reports, once a second."""

from __future__ import annotations

from broker.reporting import report_record, tuning_of
from cluster.records import TuningRecord
from cluster.tuning.report import ReportRecord
from cluster.tuning.tuner import Tuner
from simulation.machine import Machine


class Tuned:
    """A ``control`` for :func:`simulation.run.simulate`. What is found in one second holds from the next one
    on: by then it has gone through the store. ``told`` has what was found, by second."""

    def __init__(self) -> None:
        self.told: list[dict[str, TuningRecord]] = []
        self.reports: list[ReportRecord] = []
        self._tuner = Tuner()

    def __call__(self, now: float, machine: Machine) -> None:
        if self.told:
            for name, record in self.told[-1].items():
                machine.scheduler.tune(now, name, tuning_of(record, now))
        report = report_record(machine.scheduler.take_report(now), len(self.reports) + 1, [])
        self.reports.append(report)
        self._tuner.observe(now, {"shard": report})
        self.told.append(self._tuner.tuning(now))
