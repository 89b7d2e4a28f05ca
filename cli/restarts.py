"""When to start a child process again: the decision alone, without processes or clocks."""

from __future__ import annotations

FIRST = 0.5
"""Seconds before the first restart; each further one waits twice as long."""
LONGEST = 30.0
"""The longest wait in seconds."""
SETTLED = 60.0
"""A child that ran for so many seconds before it died is trusted again."""


class Restarts:
    """The back-off of one child. Times are seconds on any one clock."""

    def __init__(self) -> None:
        self.count = 0
        self._started = 0.0
        self._delay = FIRST

    def started(self, now: float) -> None:
        self._started = now

    def died(self, now: float) -> float:
        """In how many seconds to start it again."""
        if now - self._started >= SETTLED:
            self._delay = FIRST
        delay = self._delay
        self._delay = min(LONGEST, delay * 2)
        self.count += 1
        return delay
