"""The straight line nearest to measured latencies: what a batch costs, and what each of its elements adds."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np


class LinearFit(msgspec.Struct, frozen=True):
    """``alpha * b + beta`` seconds for a batch of b; ``error``: the largest part by which a measured latency is off the
    line, 0.1 being 10 % of it."""

    alpha: float
    beta: float
    error: float

    def seconds(self, batch: float) -> float:
        return self.alpha * batch + self.beta


def fit_line(points: Sequence[tuple[int, float]]) -> LinearFit:
    """The least-squares fit to (batch, seconds); through the origin where there is one batch size only."""
    batches, seconds = (np.array(column, float) for column in zip(*points, strict=True))
    if len(points) == 1:
        return LinearFit(float(seconds[0] / batches[0]), 0.0, 0.0)
    alpha, beta = (float(value) for value in np.polyfit(batches, seconds, 1))
    off = np.abs(alpha * batches + beta - seconds) / np.maximum(seconds, 1e-9)
    return LinearFit(alpha, beta, float(off.max()))
