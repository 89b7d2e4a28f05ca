"""Forming a batch at the moment of its grant: who is in it, who is dropped, who waits.

The rule of the project: drop a request iff t + l(b) + sub > deadline for the batch that would start at t.
Which requests that hits is Symphony's choice (arXiv 2308.07470, algorithm for batch formation): requests with the
earliest deadlines that a batch of the target size could not meet are passed over as long as enough later ones
remain to fill it, and dropped only if they stand in the way of the batch that is then taken.
"""

from broker.engine.budget_queue import BudgetQueue
from broker.engine.predictor import LatencyTable
from broker.engine.request import Task


class Formed:
    """``batch`` is what to run; ``dropped`` cannot make it, each short by the seconds in ``short``."""

    def __init__(self) -> None:
        self.batch: list[Task] = []
        self.dropped: list[Task] = []
        self.short: list[float] = []


def form(
    queue: BudgetQueue,
    table: LatencyTable,
    start: float,
    remaining: float,
    target: int,
    ceiling: int,
    gpus: int,
) -> Formed:
    """Take a batch off ``queue`` that would start at ``start`` on a device with ``table``.

    ``remaining`` is sub_k. Takes at most ``target`` requests, more (up to ``ceiling``) where their deadlines allow
    it and a larger batch is the faster one per request. The queue keeps everybody else.
    """
    formed = Formed()
    lone = start + table.upper(1) + remaining
    while len(queue) and queue.lowest().key < lone and not queue.lowest().settled():
        task = queue.pop_lowest()
        formed.dropped.append(task)
        formed.short.append(lone - task.key)
    if not len(queue):
        return formed

    passed: list[Task] = []
    while len(queue):
        head = queue.lowest()
        size = len(queue) if len(queue) < target else target
        if head.key >= start + table.upper(size) + remaining or head.settled():
            break
        passed.append(queue.pop_lowest())
    size = len(queue) if len(queue) < target else target
    at = 0
    finish = start + table.upper(size) + remaining
    while at < len(passed) and passed[at].key < finish:
        formed.dropped.append(passed[at])
        formed.short.append(finish - passed[at].key)
        at += 1
    kept = passed[at:]

    earliest = kept[0].key if kept else (queue.lowest().key if len(queue) else 0.0)
    total = len(kept) + len(queue)
    limit = total if total < ceiling else ceiling
    while size < limit:
        now_l = table.upper(size)
        next_l = table.upper(size + 1)
        if earliest < start + next_l + remaining or (size + 1) * now_l < size * next_l:
            break
        size += 1

    batch = formed.batch
    taken = 0
    while len(batch) < size and (taken < len(kept) or len(queue)):
        if taken < len(kept):
            task = kept[taken]
            taken += 1
        else:
            task = queue.pop_lowest()
        group = task.group
        if group is not None and not group.admitted:
            short = _makespan_short(task, table, start, remaining, target, gpus)
            if short > 0.0:
                formed.dropped.append(task)
                formed.short.append(short)
                continue
            group.admitted = True
        batch.append(task)
    for task in kept[taken:]:
        queue.push(task)
    return formed


def _makespan_short(task: Task, table: LatencyTable, start: float, remaining: float, target: int, gpus: int) -> float:
    """By how many seconds the request of a map stage's first item would miss, run in rounds of ``target`` items on
    each of ``gpus`` devices (not positive: it makes it)."""
    group = task.group
    assert group is not None
    items = group.left
    each = items if items < target else target
    rounds = -(-items // (each * gpus)) if gpus > 0 else items
    return start + rounds * table.upper(each) + remaining - task.key
