"""Execution latency of a batch on a type of device, from its profile and the latest measurements.

The schedulable windows use the 99th percentile of the last :data:`KEPT` measurements per batch size, as
Clockwork's controller does (OSDI'20, section 5.3), seeded by the profile and monotone in the batch size.
Downstream terms use means.
"""

from typing import Final

from pipelines.profile import LatencyProfile

KEPT: Final = 10
"""Measurements kept for each batch size; their 99th percentile is their maximum."""
EXPIRES: Final = 10.0
"""Seconds after which a measurement no longer counts, so that one outlier cannot close a stage for ever."""
UNKNOWN: Final = 0.0
"""What is assumed of a model without profile and measurements: run it, and see."""


class LatencyTable:
    """Predicted seconds for batches of 1 to ``max_batch`` on one (model, variant, share, device type)."""

    def __init__(self, max_batch: int, profile: list[tuple[int, float]]) -> None:
        self.max_batch = max_batch
        self._profile: list[float] = _table(profile, max_batch)
        self._upper: list[float] = list(self._profile)
        self._mean: list[float] = list(self._profile)
        self._seen: dict[int, list[tuple[float, float]]] = {}
        self._stale_at = 1e18
        self.version = 0
        """Grows whenever a prediction changed."""

    def upper(self, batch: int) -> float:
        """l(b): what a batch of b may take (99th percentile)."""
        return self._upper[batch if batch <= self.max_batch else self.max_batch]

    def mean(self, batch: int) -> float:
        """d(b): what a batch of b takes on average."""
        return self._mean[batch if batch <= self.max_batch else self.max_batch]

    def observe(self, now: float, batch: int, seconds: float) -> None:
        """Take in a measured execution."""
        if batch < 1 or batch > self.max_batch:
            return
        samples = self._seen.get(batch)
        if samples is None:
            samples = []
            self._seen[batch] = samples
        samples.append((now, seconds))
        if len(samples) > KEPT:
            samples.pop(0)
        worst = 0.0
        total = 0.0
        for _, took in samples:
            total += took
            if took > worst:
                worst = took
        self._mean[batch] = total / len(samples)
        self._stale_at = min(self._stale_at, samples[0][0] + EXPIRES)
        known = self._known(batch, worst)
        if known != self._upper[batch]:
            self._rebuild()

    def expire(self, now: float) -> None:
        """Forget measurements older than :data:`EXPIRES`; the profile takes their place."""
        if now < self._stale_at:
            return
        self._stale_at = 1e18
        for batch in list(self._seen):
            samples = [sample for sample in self._seen[batch] if sample[0] + EXPIRES > now]
            if samples:
                self._seen[batch] = samples
                self._stale_at = min(self._stale_at, samples[0][0] + EXPIRES)
            else:
                del self._seen[batch]
                self._mean[batch] = self._profile[batch]
        self._rebuild()

    def _known(self, batch: int, worst: float) -> float:
        """The bound from measurements alone, kept at or above that of the next smaller batch."""
        below = self._upper[batch - 1] if batch > 1 else 0.0
        return worst if worst > below else below

    def _rebuild(self) -> None:
        """Make the bounds monotone again. A size without measurements is the profile's, scaled by how
        far the nearest measured smaller size is off its own profile."""
        scale = 1.0
        previous = 0.0
        for batch in range(1, self.max_batch + 1):
            samples = self._seen.get(batch)
            profiled = self._profile[batch]
            if samples:
                bound = 0.0
                for _, took in samples:
                    if took > bound:
                        bound = took
                scale = bound / profiled if profiled > 0.0 else 1.0
                value = bound
            else:
                value = profiled * scale
            if value < previous:
                value = previous
            self._upper[batch] = value
            previous = value
        self.version += 1


def _table(profile: list[tuple[int, float]], max_batch: int) -> list[float]:
    """Seconds for batches 0 to ``max_batch`` (index 0 is 0); all :data:`UNKNOWN` without a profile."""
    if not profile:
        return [UNKNOWN] * (max_batch + 1)
    known = LatencyProfile(profile)
    return [0.0, *[known.latency(batch) for batch in range(1, max_batch + 1)]]
