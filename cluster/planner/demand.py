"""How many elements per second each stage has to be ready for, from the rates that were measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from cluster.planner.keys import parse_key
from cluster.planner.settings import Settings
from pipelines.spec import PipelineSpec


class StageDemand(NamedTuple):
    """``now``: elements per second to be ready for. ``kept``: the most of the last seconds of patience, which devices
    that are there stay for; None while not enough is known to give anything back."""

    now: float
    kept: float | None


class Series:
    """One rate: its forecast with a margin for bursts, and the most that was forecast lately."""

    __slots__ = ("_began", "_level", "_most", "_patience", "need")

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._level = 0.0
        self._began: float | None = None
        self._most: deque[tuple[float, float]] = deque()
        self.need = 0.0

    def observe(self, now: float, rate: float) -> None:
        """Take the rate of the last second."""
        if self._began is None:
            self._began = now
            self._level = rate
        self._level += 0.2 * (rate - self._level)
        self.need = max(rate, self._level) * 1.2
        while self._most and self._most[-1][1] <= self.need:
            self._most.pop()
        self._most.append((now, self.need))
        while self._most[0][0] < now - self._patience:
            self._most.popleft()

    def kept(self, now: float) -> float | None:
        """The most that was needed within the patience; None before that is known."""
        if self._began is None or now < self._began + self._patience:
            return None
        return self._most[0][1] if self._most else 0.0


class Demand:
    """What is known of the rates of all pipelines, by name: versions share it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._requests: dict[str, Series] = {}
        self._stages: dict[tuple[str, str], Series] = {}

    def observe(self, now: float, rates: Mapping[str, float]) -> None:
        """``rates``: elements per second over the last second by model key."""
        stages: dict[tuple[str, str], float] = {}
        for key, rate in rates.items():
            pipeline, _, stage = parse_key(key)
            stages[pipeline, stage] = stages.get((pipeline, stage), 0.0) + rate
        for stage_id, rate in stages.items():
            series = self._stages.get(stage_id)
            if series is None:
                series = self._stages[stage_id] = Series(self._settings.patience)
            series.observe(now, rate)

    def keep(self, pipelines: Mapping[str, object]) -> None:
        """Forget pipelines that are neither wanted nor served."""
        self._stages = {key: series for key, series in self._stages.items() if key[0] in pipelines}

    def of(self, now: float, spec: PipelineSpec) -> dict[str, StageDemand]:
        """By stage; a stage that is not in it has not been measured yet."""
        found = {name: self._stages.get((spec.name, name)) for name in spec.stages}
        most = max((series.need for name, series in found.items() if series and not spec.stages[name].map), default=0.0)
        demands: dict[str, StageDemand] = {}
        for name, series in found.items():
            if series is not None:
                need = series.need if spec.stages[name].map else max(most, series.need)
                demands[name] = StageDemand(need, series.kept(now))
        return demands
