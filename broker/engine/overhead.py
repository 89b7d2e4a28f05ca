"""How long a batch takes beside its execution: messages, copies of inputs, processes that wait for the processor."""

from typing import Final

LEAST: Final = 0.0001
MOST: Final = 0.05
"""Bounds of the estimate in seconds: less is not credible on a network, more is a fault and no overhead."""
DECAY: Final = 0.02
"""By how much of the difference each smaller measurement lowers the estimate; of the means that the slope is found
by, the weight of the newest."""
PACE: Final = 25.0
"""As how many measurements each second without one counts: after a time in which nearly all was dropped because of what
was measured before it, a few probes tell that it is over."""


class Overhead:
    """``base`` + ``per_element`` · batch, in seconds. The slope is that of a fading linear regression; the base is a
    slowly falling maximum of what the slope does not explain: it rises at once, and forgets within about fifty
    batches or a few seconds. Symphony uses constants here (100 µs, 50 µs a request, 2 ms of response), which hold on
    one network only."""

    def __init__(self, initial: float) -> None:
        self.base = initial
        self.per_element = 0.0
        self._mean_size = 0.0
        self._mean_seconds = 0.0
        self._variance = 0.0
        self._covariance = 0.0
        self._measured_at = -1.0

    def seconds(self, batch: int) -> float:
        """What a batch of this size takes."""
        return self.base + self.per_element * batch

    def mean(self, batch: int) -> float:
        """What a batch of this size takes on average: what is to be expected of several, one after another, whose
        worst cases do not come together."""
        if self._mean_seconds == 0.0:
            return self.seconds(batch)
        mean = self._mean_seconds + self.per_element * (batch - self._mean_size)
        return mean if mean > LEAST else LEAST

    def observe(self, now: float, batch: int, seconds: float) -> bool:
        """Take in one measurement; whether the base rose, so that windows open earlier."""
        weight = DECAY
        missing = (now - self._measured_at) * PACE
        if missing > 1.0 and self._measured_at >= 0.0:
            weight = 1.0 - float((1.0 - DECAY) ** missing)
        self._measured_at = now
        if seconds > MOST:
            seconds = MOST
        if self._mean_seconds == 0.0:
            self._mean_size = float(batch)
            self._mean_seconds = seconds
        off_size = batch - self._mean_size
        off_seconds = seconds - self._mean_seconds
        self._mean_size += weight * off_size
        self._mean_seconds += weight * off_seconds
        self._variance += weight * (off_size * off_size - self._variance)
        self._covariance += weight * (off_size * off_seconds - self._covariance)
        slope = self._covariance / self._variance if self._variance > 1.0 else 0.0
        self.per_element = slope if slope > 0.0 else 0.0
        rest = seconds - self.per_element * batch
        if rest > self.base:
            self.base = rest
            return True
        self.base += weight * (rest - self.base)
        if self.base < LEAST:
            self.base = LEAST
        return False
