"""The traces of a shard's newest requests: of those that were sampled, and of all that went wrong.

They are kept as the bytes of their records, many together, made when requests end (a microsecond for each): the objects
that say how a request went (``broker/engine/spans.py``) lie among those of requests in flight. If one in a hundred of
them stayed, the memory between them would never be free as a whole again, and every request would take a tenth longer.
"""

from __future__ import annotations

import sys
import time
from math import log, log1p
from random import Random
from typing import Final

import msgspec

from broker.engine.request import Request
from broker.engine.spans import StageTime
from broker.engine.stage import NEVER
from cluster.observe.trace import Estimate, StageSpan, TraceRecord
from laxity.outcomes import Outcome
from laxity.traceparent import LENGTH, parse_traceparent

OK: Final = Outcome.OK
REJECTED: Final = Outcome.REJECTED
CANCELLED: Final = Outcome.CANCELLED

PAGE: Final = 64
"""Records that are kept together, and read at a time: the thread that serves cannot run in the meantime."""
SEARCHED: Final = 64
"""Pages that are looked through at a time for one record."""
MOST_AT_ONCE: Final = 1000
"""Records that one call gives: they are encoded in one go."""
PAUSE: Final = 0.0005
"""Seconds between two turns, in which it can: it would not get the interpreter for 5 ms otherwise."""
LONGEST_DETAIL: Final = 1000
"""Characters of a detail: some name all pipelines, or have what a model raised."""
_ARRAY: Final = b"\xdc" + PAGE.to_bytes(2)
"""What a MessagePack array of a page's records begins with."""


class Page:
    """The newest records, as bytes; ``first`` is the number of the first one."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.records: list[bytes] = []


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
        self._encode = msgspec.msgpack.Encoder().encode
        self._page = Page(0)
        self._full: dict[int, bytes] = {}
        """Full pages by number."""
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
        if self._sample >= 1.0:
            return 0
        return int(min(log(1.0 - self._random.random()) / log1p(-self._sample), sys.maxsize))

    def note(self, ended: list[Request]) -> None:
        """These have ended: keep the sampled ones, and those that went wrong."""
        for request in ended:
            outcome = request.outcome
            assert outcome is not None
            if request.sampled or not (outcome is OK or outcome is REJECTED or outcome is CANCELLED):
                self._keep(_record(request, outcome, self._shard))

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
            TraceRecord(
                request=f"{client}-{id}",
                shard=self._shard,
                pipeline=pipeline,
                version="",
                traceparent=traceparent[:LENGTH] if parent is not None else "",
                sampled=True,
                at=_epoch() + now,
                slo=0.0,
                budget=budget,
                latency=0.0,
                outcome=REJECTED.value,
                stage="",
                detail=detail[:LONGEST_DETAIL],
                cold=False,
                priority=0,
                spans=[],
            )
        )

    def _keep(self, record: TraceRecord) -> None:
        page = self._page
        page.records.append(self._encode(record))
        self.kept += 1
        if len(page.records) == PAGE:
            number = page.first // PAGE
            self._full[number] = _ARRAY + b"".join(page.records)
            self._page = Page(self.kept)
            # What is older than the most that are wanted is not told any more, and goes with its page.
            self._full.pop(number - -(-self._most // PAGE), None)

    # ---- from other threads ----------------------------------------------------------------

    def trace(self, request: str) -> TraceRecord | None:
        """That of the request with this id, as its client knows it ('client-number'); the newest of several."""
        wanted = self._encode(request)
        kept = self.kept
        oldest = max(kept - self._most, 0)
        for number in range((kept - 1) // PAGE, oldest // PAGE - 1, -1):
            if number % SEARCHED == 0:
                time.sleep(PAUSE)
            page = self._full.get(number)
            if page is not None and wanted not in page:
                continue
            records = self._records(number)
            for at in range(len(records) - 1, -1, -1):
                if records[at].request == request and number * PAGE + at >= oldest:
                    return records[at]
        return None

    def traces(self, after: int, limit: int) -> tuple[int, list[TraceRecord]]:
        """As :meth:`cluster.observe.source.Source.traces`."""
        kept = self.kept
        if after < 0:
            after = max(after + kept, 0)
        first = min(max(after, kept - self._most), kept)
        last = min(kept, first + max(min(limit, MOST_AT_ONCE), 0))
        found: list[TraceRecord] = []
        for number in range(first // PAGE, (last + PAGE - 1) // PAGE):
            start = number * PAGE
            if found:
                time.sleep(PAUSE)
            found += self._records(number)[max(first - start, 0) : max(last - start, 0)]
        return last, found

    def _records(self, number: int) -> list[TraceRecord]:
        """Those of a page; none where it is gone."""
        page = self._page  # first: it may be full before its bytes are asked for below
        full = self._full.get(number)
        if full is not None:
            return msgspec.msgpack.decode(full, type=list[TraceRecord])
        return [_decode(record) for record in page.records.copy()] if page.first == number * PAGE else []


def _record(request: Request, outcome: Outcome, shard: str) -> TraceRecord:
    pipeline = request.pipeline
    estimate = request.estimate
    told: Estimate | None = None
    if estimate is not None:
        told = Estimate(
            stage=request.end_stage,
            at=estimate.at - request.arrival,
            remaining=estimate.due - estimate.at,
            wait=estimate.start - estimate.at,
            execution=estimate.execution,
            size=estimate.size,
            downstream=estimate.downstream,
            short=estimate.short,
        )
    return TraceRecord(
        request=f"{request.client.name}-{request.id}",
        shard=shard,
        pipeline=pipeline.name,
        version=pipeline.id().rpartition("@")[2],
        traceparent=request.traceparent,
        sampled=request.sampled,
        at=_epoch() + request.arrival,
        slo=pipeline.slo,
        budget=request.deadline - request.arrival,
        latency=request.ended_at - request.arrival,
        outcome=outcome.value,
        stage=request.end_stage,
        detail=request.detail[:LONGEST_DETAIL],
        cold=request.cold,
        priority=request.priority,
        spans=[] if request.timings is None else [_span(request, times) for times in request.timings],
        estimate=told,
    )


def _span(request: Request, times: StageTime) -> StageSpan:
    arrival = request.arrival
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
        remaining=times.remaining if ended else request.deadline - request.ended_at,
    )


def _decode(kept: bytes) -> TraceRecord:
    return msgspec.msgpack.decode(kept, type=TraceRecord)


def _epoch() -> float:
    return time.time() - time.monotonic()
