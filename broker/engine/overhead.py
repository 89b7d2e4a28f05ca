"""How long a batch takes beside its execution: messages, processes that wait for the processor."""

from typing import Final

LEAST: Final = 0.0001
MOST: Final = 0.05
"""Bounds of the estimate in seconds: less is not credible on a network, more is a fault and no overhead."""
DECAY: Final = 0.02
"""By how much of the difference each smaller measurement lowers the estimate."""


class Overhead:
    """A slowly falling maximum of measured times in seconds: rises at once, forgets within about fifty batches.
    Symphony uses constants here (100 µs of jitter, 2 ms of response), which hold on one network only."""

    def __init__(self, initial: float) -> None:
        self.seconds = initial

    def observe(self, seconds: float) -> bool:
        """Take in one measurement; whether the estimate rose, so that windows open earlier."""
        if seconds > MOST:
            seconds = MOST
        if seconds > self.seconds:
            self.seconds = seconds
            return True
        self.seconds += DECAY * (seconds - self.seconds)
        if self.seconds < LEAST:
            self.seconds = LEAST
        return False
