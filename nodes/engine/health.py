"""How a device's worker fares: how soon it is started again, and whether it is trusted with several batches at once."""

from typing import Final

BACK_OFF: Final = 0.25
MAX_BACK_OFF: Final = 30.0
"""A worker that dies is started again after BACK_OFF seconds, doubled each time up to MAX_BACK_OFF."""
CAREFUL: Final = 32
"""After a death, so many batches are handed over one by one: if the worker dies again, it is known which one it was."""
MAX_STUCK: Final = 3
"""So many batches in a row that could not begin though the device was free, for as long as a batch may hang: it is the
inputs that hang."""


class Health:
    """Of a worker, over all its lives."""

    def __init__(self) -> None:
        self.deaths = 0
        self.start_at = 0.0
        """Not to be started before."""
        self._in_a_row = 0
        self._careful = 0
        self._stuck = 0
        self._stuck_since = 0.0

    def died(self, now: float, of_batches: bool) -> None:
        """The worker died, with batches or without."""
        self.deaths += 1
        self._in_a_row += 1
        self._stuck = 0
        if of_batches:
            self._careful = CAREFUL
        self.start_at = now + min(BACK_OFF * 2.0 ** min(self._in_a_row - 1, 20), MAX_BACK_OFF)

    def careful(self) -> bool:
        """Whether it is to have one batch at a time."""
        return self._careful > 0

    def handed(self, now: float) -> None:
        """It was handed a batch."""
        if not self._stuck:
            self._stuck_since = now

    def began(self) -> None:
        """A batch began."""
        self._stuck = 0

    def ran(self) -> None:
        """A batch that had begun was answered."""
        self._in_a_row = 0
        if self._careful > 0:
            self._careful -= 1

    def could_not_begin(self, now: float, patience: float) -> bool:
        """A batch did not begin in its window, though the device was free; whether the inputs hang."""
        self._stuck += 1
        return self._stuck >= MAX_STUCK and now - self._stuck_since > patience
