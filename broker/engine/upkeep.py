"""What is brought up to date now and then rather than with each request: rates, orders, plans, and passed deadlines.

A pipeline that nobody has asked for in a while *sleeps*: thousands may be served of which few are used. It is left as
it is until somebody asks for it, and then brought to where it would be.
"""

from typing import Final

from broker.engine.dispatcher import Dispatcher
from broker.engine.fleet import Fleet
from broker.engine.ledger import Ledger
from broker.engine.metrics import Metrics
from broker.engine.plan import Pipeline
from broker.engine.planner import replan
from broker.engine.stage import NEVER, Stage

SWEEP: Final = 0.005
"""The least time between two looks for requests whose deadline passed while a batch of theirs runs."""
REFRESH: Final = 1.0
"""How often rates, predictions, orders and windows' reserves are brought up to date, in seconds."""
QUIET: Final = 3
"""Periods (of REFRESH seconds) without arrivals and without requests in flight after which a pipeline sleeps."""
NOTICED: Final = 0.001
"""Seconds by which grants must take longer than the windows know for all of them to be opened earlier at once; they
learn of less at the next refresh."""
SHED_ABOVE: Final = 0.020
"""Seconds of queueing delay above which overload control has fewer requests admitted (DAGOR, as PARD runs it)."""
SHED_TO: Final = 0.6


class Upkeep:
    """Keeps ``next_refresh`` and the dispatcher's ``next_sweep``."""

    def __init__(self, ledger: Ledger, fleet: Fleet, dispatcher: Dispatcher, metrics: Metrics | None) -> None:
        self.next_refresh = 0.0
        self.periods = 0
        """How many have ended."""
        self._ledger = ledger
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._rated_at = -1.0
        self._awake: list[Pipeline] = []
        """In the order in which they are served; those that woke since the last refresh at the end."""
        self._told = 0.0
        """The travel time that all windows know of."""

    def sweep(self, now: float) -> None:
        """End the requests whose deadline passed while a batch of theirs runs, or is being collected."""
        dispatcher = self._dispatcher
        next_sweep = NEVER
        for batch in dispatcher.batches.values():
            if batch.next_deadline <= now:
                nearest = NEVER
                for task in batch.tasks:
                    request = task.request
                    if request.outcome is None:
                        if request.deadline <= now:
                            self._ledger.expire(now, request, task.number)
                        elif request.deadline < nearest:
                            nearest = request.deadline
                batch.next_deadline = nearest
            if batch.next_deadline < next_sweep:
                next_sweep = batch.next_deadline
        for device in self._fleet.devices.values():
            for task in device.collected.copy():
                if task.request.deadline <= now:
                    self._ledger.expire(now, task.request, task.number)
                elif task.request.deadline < next_sweep:
                    next_sweep = task.request.deadline
        dispatcher.next_sweep = NEVER if next_sweep >= NEVER else max(next_sweep, now + SWEEP)

    def tell_rise(self) -> None:
        """Have windows that are not open yet opened earlier, if grants take much longer than they know."""
        travel = self._dispatcher.travel.base
        if travel >= self._told + NOTICED:
            self._told = travel
            for pipeline in self._awake:
                for stage in pipeline.lanes:
                    if stage.timer < NEVER:
                        self._ledger.touch(stage)

    def wake(self, now: float, pipeline: Pipeline) -> None:
        """Somebody asks for a pipeline that slept."""
        pipeline.asleep = False
        pipeline.quiet = 0
        self._awake.append(pipeline)
        for stage in pipeline.lanes:
            stage.catch_up(self.periods - pipeline.rated, _load(stage))
        self._replan(now, pipeline)

    def refresh(self, now: float, pipelines: list[Pipeline]) -> None:
        """Bring everything up to date that lasts."""
        self.next_refresh = now + REFRESH
        awake = [pipeline for pipeline in pipelines if not pipeline.asleep]
        self._told = self._dispatcher.travel.base
        elapsed = now - self._rated_at
        if self._rated_at < 0.0:
            self._rated_at = now
        elif elapsed >= REFRESH * 0.999:
            self._rated_at = now
            self.periods += 1
            if self._metrics is not None:
                self._metrics.end_period()
            for pipeline in awake:
                _rest(pipeline)
                pipeline.rated = self.periods
                for stage in pipeline.lanes:
                    stage.measure_rate(elapsed)
            self._rate_load([stage for pipeline in awake for stage in pipeline.lanes])
            for pipeline in awake:
                if pipeline.policy.sheds:
                    _shed(pipeline)
        for table in self._fleet.tables.values():
            table.expire(now)
        self._awake = [pipeline for pipeline in awake if not pipeline.asleep]
        for pipeline in self._awake:
            self._replan(now, pipeline)
        for pipeline in self._awake:
            for stage in pipeline.lanes:
                if not stage.idle():
                    self._ledger.touch(stage)

    def _replan(self, now: float, pipeline: Pipeline) -> None:
        if pipeline.tuning is not None:
            pipeline.tuning.lapse(now, pipeline)
        replan(pipeline, self._dispatcher.travel, self._dispatcher.response)

    def _rate_load(self, stages: list[Stage]) -> None:
        """μ of each stage: what arrives against what its devices can run in target batches, all stages that they serve
        counted."""
        groups = self._fleet.groups()
        for group in groups:
            group.demand = 0.0
            group.longest = 0.0
        for stage in stages:
            if stage.devices and stage.table is not None:
                execution = stage.table.busy(stage.target)
                work = stage.arrived * execution / stage.target
                for group in stage.groups:
                    if execution > group.longest:
                        group.longest = execution
                    group.demand += work * len(group.members) / stage.devices
        for group in groups:
            group.pending.overloaded = group.demand > len(group.members)
            group.pending.fade()
        for stage in stages:
            stage.order.update(stage.arrived, _load(stage))


def _load(stage: Stage) -> float:
    """μ, for what all its devices have to do."""
    load = 0.0
    if not stage.devices:
        return load  # its groups may be those of devices that went since they were last looked at
    for group in stage.groups:
        load += group.demand / stage.devices
    return load


def _rest(pipeline: Pipeline) -> None:
    """A period ended: whether it is time for the pipeline to sleep."""
    if pipeline.in_flight:
        pipeline.quiet = 0
        return
    for stage in pipeline.lanes:
        if stage.arrivals:
            pipeline.quiet = 0
            return
    pipeline.quiet += 1
    if pipeline.quiet >= QUIET:
        pipeline.asleep = True


def _shed(pipeline: Pipeline) -> None:
    """A stage whose queueing delay is too long has the stages before it (the first one: itself) admit less."""
    for plan in pipeline.stages:
        plan.stage.admits = 1.0
    for plan in pipeline.stages:
        if any(lane.waits.last > SHED_ABOVE for lane in plan.stage.lanes):
            for number in plan.parents:
                pipeline.stages[number].stage.admits = SHED_TO
            if not plan.parents:
                plan.stage.admits = SHED_TO
