"""What the engine counts of stages and pipelines, and reports of them. (How it adds up under everything that can happen
is in test_scheduler_state.py.)"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.engine import metrics as engine
from broker.engine.fleet import HeldModel
from broker.engine.limits import Limits
from broker.engine.metrics import MOST_NOTED, MOST_STAGES, SECONDS, Histogram, PipelineMetrics, quantile
from broker.engine.plan import FROM_REQUEST, Pipeline, StagePlan
from broker.engine.policy import make_policy
from broker.engine.report import Report
from broker.engine.request import Client, Request
from broker.engine.scheduler import Scheduler
from broker.engine.stage import Stage
from broker.reporting import report_record
from cluster.observe import families
from cluster.tuning.report import LONGEST_DETAIL, MOST_DROPS
from laxity.outcomes import Outcome
from laxity.payload import encode

values = st.one_of(st.floats(-2.0, 40.0), st.sampled_from(SECONDS), st.sampled_from(engine.SIGNED_SECONDS))


def count(histogram: Histogram) -> int:
    """How many values it has."""
    histogram.tell()
    return sum(histogram.buckets)


def total(histogram: Histogram) -> float:
    """Their sum."""
    histogram.tell()
    return histogram.sum


# ---- histograms ------------------------------------------------------------------------------------


@given(st.sampled_from(["SECONDS", "SIGNED_SECONDS", "SIZES"]), st.lists(st.tuples(values, st.integers(1, 3))))
def test_each_value_is_in_its_bucket(name: str, observed: list[tuple[float, int]]) -> None:
    bounds: list[float] = getattr(engine, name)
    histogram = Histogram(bounds)
    everything = []
    for value, times in observed:
        if times == 1:
            histogram.observe(value)
        else:
            histogram.observe_many(value, times)
        everything += [value] * times
    histogram.tell()
    expected = np.bincount(np.searchsorted(bounds, everything).astype(int), minlength=len(bounds) + 1)
    assert histogram.buckets == expected.tolist()
    assert count(histogram) == len(everything), "nothing is told twice"
    assert histogram.sum == pytest.approx(math.fsum(everything), abs=1e-6)


def test_bounds_are_those_that_people_are_told() -> None:
    assert engine.SECONDS == families.SECONDS
    assert engine.SIGNED_SECONDS == families.SIGNED_SECONDS
    assert engine.SIZES == families.SIZES
    assert MOST_STAGES == families.MOST_STAGES
    assert MOST_NOTED == MOST_DROPS


@given(st.lists(st.floats(0.0, 25.0), min_size=1, max_size=60), st.floats(0.01, 0.99))
def test_a_quantile_is_off_by_its_bucket_at_most(observed: list[float], part: float) -> None:
    histogram = Histogram(SECONDS)
    for value in observed:
        histogram.observe(value)
    histogram.tell()
    found = quantile(SECONDS, histogram.buckets, part)
    exact = sorted(observed)[math.ceil(part * len(observed) - 1e-9) - 1]
    at = int(np.searchsorted(SECONDS, exact))
    assert (SECONDS[at - 1] if at else 0.0) <= found <= SECONDS[at]


def test_quantiles_at_the_edges() -> None:
    histogram = Histogram(SECONDS)
    assert quantile(SECONDS, histogram.buckets, 0.5) == -1.0
    histogram.observe(1000.0)
    histogram.tell()
    assert quantile(SECONDS, histogram.buckets, 0.5) == SECONDS[-1]


# ---- what is counted -----------------------------------------------------------------------------


def make_pipeline(name: str = "p", version: int = 1, stages: str = "ab", policy: str = "laxity") -> Pipeline:
    plans = [
        StagePlan(stage, Stage(f"{name}@{version}/{stage}", "", 8, 1000), [(number - 1, "")], False, 1)
        for number, stage in enumerate(stages)
    ]
    assert FROM_REQUEST == -1
    return Pipeline(name, 0.5, plans, [("", len(plans) - 1, "")], make_policy(policy, {}))


class World:
    """A shard's engine with a device for each stage of pipelines named p."""

    def __init__(self, policy: str = "laxity", metrics: bool = True) -> None:
        self.scheduler = Scheduler(Limits(1 << 40, 1 << 40, 1 << 20), overhead=0.0, metrics=metrics)
        self.policy = policy
        self.client = Client("c")
        self._ids = itertools.count(1)
        self.now = 100.0
        self.apply()

    def apply(self, version: int = 1, stages: str = "ab") -> None:
        self.scheduler.apply(make_pipeline("p", version, stages, self.policy))
        for stage in stages:
            number = "abc".index(stage)
            held = [HeldModel(f"p@{v}/{stage}", "", 100, [(1, 0.05), (8, 0.1)]) for v in (1, 2)]
            self.scheduler.report("agent", number, "gpu", held)
            self.scheduler.pull("agent", number, self.now)

    def submit(self, count: int = 1, name: str = "p", budget: float = -1.0) -> list[Request]:
        submitted = []
        for _ in range(count):
            request = self.scheduler.submit(
                self.now, self.client, next(self._ids), name, self.now, budget, 0, encode("x"), False
            )
            assert request is not None
            submitted.append(request)
        return submitted

    def run(self, execution: float = 0.05, code: str = "ok") -> None:
        """Grant what is due; all of it ends ``execution`` later."""
        batches = self.scheduler.dispatch(self.now)
        self.now += execution
        for batch in batches:
            answers = [encode("y")] * len(batch.tasks)
            self.scheduler.done(self.now, "agent", batch.number, code, execution, answers, {}, "why")
            self.scheduler.pull("agent", batch.device.number, self.now)

    def finish(self) -> None:
        while self.scheduler.ledger.in_flight:
            self.run()

    def counted(self) -> PipelineMetrics:
        assert self.scheduler.metrics is not None
        return self.scheduler.metrics.pipelines["p"]

    def report(self) -> Report:
        return self.scheduler.take_report(self.now)


