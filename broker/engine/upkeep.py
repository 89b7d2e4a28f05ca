"""What is brought up to date now and then rather than with each request: rates, orders, plans, and passed deadlines."""

from typing import Final

from broker.engine.dispatcher import Dispatcher
from broker.engine.fleet import Fleet
from broker.engine.ledger import Ledger
from broker.engine.plan import Pipeline
from broker.engine.planner import replan
from broker.engine.stage import NEVER, Stage

SWEEP: Final = 0.005
"""The least time between two looks for requests whose deadline passed while a batch of theirs runs."""
REFRESH: Final = 1.0
"""How often rates, predictions, orders and windows' reserves are brought up to date, in seconds."""
NOTICED: Final = 0.001
"""Seconds by which grants must take longer than the windows know for all of them to be opened earlier at once; they
learn of less at the next refresh."""
SHED_ABOVE: Final = 0.020
"""Seconds of queueing delay above which overload control has fewer requests admitted (DAGOR, as PARD runs it)."""
SHED_TO: Final = 0.6


class Upkeep:
    """Keeps ``next_refresh`` and the dispatcher's ``next_sweep``."""

    def __init__(self, ledger: Ledger, fleet: Fleet, dispatcher: Dispatcher) -> None:
        self.next_refresh = 0.0
        self._ledger = ledger
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._rated_at = -1.0
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

    def tell_rise(self, stages: dict[str, Stage]) -> None:
        """Have windows that are not open yet opened earlier, if grants take much longer than they know."""
        travel = self._dispatcher.travel.base
        if travel >= self._told + NOTICED:
            self._told = travel
            for stage in stages.values():
                if stage.timer < NEVER:
                    self._ledger.touch(stage)

    def refresh(self, now: float, stages: dict[str, Stage], pipelines: list[Pipeline]) -> None:
        """Bring everything up to date that lasts."""
        self.next_refresh = now + REFRESH
        self._told = self._dispatcher.travel.base
        elapsed = now - self._rated_at
        if self._rated_at < 0.0:
            self._rated_at = now
        elif elapsed >= REFRESH * 0.999:
            self._rated_at = now
            for stage in stages.values():
                stage.measure_rate(elapsed)
            self._rate_load(stages)
            for pipeline in pipelines:
                if pipeline.policy.sheds:
                    _shed(pipeline)
        for table in self._fleet.tables.values():
            table.expire(now)
        for pipeline in pipelines:
            if pipeline.tuning is not None:
                pipeline.tuning.lapse(now, pipeline)
            replan(pipeline, self._dispatcher.travel, self._dispatcher.response.base)
        for stage in stages.values():
            if not stage.idle():
                self._ledger.touch(stage)

    def _rate_load(self, stages: dict[str, Stage]) -> None:
        """μ of each stage: what arrives against what its devices can run in target batches, all stages that they serve
        counted."""
        groups = self._fleet.groups()
        for group in groups:
            group.demand = 0.0
            group.longest = 0.0
        for stage in stages.values():
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
        for stage in stages.values():
            load = 0.0
            for group in stage.groups:
                load += group.demand / stage.devices
            stage.order.update(stage.arrived, load)


def _shed(pipeline: Pipeline) -> None:
    """A stage whose queueing delay is too long has the stages before it (the first one: itself) admit less."""
    for plan in pipeline.stages:
        plan.stage.admits = 1.0
    for plan in pipeline.stages:
        if plan.stage.waits.last > SHED_ABOVE:
            for number in plan.parents:
                pipeline.stages[number].stage.admits = SHED_TO
            if not plan.parents:
                plan.stage.admits = SHED_TO
