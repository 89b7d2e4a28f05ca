"""Nexus' squishy bin packing (SOSP'19): which residual loads can take turns on one device.

Models that share a device run one batch each per duty cycle: a cycle may last as long as the most urgent of them
allows, and within it each has to run what arrives meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cluster.planner.costs import StageCost

RARE = 0.1
"""A model of which fewer batches than this arrive in a duty cycle has none in most cycles."""

Load = tuple[StageCost, float]
"""A model on a type of device, and the elements per second that it is to run there."""


def longest_duty(cost: StageCost, rate: float) -> float:
    """The longest duty cycle in seconds for a load: its batches are as large as what arrives within a cycle, and cycle
    and execution together fit into the stage's part of the SLO. 0 or less where not even a batch of 1 fits."""
    if rate <= 0.0:
        return cost.part - cost.latency(1)
    low, high = 1, cost.largest
    # part - l(b) falls with b, b / rate rises: the best lies where they cross.
    while low < high:
        middle = (low + high) // 2
        if middle / rate >= cost.part - cost.latency(middle):
            high = middle
        else:
            low = middle + 1
    best = min(cost.part - cost.latency(low), low / rate)
    if low > 1:
        best = max(best, min(cost.part - cost.latency(low - 1), (low - 1) / rate))
    return best


def occupancy(loads: Sequence[Load]) -> float | None:
    """The part of a device's time (0 to 1) that the loads take when they take turns; None where they cannot. One load
    alone always can. Models whose latency nobody knows take nothing."""
    known = [(cost, rate) for cost, rate in loads if cost.known]
    if len(known) <= 1:
        return sum(min(1.0, rate / cost.rate) for cost, rate in known)
    duty = min(longest_duty(cost, rate) for cost, rate in known)
    if duty <= 0.0:
        return None
    busy = 0.0
    for cost, rate in known:
        batch = max(1, math.ceil(duty * rate - 1e-9))
        if batch > cost.largest:
            return None
        busy += cost.latency(batch) * (duty * rate if duty * rate < RARE else 1.0)
        if busy > duty:
            return None
    return busy / duty
