"""What a shard tells of itself every second: counters by stage, taken without stopping anything."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.engine.plan import Pipeline
    from broker.engine.stage import Stage


class Tally:
    """What one stage counts until it is taken (elements, save for ``batches``)."""

    def __init__(self) -> None:
        self.arrived = 0
        """Of the periods that have ended; what came since is in ``Stage.arrivals``."""
        self.started = 0
        self.batches = 0
        self.dropped = 0
        """Dropped for a prediction, or expired."""
        self.ended = 0
        self.execution = 0.0
        """Seconds of the batches that ended, and how many those were."""
        self.periods = 0
        """Periods whose batch waits have been told."""

    def ran(self, seconds: float) -> None:
        """A batch ended well."""
        self.ended += 1
        self.execution += seconds


class StageFigures:
    """One stage over the time since it was last reported. ``queued`` (mean queueing delay) and ``waits`` (every batch
    wait) are of the last whole period, which is told once; ``execution`` is the batches' mean, ``latency`` has
    measured (batch, seconds) by device type, ``drift`` how many times as much as the profiles say that is. Seconds."""

    def __init__(self, stage: "Stage") -> None:
        tally = stage.tally
        self.model = stage.key
        self.arrived = tally.arrived + stage.arrivals
        self.started = tally.started
        self.batches = tally.batches
        self.dropped = tally.dropped
        self.waiting = stage.waiting()
        self.devices = stage.devices
        self.queued = stage.waits.last
        self.execution = tally.execution / tally.ended if tally.ended else 0.0
        self.waits: list[float] = stage.waits.newest if stage.waits.periods > tally.periods else []
        self.latency: dict[str, list[tuple[int, float]]] = {}
        self.drift: dict[str, float] = {}
        for group in stage.groups:
            table = group.tables.get(stage.key)
            if table is not None and group.type not in self.latency:
                measured = table.measured()
                if measured:
                    self.latency[group.type] = measured
                    drift = table.drift()
                    if drift > 0.0:
                        self.drift[group.type] = drift
        tally.arrived = -stage.arrivals  # the period that goes on will count them
        tally.started = tally.batches = tally.dropped = tally.ended = 0
        tally.execution = 0.0
        tally.periods = stage.waits.periods


class Report:
    """Everything since the report before. ``in_flight`` counts requests by 'pipeline@version', retiring ones too."""

    def __init__(self, period: float, stages: dict[str, "Stage"], pipelines: list["Pipeline"]) -> None:
        self.period = period
        self.stages = [StageFigures(stage) for stage in stages.values()]
        self.in_flight: dict[str, int] = {}
        for pipeline in pipelines:
            self.in_flight[pipeline.id()] = pipeline.in_flight
