"""Execution latency of a batch on a type of device, from its profile and the latest measurements.

The schedulable windows use the 99th percentile of the last :data:`KEPT` measurements per batch size, as
Clockwork's controller does (OSDI'20, section 5.3), seeded by the profile and monotone in the batch size.
Downstream terms use means. Of ten measurements the 99th percentile is the largest; one that stands alone far above the
others (:data:`APART`) tells nothing of the next ten, though, and is left out until there is another.
"""

from typing import Final

from pipelines.profile import LatencyProfile

KEPT: Final = 10
"""Measurements kept for each batch size; their 99th percentile is their maximum."""
APART: Final = 1.5
"""How many times the second largest measurement the largest is at least, to be left out."""
FEWEST: Final = 3
"""Measurements that there must be before one of them is left out."""
EXPIRES: Final = 10.0
"""Seconds after which a measurement no longer counts, so that one outlier cannot close a stage for ever."""
TOLD: Final = 4
"""Sizes of which :meth:`LatencyTable.measured` tells, and at times one more."""
UNKNOWN: Final = 0.0
"""What is assumed of a model without profile and measurements: run it, and see."""
GAIN: Final = 0.95
"""Without a profile, a batch larger than those measured is assumed to take this part of what would be proportional to
the largest of them: better, so that it is tried, but not by so much that its requests would miss their deadlines."""


class Samples:
    """The latest measurements of one thing: when, how long it took, and what part of that came after execution.
    ``upper`` is their 99th percentile; ``mean`` and ``output`` (of what came after) are means."""

    def __init__(self) -> None:
        self._at: list[float] = []
        self._took: list[float] = []
        self._after: list[float] = []
        self.upper = 0.0
        self.mean = 0.0
        self.output = 0.0

    def add(self, now: float, took: float, after: float = 0.0) -> None:
        self._at.append(now)
        self._took.append(took)
        self._after.append(after)
        if len(self._at) > KEPT:
            del self._at[0], self._took[0], self._after[0]
        self._reckon()

    def count(self) -> int:
        return len(self._at)

    def stale_at(self) -> float:
        """When the oldest no longer counts."""
        return self._at[0] + EXPIRES

    def expire(self, now: float) -> bool:
        """Forget the old ones; whether any is left."""
        while self._at and self._at[0] + EXPIRES <= now:
            del self._at[0], self._took[0], self._after[0]
        if not self._at:
            return False
        self._reckon()
        return True

    def _reckon(self) -> None:
        worst = 0.0
        second = 0.0
        total = 0.0
        for took in self._took:
            total += took
            if took > worst:
                second = worst
                worst = took
            elif took > second:
                second = took
        count = len(self._took)
        if count >= FEWEST and worst > APART * second:
            total -= worst
            worst = second
            count -= 1
        self.upper = worst
        self.mean = total / count
        after = 0.0
        for output in self._after:
            after += output
        # Of what is left where one was left out, outputs have the part that they have of all.
        self.output = after / len(self._after)
        if self.output > self.mean:
            self.output = self.mean


class Inputs:
    """What the latest batches took before their execution, whatever their size: ``base`` + ``per_element`` · batch
    bounds all of it, by the slope of a linear regression; but for one measurement that stands alone."""

    def __init__(self) -> None:
        self._at: list[float] = []
        self._sizes: list[int] = []
        self._took: list[float] = []
        self.base = 0.0
        self.per_element = 0.0

    def seconds(self, batch: int) -> float:
        """What a batch of this size may take; 0 where nothing was measured."""
        return self.base + self.per_element * batch

    def add(self, now: float, batch: int, took: float) -> None:
        if took <= 0.0 and not self._at:
            return  # most models have none
        self._at.append(now)
        self._sizes.append(batch)
        self._took.append(took)
        if len(self._at) > KEPT:
            self._drop_first()
        self._reckon()

    def expire(self, now: float) -> None:
        """Forget the old ones."""
        if self._at and self._at[0] + EXPIRES <= now:
            while self._at and self._at[0] + EXPIRES <= now:
                self._drop_first()
            self._reckon()

    def clear(self) -> None:
        """Forget all."""
        self._at = []
        self._sizes = []
        self._took = []
        self._reckon()

    def _drop_first(self) -> None:
        del self._at[0], self._sizes[0], self._took[0]

    def _reckon(self) -> None:
        if len(self._took) >= FEWEST:
            worst = 0
            for index, took in enumerate(self._took):
                if took > self._took[worst]:
                    worst = index
            self._fit(worst)
            if self._took[worst] > APART * self.seconds(self._sizes[worst]):
                return
        self._fit(-1)

    def _fit(self, left_out: int) -> None:
        """Go by all but the one of this index."""
        count = 0
        size = 0.0
        seconds = 0.0
        for index, took in enumerate(self._took):
            if index != left_out:
                count += 1
                size += self._sizes[index]
                seconds += took
        self.base = 0.0
        self.per_element = 0.0
        if not count:
            return
        size /= count
        seconds /= count
        variance = 0.0
        covariance = 0.0
        for index, took in enumerate(self._took):
            if index != left_out:
                off = self._sizes[index] - size
                variance += off * off
                covariance += off * (took - seconds)
        if variance > count and covariance > 0.0:
            self.per_element = covariance / variance
        for index, took in enumerate(self._took):
            if index != left_out:
                rest = took - self.per_element * self._sizes[index]
                if rest > self.base:
                    self.base = rest


