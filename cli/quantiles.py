"""Quantiles of any number of values, in bounded memory.

As :mod:`cluster.tuning.sketch`, but to a thousandth: that one's ten per cent are made for reports every second, and
would hide what predictions are about.
"""

from __future__ import annotations

from math import ceil, exp, log

ERROR = 0.001
"""How far a quantile may be from the true one, as a part of it."""


class Quantiles:
    """Of values from 0 on; those below 1 count as 0 (values are microseconds, or so). With a larger ``error`` (see
    :data:`ERROR`) they take less memory, in proportion."""

    def __init__(self, error: float = ERROR) -> None:
        self._error = error
        self._width = log((1.0 + error) / (1.0 - error))
        self.count = 0
        self.most = 0.0
        self._bins: dict[int, int] = {}
        """Values by ⌈ln value / width⌉: some 20,000 bins between a microsecond and a week."""
        self._zeros = 0

    def add(self, value: float, count: int = 1) -> None:
        self.count += count
        if value > self.most:
            self.most = value
        if value < 1.0:
            self._zeros += count
        else:
            number = ceil(log(value) / self._width)
            self._bins[number] = self._bins.get(number, 0) + count

    def quantile(self, part: float) -> float | None:
        """The least value that at least ``part`` (0 to 1) of them do not exceed (the nearest rank); None where there
        are none."""
        if not self.count:
            return None
        rank = max(ceil(part * self.count), 1)
        seen = self._zeros
        if seen >= rank:
            return 0.0
        for number in sorted(self._bins):
            seen += self._bins[number]
            if seen >= rank:
                return min(self._value(number), self.most)
        return self.most

    def merge(self, other: Quantiles, by: float = 1.0) -> None:
        """Take in another one's values, each multiplied."""
        most = max(self.most, other.most * by)
        if other._zeros:
            self.add(0.0, other._zeros)
        for number, count in other._bins.items():
            self.add(other._value(number) * by, count)
        self.most = most

    def _value(self, number: int) -> float:
        """The value that is as far from both edges of its bin, as a part of them."""
        return exp(number * self._width) * (1.0 - self._error)
