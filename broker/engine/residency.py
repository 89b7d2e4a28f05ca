"""What a device that cannot hold all its models at once has in its memory, and what it has in its host's.

Models lie ready in the host's memory; LOAD brings one into the device's, UNLOAD makes room (paging.py decides). A model
that is being unloaded takes no more room here: a device carries out what it is told to load and unload in order.
"""

from typing import TYPE_CHECKING, Final

from broker.engine.predictor import LatencyTable, Samples

if TYPE_CHECKING:
    from broker.engine.devices import Device
    from broker.engine.stage import Stage

HELD: Final = 0
"""In the host's memory alone."""
LOADING: Final = 1
RESIDENT: Final = 2
UNLOADING: Final = 3

BACK_OFF: Final = 0.05
MAX_BACK_OFF: Final = 30.0
"""What a device refused, or failed at, is asked of it again after BACK_OFF seconds, doubled each time up to
MAX_BACK_OFF."""
TICK: Final = 1e-9
"""Seconds by which moments that were computed in two ways may differ."""
ROUNDING: Final = 1e-6
"""MiB by which sums may be off."""


class PagedModel:
    """A model in the memory of a device's host, and at times in the device's; ``load_seconds`` is what bringing it
    there is expected to take."""

    def __init__(self, key: str, table: LatencyTable, device: "Device", memory_mb: float, load_seconds: float) -> None:
        self.key = key
        self.table = table
        self.device = device
        self.memory_mb = memory_mb
        self.load_seconds = load_seconds
        self._loads = Samples()
        self.state = HELD
        self.stage: Stage | None = None
        """Where its requests wait, if this shard serves its pipeline."""
        self.expected_at = 0.0
        """When the LOAD under way should have ended."""
        self.used_at = 0.0
        """When it was last brought there, or given a batch."""
        self.retry_at = 0.0
        """Before that it is not asked for again what it failed at."""
        self._failures = 0

    def ready_at(self, now: float) -> float:
        """When it can be in the device's memory at the earliest, as far as is known."""
        if self.state == RESIDENT:
            return now
        if self.state == LOADING:
            return self.expected_at if self.expected_at > now else now
        begin = self.retry_at if self.retry_at > now else now
        return begin + self.load_seconds

    def latest_wish(self, start: float) -> float:
        """Until when asking for it can have it there by ``start``; 0 where it is too late for that already."""
        if self.state == LOADING:
            return start if self.expected_at <= start + TICK else 0.0
        begin = start - self.load_seconds
        return begin if begin >= self.retry_at - TICK else 0.0

    def took(self, now: float, seconds: float) -> None:
        """It was loaded in so many seconds."""
        self._failures = 0
        self.retry_at = 0.0
        self._loads.add(now, seconds)
        self.load_seconds = self._loads.upper

    def failed(self, now: float) -> None:
        """It could not be loaded, or not be unloaded."""
        self.retry_at = now + min(BACK_OFF * 2.0**self._failures, MAX_BACK_OFF)
        if self._failures < 20:
            self._failures += 1


class Residency:
    """One device's ``budget`` of memory in MiB and the models that share it."""

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.models: dict[str, PagedModel] = {}
        """All that can be there, by key."""
        self.resident: dict[str, PagedModel] = {}
        """Those that are there, the least recently used first."""
        self.taken = 0.0
        """MiB of those that are there or on their way."""
        self.loading: PagedModel | None = None
        """The one on its way."""
        self.paged_until = 0.0
        """When the last LOAD or UNLOAD ended: batches may have waited for that."""

    def room(self) -> float:
        """MiB that are free; negative where an unload failed that others counted on."""
        return self.budget - self.taken + ROUNDING

    def enter(self, now: float, model: PagedModel) -> None:
        """It is there."""
        if model.state != LOADING:
            self.taken += model.memory_mb
        model.state = RESIDENT
        model.used_at = now
        self.resident[model.key] = model

    def load(self, model: PagedModel, expected_at: float) -> None:
        """It is on its way."""
        self.taken += model.memory_mb
        model.state = LOADING
        model.expected_at = expected_at
        self.loading = model

    def leave(self, model: PagedModel, state: int) -> None:
        """It is not there (any more): HELD or UNLOADING."""
        if model.state == RESIDENT or model.state == LOADING:
            self.taken -= model.memory_mb
        self.resident.pop(model.key, None)
        model.state = state
        if not self.resident and self.loading is None:
            self.taken = 0.0  # no sum of roundings

    def resize(self, model: PagedModel, memory_mb: float) -> None:
        """It takes so much, as is known now."""
        if model.state == RESIDENT or model.state == LOADING:
            self.taken += memory_mb - model.memory_mb
        model.memory_mb = memory_mb

    def use(self, now: float, key: str) -> None:
        """It was given a batch."""
        model = self.resident.pop(key)
        model.used_at = now
        self.resident[key] = model
