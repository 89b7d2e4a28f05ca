"""Forming a deferred batch as Symphony does (arXiv 2308.07470, algorithm for batch formation).

Requests with the earliest deadlines that a batch of the target size could not meet are passed over as long as enough
later ones remain to fill it, and dropped only if they stand in the way of the batch that is then taken.
"""

from typing import TYPE_CHECKING

from broker.engine.formed import Form, Formed
from broker.engine.predictor import LatencyTable
from broker.engine.request import Task

if TYPE_CHECKING:
    from broker.engine.budget_queue import BudgetQueue
    from broker.engine.stage import Stage


class FormDeferred(Form):
    """symphony: lowest budget first. Takes at most the stage's target, more (up to its ceiling) where the deadlines
    allow it and a larger batch is the faster one per request."""

    def form(self, stage: "Stage", table: LatencyTable, start: float) -> Formed:
        return dropping_passed(form_deferred(stage, stage.queue, table, start, stage.remaining), stage, table, start)


def dropping_passed(formed: Formed, stage: "Stage", table: LatencyTable, start: float) -> Formed:
    """Those that were passed over are dropped."""
    size = max(len(formed.batch), 1)
    for task in formed.passed:
        formed.drop(task, start, table.upper(size), size, stage.remaining)
    return formed


def form_deferred(stage: "Stage", queue: "BudgetQueue", table: LatencyTable, start: float, remaining: float) -> Formed:
    """Take a batch off ``queue`` that leaves ``remaining`` seconds for the stages behind. Those passed over are left to
    the caller."""
    formed = Formed()
    target = stage.target
    lone = start + table.upper(1) + remaining
    while len(queue) and queue.lowest().due < lone and not queue.lowest().settled():
        formed.passed.append(queue.pop_lowest())
    if not len(queue):
        return formed

    passed: list[Task] = []
    while len(queue):
        head = queue.lowest()
        size = len(queue) if len(queue) < target else target
        if head.due >= start + table.upper(size) + remaining or head.settled():
            break
        passed.append(queue.pop_lowest())
    size = len(queue) if len(queue) < target else target
    at = 0
    finish = start + table.upper(size) + remaining
    while at < len(passed) and passed[at].due < finish:
        formed.passed.append(passed[at])
        at += 1
    kept = passed[at:]

    earliest = kept[0].due if kept else (queue.lowest().due if len(queue) else 0.0)
    total = len(kept) + len(queue)
    limit = total if total < stage.ceiling else stage.ceiling
    while size < limit:
        now_l = table.upper(size)
        next_l = table.upper(size + 1)
        if earliest < start + next_l + remaining or (size + 1) * now_l < size * next_l:
            break
        size += 1

    taken = 0
    while len(formed.batch) < size and (taken < len(kept) or len(queue)):
        if taken < len(kept):
            formed.take(kept[taken], stage, table, start)
            taken += 1
        else:
            formed.take_all(queue.pop_lowest_few(size - len(formed.batch)), stage, table, start)
    for task in kept[taken:]:
        queue.push(task)
    return formed
