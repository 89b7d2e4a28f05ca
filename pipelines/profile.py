"""Latency profiles: how long a batch of b takes."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from typing import Final

from pipelines.spec import Profile

DRIFTED: Final = 0.2
"""The part of a profile by which measurements may be off before it is taken not to hold any more."""


class LatencyProfile:
    """Execution latency in seconds by batch size, monotone: a larger batch is never predicted to be faster.

    Between two known sizes it is interpolated, above the largest extended by the last slope; below the smallest
    it is that one's latency. A single known size is extended in proportion.
    """

    __slots__ = ("_batches", "_seconds", "_slope")

    def __init__(self, points: Iterable[tuple[int, float]]) -> None:
        """``points``: (batch, seconds) in any order, such as ``ModelReport.profile``. Where noise made a larger batch
        faster, the smaller one's latency holds for both. Raises ValueError for no points, a batch below 1, or a
        latency that is negative or not finite."""
        slowest: dict[int, float] = {}
        for batch, seconds in points:
            if batch < 1:
                raise ValueError(f"a profile has a batch of {batch}; batches start at 1")
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"a profile has {seconds} s for a batch of {batch}; give a number of 0 or more")
            slowest[batch] = max(seconds, slowest.get(batch, 0.0))
        if not slowest:
            raise ValueError("a profile needs one (batch, seconds) pair at least")
        self._batches = sorted(slowest)
        self._seconds: list[float] = []
        highest = 0.0
        for batch in self._batches:
            highest = max(highest, slowest[batch])
            self._seconds.append(highest)
        if len(self._batches) == 1:
            self._slope = highest / self._batches[0]
        else:
            self._slope = (highest - self._seconds[-2]) / (self._batches[-1] - self._batches[-2])

    @classmethod
    def from_spec(cls, profile: Profile, device_type: str = "") -> LatencyProfile:
        """The profile of a (validated) spec on devices of a type."""
        profile = profile.on(device_type)
        if profile.latency_ms is not None:
            return cls((batch, ms / 1e3) for batch, ms in profile.latency_ms.items())
        alpha, beta = profile.alpha_ms or 0.0, profile.beta_ms or 0.0
        return cls((batch, (alpha * batch + beta) / 1e3) for batch in (1, 2))

    def pairs(self) -> list[tuple[int, float]]:
        """The known (batch, seconds), by batch: what ``ModelReport.profile`` carries."""
        return list(zip(self._batches, self._seconds, strict=True))

    def latency(self, batch: int) -> float:
        """Seconds for a batch of ``batch`` (1 or more)."""
        batches, seconds = self._batches, self._seconds
        at = bisect_left(batches, batch)
        if at == len(batches):
            return seconds[-1] + self._slope * (batch - batches[-1])
        if at == 0 or batches[at] == batch:
            return seconds[at]
        low, high = batches[at - 1], batches[at]
        share = (batch - low) / (high - low)
        return seconds[at - 1] * (1 - share) + seconds[at] * share

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LatencyProfile) and self.pairs() == other.pairs()

    def __hash__(self) -> int:
        return hash(tuple(self.pairs()))

    def __repr__(self) -> str:
        return f"LatencyProfile({self.pairs()!r})"
