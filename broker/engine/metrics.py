"""What a shard counts for good: of each pipeline and stage, over all its versions.

Counters only grow and are read as they stand, also by other threads; histograms are as of the last second. What they
are called for people, and the histograms' bounds, is said in ``cluster/observe/families.py``.
"""

from bisect import bisect_left
from collections import deque
from typing import TYPE_CHECKING, Final

from laxity.outcomes import Outcome

if TYPE_CHECKING:
    from broker.engine.plan import Pipeline
    from broker.engine.request import Request, Task
    from broker.engine.stage import Stage

OK: Final = Outcome.OK
DROPPED: Final = Outcome.DROPPED
EXPIRED: Final = Outcome.EXPIRED
NOTED: Final = (Outcome.DROPPED, Outcome.EXPIRED, Outcome.FAILED, Outcome.UNAVAILABLE)
"""Outcomes of which the newest requests are kept (:class:`Lost`)."""
MOST_NOTED: Final = 10
MOST_SLACKS: Final = 256
MOST_STAGES: Final = 500
"""With metrics of their own; those that come later share one."""
UNBOUNDED: Final = 1e17
"""Seconds from which on a window is none."""

SECONDS: Final = [
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075,
    0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0,
]  # fmt: skip
SIGNED_SECONDS: Final = [
    -1.0, -0.3, -0.1, -0.03, -0.01, -0.005, -0.003, -0.002, -0.001, -0.0005, 0.0,
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.03, 0.1, 0.3, 1.0,
]  # fmt: skip
SIZES: Final = [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 256.0]


class Histogram:
    """How many values fell into each bucket, and their ``sum``. ``bounds`` are the upper ones, ascending; a value equal
    to a bound belongs below it, and the last bucket has what is above all of them.

    The newest values lie aside, because most have the same bucket as the one before: what others may read
    has them after :meth:`tell`, or once a value of another bucket has come.
    """

    def __init__(self, bounds: list[float]) -> None:
        self.bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self._at = 0
        """The newest values' bucket, between these bounds:"""
        self._above = -float("inf")
        self._up_to = bounds[0]
        self._newest = 0
        self._newest_sum = 0.0

    def observe(self, value: float) -> None:
        """Take in a value."""
        if value > self._up_to or value <= self._above:
            self._turn(value)
        self._newest += 1
        self._newest_sum += value

    def observe_many(self, value: float, count: int) -> None:
        """Take in a value ``count`` times."""
        if value > self._up_to or value <= self._above:
            self._turn(value)
        self._newest += count
        self._newest_sum += value * count

    def tell(self) -> None:
        """Put the newest values to the others."""
        if self._newest:
            self.buckets[self._at] += self._newest
            self.sum += self._newest_sum
            self._newest = 0
            self._newest_sum = 0.0

    def since(self, before: list[int]) -> list[int]:
        """What was told of each bucket since they were as in ``before`` (empty: since the beginning)."""
        if not before:
            return self.buckets.copy()
        return [now - then for now, then in zip(self.buckets, before, strict=True)]

    def add(self, other: "Histogram") -> None:
        """Take in all that another one of the same bounds told."""
        for at, count in enumerate(other.buckets):
            self.buckets[at] += count
        self.sum += other.sum

    def _turn(self, value: float) -> None:
        self.tell()
        bounds = self.bounds
        at = bisect_left(bounds, value)
        self._at = at
        self._above = bounds[at - 1] if at > 0 else -float("inf")
        self._up_to = bounds[at] if at < len(bounds) else float("inf")


def quantile(bounds: list[float], buckets: list[int], part: float) -> float:
    """Below which ``part`` (0 to 1) of a histogram's positive values lie, as if they lay evenly within their buckets;
    -1.0 where there are none, and the last bound for what is above it."""
    total = sum(buckets)
    if total == 0:
        return -1.0
    rank = part * total
    below = 0
    for at, bound in enumerate(bounds):
        count = buckets[at]
        if count > 0 and below + count >= rank:
            lower = bounds[at - 1] if at > 0 else 0.0
            return lower + (bound - lower) * (rank - below) / count
        below += count
    return bounds[-1]


