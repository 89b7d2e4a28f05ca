"""Forming a batch the project's own way: who is within the plan first, who is behind it next.

The planner gives each stage a part of the SLO (its reserve is what it leaves to the stages behind). A request is
*within the plan* while the batch that it would be in can end before deadline - reserve + margin. Within the plan,
batches are formed as Symphony does (form_deferred.py); but who is passed over there is not dropped: it falls *behind*
the plan, and is dropped only when it could not make its deadline even alone, t + l(1) + sub > deadline. Those behind
get the devices that those within the plan do not need. Under overload there are none, and it is they who are dropped;
without overload they are run at once, in batches of their own, and mostly still make it. Who has fallen behind stays
there: let in again, it would have smaller batches formed for its sake, and others fall behind for that.

So the order adapts itself, without a load factor that tells what the last second was like: PARD (arXiv 2602.08747)
turns the whole queue round then.
"""

from typing import TYPE_CHECKING

from broker.engine.form_deferred import dropping_passed, form_deferred
from broker.engine.formed import Form, Formed
from broker.engine.predictor import LatencyTable

if TYPE_CHECKING:
    from broker.engine.stage import Stage


class FormPlanned(Form):
    """laxity. ``stage.behind_turn`` says that it is the turn of those behind the plan (window.py decides)."""

    def form(self, stage: "Stage", table: LatencyTable, start: float) -> Formed:
        if stage.behind_turn:
            formed = form_deferred(stage, stage.behind, table, start, stage.remaining)
            return dropping_passed(formed, stage, table, start)
        # The window opened early by the margin. Who is looked at a moment later has not fallen behind for that.
        formed = form_deferred(stage, stage.queue, table, start, stage.reserve - stage.margin)
        batch = formed.batch
        meets = start + table.upper(len(batch)) + stage.remaining
        prior = 0
        for task in formed.passed:
            if task.request.priority > 0 and task.group is None and prior < len(batch) and task.due >= meets:
                # Priority decides who is passed over: the one with the most budget waits in its place.
                stage.queue.push(batch.pop())
                batch.insert(prior, task)
                prior += 1
            else:
                stage.behind.push(task)
        return formed