class LatencyTable:
    """Predicted seconds for batches of 1 to ``max_batch`` on one (model, variant, share, device type): ``upper`` and
    ``mean`` from the start of execution until the answers are there, ``busy`` for how long the device is taken by it,
    ``input`` for what comes before."""

    def __init__(self, max_batch: int, profile: list[tuple[int, float]]) -> None:
        self.max_batch = max_batch
        self._points = profile
        self._scale = 1.0
        self._profile: list[float] = _table(profile, max_batch)
        self._upper: list[float] = list(self._profile)
        self._mean: list[float] = list(self._profile)
        self._output: list[float] = []
        """What of the means comes after execution; empty where none was ever measured."""
        self._input = Inputs()
        self._alone = self._upper[1]
        """The bound for a batch of 1, which is asked for most."""
        self._seen: dict[int, Samples] = {}
        self._stale_at = 1e18
        self._lanes: dict[str, LatencyTable] = {}
        self.version = 0
        """Counts the changes of the bounds."""

    def extend(self, max_batch: int, scale: float = 1.0) -> None:
        """Predict batches up to ``max_batch`` from now on, if the table ends below it, by ``scale`` times the profile
        that it was made of."""
        if max_batch > self.max_batch or scale != self._scale:
            self._points = [(batch, seconds * scale / self._scale) for batch, seconds in self._points]
            self._scale = scale
            if max_batch > self.max_batch:
                self.max_batch = max_batch
            max_batch = self.max_batch
            self._profile = _table(self._points, max_batch)
            self._upper = list(self._profile)
            self._mean = list(self._profile)
            if self._output:
                self._output = [0.0] * (max_batch + 1)
            self._rebuild()

    def lane(self, key: str, part: float) -> "LatencyTable":
        """The table of the model's lane of this key (stage.py), whose inputs are at most ``part`` of the largest: a
        profile is of these, and that of smaller ones is taken to be in proportion until they are measured."""
        if part >= 1.0:
            return self
        table = self._lanes.get(key)
        if table is None:
            table = LatencyTable(self.max_batch, [(batch, seconds * part) for batch, seconds in self._points])
            self._lanes[key] = table
        table.extend(self.max_batch)
        return table

    def upper(self, batch: int) -> float:
        """l(b): what a batch of b may take (99th percentile)."""
        if batch == 1:
            return self._alone
        return self._upper[batch if batch <= self.max_batch else self.max_batch]

    def mean(self, batch: int) -> float:
        """d(b): what a batch of b takes on average."""
        return self._mean[batch if batch <= self.max_batch else self.max_batch]

    def busy(self, batch: int) -> float:
        """For how long a batch of b takes the device, on average: its execution alone."""
        size = batch if batch <= self.max_batch else self.max_batch
        return self._mean[size] - self._output[size] if self._output else self._mean[size]

    def input(self, batch: int) -> float:
        """What a batch of b takes between its coming to the device and its execution: inputs made and copied, beside
        other batches' execution; 0 where nothing was measured."""
        return self._input.seconds(batch)

    def observe(self, now: float, batch: int, execution: float, output: float = 0.0, input: float = 0.0) -> bool:
        """Take in what was measured of a batch; whether a bound changed."""
        if batch < 1 or batch > self.max_batch:
            return False
        self._input.add(now, batch, input)
        if output > 0.0 and not self._output:
            self._output = [0.0] * (self.max_batch + 1)
        samples = self._seen.get(batch)
        if samples is None:
            samples = Samples()
            self._seen[batch] = samples
        samples.add(now, execution + output, output)
        self._mean[batch] = samples.mean
        if self._output:
            self._output[batch] = samples.output
        self._stale_at = min(self._stale_at, samples.stale_at())
        known = self._known(batch, samples.upper)
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

    def drift(self) -> float:
        """How many times as long as the profile says batches took of late; 0 where too few were measured to tell, or no
        profile says anything."""
        measured = 0.0
        stated = 0.0
        count = 0
        for size, samples in self._seen.items():
            profiled = self._profile[size]
            if self._points and profiled > 0.0:
                weight = samples.count()
                count += weight
                measured += weight * samples.mean
                stated += weight * profiled
        return measured / stated if count >= KEPT else 0.0

    def forget(self, batch: int) -> None:
        """A probe is about to tell anew what a batch of this size takes: what was measured up to it is in doubt."""
        self._seen = {size: samples for size, samples in self._seen.items() if size > batch}
        self._input.clear()

    def expire(self, now: float) -> None:
        """Forget measurements older than :data:`EXPIRES`; the profile takes their place."""
        for table in self._lanes.values():
            table.expire(now)
        self._input.expire(now)
        if now < self._stale_at:
            return
        self._stale_at = 1e18
        for batch in list(self._seen):
            samples = self._seen[batch]
            if samples.expire(now):
                self._stale_at = min(self._stale_at, samples.stale_at())
            else:
                del self._seen[batch]
        self._rebuild()

    def _known(self, batch: int, worst: float) -> float:
        """The bound from measurements alone, kept at or above that of the next smaller batch."""
        below = self._upper[batch - 1] if batch > 1 else 0.0
        return worst if worst > below else below

    def _rebuild(self) -> None:
        """Bring the predictions in line with the measurements, the bounds monotone. A size without measurements is
        the profile's, scaled by how far the nearest measured size is off its own profile: by its bound where it is
        smaller, by its mean where it is larger, so that one slow large batch does not close a stage for small ones.
        Without a profile, a size is reckoned from the next smaller one."""
        self.version += 1
        sizes = sorted(self._seen)
        at = -1
        """Of the nearest in ``sizes``; where there is no profile, of the nearest that is smaller."""
        scale = 1.0
        mean_scale = 1.0
        part = 0.0
        """Of the means, what outputs take."""
        previous = 0.0
        for batch in range(1, self.max_batch + 1):
            profiled = self._profile[batch]
            if at + 1 < len(sizes) and (
                sizes[at + 1] == batch or (self._points and (at < 0 or sizes[at + 1] * sizes[at] < batch * batch))
            ):
                at += 1
                measured = self._seen[sizes[at]]
                stated = self._profile[sizes[at]]
                scale = measured.upper / stated if stated > 0.0 else 1.0
                mean_scale = measured.mean / stated if stated > 0.0 else 1.0
                part = measured.output / measured.mean if measured.mean > 0.0 else 0.0
            if at >= 0 and sizes[at] == batch:
                value = self._seen[batch].upper
                mean = self._seen[batch].mean
            elif at >= 0 and not self._points:
                growth = GAIN * batch / sizes[at]
                value = self._upper[sizes[at]] * growth
                mean = self._mean[sizes[at]] * growth
            else:
                value = profiled * (scale if at < 0 or batch > sizes[at] else mean_scale)
                mean = profiled * mean_scale
            if value < previous:
                value = previous
            self._upper[batch] = value
            self._mean[batch] = mean
            if self._output:
                self._output[batch] = mean * part
            previous = value
        self._alone = self._upper[1]


def _table(profile: list[tuple[int, float]], max_batch: int) -> list[float]:
    """Seconds for batches 0 to ``max_batch`` (index 0 is 0); all :data:`UNKNOWN` without a profile."""
    if not profile:
        return [UNKNOWN] * (max_batch + 1)
    known = LatencyProfile(profile)
    return [0.0, *[known.latency(batch) for batch in range(1, max_batch + 1)]]
