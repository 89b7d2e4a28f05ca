"""How long requests wait at a stage: what PARD's state planner knows of it (arXiv 2602.08747, section 4)."""

from typing import Final

PRIOR: Final = 5.0
"""How many requests of the newest period what others found counts for."""
BINS: Final = 256
"""Resolution of a distribution of waits."""


class Waits:
    """Waits of the last periods (one second each): ``queued`` is the mean queueing delay, weighted linearly from
    the newest period down to nothing for one that is ``history`` older; the batch waits are kept as
    they are, for their distribution."""

    def __init__(self, history: float) -> None:
        self.queued = 0.0
        """q: seconds."""
        self.last = 0.0
        """Mean queueing delay of the last period alone."""
        self.longest = 0.0
        """The longest time that a batch's requests took here in the last period, execution included (wcl)."""
        self.prior = -1.0
        """What others found q to be, for where there is little to go by; negative where nobody did."""
        self.newest: list[float] = []
        """The batch waits of the last period."""
        self.periods = 0
        """How many have ended."""
        self.history = history
        self._sums: list[float] = []
        self._counts: list[int] = []
        self._batch_waits: list[list[float]] = []
        self._sum = 0.0
        self._count = 0
        self._longest = 0.0
        self._now: list[float] = []

    def note(self, queued: float, batch_wait: float) -> None:
        """A request waited in the queue, and then for its batch to start."""
        self._sum += queued
        self._count += 1
        self._now.append(batch_wait)

    def note_queued(self, total: float, count: int) -> None:
        """``count`` requests waited ``total`` seconds between them."""
        self._sum += total
        self._count += count

    def took(self, seconds: float) -> None:
        """A request was here for so long."""
        if seconds > self._longest:
            self._longest = seconds

    def end_period(self) -> None:
        """Bring the figures up to date; a period without requests counts for nothing."""
        self._sums.append(self._sum)
        self._counts.append(self._count)
        self._batch_waits.append(self._now)
        while len(self._sums) > 1 and len(self._sums) >= self.history + 1.0:
            self._sums.pop(0)
            self._counts.pop(0)
            self._batch_waits.pop(0)
        self.periods += 1
        self.newest = self._now
        self.last = self._sum / self._count if self._count else 0.0
        self._sum = 0.0
        self._count = 0
        self._now = []
        self.longest = self._longest
        self._longest = 0.0
        weighted = 0.0
        weights = 0.0
        weight = float(len(self._sums))
        if weight > self.history:
            weight = self.history
        if self.prior >= 0.0:
            weights = PRIOR * weight
            weighted = weights * self.prior
        for at in range(len(self._sums) - 1, -1, -1):
            weighted += weight * self._sums[at]
            weights += weight * self._counts[at]
            weight -= 1.0
        self.queued = weighted / weights if weights > 0.0 else 0.0

    def distribution(self, width: float) -> list[float]:
        """The batch waits' probabilities in bins of ``width`` seconds, the last one open; all in the first where
        nothing is known."""
        bins = [0.0] * BINS
        total = 0
        for waits in self._batch_waits:
            for wait in waits:
                at = int(wait / width) if width > 0.0 else 0
                bins[at if at < BINS else BINS - 1] += 1.0
                total += 1
        if total == 0:
            bins[0] = 1.0
            return bins
        for at in range(BINS):
            bins[at] /= total
        return bins


def convolve(one: list[float], other: list[float]) -> list[float]:
    """The distribution of the sum of two waits (same bins; what lies beyond the last is put into it)."""
    result = [0.0] * BINS
    for i in range(BINS):
        p = one[i]
        if p > 0.0:
            for j in range(BINS):
                q = other[j]
                if q > 0.0:
                    at = i + j
                    result[at if at < BINS else BINS - 1] += p * q
    return result


def quantile(bins: list[float], part: float, width: float, count: int) -> float:
    """Where ``part`` of a distribution lies below, in seconds; ``count`` waits were added up in it, each of which lies
    half a bin above its bin's edge on average."""
    below = 0.0
    for at in range(BINS):
        p = bins[at]
        if p > 0.0 and below + p >= part:
            inside = (part - below) / p
            return (at + inside + 0.5 * (count - 1)) * width
        below += p
    return BINS * width
