"""λ: how sure the proactive drop wants to be that a request makes it.

PARD drops a request whose slack (what is left of its budget beyond queueing and execution) is less than w, the
λ-quantile of the batch waits summed over the stages to come. A request with a slack of x makes it with probability
F(x), F being the distribution of that sum; so it is dropped iff it would make it with a probability below λ. Too small
a λ has GPU time spent on requests that are dropped later on; too large a λ turns away some that would have made it.
Both are counted in requests per second that could have been good:

- *late*: Σ over the stages of what they drop times the part of a request's GPU time that is behind it by then;
- *early*: of what the first stage drops, as much as the idle devices of the tightest stage could have taken, times the
  probability that such a request makes it: the mean of F over the slacks up to w, from the merged sketches.

λ lies between :data:`LOWEST` and :data:`HIGHEST` in the proportion of late to late + early. It starts, and stays
where neither is found, at :data:`START`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from cluster.tuning.merge import StageState
from cluster.tuning.sketch import LEAST, distribution

START: Final = 0.1
LOWEST: Final = 0.05
HIGHEST: Final = 0.2
"""The range in which the paper finds the best, with some room."""
SMOOTHING: Final = 0.1
"""Weight of the newest second."""
DOUBT: Final = 0.002
"""What START counts for, as a part of the arrivals that late and early drops are weighed against."""
BINS: Final = 256
TURNS: Final = 0.005
"""By how much λ must be wrong before it is changed."""


class QuantileTuner:
    """Of one pipeline."""

    def __init__(self) -> None:
        self.quantile = START
        self.late = 0.0
        self.early = 0.0
        """Requests per second, smoothed."""
        self._arrived = 0.0

    def observe(self, stages: Sequence[StageState]) -> None:
        """Another second; the stages in topological order."""
        first = stages[0]
        self._arrived += SMOOTHING * (first.arrived - self._arrived)
        self.late += SMOOTHING * (late_drops(stages) - self.late)
        self.early += SMOOTHING * (early_drops(stages, self.quantile) - self.early)
        doubt = DOUBT * self._arrived
        total = self.late + self.early + doubt
        if total <= 0.0:
            return
        begin = (START - LOWEST) / (HIGHEST - LOWEST)
        wanted = min(LOWEST + (HIGHEST - LOWEST) * (self.late + begin * doubt) / total, HIGHEST)
        if abs(wanted - self.quantile) >= TURNS:
            self.quantile = wanted


def late_drops(stages: Sequence[StageState]) -> float:
    """Requests per second that the GPU time would have served which was spent on those that were dropped later on."""
    costs = _costs(stages)
    whole = sum(costs)
    if whole <= 0.0:
        return 0.0
    spent = late = 0.0
    for stage, cost in zip(stages, costs, strict=True):
        late += stage.dropped * spent / whole
        spent += cost
    return late


def early_drops(stages: Sequence[StageState], quantile: float) -> float:
    """Requests per second that were turned away at the first stage, and would have made it on devices that idled."""
    spare = float("inf")
    for stage in stages:
        if stage.busy > 0.0:
            rate = stage.started * _per_request(stages, stage)
            spare = min(spare, rate * max(stage.devices - stage.busy, 0.0) / stage.busy)
    return min(stages[0].dropped, spare) * chance(stages[1:], quantile)


def chance(behind: Sequence[StageState], quantile: float) -> float:
    """With which probability somebody makes it who was turned away for having less slack than the batch waits of the
    stages ``behind``: the mean of their sum's distribution function below its ``quantile``."""
    longest = sum(stage.execution for stage in behind)
    if longest <= LEAST:
        return 0.0
    width = longest / (BINS - 1)
    summed = distribution([], width, BINS)
    for stage in behind:
        both = np.convolve(summed, distribution(stage.waits, width, BINS))
        summed = both[:BINS]
        summed[-1] += both[BINS:].sum()
    below = np.cumsum(summed)
    within = below[below <= quantile]
    return float(within.mean()) if len(within) else 0.0


def _costs(stages: Sequence[StageState]) -> list[float]:
    """Each stage's GPU seconds for one request."""
    return [
        stage.busy / stage.started / max(_per_request(stages, stage), 1e-9) if stage.started > 0.0 else 0.0
        for stage in stages
    ]


def _per_request(stages: Sequence[StageState], stage: StageState) -> float:
    """Requests for one element of this stage: below 1 where requests bring several (map stages)."""
    through = stages[0].started
    return min(through / stage.arrived, 1.0) if stage.arrived > 0.0 and through > 0.0 else 1.0
