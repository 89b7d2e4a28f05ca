"""What a shard keeps of how its requests went: spans and estimates from the engine, and which traces are there."""

from __future__ import annotations

import gc
import itertools
import types
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.engine.devices import Batch
from broker.engine.fleet import HeldModel
from broker.engine.limits import Limits
from broker.engine.plan import FROM_REQUEST, Pipeline, StagePlan
from broker.engine.request import Client, Request, Task
from broker.engine.scheduler import Scheduler
from broker.engine.stage import Stage
from broker.tracing import LONGEST_DETAIL, MOST_AT_ONCE, PAGE, Tracer
from cluster.observe.trace import StageSpan, TraceRecord
from laxity.payload import Payload, encode

SLO = 1.0
EACH = [(1, 0.1), (8, 0.8)]
FLAT = [(1, 0.1), (8, 0.1)]
SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = SAMPLED[:-1] + "0"


class World:
    """A shard's engine with its tracer, and one device that holds all stages of a pipeline 'p'."""

    def __init__(
        self,
        *stages: str,
        profile: list[tuple[int, float]] = EACH,
        traces: int = 100,
        sample: float = 0.0,
        is_map: str = "",
        devices: int = 1,
        outputs: list[tuple[str, int, str]] | None = None,
    ) -> None:
        self.scheduler = Scheduler(Limits(), spans=traces > 0)
        self.tracer = Tracer("s0", traces, sample, Random(1)) if traces else None
        self.client = Client("c")
        self.ids = itertools.count()
        plans = [
            StagePlan(
                name,
                Stage(f"p@v1/{name}", "", 8, 100),
                [(number - 1 if number else FROM_REQUEST, "")],
                name == is_map,
                9,
            )
            for number, name in enumerate(stages)
        ]
        self.scheduler.apply(Pipeline("p", SLO, plans, outputs or [("", len(plans) - 1, "")]))
        for number in range(devices):
            self.scheduler.report("a", number, "gpu", [HeldModel(f"p@v1/{name}", "", 100, profile) for name in stages])
            self.scheduler.pull("a", number, 0.0)

    def submit(
        self, now: float, value: Any = "x", *, traceparent: str = "", timed: bool = False, **also: Any
    ) -> Request:
        budget, arrival = also.get("budget", -1.0), also.get("arrival", now)
        request = self.scheduler.submit(now, self.client, next(self.ids), "p", arrival, budget, 0, encode(value), timed)
        assert request is not None
        if self.tracer is not None:
            self.tracer.begin(request, traceparent)
        return request

    def grant(self, now: float) -> Batch:
        while not (batches := self.scheduler.dispatch(now)):
            now = self.scheduler.next_wake()
        (batch,) = batches
        return batch

    def done(self, now: float, batch: Batch, code: str = "ok", execution: float = 0.1, **also: Any) -> None:
        results = [task.inputs[0] for task in batch.tasks] if code == "ok" else []
        device, detail, failures = batch.device, also.get("detail", "why"), also.get("failures", {})
        self.scheduler.done(now, device.agent, batch.number, code, execution, results, failures, detail, 0.002, 0.003)
        self.scheduler.pull(device.agent, device.number, now)

    def trace(self, request: Request) -> TraceRecord:
        """Of a request that has ended."""
        assert self.tracer is not None
        self.tracer.note(self.scheduler.take_ended())
        found = self.tracer.trace(f"c-{request.id}")
        assert found is not None
        return found

    def kept(self) -> list[str]:
        assert self.tracer is not None
        self.tracer.note(self.scheduler.take_ended())
        return [record.request for record in self.tracer.traces(0, 1000)[1]]


def check_in_order(span: StageSpan) -> None:
    moments = [span.queued, span.opens, span.granted, span.started, span.ended]
    happened = [moment for moment in moments if moment != -1.0]
    assert happened == sorted(happened)
    assert 0.0 <= span.forced <= max(span.granted - span.queued, 0.0) + 1e-9


# ---- spans ----------------------------------------------------------------------------------


