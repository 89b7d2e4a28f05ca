"""The window over which queueing delays are averaged, by how bursty the arrivals are.

PARD (arXiv 2602.08747) finds 5-7 s best where the coefficient of variation of the per-second rate is below 0.5, 3-5 s
from 0.5 to 1, 1-3 s above. The window goes through these ranges evenly. What a steady stream varies by because
requests are few (its mean, if they come as a Poisson process) is no burst and is not counted: a slow stream needs a
long window, to have enough to average.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import numpy as np

START: Final = 5.0
KNOWN_AFTER: Final = 10
"""Seconds of arrivals before which the window stays at START."""
LOOKS_BACK: Final = 60
"""Seconds of arrivals that are looked at."""
TURNS: Final = 0.5
"""By how many seconds the window must be wrong before it is changed: each change costs a moment of the estimate."""
VARIATIONS: Final = (0.0, 0.5, 1.0, 2.0)
WINDOWS: Final = (7.0, 5.0, 3.0, 1.0)


class WindowTuner:
    """Of one pipeline."""

    def __init__(self) -> None:
        self.seconds = START
        self.variation = 0.0
        """The coefficient of variation, without the Poisson process' own."""
        self._rates: deque[float] = deque(maxlen=LOOKS_BACK)

    def observe(self, arrived: float) -> None:
        """Another second with ``arrived`` requests."""
        self._rates.append(arrived)
        if len(self._rates) < KNOWN_AFTER:
            return
        rates = np.array(self._rates)
        mean = float(rates.mean())
        if mean <= 0.0:
            return
        self.variation = max(float(rates.var()) - mean, 0.0) ** 0.5 / mean
        wanted = float(np.interp(self.variation, VARIATIONS, WINDOWS))
        if abs(wanted - self.seconds) >= TURNS:
            self.seconds = wanted