def test_requests_and_elements_by_hand() -> None:
    world = World("nexus")
    world.submit(5)
    world.finish()
    counted = world.counted()
    assert (counted.submitted, counted.ended, counted.ok, counted.not_ok) == (5, 5, 5, {})
    assert count(counted.latency) == 5
    for stage in counted.stages.values():
        assert count(stage.at_enqueue) == count(stage.at_dispatch) == total(stage.sizes) == 5
        assert stage.batches == {"ok": count(stage.sizes)}
        assert total(stage.execution) == pytest.approx(0.05 * count(stage.sizes))
    first = counted.stages["a"]
    assert total(first.at_enqueue) == pytest.approx(5 * 0.5)
    assert total(first.error) < 0.5


def test_waiting_is_forced_only_for_want_of_a_device() -> None:
    world = World("nexus")  # whose windows are always open
    world.submit()
    batches = world.scheduler.dispatch(world.now)
    assert len(batches) == 1
    world.submit()  # the device is busy
    assert not world.scheduler.dispatch(world.now)
    world.now += 0.07
    world.scheduler.done(world.now, "agent", batches[0].number, "ok", 0.07, [encode("y")], {}, "")
    world.scheduler.pull("agent", 0, world.now)
    world.scheduler.dispatch(world.now)
    first = world.counted().stages["a"]
    assert (total(first.forced), total(first.chosen)) == (pytest.approx(0.07), pytest.approx(0.0))


def test_waiting_for_a_window_is_chosen() -> None:
    world = World()
    stage = world.scheduler.stages["p@1/a"]
    stage.rate = 1000.0  # others are expected, so that waiting pays
    world.submit()
    assert not world.scheduler.dispatch(world.now)
    begun = world.now
    world.now = world.scheduler.next_wake()
    while not world.scheduler.dispatch(world.now):
        world.now = max(world.now, world.scheduler.next_wake())
    first = world.counted().stages["a"]
    assert total(first.forced) == 0.0
    assert total(first.chosen) == pytest.approx(world.now - begun)
    assert total(first.chosen) > 0.0
    assert count(first.slack) == 1


