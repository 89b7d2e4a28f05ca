"""How many elements per second each stage has to be ready for, from the rates that were measured.

What the first stages receive is the pipeline's demand. A stage behind them sees only what they let through, and would
learn of a rise only once they have been given devices; so a stage's demand follows from the pipeline's: as much where
it runs once for each request, and times the items that requests have brought lately where it runs for each item.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

from cluster.planner.forecast import Forecast
from cluster.planner.keys import parse_key
from cluster.planner.settings import Settings
from pipelines.spec import PipelineSpec

ITEMS_REMEMBERED = 0.97
"""What a second's items per request count for a second later."""


class StageDemand(NamedTuple):
    """``now``: elements per second to be ready for, of which ``least`` are not a guess. ``kept``: the most of the last
    seconds of patience, which devices that are there stay for; None while not enough is known to give anything back."""

    now: float
    least: float
    kept: float | None

    @property
    def most(self) -> float:
        """What is needed or kept."""
        return self.now if self.kept is None else max(self.now, self.kept)


class _Items:
    """Items per request of a map stage."""

    __slots__ = ("_items", "_requests")

    def __init__(self) -> None:
        self._items = 0.0
        self._requests = 0.0

    def observe(self, items: float, requests: float) -> None:
        self._items = self._items * ITEMS_REMEMBERED + items
        self._requests = self._requests * ITEMS_REMEMBERED + requests

    def each(self) -> float:
        return self._items / self._requests if self._requests > 0.0 else 0.0


class Demand:
    """What is known of the rates of all pipelines, by name: versions share it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._specs: dict[str, tuple[PipelineSpec, int]] = {}
        self._unknown: dict[str, dict[str, float]] = {}
        """The last rates of pipelines that nobody has told of yet, by stage."""
        self._requests: dict[str, Forecast] = {}
        self._stages: dict[tuple[str, str], tuple[Forecast, _Items]] = {}

    def know(self, specs: Mapping[str, tuple[PipelineSpec, float]]) -> None:
        """The pipelines that there are, by name, each with the seconds that its slowest model takes to load; all others
        are forgotten."""
        self._specs = {name: (spec, max(1, math.ceil(load))) for name, (spec, load) in specs.items()}
        self._requests = {name: forecast for name, forecast in self._requests.items() if name in specs}
        self._stages = {key: known for key, known in self._stages.items() if key[0] in specs}
        for name, stages in self._unknown.items():
            if name in specs:
                self._observe(name, stages)
        self._unknown.clear()

    def observe(self, rates: Mapping[str, float]) -> None:
        """``rates``: elements per second over the last second by model key. What is not named was not measured."""
        measured: dict[str, dict[str, float]] = {}
        for key, rate in rates.items():
            pipeline, _, stage = parse_key(key)
            stages = measured.setdefault(pipeline, {})
            stages[stage] = stages.get(stage, 0.0) + rate
        for name, stages in measured.items():
            if name in self._specs:
                self._observe(name, stages)
            else:
                self._unknown[name] = stages

    def _observe(self, name: str, stages: Mapping[str, float]) -> None:
        spec, horizon = self._specs[name]
        once = [rate for stage, rate in stages.items() if stage in spec.stages and not spec.stages[stage].map]
        requests = max(once, default=None)
        if requests is not None:
            if name not in self._requests:
                self._requests[name] = Forecast(self._settings, horizon)
            self._requests[name].observe(requests)
        for stage, rate in stages.items():
            if stage in spec.stages and spec.stages[stage].map:
                if (name, stage) not in self._stages:
                    self._stages[name, stage] = (Forecast(self._settings, horizon), _Items())
                forecast, items = self._stages[name, stage]
                forecast.observe(rate)
                if requests is not None:
                    items.observe(rate, requests)

    def requests(self, name: str) -> float:
        """Requests per second that a pipeline needs or keeps devices for; elements of a map stage where every stage is
        one."""
        known = self._requests.get(name)
        forecasts = [known] if known is not None else [own for (of, _), (own, _) in self._stages.items() if of == name]
        return max((max(forecast.need, forecast.kept or 0.0) for forecast in forecasts), default=0.0)

    def of(self, name: str, stages: Collection[str]) -> dict[str, StageDemand]:
        """By stage; a stage that is not in it has not been measured yet."""
        spec, _ = self._specs[name]
        requests = self._requests.get(name)
        demands: dict[str, StageDemand] = {}
        for stage in stages:
            own = self._stages.get((name, stage)) if stage in spec.stages and spec.stages[stage].map else None
            if own is not None:
                forecast, items = own
                each = items.each()
                need, least, kept = forecast.need, forecast.least, forecast.kept
                if requests is not None:
                    need = max(need, requests.need * each)
                    least = max(least, requests.least * each)
                    kept = None if kept is None or requests.kept is None else max(kept, requests.kept * each)
                demands[stage] = StageDemand(need, least, kept)
            elif requests is not None and not (stage in spec.stages and spec.stages[stage].map):
                demands[stage] = StageDemand(requests.need, requests.least, requests.kept)
        return demands
