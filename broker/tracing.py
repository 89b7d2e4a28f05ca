"""The traces of a shard's newest requests: of those that were sampled, and of all that went wrong.

What the serving thread does for one is to keep the few objects that say how it went (``broker/engine/spans.py``), none
of which holds a payload. They become records in the thread of whoever asks, a few at a time.
"""

from __future__ import annotations

import sys
import time
from math import log
from random import Random
from typing import Final

from broker.engine.request import Request
from broker.engine.spans import Estimate, StageTime
from broker.engine.stage import NEVER
from cluster.observe import trace as records
from cluster.observe.trace import StageSpan, TraceRecord
from laxity.outcomes import Outcome
from laxity.traceparent import LENGTH, parse_traceparent

OK: Final = Outcome.OK
REJECTED: Final = Outcome.REJECTED
CANCELLED: Final = Outcome.CANCELLED

CHUNK: Final = 64
"""Records that are made at a time: the thread that serves cannot run in the meantime."""
MOST_AT_ONCE: Final = 1000
"""Records that one call gives: they are encoded in one go."""
PAUSE: Final = 0.0005
"""Seconds between two chunks, in which it can: it would not get the interpreter for 5 ms otherwise."""


class Trace:
    """What is kept of one request, ``number`` counting those that were kept. Moments are on the shard's clock."""

    def __init__(
        self,
        number: int,
        request: str,
        pipeline: str,
        version: str,
        traceparent: str,
        sampled: bool,
        arrival: float,
        deadline: float,
        slo: float,
        ended_at: float,
        outcome: Outcome,
        stage: str,
        detail: str,
        cold: bool,
        priority: int,
        times: list[StageTime],
        estimate: Estimate | None,
    ) -> None:
        self.number = number
        self.request = request
        self.pipeline = pipeline
        self.version = version
        self.traceparent = traceparent
        self.sampled = sampled
        self.arrival = arrival
        self.deadline = deadline
        self.slo = slo
        self.ended_at = ended_at
        self.outcome = outcome
        self.stage = stage
        self.detail = detail
        self.cold = cold
        self.priority = priority
        self.times = times
        self.estimate = estimate

    def record(self, shard: str, epoch: float) -> TraceRecord:
        """As it is told; ``epoch``: the shard's clock's zero in Unix seconds."""
        return TraceRecord(
            request=self.request,
            shard=shard,
            pipeline=self.pipeline,
            version=self.version,
            traceparent=self.traceparent,
            sampled=self.sampled,
            at=epoch + self.arrival,
            slo=self.slo,
            budget=self.deadline - self.arrival,
            latency=self.ended_at - self.arrival,
            outcome=self.outcome.value,
            stage=self.stage,
            detail=self.detail,
            cold=self.cold,
            priority=self.priority,
            spans=[self._span(times) for times in self.times],
            estimate=self._estimate(),
        )

    def _span(self, times: StageTime) -> StageSpan:
        arrival = self.arrival
        run = times.run
        ended = times.items == times.elements
        return StageSpan(
            stage=times.stage,
            queued=times.queued_at - arrival,
            opens=-1.0 if run is None else max(run.opens, times.queued_at) - arrival,
            closes=-1.0 if run is None or run.closes >= NEVER else run.closes - arrival,
            granted=-1.0 if run is None else run.granted_at - arrival,
            started=-1.0 if run is None or run.started < 0.0 else run.started - arrival,
            ended=times.ended_at - arrival if ended else -1.0,
            execution=0.0 if run is None else run.execution,
            input=0.0 if run is None else run.input,
            output=0.0 if run is None else run.output,
            forced=times.forced,
            device="" if run is None else f"{run.agent}/{run.device}",
            batch=-1 if run is None else run.number,
            size=0 if run is None else run.size,
            items=times.elements,
            batches=times.batches or (0 if run is None else 1),
            attempts=times.grants,
            predicted=0.0 if run is None else run.predicted,
            remaining=times.remaining if ended else self.deadline - self.ended_at,
        )

    def _estimate(self) -> records.Estimate | None:
        estimate = self.estimate
        if estimate is None:
            return None
        return records.Estimate(
            stage=self.stage,
            at=estimate.at - self.arrival,
            remaining=estimate.due - estimate.at,
            wait=estimate.start - estimate.at,
            execution=estimate.execution,
            size=estimate.size,
            downstream=estimate.downstream,
            short=estimate.short,
        )


