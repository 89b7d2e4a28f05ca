"""Forming a batch the project's own way: who is within the plan first, who is behind it next.

The planner gives each stage a part of the SLO (its reserve is what it leaves to the stages behind). A request is
*within the plan* if the batch that it would be in ends before deadline - reserve, and *behind* otherwise; it is
dropped iff it could not make its deadline even alone: t + l(1) + sub > deadline. Within the plan the lowest budget goes
first, so batches are as large as the plan allows and what is behind the stage goes as planned. Those behind get
what devices those within the plan do not need. Under overload that is none: they are passed over, and it is they
who are dropped. Without overload they are run at once and mostly still make it.

So the order adapts itself without a load factor: PARD (arXiv 2602.08747) turns the whole queue round when the last
second's load was above 1, and what is then served late in its budget misses further on.
"""

from typing import TYPE_CHECKING

from broker.engine.formed import Form, Formed
from broker.engine.predictor import LatencyTable

if TYPE_CHECKING:
    from broker.engine.stage import Stage


class FormPlanned(Form):
    """laxity. ``stage.behind_turn`` says that it is the turn of those behind the plan (window.py decides)."""

    def form(self, stage: "Stage", table: LatencyTable, start: float) -> Formed:
        formed = Formed()
        queue = stage.queue
        alone = start + table.upper(1)
        while len(queue) and queue.lowest().due < alone + stage.remaining and not queue.lowest().settled():
            task = queue.pop_lowest()
            formed.drop(task, alone + stage.remaining - task.due)
        if not len(queue):
            return formed
        if queue.lowest().settled():
            _take_lowest(stage, table, start, formed)
            return formed
        reserve = stage.reserve
        most = queue.count_from(alone + reserve)
        if stage.behind_turn or most == 0:
            reserve = stage.remaining
            most = len(queue) - most
        size = _largest(stage, table, start + reserve, most if most < stage.target else stage.target)
        finish = start + table.upper(size) + reserve
        available = queue.count_from(finish)
        earliest = queue.peek_from(finish)
        assert earliest is not None
        limit = available if available < stage.ceiling else stage.ceiling
        while size < limit and earliest.due >= start + table.upper(size + 1) + reserve:
            if (size + 1) * table.upper(size) < size * table.upper(size + 1):
                break  # the larger one takes longer per request
            size += 1
        if available > size:
            # Not all can be served by this batch: those of priority 1 are not who is passed over.
            meets = start + table.upper(size) + stage.remaining
            for task in stage.take_prior(size):
                if task.due >= meets:
                    formed.take(task, stage, table, start)
                else:
                    queue.push(task)
        while len(formed.batch) < size and queue.count_from(finish) > 0:
            formed.take(queue.pop_from(finish), stage, table, start)
        return formed


def _largest(stage: "Stage", table: LatencyTable, start: float, most: int) -> int:
    """The largest batch, up to ``most``, that so many of the queue would be met by; at least 1. ``start`` includes what
    is reserved behind the stage."""
    queue = stage.queue
    if queue.count_from(start + table.upper(most)) >= most:
        return most
    low, high = 1, most  # low is feasible, high is not: the larger, the later it ends, and the fewer are met
    while high - low > 1:
        middle = (low + high) // 2
        if queue.count_from(start + table.upper(middle)) >= middle:
            low = middle
        else:
            high = middle
    return low


def _take_lowest(stage: "Stage", table: LatencyTable, start: float, formed: Formed) -> None:
    """Run those that were decided upon (a probe, the items of a map request that has begun), and who may go along."""
    queue = stage.queue
    finish = start + table.upper(stage.target) + stage.remaining
    while len(formed.batch) < stage.target and len(queue):
        task = queue.lowest()
        if task.due < finish and not task.settled():
            break
        formed.take(queue.pop_lowest(), stage, table, start)
