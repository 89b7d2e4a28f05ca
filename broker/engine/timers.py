"""When stages want to be looked at."""

from heapq import heappop, heappush

from broker.engine.stage import NEVER, Stage


class Timers:
    """A heap of moments with entries that may be out of date: the cost does not grow with the number of stages."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Stage]] = []
        self._number = 0

    def set(self, stage: Stage, when: float) -> None:
        """Have ``stage`` looked at at ``when`` (NEVER: not at all), and no more at what was set before."""
        stage.timer = when
        if when < stage.timer_queued:
            stage.timer_queued = when
            self._number += 1
            heappush(self._heap, (when, self._number, stage))

    def due(self, now: float) -> list[Stage]:
        """The stages whose time has come; they have no timer any more."""
        due: list[Stage] = []
        heap = self._heap
        while heap and heap[0][0] <= now:
            when, _, stage = heappop(heap)
            if when != stage.timer_queued:
                continue
            stage.timer_queued = NEVER
            if stage.timer <= now:
                stage.timer = NEVER
                due.append(stage)
            elif stage.timer < NEVER:
                self.set(stage, stage.timer)
        return due

    def next(self) -> float:
        """The first moment at which :meth:`due` has something to do, if only to find an entry out of date."""
        heap = self._heap
        while heap and heap[0][0] != heap[0][2].timer_queued:
            heappop(heap)
        return heap[0][0] if heap else NEVER
