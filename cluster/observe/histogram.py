"""What rarely happens and takes time, counted for one of the families."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from cluster.observe.figures import HistogramFigures


class Histogram:
    """``bounds`` are the family's. (A shard's engine has its own, for what happens all the time.)"""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._buckets = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._buckets[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def figures(self) -> HistogramFigures:
        return HistogramFigures(self._buckets.copy(), self._sum)
