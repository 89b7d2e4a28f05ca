"""The account of requests: each comes in once and ends once, whatever happens in between."""

from typing import Final

from broker.engine.limits import Limits
from broker.engine.request import QUEUED, Request, Task
from broker.engine.spans import Estimate, note_unfinished
from broker.engine.stage import Stage
from laxity.outcomes import Outcome

OK: Final = Outcome.OK


class Ledger:
    """Keeps submitted = Σ ended + in flight, the bytes held, and the stages that have to be looked at again."""

    def __init__(self, limits: Limits, spans: bool = False) -> None:
        self.limits = limits
        self.spans = spans
        """Whether it is kept how the stages of requests went (else only where their clients want to know)."""
        self.submitted = 0
        self.in_flight = 0
        self.bytes = 0
        self.touched: list[Stage] = []
        """Stages whose queue changed since they were last looked at, each once."""
        self.drained = False
        """Whether the last request of a retired pipeline has ended."""
        self._ended: list[Request] = []
        self._ok = 0
        self._not_ok: dict[str, int] = {outcome.value: 0 for outcome in Outcome if outcome is not OK}

    @property
    def ended_by(self) -> dict[str, int]:
        """How many requests ended, by outcome."""
        return {OK.value: self._ok, **self._not_ok}

    def touch(self, stage: Stage) -> None:
        """Have a stage looked at again."""
        if not stage.dirty:
            stage.dirty = True
            self.touched.append(stage)

    def enter(self, request: Request) -> bool:
        """A request came in; False where its client has one of that id in flight already, which changes nothing."""
        if request.client.requests.setdefault(request.id, request) is not request:
            return False
        request.client.account.in_flight += 1
        pipeline = request.pipeline
        pipeline.in_flight += 1
        if pipeline.metrics is not None:
            pipeline.metrics.submitted += 1
        self.submitted += 1
        self.in_flight += 1
        self.bytes += request.nbytes
        return True

    def end(self, now: float, request: Request, outcome: Outcome, stage: str, detail: str) -> None:
        """End a request, unless it has ended before; what it has queued anywhere goes with it."""
        if request.outcome is not None:
            return
        request.outcome = outcome
        request.end_stage = stage
        request.detail = detail
        request.ended_at = now
        if request.newest is not None:
            if self.spans:
                note_unfinished(request)
            for task in request.tasks:
                if task.state == QUEUED:
                    task.stage.take_out(task)
                    self.touch(task.stage)
                request.forget(task)
        client = request.client
        del client.requests[request.id]
        client.account.in_flight -= 1
        pipeline = request.pipeline
        pipeline.in_flight -= 1
        self.in_flight -= 1
        self.bytes -= request.nbytes
        if outcome is OK:
            self._ok += 1
        else:
            self._not_ok[outcome] += 1
        self._ended.append(request)
        if pipeline.metrics is not None:
            pipeline.metrics.end(now, request, outcome, stage, detail)
        if pipeline.retired and pipeline.in_flight == 0:
            self.drained = True

    def expire(self, now: float, request: Request, number: int) -> None:
        """End a request whose deadline has passed, at the stage of this number."""
        plan = request.pipeline.stages[number]
        plan.stage.tally.dropped += 1
        late = (now - request.deadline) * 1e3
        detail = f"the deadline passed {late:.1f} ms ago{_not_loaded(plan.stage)}"
        self.end(now, request, Outcome.EXPIRED, plan.name, detail)

    def drop(self, now: float, task: Task, estimate: Estimate) -> None:
        """End a request that is predicted to miss its deadline."""
        name = task.stage_name()
        task.stage.tally.dropped += 1
        estimate.at = now
        short = estimate.short
        task.request.estimate = estimate
        task.request.short_by = short
        self.end(
            now,
            task.request,
            Outcome.DROPPED,
            name,
            f"predicted to miss its deadline by {short * 1e3:.1f} ms at stage {name!r}{_not_loaded(task.stage)}",
        )

    def take_ended(self) -> list[Request]:
        """The requests that ended since the last call."""
        ended = self._ended
        if ended:
            self._ended = []
        return ended


def _not_loaded(stage: Stage) -> str:
    """Why no device has its model, where that is known."""
    return f" (its model could not be loaded: {stage.trouble})" if stage.trouble and stage.cold() else ""
