"""What a shard tells of itself every second: counters by stage, taken without stopping anything."""

from typing import TYPE_CHECKING

from broker.engine.metrics import Lost, Metrics, PipelineMetrics, quantile
from broker.engine.predictor import LatencyTable

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
    measured (batch, seconds) by device type, ``drift`` how many times as much as the profiles say that is. ``slack`` is
    the 10th percentile and the median from the grant of a batch to the closing of its window (-1.0 where none was
    counted). Seconds."""

    def __init__(self, stage: "Stage") -> None:
        self.model = stage.key
        self.devices = stage.devices
        self.arrived = self.started = self.batches = self.dropped = self.waiting = 0
        self.waits: list[float] = []
        self.latency: dict[str, list[tuple[int, float]]] = {}
        self.drift: dict[str, float] = {}
        self.slack = (-1.0, -1.0)
        self.load_factor = stage.order.load
        self.order = order_name(stage)
        ended = 0
        execution = 0.0
        for lane in stage.lanes:
            tally = lane.tally
            self.arrived += tally.arrived + lane.arrivals
            self.started += tally.started
            self.batches += tally.batches
            self.dropped += tally.dropped
            self.waiting += lane.waiting()
            ended += tally.ended
            execution += tally.execution
            if lane.waits.periods > tally.periods:
                self.waits = self.waits + lane.waits.newest if self.waits else lane.waits.newest
            tally.arrived = -lane.arrivals  # the period that goes on will count them
            tally.started = tally.batches = tally.dropped = tally.ended = 0
            tally.execution = 0.0
            tally.periods = lane.waits.periods
        self.queued = _mean_queued(stage)
        if self.batches:
            self.slack = _slack(stage)
        self.execution = execution / ended if ended else 0.0
        for group in stage.groups:
            if group.type not in self.latency:
                tables = [table for lane in stage.lanes if (table := group.tables.get(lane.key)) is not None]
                measured = _measured(stage, tables)
                if measured:
                    self.latency[group.type] = measured
                    drifts = [drift for table in tables if (drift := table.drift()) > 0.0]
                    if drifts:
                        self.drift[group.type] = max(drifts, key=_off)


def _mean_queued(stage: "Stage") -> float:
    """Of the last period, by arrivals where there are lanes."""
    if len(stage.lanes) == 1:
        return stage.waits.last
    arrived = sum([lane.arrived for lane in stage.lanes])
    return sum([lane.waits.last * lane.arrived for lane in stage.lanes]) / arrived if arrived > 0.0 else 0.0


def order_name(stage: "Stage") -> str:
    """By what its queue is ordered at present: ``fcfs``, ``lbf`` or ``hbf``."""
    if not stage.by_deadline:
        return "fcfs"
    return "hbf" if stage.order.highest_first else "lbf"


def _slack(stage: "Stage") -> tuple[float, float]:
    """Of the windows of the batches that were granted since this was last asked."""
    metrics = stage.metrics
    if metrics is None or metrics.shared or not metrics.slacks:
        return (-1.0, -1.0)
    slacks = sorted(metrics.slacks)
    metrics.slacks.clear()
    return (slacks[len(slacks) // 10], slacks[len(slacks) // 2])


def _measured(stage: "Stage", tables: list[LatencyTable]) -> list[tuple[int, float]]:
    """(batch, seconds) on one type of device; of several lanes the mean by arrivals, for the sizes that were measured
    in any."""
    if len(stage.lanes) == 1 or len(tables) < len(stage.lanes):
        return tables[-1].measured() if tables else []
    weights = [lane.rate for lane in stage.lanes]
    total = sum(weights)
    sizes = sorted({size for table in tables for size, _ in table.measured()})
    if total <= 0.0:
        return tables[-1].measured()
    return [
        (size, sum([weight * table.mean(size) for weight, table in zip(weights, tables, strict=True)]) / total)
        for size in sizes
    ]


def _off(drift: float) -> float:
    return abs(drift - 1.0)


class PipelineFigures:
    """One pipeline, all versions, since it was last reported: what came, what ended by outcome, and the median and the
    99th percentile of the latency in seconds of what ended ok (-1.0 where nothing did)."""

    def __init__(self, metrics: PipelineMetrics) -> None:
        self.name = metrics.name
        self.submitted = metrics.submitted - metrics.told_submitted
        self.outcomes: dict[str, int] = {}
        self.latency = (-1.0, -1.0)
        ok = metrics.ok - metrics.told_ok
        if ok:
            self.outcomes["ok"] = ok
            metrics.latency.tell()
            buckets = metrics.latency.since(metrics.told_latency)
            bounds = metrics.latency.bounds
            self.latency = (quantile(bounds, buckets, 0.5), quantile(bounds, buckets, 0.99))
            metrics.told_latency = metrics.latency.buckets.copy()
        if metrics.ended - metrics.told_ended > ok:
            for key, count in metrics.not_ok.items():
                more = count - metrics.told_not_ok.get(key, 0)
                if more:
                    self.outcomes[key[1]] = self.outcomes.get(key[1], 0) + more
            metrics.told_not_ok = metrics.not_ok.copy()
        metrics.told_submitted = metrics.submitted
        metrics.told_ended = metrics.ended
        metrics.told_ok = metrics.ok


class Report:
    """Everything since the report before. ``in_flight`` counts requests by 'pipeline@version', retiring ones too.
    ``pipelines`` are those for which something came or ended, ``lost`` the newest requests that were dropped, expired,
    failed or unavailable; both are empty without ``metrics``."""

    def __init__(
        self,
        now: float,
        period: float,
        stages: dict[str, "Stage"],
        pipelines: list["Pipeline"],
        metrics: Metrics | None,
    ) -> None:
        self.at = now
        self.period = period
        self.stages = [StageFigures(stage) for stage in stages.values()]
        self.in_flight: dict[str, int] = {}
        for pipeline in pipelines:
            self.in_flight[pipeline.id()] = pipeline.in_flight
        self.pipelines: list[PipelineFigures] = []
        self.lost: list[Lost] = []
        if metrics is None:
            return
        for counted in metrics.pipelines.values():
            changed = counted.submitted != counted.told_submitted or counted.ended != counted.told_ended
            if changed and counted.name:
                self.pipelines.append(PipelineFigures(counted))
        self.lost = list(metrics.lost)
        metrics.lost.clear()
