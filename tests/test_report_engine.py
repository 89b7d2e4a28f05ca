"""What the engine reports and how it is tuned at run time: by hand, and in whole simulated runs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.engine.fleet import HeldModel
from broker.engine.limits import Limits
from broker.engine.predictor import TOLD, LatencyTable
from broker.engine.request import Client, Request
from broker.engine.scheduler import Scheduler
from broker.engine.tuning import RENEWED, Tuning
from broker.engine.waits import PRIOR, Waits
from broker.plans import build_pipeline
from broker.reporting import tuning_of
from cluster.records import TuningRecord
from cluster.tuning.merge import sound
from laxity.outcomes import Outcome
from laxity.payload import encode
from pipelines.load import parse_spec
from pipelines.spec import PipelineSpec
from simulation.machine import Machine
from simulation.run import Cluster, Workload, simulate
from simulation.tuned import Tuned

SPEC = """
name: p
slo: 500ms
stages:
  a: {executor: emulated, profile: {alpha_ms: 5, beta_ms: 10}, inputs: [request], max_batch: 8}
  b: {executor: emulated, profile: {alpha_ms: 5, beta_ms: 20}, inputs: [a], max_batch: 8}
output: b
"""


def spec(policy: str = "laxity", text: str = SPEC) -> PipelineSpec:
    return parse_spec(f"{text}policy: '{policy}'\n", file="p.yaml", root="")


class World:
    """A scheduler that serves one pipeline, with a device for each stage."""

    def __init__(self, policy: str = "laxity") -> None:
        self.spec = spec(policy)
        self.scheduler = Scheduler(Limits(1 << 40, 1 << 40, 1 << 20))
        self.pipeline = build_pipeline(self.spec)
        self.scheduler.apply(self.pipeline)
        self.client = Client("c")
        self._ids = itertools.count()
        for number, name in enumerate(self.spec.stages):
            held = HeldModel(self.spec.model_key(name), "", 100, [(1, 0.02), (8, 0.06)])
            self.scheduler.report("agent", number, "gpu", [held])
            self.scheduler.pull("agent", number, 0.0)

    def submit(self, now: float, priority: int = 0) -> Request:
        request = self.scheduler.submit(now, self.client, next(self._ids), "p", now, -1.0, priority, encode("x"), False)
        assert request is not None
        return request

    def run(self, now: float, execution: float = 0.03) -> int:
        """Grant what is due and have it done at once; how many batches."""
        batches = self.scheduler.dispatch(now)
        for batch in batches:
            answers = [encode("y")] * len(batch.tasks)
            self.scheduler.done(now, "agent", batch.number, "ok", execution, answers, {}, "")
            self.scheduler.pull("agent", batch.device.number, now)
        return len(batches)

    def tune(self, now: float = 0.0, **fields: Any) -> None:
        record = TuningRecord(**{"quantile": 0.1, "history": 5.0, "admission": 1.0, **fields})
        self.scheduler.tune(now, "p", tuning_of(record, now))

    def refresh(self, now: float) -> None:
        self.scheduler.dispatch(now)


# ---- reports ---------------------------------------------------------------------------------------


def test_a_report_by_hand() -> None:
    world = World()
    world.scheduler.take_report(0.0)
    for _ in range(3):
        world.submit(0.0)
    world.submit(0.1)
    for step in range(12):
        world.run(0.1 + 0.05 * step)
    report = world.scheduler.take_report(1.0)
    assert report.period == 1.0
    assert report.in_flight == {world.pipeline.id(): 0}
    a, b = report.stages
    assert (a.model, b.model) == (world.spec.model_key("a"), world.spec.model_key("b"))
    assert (a.arrived, a.started, a.waiting, a.devices) == (4, 4, 0, 1)
    assert (b.arrived, b.started) == (4, 4)
    assert a.batches >= 1
    assert a.execution == pytest.approx(0.03)
    assert set(a.latency) == {"gpu"}
    assert all(seconds == pytest.approx(0.03) for _, seconds in a.latency["gpu"])
    again = world.scheduler.take_report(1.5)
    assert (again.period, [stage.arrived for stage in again.stages], again.stages[0].execution) == (0.5, [0, 0], 0.0)


def test_arrivals_are_told_once_across_the_engines_own_periods() -> None:
    """The engine starts counting anew every second; reports come when they like."""
    world = World()
    told = sent = 0
    for tenth in range(60):
        now = tenth / 10
        world.submit(now)
        sent += 1
        world.run(now)
        if tenth % 7 == 0:
            told += world.scheduler.take_report(now).stages[0].arrived
    assert told + world.scheduler.take_report(6.0).stages[0].arrived == sent


def test_requests_of_a_retiring_version_are_still_told() -> None:
    world = World()
    world.submit(0.0)
    before = world.pipeline.id()
    after = build_pipeline(spec(text=SPEC.replace("500ms", "600ms")))
    world.scheduler.apply(after)
    report = world.scheduler.take_report(0.0)
    assert report.in_flight == {after.id(): 0, before: 1}
    assert len(report.stages) == 4


def test_batch_waits_are_told_once() -> None:
    world = World("pard")
    waits = world.pipeline.stages[0].stage.waits
    waits.note(0.0, 0.020)
    waits.end_period()
    assert world.scheduler.take_report(1.0).stages[0].waits == [0.020]
    assert world.scheduler.take_report(1.1).stages[0].waits == []


def test_few_batch_sizes_are_told_spread_out() -> None:
    table = LatencyTable(64, [(1, 0.01), (64, 0.64)])
    assert table.measured() == []
    for batch in range(1, 65):
        table.observe(0.0, batch, 0.01 * batch)
    sizes = [batch for batch, _ in table.measured()]
    assert (sizes[0], sizes[-1]) == (1, 64)
    assert 3 <= len(sizes) <= TOLD + 1
    assert all(seconds == pytest.approx(0.01 * batch) for batch, seconds in table.measured())


@settings(max_examples=30)
@given(st.sets(st.integers(1, 200), max_size=40))
def test_the_measured_sizes_that_are_told_are_few_and_measured(sizes: set[int]) -> None:
    table = LatencyTable(200, [])
    for batch in sizes:
        table.observe(0.0, batch, 0.1)
    told = [batch for batch, _ in table.measured()]
    assert set(told) <= sizes
    assert len(told) <= TOLD + 1
    assert told == sorted(told)
    assert not sizes or (told[0], told[-1]) == (min(sizes), max(sizes))


@pytest.mark.parametrize("policy", ["laxity", "pard", "nexus"])
def test_the_reports_of_a_run_add_up_to_it(policy: str) -> None:
    """Overloaded, so that some are dropped and some expire."""
    served = spec(policy)
    tuned = Tuned()
    arrivals = np.sort(np.random.default_rng(1).uniform(0.0, 10.0, 3000))
    (result,) = simulate(
        [Workload(served, policy, arrivals)],
        Cluster(held=[[served.model_key("a")]] * 2 + [[served.model_key("b")]] * 2),
        seconds=11.0,
        control=tuned,
    )
    stages = [stage for report in tuned.reports for stage in report.stages]
    assert sum(stage.arrived for stage in stages if stage.model.endswith("/a")) == result.submitted
    assert sum(stage.started for stage in stages) == result.stage_visits
    lost = result.outcomes[Outcome.DROPPED] + result.outcomes[Outcome.EXPIRED]
    assert lost > 100
    assert sum(stage.dropped for stage in stages) == lost
    assert all(sound(stage) for stage in stages)
    assert tuned.reports[-1].in_flight == {served.model_key("a").rpartition("/")[0]: 0}
    assert [report.number for report in tuned.reports] == list(range(1, 12))
    if policy == "pard":
        told = sum(sum(stage.waits) for stage in stages)
        assert 0.9 * result.stage_visits <= told <= result.stage_visits


# ---- λ and window at run time ------------------------------------------------------------------------


def test_lambda_and_window_are_set_where_they_were_not_given() -> None:
    world = World("pard")
    world.tune(quantile=0.17, history=2.5)
    assert world.pipeline.quantile == 0.17
    assert all(plan.stage.waits.history == 2.5 for plan in world.pipeline.stages)


@pytest.mark.parametrize(
    ("policy", "quantile", "history"),
    [
        ("pard:lambda=0.2", 0.2, 2.5),
        ("pard:history=3", 0.17, 3.0),
        ("pard:lambda=0.2,history=3", 0.2, 3.0),
        ("pard-upper", 1.0, 2.5),
        ("pard-lower", 0.0, 2.5),
        ("pard-instant", 0.17, 2.5),
        ("pard-sf", 0.1, 5.0),
        ("laxity", 0.1, 2.5),
        ("laxity:history=3", 0.1, 3.0),
        ("nexus", 0.1, 5.0),
    ],
)
def test_what_was_given_or_does_not_matter_is_left_alone(policy: str, quantile: float, history: float) -> None:
    world = World(policy)
    world.tune(quantile=0.17, history=2.5)
    assert world.pipeline.quantile == quantile
    assert all(plan.stage.waits.history == history for plan in world.pipeline.stages)


def test_another_version_goes_on_with_what_was_told() -> None:
    world = World("pard")
    world.tune(quantile=0.17)
    after = build_pipeline(spec("pard", SPEC.replace("500ms", "600ms")))
    world.scheduler.apply(after)
    assert after.quantile == 0.17


def test_what_is_told_before_the_pipeline_comes_counts() -> None:
    scheduler = Scheduler(Limits(1 << 40, 1 << 40, 1 << 20))
    scheduler.tune(0.0, "p", Tuning(0.17, 5.0, 1.0, "", {}, 0.0))
    pipeline = build_pipeline(spec("pard"))
    scheduler.apply(pipeline)
    assert pipeline.quantile == 0.17


def test_a_window_may_be_shortened_and_lengthened_while_it_runs() -> None:
    waits = Waits(5.0)
    for seconds in (0.010, 0.020, 0.030, 0.040):
        waits.note(seconds, 0.0)
        waits.end_period()
    waits.history = 1.0
    waits.note(0.050, 0.0)
    waits.end_period()
    assert waits.queued == pytest.approx(0.050)
    waits.history = 2.5
    waits.note(0.100, 0.0)
    waits.end_period()
    assert waits.queued == pytest.approx((2 * 0.100 + 1 * 0.050) / 3)
    waits.note(0.0, 0.0)
    waits.end_period()
    assert waits.queued == pytest.approx((2.5 * 0.0 + 1.5 * 0.100 + 0.5 * 0.050) / 4.5)


def test_what_others_measured_counts_where_there_is_little_else() -> None:
    waits = Waits(5.0)
    waits.prior = 0.100
    waits.end_period()
    assert waits.queued == pytest.approx(0.100)
    for _ in range(5):
        waits.note(0.020, 0.0)
    waits.end_period()
    assert waits.queued == pytest.approx((2 * 5 * 0.020 + 2 * PRIOR * 0.100) / (2 * 5 + 2 * PRIOR))
    for _ in range(5000):
        waits.note(0.020, 0.0)
    waits.end_period()
    assert waits.queued == pytest.approx(0.020, rel=0.01)


# ---- admission ---------------------------------------------------------------------------------------


def let_in(world: World, now: float, count: int = 100, priority: int = 0) -> int:
    """How many of ``count`` requests are not turned away."""
    return sum(world.submit(now, priority).outcome is None for _ in range(count))


def test_a_part_is_let_in_and_told_why() -> None:
    world = World()
    world.tune(admission=0.6, limit="b")
    count = let_in(world, 0.0)
    assert count == pytest.approx(60, abs=1)
    turned_away = [request for request in world.scheduler.take_ended() if request.outcome is Outcome.DROPPED]
    assert len(turned_away) == 100 - count
    assert turned_away[0].detail == "stage 'b' cannot keep up: 60% of the requests are let in at present"
    assert turned_away[0].end_stage == "a"
    assert let_in(world, 0.0, 40, priority=1) == 40


def test_an_admission_that_is_not_renewed_is_taken_back() -> None:
    world = World()
    world.tune(0.0, admission=0.1, limit="b", queued={"b": 0.2})
    world.refresh(RENEWED - 0.1)
    assert let_in(world, RENEWED - 0.1) == pytest.approx(10, abs=1)
    world.tune(RENEWED - 0.1, admission=0.1, limit="b")
    world.refresh(RENEWED + 1.0)
    assert let_in(world, RENEWED + 1.0) == pytest.approx(10, abs=1)
    world.refresh(2 * RENEWED + 1.0)
    assert let_in(world, 2 * RENEWED + 1.0) == 100
    assert world.pipeline.stages[1].stage.waits.prior < 0.0


def test_policies_that_drop_as_their_papers_have_it_turn_nobody_away() -> None:
    for policy in ("nexus", "naive", "pard-oc", "pard-sf"):
        world = World(policy)
        world.tune(admission=0.1, limit="b")
        assert let_in(world, 0.0) == 100


FORKED = """
name: p
slo: 500ms
stages:
  a: {executor: emulated, profile: {alpha_ms: 5, beta_ms: 10}, inputs: [request], max_batch: 8}
  b: {executor: emulated, profile: {alpha_ms: 5, beta_ms: 20}, inputs: [request], max_batch: 8}
