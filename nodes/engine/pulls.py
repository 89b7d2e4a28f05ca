"""When a device asks for its next batch: just in time."""

from typing import Final

LEAD: Final = 0.002
"""Seconds, beside the measured round trip and the inputs' time, by which a pull goes ahead of the running batch's
end."""
MAX_TRIP: Final = 0.1
"""Seconds that a round trip is taken to be at most: a grant that lay in a frozen socket says nothing of the next."""
WEIGHT: Final = 0.2
"""Of a new measurement in a moving mean."""


class Pulls:
    """The pulls of a device: at most one is unanswered."""

    def __init__(self) -> None:
        self.seq = 0
        self.open = False
        """Whether one is unanswered."""
        self.round_trip = 0.0
        """Seconds between a pull and its grant, less what the shard held it for; a moving mean."""
        self.input_time = 0.0
        """Seconds that a batch's inputs take before it can execute; a moving mean."""

    def send(self) -> int:
        """The number of a new pull."""
        self.open = True
        self.seq += 1
        return self.seq

    def answered(self, now: float, seq: int, left_at: float) -> None:
        """A grant for a pull came, which left the shard at ``left_at`` at the earliest."""
        if seq == self.seq:
            self.open = False
            trip = min(now - left_at, MAX_TRIP)
            self.round_trip += WEIGHT * (trip - self.round_trip) if self.round_trip else trip

    def took_in(self, seconds: float) -> None:
        """A batch's inputs took so long."""
        self.input_time += WEIGHT * (seconds - self.input_time)

    def time(self, free_at: float) -> float:
        """When to pull for a device that gets free at ``free_at``."""
        return free_at - LEAD - self.round_trip - self.input_time
