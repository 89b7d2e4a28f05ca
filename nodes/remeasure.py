"""Finding out while a model serves that its profile does not hold any more."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Final

from nodes.measured import Measured
from pipelines.profile import DRIFTED, LatencyProfile

BATCHES: Final = 50
"""Batches that have to tell of a drift."""
PAUSE: Final = 600.0
"""Seconds for which a model's profile then stays as it is: hosts of one type that are not alike would else change it to
and fro."""


class _Seen:
    def __init__(self, measured: Measured) -> None:
        self.measured = measured
        self.profile = LatencyProfile(measured.profile)
        self.ratios: deque[float] = deque(maxlen=BATCHES)


class Remeasure:
    """The batches of one device's models against what is known of them."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}
        self._changed_at: dict[str, float] = {}

    def note(self, now: float, key: str, batch: int, seconds: float, measured: Measured) -> Measured | None:
        """A batch took ``seconds`` from the start of its execution until its answers were there. What is to be known of
        the model from now on, where :data:`BATCHES` in a row say, by their median, that it takes longer or less than is
        known by more than :data:`DRIFTED`: its profile in proportion."""
        if not measured.profile:
            return None
        seen = self._seen.get(key)
        if seen is None or seen.measured is not measured:
            seen = self._seen[key] = _Seen(measured)
        expected = seen.profile.latency(batch)
        if expected <= 0.0:
            return None
        seen.ratios.append(seconds / expected)
        if len(seen.ratios) < BATCHES or now < self._changed_at.get(key, -PAUSE) + PAUSE:
            return None
        ratio = statistics.median(seen.ratios)
        if abs(ratio - 1.0) <= DRIFTED:
            return None
        self._changed_at[key] = now
        profile = [(size, known * ratio) for size, known in measured.profile]
        return Measured(profile, measured.load_seconds, measured.memory_mb)

    def keep(self, keys: set[str]) -> None:
        """Forget all other models."""
        self._seen = {key: seen for key, seen in self._seen.items() if key in keys}
        self._changed_at = {key: at for key, at in self._changed_at.items() if key in keys}