def test_batch_waits_are_those_of_who_collects() -> None:
    for policy, waits in (("laxity", False), ("pard", True)):
        world = World(policy)
        for _ in range(5):
            world.submit(2)
            world.run()
        assert (count(world.counted().stages["a"].batch_wait) > 0) == waits


def test_outcomes_by_stage() -> None:
    world = World()
    world.submit(3, budget=0.01)  # not enough for anything
    world.run()
    world.submit(2, name="nobody")
    world.client.requests.clear()
    assert world.counted().not_ok == {("a", "dropped"): 3}
    assert world.counted().stages["a"].dropped == 3
    assert world.scheduler.metrics is not None
    unknown = world.scheduler.metrics.pipelines[""]
    assert (unknown.submitted, unknown.not_ok) == (2, {("", "rejected"): 2})


def test_the_drop_probability_is_that_of_the_last_second() -> None:
    world = World()
    world.scheduler.dispatch(world.now)
    stage = world.counted().stages["a"]
    world.now += 1.0
    world.scheduler.dispatch(world.now)
    world.submit(1)
    world.submit(3, budget=0.01)
    world.finish()
    world.now += 1.0
    world.scheduler.dispatch(world.now)
    assert stage.drop_probability == pytest.approx(0.75)
    for _ in range(2):
        world.now += 1.0
        world.scheduler.dispatch(world.now)
    assert stage.drop_probability == 0.0


def test_batches_by_code_and_lost_agents() -> None:
    world = World("nexus")
    world.submit()
    world.run(code="worker_died")
    world.run()
    assert world.counted().stages["a"].batches == {"worker_died": 1, "ok": 1}
    assert len(world.scheduler.dispatch(world.now)) == 1  # the second stage's
    world.scheduler.agent_lost(world.now, "agent", "gone")
    assert world.counted().stages["b"].batches == {"agent_lost": 1}


def test_counters_go_on_over_versions_and_end_with_the_pipeline() -> None:
    world = World("nexus")
    world.submit(2)
    world.finish()
    before = world.counted()
    world.submit(1)
    world.apply(2, "ac")  # one of the first version is in flight
    world.submit(4)
    assert set(before.stages) == {"a", "b", "c"}
    world.finish()
    world.run()
    assert world.counted() is before
    assert (before.submitted, before.ok) == (7, 7)
    assert set(before.stages) == {"a", "c"}
    assert count(before.stages["a"].at_enqueue) == 7
    world.submit(1)
    world.scheduler.delete("p")
    world.scheduler.dispatch(world.now)
    assert world.counted() is before  # it has to finish yet
    world.scheduler.shut_down(world.now, "enough")
    world.scheduler.dispatch(world.now)
    assert world.scheduler.metrics is not None
    assert set(world.scheduler.metrics.pipelines) == {""}


def test_stages_beyond_the_most_share_one() -> None:
    scheduler = Scheduler(Limits(), metrics=True)
    metrics = scheduler.metrics
    assert metrics is not None
    for number in range(MOST_STAGES + 3):
        scheduler.apply(make_pipeline(f"p{number}", stages="a"))
    assert not metrics.pipelines[f"p{MOST_STAGES - 1}"].shared
    for number in range(MOST_STAGES, MOST_STAGES + 3):
        shared = metrics.pipelines[f"p{number}"]
        assert shared.shared
        assert shared.stages["a"] is metrics.others
    # What was counted of one that goes is not forgotten, and there is room again.
    client = Client("c")
    scheduler.submit(0.0, client, 1, f"p{MOST_STAGES}", 0.0, 0.0, 0, encode("x"), False)
    scheduler.delete(f"p{MOST_STAGES}")
    scheduler.delete("p0")
    scheduler.dispatch(0.0)
    assert (metrics.gone.submitted, metrics.gone.not_ok) == (1, {("", "rejected"): 1})
    scheduler.apply(make_pipeline("new", stages="ab"))
    new = metrics.pipelines["new"]
    assert not new.shared
    assert [stage.shared for stage in new.stages.values()] == [False, True]
    assert metrics.pipelines[f"p{MOST_STAGES + 1}"].shared, "whoever shares goes on to"


