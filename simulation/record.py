"""What is noted of a simulated run while it goes on: plain counters, cheap enough for millions of requests."""

from broker.engine.devices import Batch
from broker.engine.request import Request
from laxity.outcomes import Outcome


class StageRecord:
    """One stage; lists have one entry a second."""

    def __init__(self, seconds: int) -> None:
        self.batches = [0] * seconds
        self.elements = [0] * seconds
        self.waited = [0.0] * seconds
        self.busy = [0.0] * seconds
        self.dropped = [0] * seconds


class PipelineRecord:
    """One pipeline; ``good`` counts by the second of arrival."""

    def __init__(self, stages: list[str], seconds: int) -> None:
        self.stages = {name: StageRecord(seconds) for name in stages}
        self.good = [0] * seconds
        self.outcomes: dict[str, int] = {outcome.value: 0 for outcome in Outcome}
        self.latencies: list[float] = []
        """Seconds of the good requests."""
        self.busy = 0.0
        self.invalid = 0.0
        """GPU-seconds spent on requests that were not good."""


class Record:
    """Requests are numbered from 0 in the order of their arrival, over all pipelines."""

    def __init__(self, pipelines: list[PipelineRecord], places: dict[str, tuple[int, str]], seconds: int) -> None:
        self.pipelines = pipelines
        self.submitted = 0
        self._places = places
        """(pipeline, stage name) by model key."""
        self._last = seconds - 1
        self._spent: list[float] = []
        """GPU-seconds by request."""
        self._which: list[int] = []

    def arrive(self, which: int) -> None:
        self.submitted += 1
        self._spent.append(0.0)
        self._which.append(which)

    def grant(self, now: float, batch: Batch) -> None:
        which, name = self._places[batch.stage.model]
        stage = self.pipelines[which].stages[name]
        second = self._second(now)
        stage.batches[second] += 1
        stage.elements[second] += len(batch.tasks)
        waited = 0.0
        for task in batch.tasks:
            waited += now - task.queued_at
        stage.waited[second] += waited

    def ran(self, now: float, batch: Batch, seconds: float) -> None:
        """A batch ended that ran for ``seconds``."""
        which, name = self._places[batch.stage.model]
        pipeline = self.pipelines[which]
        pipeline.busy += seconds
        pipeline.stages[name].busy[self._second(now)] += seconds
        each = seconds / len(batch.tasks)
        spent = self._spent
        for task in batch.tasks:
            request = task.request
            if request.outcome is None:
                spent[request.id] += each
            elif request.outcome != Outcome.OK:
                pipeline.invalid += each

    def lost(self, now: float, batch: Batch) -> None:
        """A batch was lost with its host: what it ran until then served nobody."""
        if batch.start < now:
            pipeline = self.pipelines[self._places[batch.stage.model][0]]
            pipeline.busy += now - batch.start
            pipeline.invalid += now - batch.start

    def end(self, ended: list[Request]) -> None:
        for request in ended:
            pipeline = self.pipelines[self._which[request.id]]
            outcome = request.outcome
            assert outcome is not None
            pipeline.outcomes[outcome.value] += 1
            if outcome == Outcome.OK:
                pipeline.good[self._second(request.arrival)] += 1
                pipeline.latencies.append(request.ended_at - request.arrival)
            else:
                pipeline.invalid += self._spent[request.id]
                if outcome in (Outcome.DROPPED, Outcome.EXPIRED) and request.end_stage:
                    pipeline.stages[request.end_stage].dropped[self._second(request.ended_at)] += 1

    def _second(self, now: float) -> int:
        second = int(now)
        return second if second < self._last else self._last