def test_a_trace_tells_of_each_stage() -> None:
    world = World("a", "b")
    request = world.submit(10.05, traceparent=SAMPLED, arrival=10.0)
    batch = world.grant(10.05)
    world.done(10.2, batch)
    second = world.grant(10.2)
    assert second is not None
    world.done(10.35, second)
    trace = world.trace(request)
    assert (trace.request, trace.shard, trace.pipeline, trace.version) == (f"c-{request.id}", "s0", "p", "v1")
    assert (trace.outcome, trace.stage, trace.detail, trace.estimate) == ("ok", "", "", None)
    assert (trace.sampled, trace.traceparent) == (True, SAMPLED)
    assert (trace.slo, trace.budget, trace.latency) == pytest.approx((SLO, SLO, 0.35))
    first, last = trace.spans
    for span in (first, last):
        check_in_order(span)
        assert (span.device, span.size, span.items, span.batches, span.attempts) == ("a/0", 1, 1, 1, 1)
        assert (span.execution, span.input, span.output, span.predicted) == pytest.approx((0.1, 0.002, 0.003, 0.1))
    assert [span.stage for span in trace.spans] == ["a", "b"]
    assert [span.batch for span in trace.spans] == [batch.number, second.number]
    assert (first.queued, first.granted, first.ended, first.remaining) == pytest.approx((0.05, 0.05, 0.2, 0.8))
    assert (last.queued, last.ended, last.remaining) == pytest.approx((0.2, 0.35, 0.65))
    assert first.ended - first.started >= first.execution + first.output
    assert first.closes > first.granted


def test_waiting_for_a_device_is_told_from_waiting_for_the_window() -> None:
    world = World("s")
    first, second = world.submit(0.0, traceparent=SAMPLED), world.submit(0.0, traceparent=SAMPLED)
    batch = world.grant(0.0)
    world.scheduler.dispatch(0.0)
    world.done(0.25, batch)
    world.done(0.4, world.grant(0.25))
    assert world.trace(first).spans[0].forced == 0.0
    (span,) = world.trace(second).spans
    assert span.forced == pytest.approx(span.granted - span.queued) == pytest.approx(0.25)

    patient = World("s", profile=FLAT)
    for stage in patient.scheduler.stages.values():
        stage.rate = 10.0  # others are expected
    waits = patient.submit(0.0, traceparent=SAMPLED)
    batch = patient.grant(0.0)
    patient.done(batch.granted_at + 0.1, batch)
    (span,) = patient.trace(waits).spans
    assert span.opens == span.granted > 0.5
    assert span.forced == 0.0


def test_the_items_of_a_map_stage_are_one_span() -> None:
    world = World("m", is_map="m", devices=2)
    request = world.submit(0.0, [1, 2, 3], traceparent=SAMPLED)
    batches = world.scheduler.dispatch(0.0)
    while request.outcome is None:
        batch = batches.pop(0)
        world.done(0.1 * (3 - len(batches)), batch)
        batches += world.scheduler.dispatch(0.3)
    (span,) = world.trace(request).spans
    check_in_order(span)
    assert (span.items, span.batches, span.attempts) == (3, 3, 1)
    assert span.ended == pytest.approx(request.ended_at)


def test_a_request_that_expires_while_it_runs_tells_how_far_it_got() -> None:
    world = World("a", "b")
    request = world.submit(0.0)
    world.done(0.2, world.grant(0.0))
    batch = world.grant(0.2)
    world.scheduler.dispatch(SLO)
    trace = world.trace(request)
    assert (trace.outcome, trace.stage, trace.sampled) == ("expired", "b", False)
    a, b = trace.spans
    assert a.ended == pytest.approx(0.2)
    assert (b.granted, b.batch, b.started, b.ended) == (pytest.approx(0.2), batch.number, -1.0, -1.0)
    assert b.remaining <= 0.0


def test_a_request_that_was_never_granted_has_a_span_without_a_batch() -> None:
    world = World("s")
    world.submit(0.0)
    world.grant(0.0)
    waits = world.submit(0.0, budget=0.5)
    world.scheduler.dispatch(0.0)
    world.scheduler.agent_lost(0.1, "a", "gone")
    world.scheduler.dispatch(0.7)
    trace = world.trace(waits)
    assert trace.outcome == "unavailable"
    (span,) = trace.spans
    assert (span.granted, span.device, span.batch, span.size, span.batches, span.attempts) == (-1.0, "", -1, 0, 0, 0)


@pytest.mark.parametrize(("code", "outcome"), [("too_late", "dropped"), ("worker_died", "unavailable")])
def test_attempts_are_counted(code: str, outcome: str) -> None:
    world = World("s")
    request = world.submit(0.0)
    for number in (1, 2):
        world.done(0.1 * number, world.grant(0.1 * (number - 1)), code, 0.0)
    trace = world.trace(request)
    assert (trace.outcome, trace.estimate) == (outcome, None)
    assert "2 attempts failed" in trace.detail
    assert trace.spans[0].attempts == 2


