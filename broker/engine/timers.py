"""When stages want to be looked at."""

from broker.engine.stage import NEVER, Stage


class Timers:
    """A binary heap of stages by their moments, those set first before others of the same moment. Each stage knows its
    place in it: windows open earlier with every request that comes, and an entry for each would be found out of date
    later."""

    def __init__(self) -> None:
        self._heap: list[Stage] = []
        self._number = 0

    def set(self, stage: Stage, when: float) -> None:
        """Have ``stage`` looked at at ``when`` (NEVER: not at all), and no more at what was set before."""
        before = stage.timer
        if when == before:
            return
        stage.timer = when
        if when >= NEVER:
            self._remove(stage)
            return
        self._number += 1
        stage.timer_number = self._number
        if before >= NEVER:
            self._heap.append(stage)
            self._rise(stage, len(self._heap) - 1)
        elif when < before:
            self._rise(stage, stage.timer_at)
        else:
            self._sink(stage, stage.timer_at)

    def due(self, now: float) -> list[Stage]:
        """The stages whose time has come; they have no timer any more."""
        due: list[Stage] = []
        heap = self._heap
        while heap and heap[0].timer <= now:
            stage = heap[0]
            stage.timer = NEVER
            self._remove(stage)
            due.append(stage)
        return due

    def next(self) -> float:
        """The first moment at which :meth:`due` has something to do."""
        heap = self._heap
        return heap[0].timer if heap else NEVER

    def _remove(self, stage: Stage) -> None:
        last = self._heap.pop()
        if last is not stage:
            at = stage.timer_at
            self._rise(last, at)
            self._sink(last, last.timer_at)

    def _rise(self, stage: Stage, at: int) -> None:
        """Put a stage at a place in the heap, or nearer to its top."""
        heap = self._heap
        when = stage.timer
        number = stage.timer_number
        while at > 0:
            above = (at - 1) >> 1
            other = heap[above]
            if other.timer < when or (other.timer == when and other.timer_number < number):
                break
            heap[at] = other
            other.timer_at = at
            at = above
        heap[at] = stage
        stage.timer_at = at

    def _sink(self, stage: Stage, at: int) -> None:
        """Put a stage at a place in the heap, or further from its top."""
        heap = self._heap
        size = len(heap)
        when = stage.timer
        number = stage.timer_number
        while True:
            below = 2 * at + 1
            if below >= size:
                break
            other = heap[below]
            if below + 1 < size:
                right = heap[below + 1]
                if right.timer < other.timer or (
                    right.timer == other.timer and right.timer_number < other.timer_number
                ):
                    below += 1
                    other = right
            if when < other.timer or (when == other.timer and number < other.timer_number):
                break
            heap[at] = other
            other.timer_at = at
            at = below
        heap[at] = stage
        stage.timer_at = at
