"""The stages that wait for a device of one group, in the order in which they get one."""

from heapq import heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.engine.stage import Stage


class Pending:
    """The pipeline whose window closes first goes first; under overload, when not all can be served, the pipeline
    that has had the least of these devices lately, so that none starves another. Of one pipeline the stage
    furthest on goes first (of its lanes the one whose window closes first): it needs the least GPU time for its
    goodput. (Taken in the order of their windows alone, all requests of a burst would pass the first stage before any
    of them passes the second, and all of them miss.)"""

    def __init__(self) -> None:
        self.overloaded = False
        self._stages: dict[str, list[Stage]] = {}
        """By pipeline."""
        self._heap: list[tuple[float, int, Stage]] = []
        self._queued: dict[str, float] = {}
        """The key of each stage's valid entry in the heap, by the stage's own; not above its present one."""
        self._number = 0
        self._usage: dict[str, float] = {}
        """Device seconds by pipeline, fading."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, stage: "Stage") -> None:
        """A stage's window is open, or closes at another time than before."""
        stages = self._stages.get(stage.pipeline)
        if stages is None:
            stages = []
            self._stages[stage.pipeline] = stages
        if stage not in stages:
            stages.append(stage)
            self._count += 1
        key = self._key(stage)
        queued = self._queued.get(stage.key)
        if queued is None or key < queued:
            self._push(stage, key)

    def discard(self, stage: "Stage") -> None:
        stages = self._stages.get(stage.pipeline)
        if stages is not None and stage in stages:
            stages.remove(stage)
            self._count -= 1

    def first(self) -> "Stage":
        """Which stage gets the next device; IndexError if none is pending. It stays until it is discarded."""
        heap = self._heap
        while True:
            key, _, stage = heap[0]
            if self._queued.get(stage.key) != key:
                heappop(heap)
                continue
            stages = self._stages[stage.pipeline]
            now = self._key(stage)
            if stage not in stages:
                heappop(heap)
                del self._queued[stage.key]
            elif key != now:
                heappop(heap)
                self._push(stage, now)
            else:
                furthest = stage
                for other in stages:
                    if other.depth > furthest.depth or (
                        other.depth == furthest.depth and other.closes < furthest.closes
                    ):
                        furthest = other
                return furthest

    def charge(self, pipeline: str, seconds: float) -> None:
        """A batch of this pipeline takes a device for so long."""
        self._usage[pipeline] = self._usage.get(pipeline, 0.0) + seconds

    def fade(self) -> None:
        """Let what was used long ago count for less; called once a period."""
        self._usage = {name: used * 0.5 for name, used in self._usage.items() if used > 1e-3}
        self._heap = []
        self._queued = {}
        for stages in self._stages.values():
            for stage in stages:
                self._push(stage, self._key(stage))

    def _key(self, stage: "Stage") -> float:
        return self._usage.get(stage.pipeline, 0.0) if self.overloaded else stage.closes

    def _push(self, stage: "Stage", key: float) -> None:
        self._number += 1
        self._queued[stage.key] = key
        heappush(self._heap, (key, self._number, stage))