output: {a: a, b: b}
"""


def test_with_several_first_stages_nobody_is_thinned_twice() -> None:
    scheduler = Scheduler(Limits(1 << 40, 1 << 40, 1 << 20))
    scheduler.apply(build_pipeline(spec("laxity", FORKED)))
    scheduler.tune(0.0, "p", Tuning(0.1, 5.0, 0.5, "b", {}, 0.0))
    client = Client("c")
    requests = [scheduler.submit(0.0, client, n, "p", 0.0, -1.0, 0, encode("x"), False) for n in range(100)]
    assert sum(request is not None and request.outcome is None for request in requests) == 50


def test_a_stage_that_is_short_has_less_run_for_nothing() -> None:
    """The second stage's device can run a third of what comes. With an admission about as many are good, and less GPU
    time is spent on the others."""
    served = spec("laxity")
    arrivals = np.sort(np.random.default_rng(1).uniform(0.0, 40.0, 20_000))

    class Untuned:
        def __call__(self, now: float, machine: Machine) -> None:
            machine.scheduler.take_report(now)

    def run(control: Any) -> Any:
        cluster = Cluster(held=[[served.model_key("a")]] * 4 + [[served.model_key("b")]])
        (result,) = simulate([Workload(served, "laxity", arrivals)], cluster, seconds=41.0, control=control)
        return result

    plain, tuned = run(Untuned()), run(Tuned())
    assert sum(tuned.series.good) > 0.97 * sum(plain.series.good)
    assert tuned.invalid_rate < 0.7 * plain.invalid_rate
