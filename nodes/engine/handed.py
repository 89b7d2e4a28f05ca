"""What a device's worker has been handed, and when it is taken to hang."""

from typing import Final

from nodes.engine.models import Model

HANG_FACTOR: Final = 10.0
HANG_GRACE: Final = 1.0
"""A batch hangs that takes HANG_GRACE seconds longer than its pipeline's SLO and than HANG_FACTOR times what was
expected: nobody waits for it any more. Its worker is killed."""
LOAD_GRACE: Final = 5.0
"""A LOAD or an UNLOAD hangs that is unanswered so many seconds, and HANG_FACTOR times what was expected, after it had
to begin."""


class Handed:
    """A batch that the worker has, to begin no earlier than ``earliest`` and no later than ``latest``."""

    def __init__(
        self, batch: int, model: Model, earliest: float, latest: float, expected: float, slo: float, came: float
    ) -> None:
        self.batch = batch
        self.model = model
        self.earliest = earliest
        self.latest = latest
        self.expected = expected
        self.slo = slo
        self.came = came
        self.began = False
        self.began_at = 0.0
        self.overran = False
        """It runs so long that the next batch had to be refused."""

    def begin(self, at: float) -> None:
        """Its execution began."""
        self.began = True
        self.began_at = at

    def free_at(self) -> float:
        """When its execution is expected to end, once it has begun."""
        return self.began_at + self.expected

    def patience(self) -> float:
        """Seconds that it may take."""
        return max(HANG_FACTOR * self.expected, self.slo) + HANG_GRACE

    def hangs_at(self, free: float) -> float:
        """From when on it is taken to hang; ``free`` is since when it could have begun."""
        return (self.began_at if self.began else free) + self.patience()


class Page:
    """A LOAD or an UNLOAD that the worker has, to begin no later than ``latest``."""

    def __init__(self, number: int, model: Model, loads: bool, latest: float, expected: float, asked: bool) -> None:
        self.number = number
        self.model = model
        self.loads = loads
        self.latest = latest
        self.expected = expected
        self.asked = asked
        """By a shard; otherwise nobody waits for an answer."""

    def hangs_at(self) -> float:
        """From when on it is taken to hang."""
        return self.latest + HANG_FACTOR * self.expected + LOAD_GRACE
