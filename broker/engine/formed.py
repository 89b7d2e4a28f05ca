"""What forming a batch comes out as, and what all ways of forming one have in common."""

from typing import TYPE_CHECKING

from broker.engine.predictor import LatencyTable
from broker.engine.request import MapGroup, Task
from broker.engine.spans import Estimate

if TYPE_CHECKING:
    from broker.engine.stage import Stage


class Formed:
    """``batch`` is what to run; ``dropped`` cannot make it, each for the reason in ``estimates``; ``passed`` stand in
    the way of the batch that was formed (form_deferred.py)."""

    def __init__(self) -> None:
        self.batch: list[Task] = []
        self.dropped: list[Task] = []
        self.estimates: list[Estimate] = []
        self.passed: list[Task] = []

    @property
    def short(self) -> list[float]:
        """By how many seconds each of ``dropped`` would miss."""
        return [estimate.short for estimate in self.estimates]

    def drop(self, task: Task, start: float, execution: float, size: int, downstream: float) -> None:
        """Leave a task out for good: in a batch of ``size`` from ``start`` on that takes ``execution``, and with
        ``downstream`` behind it, it would miss."""
        self.dropped.append(task)
        self.estimates.append(Estimate(start, task.due, execution, size, downstream))

    def take(self, task: Task, stage: "Stage", table: LatencyTable, start: float) -> None:
        """Take a task that makes it into the batch; drop it if it is the first item of a map request that does not
        make it as a whole (a map stage is all or nothing)."""
        group = task.group
        if group is not None and not group.admitted:
            took = makespan(group, stage, table)
            if start + took + stage.remaining - task.due > 0.0:
                self.drop(task, start, took, min(group.left, stage.target), stage.remaining)
                return
            group.admitted = True
        self.batch.append(task)

    def take_all(self, tasks: list[Task], stage: "Stage", table: LatencyTable, start: float) -> None:
        """:meth:`take` each of them."""
        for task in tasks:
            if task.group is not None:
                break
        else:
            self.batch.extend(tasks)
            return
        for task in tasks:
            self.take(task, stage, table, start)


class Form:
    """A way of forming batches: one of the four parts of a policy. It has no state of its own."""

    def form(self, stage: "Stage", table: LatencyTable, start: float) -> Formed:
        """Take a batch off the stage's queue that would start at ``start`` on a device with ``table``. The queue keeps
        everybody else."""
        raise NotImplementedError


def makespan(group: MapGroup, stage: "Stage", table: LatencyTable) -> float:
    """Seconds in which the items of a map stage's request are run, in rounds of the target batch on each of the stage's
    devices."""
    if group.spread:
        return _makespan(group.spread, stage, table)
    items = group.left
    target = stage.target
    gpus = stage.devices
    each = items if items < target else target
    rounds = -(-items // (each * gpus)) if gpus > 0 else items
    return rounds * table.upper(each)


def _makespan(spread: list[tuple["Stage", int]], stage: "Stage", table: LatencyTable) -> float:
    """Seconds in which a stage's devices run these items of its lanes in target batches, at most (Graham's bound)."""
    total = 0.0
    longest = 0.0
    for lane, items in spread:
        predicted = table if lane is stage or lane.table is None else lane.table
        each = items if items < lane.target else lane.target
        took = predicted.upper(each)
        total += -(-items // each) * took
        if took > longest:
            longest = took
    gpus = stage.devices if stage.devices > 0 else 1
    return longest + (total - longest) / gpus
