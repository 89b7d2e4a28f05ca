"""The way of a request through its graph: into a stage's queue, out with its answer, on to the next stages."""

from typing import Final

from broker.engine.ledger import Ledger
from broker.engine.plan import FROM_REQUEST, StagePlan
from broker.engine.request import NO_MORE, NO_SPREAD, NO_VALUES, MapGroup, Request, Task
from broker.engine.spans import note_end
from broker.engine.stage import Stage
from laxity.node import PayloadError
from laxity.outcomes import Outcome
from laxity.payload import Payload, as_dict, as_list

OK: Final = Outcome.OK


class Flow:
    """Moves requests; who ends on the way is told to the ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def begin(self, now: float, request: Request) -> None:
        """Queue a new request for the stages that need nothing but the request."""
        if request.left == 1:
            self._enqueue(now, request, 0)
            return
        pipeline = request.pipeline
        request.values = [None] * request.left
        request.waiting = pipeline.parent_counts.copy()
        for number in pipeline.roots:
            if request.outcome is None:
                self._enqueue(now, request, number)

    def finish_task(self, now: float, task: Task, answer: Payload, execution: float) -> None:
        """A task of a live request was run: its stage is done, or one item of it."""
        request = task.request
        group = task.group
        request.forget(task)
        if request.timed or (self._ledger.spans and (request.sampled or not _ends_ok(now, task))):
            note_end(now, task, execution)
        if group is None:
            self._finish_stage(now, request, task.number, answer)
            return
        group.results[task.item] = answer
        group.left -= 1
        if group.left == 0:
            results: list[Payload] = []
            for result in group.results:
                assert result is not None
                results.append(result)
            self._finish_stage(now, request, task.number, as_list(results))

    def _enqueue(self, now: float, request: Request, number: int) -> None:
        """All inputs of a stage are there: queue the request (or its items) for it."""
        ledger = self._ledger
        plan = request.pipeline.stages[number]
        if plan.takes_request:
            self._queue(now, request, number, plan, plan.stage, request.payload, NO_MORE)
            return
        inputs: list[Payload] = []
        try:
            for source, field in plan.sources:
                value = request.payload if source == FROM_REQUEST else request.values[source]
                assert value is not None
                inputs.append(value.field(field) if field else value)
            items = inputs[0].items(plan.max_items) if plan.is_map else []
        except PayloadError as error:
            at = len(inputs) if len(inputs) < len(plan.sources) else 0
            source = plan.sources[at][0]
            why = f"no input for stage {plan.name!r}: {error}"
            if source == FROM_REQUEST:
                ledger.end(now, request, Outcome.REJECTED, plan.name, why)
            else:
                ledger.end(now, request, Outcome.FAILED, request.pipeline.stages[source].name, why)
            return
        if plan.is_map:
            self._queue_items(now, request, number, plan, items)
        else:
            more = inputs[1:] if len(inputs) > 1 else NO_MORE
            self._queue(now, request, number, plan, plan.lane(inputs), inputs[0], more)

    def _queue(
        self,
        now: float,
        request: Request,
        number: int,
        plan: StagePlan,
        stage: Stage,
        input: Payload,
        more: list[Payload],
    ) -> None:
        if self._lets_in(now, request, plan, stage, 1, NO_SPREAD):
            stage.push(Task(request, stage, number, -1, None, input, now, more))
            self._ledger.touch(stage)

    def _queue_items(self, now: float, request: Request, number: int, plan: StagePlan, items: list[Payload]) -> None:
        count = len(items)
        stage = plan.stage
        lanes: list[Stage] = []
        spread = NO_SPREAD
        if plan.cost is not None:
            lanes = [plan.lane([item]) for item in items]
            spread = [(lane, lanes.count(lane)) for lane in stage.lanes if lane in lanes]
        if not self._lets_in(now, request, plan, stage, count, spread):
            return
        if count == 0:
            self._finish_stage(now, request, number, as_list([]))
            return
        plan.note_items(count)
        group = MapGroup(count)
        group.spread = spread
        for index in range(count):
            lane = lanes[index] if lanes else stage
            lane.push(Task(request, lane, number, index, group, items[index], now))
        if lanes:
            for lane, _ in spread:
                self._ledger.touch(lane)
        else:
            self._ledger.touch(stage)

    def _lets_in(
        self,
        now: float,
        request: Request,
        plan: StagePlan,
        lane: Stage,
        count: int,
        spread: list[tuple[Stage, int]],
    ) -> bool:
        """Whether the stage takes ``count`` elements more, of ``lane`` or ``spread`` over several; the request ends if
        it does not."""
        ledger = self._ledger
        stage = plan.stage
        waiting = stage.waiting() if plan.cost is None else stage.all_waiting()
        if waiting + count > stage.max_queue:
            why = f"queue full: {waiting} of {stage.max_queue} elements wait at stage {plan.name!r}"
            ledger.end(now, request, Outcome.REJECTED, plan.name, why)
            return False
        if spread:
            for each, items in spread:
                each.arrivals += items
        else:
            lane.arrivals += count
        if stage.metrics is not None:
            stage.metrics.came(count, request.deadline - now)
        if not stage.lets_in(request.priority > 0):
            why = f"overload control: stage {plan.name!r} admits {stage.admits:.0%} at present"
            if stage.limit:
                why = f"stage {stage.limit!r} cannot keep up: {stage.admits:.0%} of the requests are let in at present"
            ledger.end(now, request, Outcome.DROPPED, plan.name, why)
            return False
        return True

    def _finish_stage(self, now: float, request: Request, number: int, value: Payload) -> None:
        ledger = self._ledger
        pipeline = request.pipeline
        request.left -= 1
        if request.left == 0 and pipeline.whole_answer == number and now <= request.deadline:
            request.answer = value
            ledger.end(now, request, OK, "", "")
            return
        if request.values is NO_VALUES:
            request.values = [None]
        request.values[number] = value
        request.nbytes += value.nbytes
        ledger.bytes += value.nbytes
        if request.left == 0:
            self._answer(now, request)
            return
        if ledger.bytes > ledger.limits.max_bytes:
            why = (
                f"queue full: an answer of {value.nbytes} bytes is more than the shard's {ledger.limits.max_bytes} hold"
            )
            ledger.end(now, request, Outcome.REJECTED, pipeline.stages[number].name, why)
            return
        for child in pipeline.stages[number].children:
            request.waiting[child] -= 1
            if request.waiting[child] == 0 and request.outcome is None:
                self._enqueue(now, request, child)

    def _answer(self, now: float, request: Request) -> None:
        pipeline = request.pipeline
        if now > request.deadline:
            self._ledger.expire(now, request, len(pipeline.stages) - 1)
            return
        fields: dict[str, Payload] = {}
        try:
            for name, source, field in pipeline.outputs:
                value = request.payload if source == FROM_REQUEST else request.values[source]
                assert value is not None
                fields[name] = value.field(field) if field else value
        except PayloadError as error:
            self._ledger.end(now, request, Outcome.FAILED, pipeline.stages[-1].name, f"no output: {error}")
            return
        request.answer = fields[""] if "" in fields else as_dict(fields)
        self._ledger.end(now, request, OK, "", "")


def _ends_ok(now: float, task: Task) -> bool:
    """Whether the request ends ok now that this task was run: the times of its stages would be of no interest."""
    request = task.request
    return (
        request.left == 1
        and task.group is None
        and request.pipeline.whole_answer == task.number
        and now <= request.deadline
    )
