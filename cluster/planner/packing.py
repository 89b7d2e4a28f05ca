"""Nexus' squishy bin packing (SOSP'19): which residual loads can take turns on one device.

Models that share a device run one batch each per duty cycle: a cycle may last as long as the most urgent of them
allows, and within it each has to run what arrives meanwhile.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

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


class Turns:
    """Loads that are to take turns on a device, and whether others can beside them: not all of them are reckoned anew
    for each.

    Their occupancy is the part of the device's time (0 to 1) that they take, None where they cannot take turns. One
    load alone always can. Models whose latency nobody knows take nothing.
    """

    __slots__ = ("_executing", "_known", "_least", "_longest")

    def __init__(self, loads: Sequence[Load]) -> None:
        self._known = [load for load in loads if load[0].known]
        self._longest: float | None = None
        """The cycle in seconds, where that is reckoned: not for one alone."""
        self._executing: float | None = None
        """Seconds of execution in each cycle, likewise."""
        self._least: list[tuple[float, float]] = []
        """(cycle, seconds of execution at least): in a longer cycle they execute no less."""

    def busy(self) -> float | None:
        """Their occupancy."""
        if len(self._known) <= 1:
            return _alone(self._known)
        duty = self._duty()
        return None if duty <= 0.0 else _part(self._now(duty), duty)

    def busy_with(self, load: Load) -> float | None:
        """Their occupancy with another load beside them."""
        if not load[0].known or not self._known:
            return self.busy() if self._known else _alone([load] if load[0].known else [])
        duty, present = longest_duty(*load), self._duty()
        if min(duty, present) <= 0.0:
            return None
        if duty >= present:
            return _part(self._now(present) + _execution(*load, present), present)
        own = _execution(*load, duty)
        shorter = bisect_right(self._least, (duty, math.inf))
        if shorter and self._least[shorter - 1][1] + own > duty:
            return None
        others = _executions(self._known, duty)
        self._least.insert(shorter, (duty, others))
        return _part(others + own, duty)

    def add(self, load: Load) -> None:
        """Another load takes turns with them."""
        if not load[0].known:
            return
        self._known.append(load)
        if self._longest is None:
            return
        duty = longest_duty(*load)
        if duty < self._longest:
            self._longest = duty
            self._executing = None
        elif self._executing is not None:
            self._executing += _execution(*load, self._longest)

    def _duty(self) -> float:
        if self._longest is None:
            self._longest = min(longest_duty(cost, rate) for cost, rate in self._known)
        return self._longest

    def _now(self, duty: float) -> float:
        if self._executing is None:
            self._executing = _executions(self._known, duty)
        return self._executing


def leave(loads: Sequence[Load], most: int) -> int:
    """How many of the first loads have to go so that the others can take turns: the fewest, up to ``most``. It is tried
    with twice as many each time, and then halfway between."""
    duties = [longest_duty(cost, rate) if cost.known else math.inf for cost, rate in loads]
    shortest = list(accumulate(reversed(duties), min))[::-1]

    def suffices(count: int) -> bool:
        known = [load for load in loads[count:] if load[0].known]
        if len(known) <= 1:
            return True
        duty = shortest[count]
        return duty > 0.0 and _executions(known, duty) <= duty

    few, enough = -1, 0
    while enough < most and not suffices(enough):
        few, enough = enough, min(max(1, 2 * enough), most)
    while enough - few > 1:
        middle = (few + enough) // 2
        if suffices(middle):
            enough = middle
        else:
            few = middle
    return enough


def _alone(known: Sequence[Load]) -> float:
    return sum(min(1.0, rate / cost.rate) for cost, rate in known)


def _part(executing: float, duty: float) -> float | None:
    return None if executing > duty else executing / duty


def _executions(known: Sequence[Load], duty: float) -> float:
    return sum(_execution(cost, rate, duty) for cost, rate in known)


def _execution(cost: StageCost, rate: float, duty: float) -> float:
    """Seconds that a load executes in each cycle; infinite where its batch would be too large."""
    elements = duty * rate
    batch = max(1, math.ceil(elements - 1e-9))
    if batch > cost.largest:
        return math.inf
    return cost.latency(batch) * (elements if elements < RARE else 1.0)