class Lost:
    """What became of a request that was dropped, expired, failed or unavailable, at ``at``."""

    def __init__(self, request: "Request", outcome: Outcome, stage: str, detail: str, at: float) -> None:
        self.client = request.client.name
        self.id = request.id
        self.pipeline = request.pipeline.name
        self.outcome: str = outcome.value
        self.stage = stage
        self.detail = detail
        self.at = at


class StageMetrics:
    """One stage, all its lanes and versions, or several stages (``shared``); seconds. Elements are requests, or items
    of map stages."""

    def __init__(self, shared: bool = False) -> None:
        self.shared = shared
        self.at_enqueue = Histogram(SECONDS)
        """Remaining budget of the elements that came, ..."""
        self.at_dispatch = Histogram(SECONDS)
        """... and of those that were granted, with each attempt; as the waiting:"""
        self.forced = Histogram(SECONDS)
        self.chosen = Histogram(SECONDS)
        self.batch_wait = Histogram(SECONDS)
        """Of policies that put batches together while their device is busy."""
        self.execution = Histogram(SECONDS)
        self.sizes = Histogram(SIZES)
        """Of the batches granted, ..."""
        self.slack = Histogram(SECONDS)
        """... and from their grant to the closing of their window, where it closes."""
        self.error = Histogram(SIGNED_SECONDS)
        """Predicted (mean) less measured execution."""
        self.batches: dict[str, int] = {}
        """That ended, by the agent's code; ``agent_lost`` where it gave none any more."""
        self.dropped = 0
        """Requests that were dropped or expired here."""
        self.drop_probability = 0.0
        """What part that was of those that came in the last second."""
        self.slacks: deque[float] = deque(maxlen=MOST_SLACKS)
        """The newest since they were reported last (report.py)."""
        self._histograms = [
            self.at_enqueue,
            self.at_dispatch,
            self.forced,
            self.chosen,
            self.batch_wait,
            self.execution,
            self.sizes,
            self.slack,
            self.error,
        ]
        self._came = 0
        self._came_before = 0
        self._dropped_before = 0

    def came(self, count: int, budget: float) -> None:
        """A request came with so many elements."""
        self._came += 1
        self.at_enqueue.observe_many(budget, count)

    def granted(self, now: float, stage: "Stage", tasks: list["Task"], start: float, closes: float) -> None:
        """A batch of these was granted."""
        self.sizes.observe(float(len(tasks)))
        if closes < UNBOUNDED:
            slack = closes - now
            self.slack.observe(slack)
            self.slacks.append(slack)
        at_dispatch = self.at_dispatch
        forced = self.forced
        chosen = self.chosen
        if stage.policy.collects:
            # They wait for a device only.
            for task in tasks:
                taken = task.taken_at if task.taken_at > task.queued_at else now
                at_dispatch.observe(task.request.deadline - now)
                forced.observe(taken - task.queued_at)
                chosen.observe(0.0)
                self.batch_wait.observe(start - taken)
            return
        blocked = stage.blocked_for(now)
        for task in tasks:
            waited = now - task.queued_at
            lacked = blocked - task.blocked
            if lacked > waited:
                lacked = waited
            elif lacked < 0.0:
                lacked = 0.0  # B(t) is a sum, and rounded
            at_dispatch.observe(task.request.deadline - now)
            forced.observe(lacked)
            chosen.observe(waited - lacked)

    def ended(self, code: str, execution: float, predicted: float) -> None:
        """A batch ended."""
        self.batches[code] = self.batches.get(code, 0) + 1
        if code == "ok":
            self.execution.observe(execution)
            self.error.observe(predicted - execution)

    def end_period(self) -> None:
        """A second has passed."""
        came = self._came - self._came_before
        dropped = self.dropped - self._dropped_before
        self._came_before = self._came
        self._dropped_before = self.dropped
        for histogram in self._histograms:
            histogram.tell()
        # Those that were dropped may have come in the second before.
        self.drop_probability = min(dropped / came, 1.0) if came else float(dropped > 0)