class Tracer:
    """Keeps the newest ``traces``. A traceparent says whether its request is sampled; of those without one the part
    ``sample`` is. One thread calls :meth:`begin`, :meth:`note` and :meth:`rejected`; the rest is for any."""

    def __init__(self, shard: str, traces: int, sample: float, random: Random) -> None:
        self._shard = shard
        self._most = traces
        self._random = random
        self._sample = 0.0
        self._unsampled = 0
        """How many more are not sampled before one is: drawn once for each that is."""
        self.resample(sample)
        self._ring: list[Trace] = []
        self._by_request: dict[str, Trace] = {}
        self.kept = 0
        """How many were kept until now."""

    def begin(self, request: Request, traceparent: str) -> None:
        """A request came in."""
        if traceparent:
            parent = parse_traceparent(traceparent)
            if parent is not None:
                request.traceparent = traceparent[:LENGTH]
                request.sampled = parent.sampled
                return
        if self._unsampled:
            self._unsampled -= 1
        else:
            request.sampled = True
            self._unsampled = self._draw()

    def resample(self, sample: float) -> None:
        """Have another part of the requests sampled."""
        self._sample = sample
        self._unsampled = self._draw()

    def _draw(self) -> int:
        if self._sample <= 0.0:
            return sys.maxsize
        return int(log(1.0 - self._random.random()) / log(1.0 - self._sample)) if self._sample < 1.0 else 0

    def note(self, ended: list[Request]) -> None:
        """These have ended: keep the sampled ones, and those that went wrong."""
        for request in ended:
            outcome = request.outcome
            assert outcome is not None
            if not request.sampled and (outcome is OK or outcome is REJECTED or outcome is CANCELLED):
                continue
            pipeline = request.pipeline
            self._keep(
                Trace(
                    self.kept,
                    f"{request.client.name}-{request.id}",
                    pipeline.name,
                    pipeline.id().rpartition("@")[2],
                    request.traceparent,
                    request.sampled,
                    request.arrival,
                    request.deadline,
                    pipeline.slo,
                    request.ended_at,
                    outcome,
                    request.end_stage,
                    request.detail,
                    request.cold,
                    request.priority,
                    [] if request.timings is None else request.timings,
                    request.estimate,
                )
            )

    def rejected(
        self,
        now: float,
        client: str,
        id: int,
        pipeline: str,
        traceparent: str,
        budget: float,
        detail: str,
    ) -> None:
        """A request that did not even reach the engine: kept where it is sampled."""
        parent = parse_traceparent(traceparent)
        if not (self._random.random() < self._sample if parent is None else parent.sampled):
            return
        self._keep(
            Trace(
                self.kept,
                f"{client}-{id}",
                pipeline,
                "",
                traceparent[:LENGTH] if parent is not None else "",
                True,
                now,
                now + budget,
                0.0,
                now,
                REJECTED,
                "",
                detail,
                False,
                0,
                [],
                None,
            )
        )

    def _keep(self, trace: Trace) -> None:
        at = trace.number % self._most
        if at == len(self._ring):
            self._ring.append(trace)
        else:
            oldest = self._ring[at]
            self._ring[at] = trace
            if self._by_request.get(oldest.request) is oldest:
                del self._by_request[oldest.request]
        self._by_request[trace.request] = trace
        self.kept = trace.number + 1

    # ---- from other threads ----------------------------------------------------------------

    def trace(self, request: str) -> TraceRecord | None:
        """That of the request with this id, as its client knows it ('client-number')."""
        found = self._by_request.get(request)
        return found.record(self._shard, _epoch()) if found is not None else None

    def traces(self, after: int, limit: int) -> tuple[int, list[TraceRecord]]:
        """As :meth:`cluster.observe.source.Source.traces`."""
        kept = self.kept
        if after < 0:
            after = max(after + kept, 0)
        first = min(max(after, kept - self._most), kept)
        last = min(kept, first + max(min(limit, MOST_AT_ONCE), 0))
        epoch = _epoch()
        found: list[TraceRecord] = []
        for number in range(first, last):
            if (number - first) % CHUNK == CHUNK - 1:
                time.sleep(PAUSE)
            trace = self._ring[number % self._most]
            if trace.number == number:
                found.append(trace.record(self._shard, epoch))
        return last, found


def _epoch() -> float:
    return time.time() - time.monotonic()
