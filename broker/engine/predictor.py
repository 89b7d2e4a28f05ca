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
TOLD: Final = 4
"""Sizes of which :meth:`LatencyTable.measured` tells, and at times one more."""
UNKNOWN: Final = 0.0
"""What is assumed of a model without profile and measurements: run it, and see."""
GAIN: Final = 0.95
"""Without a profile, a batch larger than those measured is assumed to take this part of what would be proportional to
the largest of them: better, so that it is tried, but not by so much that its requests would miss their deadlines."""


class LatencyTable:
    """Predicted seconds for batches of 1 to ``max_batch`` on one (model, variant, share, device type)."""

    def __init__(self, max_batch: int, profile: list[tuple[int, float]]) -> None:
        self.max_batch = max_batch
        self._points = profile
        self._profile: list[float] = _table(profile, max_batch)
        self._upper: list[float] = list(self._profile)
        self._mean: list[float] = list(self._profile)
        self._alone = self._upper[1]
        """The bound for a batch of 1, which is asked for most."""
        self._seen: dict[int, list[tuple[float, float]]] = {}
        self._stale_at = 1e18
        self.version = 0
        """Counts the changes of the bounds."""

    def extend(self, max_batch: int) -> None:
        """Predict batches up to ``max_batch`` from now on, if the table ends below it."""
        if max_batch > self.max_batch:
            self.max_batch = max_batch
            self._profile = _table(self._points, max_batch)
            self._upper = list(self._profile)
            self._mean = list(self._profile)
            self._rebuild()

    def upper(self, batch: int) -> float:
        """l(b): what a batch of b may take (99th percentile)."""
        if batch == 1:
            return self._alone
        return self._upper[batch if batch <= self.max_batch else self.max_batch]

    def mean(self, batch: int) -> float:
        """d(b): what a batch of b takes on average."""
        return self._mean[batch if batch <= self.max_batch else self.max_batch]

    def observe(self, now: float, batch: int, seconds: float) -> bool:
        """Take in a measured execution; whether a bound changed."""
        if batch < 1 or batch > self.max_batch:
            return False
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
        if known == self._upper[batch]:
            return False
        self._rebuild()
        return True

    def measured(self) -> list[tuple[int, float]]:
        """(batch, mean seconds) as measured of late, ascending; of many sizes :data:`TOLD` that are spread out."""
        if not self._seen:
            return []
        sizes = sorted(self._seen)
        largest = sizes[-1]
        apart = (largest / sizes[0]) ** (1.0 / (TOLD - 1)) - 1e-9
        chosen: list[tuple[int, float]] = []
        next_from = 0.0
        for size in sizes:
            if size >= next_from or size == largest:
                chosen.append((size, self._mean[size]))
                next_from = size * apart
        return chosen

    def forget(self, batch: int) -> None:
        """A probe is about to tell anew what a batch of this size takes: what was measured up to it is in doubt."""
        self._seen = {size: samples for size, samples in self._seen.items() if size > batch}

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
        self._rebuild()

    def _known(self, batch: int, worst: float) -> float:
        """The bound from measurements alone, kept at or above that of the next smaller batch."""
        below = self._upper[batch - 1] if batch > 1 else 0.0
        return worst if worst > below else below

    def _rebuild(self) -> None:
        """Bring the predictions in line with the measurements, the bounds monotone. A size without measurements is
        the profile's, scaled by how far the nearest measured smaller size is off its own profile."""
        self.version += 1
        scale = 1.0
        mean_scale = 1.0
        measured = 0
        previous = 0.0
        for batch in range(1, self.max_batch + 1):
            samples = self._seen.get(batch)
            profiled = self._profile[batch]
            if samples:
                value = 0.0
                total = 0.0
                for _, took in samples:
                    total += took
                    if took > value:
                        value = took
                mean = total / len(samples)
                measured = batch
                scale = value / profiled if profiled > 0.0 else 1.0
                mean_scale = mean / profiled if profiled > 0.0 else 1.0
            elif measured and not self._points:
                growth = GAIN * batch / measured
                value = self._upper[measured] * growth
                mean = self._mean[measured] * growth
            else:
                value = profiled * scale
                mean = profiled * mean_scale
            if value < previous:
                value = previous
            self._upper[batch] = value
            self._mean[batch] = mean
            previous = value
        self._alone = self._upper[1]


def _table(profile: list[tuple[int, float]], max_batch: int) -> list[float]:
    """Seconds for batches 0 to ``max_batch`` (index 0 is 0); all :data:`UNKNOWN` without a profile."""
    if not profile:
        return [UNKNOWN] * (max_batch + 1)
    known = LatencyProfile(profile)
    return [0.0, *[known.latency(batch) for batch in range(1, max_batch + 1)]]
