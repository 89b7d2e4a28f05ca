"""What forming a batch comes out as, and what all ways of forming one have in common."""

from typing import TYPE_CHECKING

from broker.engine.predictor import LatencyTable
from broker.engine.request import Task

if TYPE_CHECKING:
    from broker.engine.stage import Stage


class Formed:
    """``batch`` is what to run; ``dropped`` cannot make it, each short by the seconds in ``short``; ``passed`` stand in
    the way of the batch that was formed (form_deferred.py)."""

    def __init__(self) -> None:
        self.batch: list[Task] = []
        self.dropped: list[Task] = []
        self.short: list[float] = []
        self.passed: list[Task] = []

    def drop(self, task: Task, short: float) -> None:
        """Leave a task out for good."""
        self.dropped.append(task)
        self.short.append(short)

    def take(self, task: Task, stage: "Stage", table: LatencyTable, start: float) -> None:
        """Take a task that makes it into the batch; drop it if it is the first item of a map request that does not
        make it as a whole (a map stage is all or nothing)."""
        group = task.group
        if group is not None and not group.admitted:
            short = makespan_short(task, stage, table, start)
            if short > 0.0:
                self.drop(task, short)
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


def makespan_short(task: Task, stage: "Stage", table: LatencyTable, start: float) -> float:
    """By how many seconds the request of a map stage's first item would miss, run in rounds of the target batch on
    each of the stage's devices (not positive: it makes it)."""
    group = task.group
    assert group is not None
    if group.spread:
        return start + _makespan(group.spread, stage, table) + stage.remaining - task.due
    items = group.left
    target = stage.target
    gpus = stage.devices
    each = items if items < target else target
    rounds = -(-items // (each * gpus)) if gpus > 0 else items
    return start + rounds * table.upper(each) + stage.remaining - task.due


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