def test_a_grant_that_could_not_be_sent_is_none() -> None:
    world = World("s")
    request = world.submit(0.0, traceparent=SAMPLED)
    world.scheduler.grant_failed(world.grant(0.0).number)
    world.scheduler.pull("a", 0, 0.0)
    batch = world.grant(0.0)
    world.done(0.1, batch)
    (span,) = world.trace(request).spans
    assert (span.attempts, span.batch) == (1, batch.number)


def test_an_input_that_fails_tells_of_its_batch() -> None:
    world = World("a", "b")
    request = world.submit(0.0)
    world.done(0.2, world.grant(0.0))
    batch = world.grant(0.2)
    world.done(0.4, batch, failures={0: "bad item"})
    trace = world.trace(request)
    assert (trace.outcome, trace.detail) == ("failed", "bad item")
    assert (trace.spans[1].batch, trace.spans[1].execution, trace.spans[1].ended) == (batch.number, 0.1, -1.0)
    assert trace.spans[1].started >= trace.spans[1].granted


def test_an_answer_that_cannot_be_put_together_still_has_its_stages() -> None:
    world = World("s", outputs=[("name", 0, "field")])
    request = world.submit(0.0)
    world.done(0.2, world.grant(0.0))
    trace = world.trace(request)
    assert trace.outcome == "failed"
    assert [span.ended for span in trace.spans] == [pytest.approx(0.2)]


# ---- why it was dropped ---------------------------------------------------------------------


def test_a_drop_comes_with_the_sum_that_led_to_it() -> None:
    world = World("a", "b")
    request = world.submit(0.0, budget=0.15)  # two stages of 100 ms each
    world.scheduler.dispatch(0.0)
    world.scheduler.dispatch(0.01)
    trace = world.trace(request)
    assert trace.outcome == "dropped"
    estimate = trace.estimate
    assert estimate is not None
    assert (estimate.stage, estimate.size) == ("a", 1)
    assert estimate.remaining == pytest.approx(0.15 - estimate.at)
    assert estimate.execution == pytest.approx(0.1)
    assert estimate.downstream >= 0.1
    assert estimate.wait + estimate.execution + estimate.downstream == pytest.approx(
        estimate.remaining + estimate.short
    )
    assert estimate.short == pytest.approx(request.short_by)
    assert f"{estimate.short * 1e3:.1f} ms" in trace.detail


# ---- what is kept ---------------------------------------------------------------------------


def test_a_request_that_ends_ok_and_is_not_sampled_leaves_nothing() -> None:
    world = World("s")
    request = world.submit(0.0)
    world.done(0.2, world.grant(0.0))
    assert request.timings is None
    assert world.kept() == []


def test_without_traces_nothing_is_noted_but_timings() -> None:
    world = World("a", "b", traces=0)
    plain, timed = world.submit(0.0), world.submit(0.0, timed=True)
    dropped = world.submit(0.0, budget=0.02)
    while timed.outcome is None:
        batch = world.grant(0.0)
        world.done(batch.granted_at + 0.1, batch)
    assert plain.timings is None
    assert timed.timings is not None
    assert [time.stage for time in timed.timings] == ["a", "b"]
    assert dropped.outcome == "dropped"
    assert dropped.timings is None


def test_what_a_client_asked_for_is_not_more_for_being_traced() -> None:
    world = World("a", "b")
    request = world.submit(0.0, timed=True)
    world.done(0.2, world.grant(0.0))
    world.grant(0.2)
    world.scheduler.dispatch(SLO)
    assert request.outcome == "expired"
    assert request.timings is not None
    assert [(time.stage, time.items) for time in request.timings] == [("a", 1), ("b", 0)]


def test_a_traceparent_decides_whether_its_request_is_sampled() -> None:
    world = World("s", sample=1.0)
    requests = [world.submit(0.0, traceparent=text) for text in (SAMPLED, UNSAMPLED, "", "nonsense", SAMPLED + "-more")]
    assert [request.sampled for request in requests] == [True, False, True, True, True]
    assert [request.traceparent for request in requests] == [SAMPLED, UNSAMPLED, "", "", ""]
    later = world.submit(0.0, traceparent="01" + SAMPLED[2:] + "-" + "x" * 10_000)
    assert later.traceparent == "01" + SAMPLED[2:]


