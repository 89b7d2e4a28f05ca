"""Which end of the queue goes first: PARD's adaptive order (arXiv 2602.08747, section on adaptive priority).

The load factor μ = T_in / T_m compares a stage's arrivals with what it can run. Above 1 + ε the highest budget goes
first (HBF): the old ones are lost anyway. Below 1 - ε the lowest (LBF). In between the order stays as it is, so that
noise does not turn it to and fro (delayed transition); ε is how far the arrivals stray from their own sliding mean.
"""

from typing import Final

KEPT: Final = 5
"""Periods over which arrivals are smoothed and compared."""


class Order:
    """One stage's order. ``fixed`` keeps it as it begins; ``delayed`` is whether there is an ε."""

    def __init__(self, fixed: bool, highest_first: bool, delayed: bool) -> None:
        self.fixed = fixed
        self.delayed = delayed
        self.highest_first = highest_first
        self.load = 0.0
        """μ as of the last period."""
        self.epsilon = 0.0
        """What μ has to differ from 1 by."""
        self.bursts = 0.0
        """How far the arrivals of the last periods stray from their mean, as a part of it."""
        self._rates: list[float] = []

    def catch_up(self, periods: int, load: float) -> None:
        """So many periods ended in which nothing arrived; ``load`` is as of now."""
        for _ in range(min(periods, KEPT)):
            self.update(0.0, load)

    def update(self, rate: float, load: float) -> None:
        """A period ended in which elements arrived at ``rate`` per second, ``load`` times what the stage can run."""
        self.load = load
        self._rates.append(rate)
        if len(self._rates) > KEPT:
            self._rates.pop(0)
        self.bursts = spread(self._rates)
        if self.fixed:
            return
        self.epsilon = self.bursts if self.delayed else 0.0
        if load > 1.0 + self.epsilon:
            self.highest_first = True
        elif load < 1.0 - self.epsilon:
            self.highest_first = False


def spread(rates: list[float]) -> float:
    """ε = Σ|T_in − T_s| / ΣT_in, T_s being the sliding mean."""
    total = sum(rates)
    if total <= 0.0:
        return 0.0
    mean = total / len(rates)
    strayed = 0.0
    for rate in rates:
        strayed += abs(rate - mean)
    return strayed / total
