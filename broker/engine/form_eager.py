"""How the peers form a batch as soon as a GPU would take one."""

from typing import TYPE_CHECKING, Final

from broker.engine.formed import Form, Formed
from broker.engine.predictor import LatencyTable

if TYPE_CHECKING:
    from broker.engine.stage import Stage

CLOCKWORK_BATCHES: Final = [2, 4, 8, 16]


class FormAll(Form):
    """naive: everybody up to the target batch, whatever the deadlines."""

    def form(self, stage: "Stage", table: LatencyTable, start: float) -> Formed:
        formed = Formed()
        queue = stage.queue
        while len(formed.batch) < stage.target and len(queue):
            task = queue.pop_lowest()
            if task.group is not None:
                task.group.admitted = True
            formed.batch.append(task)
        return formed


class FormUnexpired(Form):
    """clipper++: drops only what has used up its stage's budget before it is run (Clipper, NSDI'17, with the SLO split
    over the stages as in PARD, section 5.1)."""

    def form(self, stage: "Stage", table: LatencyTable, start: float) -> Formed:
        formed = Formed()
        queue = stage.queue
        while len(formed.batch) < stage.target and len(queue):
            task = queue.pop_lowest()
            if task.due < start and not task.settled():
                formed.drop(task, start, 0.0, 0, 0.0)
            else:
                if task.group is not None:
                    task.group.admitted = True
                formed.batch.append(task)
        return formed


class FormEarly(Form):
    """nexus: early drop (SOSP'19, section 6.3). Whoever would not be met by the batch that is being filled is dropped;
    the batch shrinks when the queue runs short."""

    def form(self, stage: "Stage", table: LatencyTable, start: float) -> Formed:
        formed = Formed()
        queue = stage.queue
        size = len(queue) if len(queue) < stage.target else stage.target
        finish = start + table.upper(size) + stage.remaining
        while len(formed.batch) < size and len(queue):
            task = queue.pop_lowest()
            if task.due < finish and not task.settled():
                formed.drop(task, start, table.upper(size), size, stage.remaining)
            else:
                formed.take(task, stage, table, start)
            if len(formed.batch) + len(queue) < size:
                size = len(formed.batch) + len(queue)
                finish = start + table.upper(size) + stage.remaining
        return formed


class FormLargest(Form):
    """shepherd: in deadline order while the earliest deadline allows one more (Flex, NSDI'23, section 5)."""

    def form(self, stage: "Stage", table: LatencyTable, start: float) -> Formed:
        formed = Formed()
        _drop_hopeless(stage, table, start, formed)
        queue = stage.queue
        if not len(queue):
            return formed
        earliest = queue.lowest().due
        while len(queue) and len(formed.batch) < stage.target:
            size = len(formed.batch) + 1
            if size > 1 and earliest < start + table.upper(size) + stage.remaining:
                break
            formed.take(queue.pop_lowest(), stage, table, start)
        return formed


class FormStrategies(Form):
    """clockwork: the batch sizes 1, 2, 4, 8 and 16; grows while enough requests still meet the larger one's end
    (OSDI'20, section 5.3). Whoever is more urgent than that stays in the queue."""

    def form(self, stage: "Stage", table: LatencyTable, start: float) -> Formed:
        formed = Formed()
        _drop_hopeless(stage, table, start, formed)
        queue = stage.queue
        if not len(queue):
            return formed
        size = 1
        finish = start + table.upper(1) + stage.remaining
        for larger in CLOCKWORK_BATCHES:
            later = start + table.upper(larger) + stage.remaining
            if larger > stage.target or queue.count_from(later) < larger:
                break
            size = larger
            finish = later
        for _ in range(size):
            # Settled ones (a probe, the items of a map request that has begun) are run whatever their deadline.
            settled = size == 1 or queue.lowest().settled()
            formed.take(queue.pop_lowest() if settled else queue.pop_from(finish), stage, table, start)
        return formed


class FormProactive(Form):
    """pard: requests by the stage's order, each dropped if it is predicted to miss, downstream included
    (arXiv 2602.08747, section 4). Fills up what is being collected for a device; ``stage.collected`` says how many
    there are."""

    def form(self, stage: "Stage", table: LatencyTable, start: float) -> Formed:
        formed = Formed()
        queue = stage.queue
        room = stage.target - stage.collected
        typical = stage.typical_batch()
        while len(formed.batch) < room and len(queue):
            task = queue.pop_highest() if stage.order.highest_first else queue.pop_lowest()
            size = stage.collected + len(formed.batch) + 1
            if size < typical:
                size = typical
            if task.due < start + table.upper(size) + stage.remaining and not task.settled():
                formed.drop(task, start, table.upper(size), size, stage.remaining)
            else:
                formed.take(task, stage, table, start)
        return formed


def _drop_hopeless(stage: "Stage", table: LatencyTable, start: float, formed: Formed) -> None:
    """Drop those that would miss even in a batch of their own."""
    queue = stage.queue
    lone = start + table.upper(1) + stage.remaining
    while len(queue) and queue.lowest().due < lone and not queue.lowest().settled():
        task = queue.pop_lowest()
        formed.drop(task, start, table.upper(1), 1, stage.remaining)
