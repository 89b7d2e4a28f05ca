"""The books of a load: what was offered, what became of it and how long it took, in bounded memory."""

from __future__ import annotations

import math
from collections import deque
from typing import Final

from cli.quantiles import Quantiles
from laxity.outcomes import Outcome

MOST_BINS: Final = 600
"""Seconds of a step that are told of one by one; of a longer one, pairs are put together, again and again."""
COARSE: Final = 0.01
"""How far the quantiles of one second may be off, as a part of them."""
STEADY: Final = 3
"""Intervals that must agree."""


class End:
    """One way in which requests ended that were not good: how many, and what was said of the first."""

    def __init__(self, detail: str) -> None:
        self.count = 0
        self.detail = detail


class Tally:
    """Requests of one kind that were due within one interval. Latencies are in microseconds, of good requests."""

    def __init__(self) -> None:
        self.submitted = 0
        self.unsent = 0
        self.outcomes = dict.fromkeys(Outcome, 0)
        self.latency = Quantiles()
        self.ends: dict[tuple[str, Outcome], End] = {}
        """By stage ('': none was reached) and outcome."""

    def ended(self, latency: float, outcome: Outcome, stage: str, detail: str) -> None:
        self.outcomes[outcome] += 1
        if outcome is Outcome.OK:
            self.latency.add(latency * 1e6)
            return
        self._end(stage, outcome, detail).count += 1

    def _end(self, stage: str, outcome: Outcome, detail: str) -> End:
        end = self.ends.get((stage, outcome))
        if end is None:
            end = self.ends[stage, outcome] = End(detail)
        return end

    def merge(self, other: Tally, prefix: str = "") -> None:
        """Take in another one, its stages' names with a ``prefix``."""
        self.submitted += other.submitted
        self.unsent += other.unsent
        for outcome, count in other.outcomes.items():
            self.outcomes[outcome] += count
        self.latency.merge(other.latency)
        for (stage, outcome), end in other.ends.items():
            self._end(f"{prefix}{stage}" if stage else "", outcome, end.detail).count += end.count

    @property
    def offered(self) -> int:
        return self.submitted + self.unsent


class Bin:
    """One second of a step, or some: requests by when they were due."""

    def __init__(self) -> None:
        self.offered = 0
        self.unsent = 0
        self.outcomes = dict.fromkeys(Outcome, 0)
        self.latency = Quantiles(COARSE)

    def merge(self, other: Bin) -> None:
        self.offered += other.offered
        self.unsent += other.unsent
        for outcome, count in other.outcomes.items():
            self.outcomes[outcome] += count
        self.latency.merge(other.latency)


class Series:
    """A step over time, ``width`` seconds to a bin."""

    def __init__(self) -> None:
        self.width = 1.0
        self.bins: list[Bin] = []

    def at(self, seconds: float) -> Bin:
        while (number := int(seconds / self.width)) >= MOST_BINS:
            self.width *= 2.0
            pairs = [self.bins[first : first + 2] for first in range(0, len(self.bins), 2)]
            for pair in pairs:
                if len(pair) == 2:
                    pair[0].merge(pair[1])
            self.bins = [pair[0] for pair in pairs]
        while number >= len(self.bins):
            self.bins.append(Bin())
        return self.bins[number]


class Recent:
    """What ended in the present interval, and what that came to in the last three: whether a load is steady."""

    def __init__(self, interval: float, most: int, percentile: float, tolerance: float) -> None:
        self._interval = interval
        self._most = most
        self._part = percentile / 100.0
        self._tolerance = tolerance / 100.0
        self._good = 0
        self._latency = Quantiles()
        self._last: deque[tuple[float, float]] = deque(maxlen=STEADY)
        self.intervals = 0
        """How many have passed, until there was no need for more."""

    def ended(self, at: float, latency: float) -> None:
        """A good request ended."""
        self.until(at)
        self._good += 1
        self._latency.add(latency * 1e6)

    def until(self, now: float) -> None:
        """So late is it: intervals that have ended are done with."""
        while now >= (self.intervals + 1) * self._interval and not self.over():
            self._last.append((self._good / self._interval, self._latency.quantile(self._part) or 0.0))
            self._good = 0
            self._latency = Quantiles()
            self.intervals += 1

    def over(self) -> bool:
        """Whether there is no need for more intervals."""
        return self.intervals >= self._most or self.steady()

    def steady(self) -> bool:
        """Whether goodput and latency of the last three intervals are within the tolerance of their means."""
        return len(self._last) == STEADY and all(
            all(abs(value - sum(values) / STEADY) <= self._tolerance * sum(values) / STEADY for value in values)
            for values in zip(*self._last, strict=True)
        )


class StepTally:
    """One step: by kind of request, by interval, over time, and now. All times are seconds from the step's begin."""

    def __init__(self, kinds: int, interval: float = math.inf, recent: Recent | None = None) -> None:
        self._kinds = kinds
        self._interval = interval
        self._recent = recent
        self.intervals: list[list[Tally]] = []
        self.series = Series()
        self.lag = Quantiles()
        """Microseconds by which the generator sent later than it should."""
        self.ok = 0
        self.submitted = 0
        self.offered = 0
        self.not_good = 0

    def sent(self, kind: int, at: float, lag: float) -> None:
        """A request that was due at ``at`` was sent, so many seconds late."""
        self.lag.add(lag * 1e6)
        self.submitted += 1
        self.offered += 1
        self.series.at(at).offered += 1
        self._tally(kind, at).submitted += 1

    def unsent(self, kind: int, at: float) -> None:
        """A request that was due at ``at`` was not sent."""
        self.offered += 1
        self.not_good += 1
        second = self.series.at(at)
        second.offered += 1
        second.unsent += 1
        self._tally(kind, at).unsent += 1

    def ended(
        self, kind: int, at: float, now: float, latency: float, outcome: Outcome, stage: str, detail: str
    ) -> None:
        """A request that was due at ``at`` has ended ``now``."""
        second = self.series.at(at)
        second.outcomes[outcome] += 1
        self._tally(kind, at).ended(latency, outcome, stage, detail)
        if outcome is Outcome.OK:
            self.ok += 1
            second.latency.add(latency * 1e6)
            if self._recent is not None:
                self._recent.ended(now, latency)
        else:
            self.not_good += 1

    def of_intervals(self, first: int = 0, last: int | None = None) -> list[Tally]:
        """By kind, all that was due in the intervals [first, last), or in all of them."""
        together = [Tally() for _ in range(self._kinds)]
        for interval in self.intervals[first:last]:
            for whole, part in zip(together, interval, strict=True):
                whole.merge(part)
        return together

    def _tally(self, kind: int, at: float) -> Tally:
        number = int(at / self._interval)
        while number >= len(self.intervals):
            self.intervals.append([Tally() for _ in range(self._kinds)])
        return self.intervals[number][kind]