def test_nothing_is_counted_without_metrics() -> None:
    world = World(metrics=False)
    world.submit(3)
    world.submit(1, budget=0.01)
    world.submit(1, name="nobody")
    world.finish()
    assert world.scheduler.metrics is None
    assert all(pipeline.metrics is None for pipeline in world.scheduler.serving())
    report = world.report()
    assert (report.pipelines, report.lost) == ([], [])
    assert all(stage.slack == (-1.0, -1.0) for stage in report.stages)


# ---- what is reported of it ----------------------------------------------------------------------------


def test_a_report_has_what_ended_since_the_last_one() -> None:
    world = World("nexus")
    world.submit(4)
    world.finish()
    (figures,) = world.report().pipelines
    assert (figures.name, figures.submitted, figures.outcomes) == ("p", 4, {"ok": 4})
    median, highest = figures.latency
    assert 0.0 < median <= highest <= 0.5
    assert world.report().pipelines == []
    world.submit(3)
    world.submit(2, budget=0.01)
    world.finish()
    world.submit(1)
    (figures,) = world.report().pipelines
    assert (figures.submitted, figures.outcomes) == (6, {"ok": 3, "dropped": 2})
    world.finish()
    (figures,) = world.report().pipelines
    assert (figures.submitted, figures.outcomes) == (0, {"ok": 1})


def test_a_report_has_each_stages_slack_load_and_order() -> None:
    world = World()
    world.submit(2)
    world.finish()
    record = report_record(world.report(), 1, [])
    for stage in record.stages:
        low, middle = stage.slack
        assert -0.01 <= low <= middle <= 0.5
        assert stage.order == "lbf"
        assert stage.load_factor == 0.0
    again = report_record(world.report(), 2, [])
    assert [stage.slack for stage in again.stages] == [(-1.0, -1.0)] * 2
    for stage in world.scheduler.stages.values():
        stage.order.load = 1.5
        stage.order.highest_first = True
    turned = report_record(world.report(), 3, [])
    assert {(stage.load_factor, stage.order) for stage in turned.stages} == {(1.5, "hbf")}
    assert {stage.order for stage in report_record(World("naive").report(), 1, []).stages} == {"fcfs"}


def test_a_report_has_the_newest_drops_of_its_period() -> None:
    world = World()
    submitted = world.submit(MOST_DROPS + 5, budget=0.01)
    world.run()
    assert {request.outcome for request in submitted} == {Outcome.DROPPED}
    world.submit(1, name="nobody")
    world.scheduler.cancel(world.now, world.client, world.submit(1)[0].id)
    world.now += 0.25
    record = report_record(world.report(), 1, [])
    assert len(record.drops) == MOST_DROPS
    newest = record.drops[0]
    assert newest.request in {f"c-{request.id}" for request in submitted}
    assert (newest.pipeline, newest.stage, newest.outcome) == ("p", "a", "dropped")
    assert newest.detail == submitted[-1].detail
    assert newest.ago == pytest.approx(0.25 + 0.05)
    assert [drop.ago for drop in record.drops] == sorted(drop.ago for drop in record.drops)
    assert report_record(world.report(), 2, []).drops == []


def test_long_details_are_cut_short() -> None:
    world = World("nexus")
    world.submit(1)
    (batch,) = world.scheduler.dispatch(world.now)
    world.scheduler.done(world.now, "agent", batch.number, "model_error", 0.0, [], {}, "x" * 5000)
    world.scheduler.dispatch(world.now)
    (drop,) = report_record(world.report(), 1, []).drops
    assert (drop.outcome, drop.detail) == ("failed", "x" * LONGEST_DETAIL)
