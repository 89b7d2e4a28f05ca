"""What a shard is told to be right for a pipeline's drop, found by the leader over all shards."""

from typing import Final

from broker.engine.plan import Pipeline

RENEWED: Final = 10.0
"""Seconds after which an admission, and what others measured, no longer hold unless told again: the leader may be gone,
or the store, and what was right then would starve the pipeline now."""


class Tuning:
    """λ (``quantile``), the ``history`` in seconds over which queueing delays are averaged, the part of the requests
    that is let in (``admission``; ``limit`` names the stage that cannot keep up with more) and the mean queueing delay
    ``queued`` by stage name, in seconds."""

    def __init__(
        self, quantile: float, history: float, admission: float, limit: str, queued: dict[str, float], told_at: float
    ) -> None:
        self.quantile = quantile
        self.history = history
        self.admission = admission
        self.limit = limit
        self.queued = queued
        self.told_at = told_at

    def apply(self, now: float, pipeline: Pipeline) -> None:
        """Have a pipeline go by it, as far as its policy knows of such things and was not given them."""
        pipeline.tuning = self
        policy = pipeline.policy
        if policy.tunes_quantile:
            pipeline.quantile = self.quantile
        for plan in pipeline.stages:
            for lane in plan.stage.lanes:
                if policy.tunes_history:
                    lane.waits.history = self.history
                lane.waits.prior = self.queued.get(plan.name, -1.0)
        if pipeline.roots and policy.tunes_admission():
            # One first stage counts for all: every request comes to it, and those turned away reach no other.
            first = pipeline.stages[pipeline.roots[0]].stage
            first.admits = self.admission
            first.limit = self.limit if self.limit else pipeline.stages[-1].name
        self.lapse(now, pipeline)

    def lapse(self, now: float, pipeline: Pipeline) -> None:
        """Take back what has not been renewed for too long."""
        if now < self.told_at + RENEWED:
            return
        for lane in pipeline.lanes:
            lane.waits.prior = -1.0
        if pipeline.roots and pipeline.policy.tunes_admission():
            pipeline.stages[pipeline.roots[0]].stage.admits = 1.0