def test_a_part_of_the_requests_is_sampled() -> None:
    world = World("s", sample=0.1)
    sampled = sum(world.submit(0.0).sampled for _ in range(2000))
    assert 120 < sampled < 280  # the generator's seed is fixed
    assert not any(World("s", sample=0.0).submit(0.0).sampled for _ in range(100))


@pytest.mark.parametrize("sample", [1e-17, 5e-324])
def test_so_small_a_part_that_none_is_sampled(sample: float) -> None:
    assert not any(World("s", sample=sample).submit(0.0).sampled for _ in range(100))


def test_details_are_kept_up_to_a_length() -> None:
    world = World("s")
    failed = world.submit(0.0, traceparent=SAMPLED)
    world.done(0.2, world.grant(0.0), "model_error", detail="x" * 10_000)
    assert world.trace(failed).detail == "x" * LONGEST_DETAIL
    world.tracer.rejected(0.0, "c", 9, "p", SAMPLED, 0.5, "x" * 10_000)
    assert world.tracer.traces(-1, 1)[1][0].detail == "x" * LONGEST_DETAIL


@given(
    st.one_of(
        st.tuples(st.integers(1, 7), st.integers(0, 30), st.integers(1, 9)),
        st.tuples(st.integers(PAGE - 1, 2 * PAGE + 1), st.integers(0, 5 * PAGE), st.integers(PAGE // 2, 3 * PAGE)),
    )
)
def test_the_newest_are_kept(numbers: tuple[int, int, int]) -> None:
    traces, requests, limit = numbers
    tracer = Tracer("s", traces, 1.0, Random(0))
    for number in range(requests):
        tracer.rejected(float(number), "c", number % 11, "p", "", 0.5, "no")
    assert tracer.kept == requests
    newest = [f"c-{number % 11}" for number in range(requests)][-traces:]
    collected, after = [], 0
    while True:
        last, some = tracer.traces(after, limit)
        collected += some
        assert len(some) <= limit
        if last == after:
            break
        after = last
    assert after == requests
    assert [record.request for record in collected] == newest
    assert [record.request for record in tracer.traces(-limit, limit)[1]] == newest[-limit:]
    for number in range(11):
        assert (tracer.trace(f"c-{number}") is not None) == (f"c-{number}" in newest)
    assert tracer.traces(requests + 5, limit) == (requests, [])


def test_a_call_gives_a_bounded_number() -> None:
    tracer = Tracer("s", 3000, 1.0, Random(0))
    for number in range(2500):
        tracer.rejected(0.0, "c", number, "p", "", 0.5, "no")
    last, records = tracer.traces(0, 1_000_000)
    assert (last, len(records)) == (MOST_AT_ONCE, MOST_AT_ONCE)


def test_what_never_reached_the_engine_is_kept_if_it_is_sampled() -> None:
    tracer = Tracer("s", 10, 0.0, Random(0))
    tracer.rejected(5.0, "c", 1, "p", "", 0.5, "malformed")
    tracer.rejected(5.0, "c", 2, "p", UNSAMPLED, 0.5, "malformed")
    tracer.rejected(5.0, "c", 3, "p", SAMPLED, 0.5, "malformed")
    (record,) = tracer.traces(0, 10)[1]
    assert (record.request, record.outcome, record.detail, record.spans) == ("c-3", "rejected", "malformed", [])


def test_traces_keep_no_payload_alive() -> None:
    world = World("a", "m", is_map="m")
    good, expired, dropped = (world.submit(0.0, ["x" * 100] * 3, traceparent=SAMPLED) for _ in range(3))
    failed = world.submit(0.0, 5)
    for _ in range(20):
        for batch in world.scheduler.dispatch(world.scheduler.next_wake()):
            world.done(batch.granted_at + 0.1, batch)
    assert len(world.kept()) >= 3
    seen: set[int] = set()
    queue: list[object] = [world.tracer]
    while queue:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, (type, types.ModuleType, types.FunctionType)):
            continue
        seen.add(id(thing))
        assert not isinstance(thing, (Payload, Request, Task, Stage, Batch, Pipeline)), thing
        queue += gc.get_referents(thing)
    assert {good.outcome, expired.outcome, dropped.outcome, failed.outcome} != {None}