class PipelineMetrics:
    """One pipeline; ``ended`` counts all outcomes, ``not_ok`` the others than ok by (stage, outcome), the stage being
    empty where none is to blame. ``shared``: it has no series of its own (:data:`MOST_STAGES`)."""

    def __init__(self, name: str, shared: bool, lost: deque[Lost]) -> None:
        self.name = name
        self.shared = shared
        self.stages: dict[str, StageMetrics] = {}
        self.submitted = 0
        self.ended = 0
        self.ok = 0
        self.not_ok: dict[tuple[str, str], int] = {}
        self.latency = Histogram(SECONDS)
        """Of those that ended ok."""
        self.told_submitted = 0
        self.told_ended = 0
        self.told_ok = 0
        self.told_not_ok: dict[tuple[str, str], int] = {}
        self.told_latency: list[int] = []
        """As they were reported last (report.py)."""
        self._lost = lost
        self._moved = False
        self._submitted_before = 0
        self._ended_before = 0

    def end(self, now: float, request: "Request", outcome: Outcome, stage: str, detail: str) -> None:
        """A request of it ended."""
        self.ended += 1
        if outcome is OK:
            self.ok += 1
            self.latency.observe(now - request.arrival)
            return
        key = (stage, outcome.value)
        self.not_ok[key] = self.not_ok.get(key, 0) + 1
        if outcome is DROPPED or outcome is EXPIRED:
            there = self.stages.get(stage)
            if there is not None:
                there.dropped += 1
        if outcome in NOTED:
            self._lost.append(Lost(request, outcome, stage, detail, now))

    def end_period(self) -> None:
        """A second has passed."""
        moved = self.submitted != self._submitted_before or self.ended != self._ended_before
        if moved or self._moved:
            self._submitted_before = self.submitted
            self._ended_before = self.ended
            self.latency.tell()
            for stage in self.stages.values():
                stage.end_period()
        self._moved = moved

    def absorb(self, other: "PipelineMetrics") -> None:
        """Take over the counters of another one; by outcome alone, whatever the stage."""
        self.submitted += other.submitted
        self.ended += other.ended
        self.ok += other.ok
        for (_, outcome), count in list(other.not_ok.items()):
            key = ("", outcome)
            self.not_ok[key] = self.not_ok.get(key, 0) + count
        self.latency.add(other.latency)


class Metrics:
    """Those of all pipelines, by name; requests for unknown ones are under ''. ``others`` are the stages without
    metrics of their own, ``gone`` has the counters of shared pipelines that are no longer served."""

    def __init__(self) -> None:
        self.pipelines: dict[str, PipelineMetrics] = {}
        self.others = StageMetrics(True)
        self.lost: deque[Lost] = deque(maxlen=MOST_NOTED)
        """The newest."""
        self.gone = PipelineMetrics("", True, self.lost)
        self._stages = 0
        """With metrics of their own."""

    def attach(self, pipeline: "Pipeline") -> None:
        """Have a pipeline counted, with what other versions of it were."""
        found = self.pipelines.get(pipeline.name)
        if found is None:
            found = PipelineMetrics(pipeline.name, self._stages >= MOST_STAGES, self.lost)
            self.pipelines[pipeline.name] = found
        pipeline.metrics = found
        for plan in pipeline.stages:
            stage = found.stages.get(plan.name)
            if stage is None:
                stage = self.others
                if not found.shared and self._stages < MOST_STAGES:
                    stage = StageMetrics()
                    self._stages += 1
                found.stages[plan.name] = stage
            for lane in plan.stage.lanes:
                lane.metrics = stage

    def forget(self, name: str, remaining: list["Pipeline"]) -> None:
        """A version of the pipeline of this name is served no more; ``remaining`` are those that are."""
        found = self.pipelines.get(name)
        if found is None:
            return
        kept = {plan.name for pipeline in remaining if pipeline.name == name for plan in pipeline.stages}
        for stage in [stage for stage in found.stages if stage not in kept]:
            if found.stages.pop(stage) is not self.others:
                self._stages -= 1
        if not found.stages:
            del self.pipelines[name]
            if found.shared:
                found.latency.tell()
                self.gone.absorb(found)

    def end_period(self) -> None:
        """A second has passed."""
        for pipeline in self.pipelines.values():
            pipeline.end_period()
