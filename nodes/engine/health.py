"""How a device's worker fares: how soon it is started again, and whether it is trusted with several batches at once."""

from typing import Final

BACK_OFF: Final = 0.25
MAX_BACK_OFF: Final = 30.0
"""A worker that dies is started again after BACK_OFF seconds, doubled each time up to MAX_BACK_OFF."""
CAREFUL: Final = 32
"""After a death, so many batches are handed over one by one: if the worker dies again, it is known which one it was."""


class Health:
    """Of a worker, over all its lives."""

    def __init__(self) -> None:
        self.deaths = 0
        self.start_at = 0.0
        """Not to be started before."""
        self._in_a_row = 0
        self._careful = 0

    def died(self, now: float, of_batches: bool) -> None:
        """The worker died, of its batches or of something else."""
        self.deaths += 1
        self._in_a_row += 1
        if of_batches:
            self._careful = CAREFUL
        self.start_at = now + min(BACK_OFF * 2.0 ** min(self._in_a_row - 1, 20), MAX_BACK_OFF)

    def careful(self) -> bool:
        """Whether it is to have one batch at a time."""
        return self._careful > 0

    def ran(self) -> None:
        """A batch that had begun was answered."""
        self._in_a_row = 0
        if self._careful > 0:
            self._careful -= 1
