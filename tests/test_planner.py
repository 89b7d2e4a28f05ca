"""How the SLO is shared out over chains and graphs."""

from __future__ import annotations

import itertools

import pytest

from broker.engine.devices import Device, DeviceGroup
from broker.engine.overhead import Overhead
from broker.engine.plan import Pipeline, StagePlan
from broker.engine.planner import MARGIN, common_batch, replan
from broker.engine.policy import make_policy
from broker.engine.predictor import LatencyTable
from broker.engine.stage import Stage
from broker.plans import build_pipeline
from pipelines.load import load_spec
from pipelines.profile import LatencyProfile

SPLIT = "symphony"
"""A policy that splits the SLO over the stages."""


def linear(alpha_ms: float, beta_ms: float, max_batch: int = 64) -> LatencyTable:
    return LatencyTable(max_batch, [(1, (alpha_ms + beta_ms) / 1e3), (2, (2 * alpha_ms + beta_ms) / 1e3)])


def make_pipeline(slo: float, parents: dict[str, list[str]], max_batch: int = 64, policy: str = "laxity") -> Pipeline:
    names = list(parents)
    stages = [
        StagePlan(
            name,
            Stage(f"p@1/{name}", "", max_batch, 1000),
            [(names.index(parent), "") for parent in sources] or [(-1, "")],
            False,
            1,
        )
        for name, sources in parents.items()
    ]
    return Pipeline("p", slo, stages, [("", len(stages) - 1, "")], make_policy(policy, {}))


def serve(pipeline: Pipeline, tables: dict[str, LatencyTable], devices: int = 1) -> None:
    """Give each named stage ``devices`` devices of its own."""
    for plan in pipeline.stages:
        if plan.name in tables:
            group = DeviceGroup("gpu", {plan.stage.key: tables[plan.name]})
            for index in range(devices):
                group.add(Device(index, "agent", index, "gpu"))
            plan.stage.groups = [group]
            plan.stage.devices = devices


def shipped(name: str, policy: str = "") -> tuple[Pipeline, list[LatencyTable]]:
    spec = load_spec(name)
    pipeline = build_pipeline(spec, policy)
    tables = []
    for plan in pipeline.stages:
        stated = spec.stages[plan.name].profile
        assert stated is not None
        tables.append(LatencyTable(plan.stage.max_batch, LatencyProfile.from_spec(stated).pairs()))
    return pipeline, tables


@pytest.mark.parametrize("name", ["tm", "lv", "ga", "da"])
def test_the_common_batch_of_a_shipped_pipeline_is_the_largest_that_fits_twice(name: str) -> None:
    pipeline, tables = shipped(name)
    common = common_batch(pipeline, list(tables))
    assert common > 1

    def longest(batch: int) -> float:
        times = [table.upper(batch) for table in tables]
        return max(times[root] + pipeline.downstream(times)[root] for root in pipeline.roots)

    assert 2 * longest(common) <= pipeline.slo < 2 * longest(common + 1)


def test_the_common_batch_of_lv_is_15() -> None:
    pipeline, tables = shipped("lv")
    assert common_batch(pipeline, list(tables)) == 15


def test_the_slo_is_shared_in_proportion_along_a_chain() -> None:
    """Flat latencies of 10 and 30 ms: a quarter and three quarters of 400 ms."""
    pipeline = make_pipeline(0.4, {"a": [], "b": ["a"]}, policy=SPLIT)
    serve(pipeline, {"a": linear(0, 10), "b": linear(0, 30)})
    replan(pipeline, Overhead(0.0), Overhead(0.0))
    a, b = (plan.stage for plan in pipeline.stages)
    assert (a.due_share, b.due_share) == pytest.approx((0.25, 1.0))


def test_the_shares_of_a_path_are_those_at_the_common_batch_and_add_up_to_the_slo() -> None:
    pipeline, tables = shipped("lv", SPLIT)
    serve(pipeline, {plan.name: table for plan, table in zip(pipeline.stages, tables, strict=True)}, 8)
    replan(pipeline, Overhead(0.0), Overhead(0.0))
    times = [table.upper(15) for table in tables]
    sums = list(itertools.accumulate(times))
    assert [plan.stage.due_share for plan in pipeline.stages] == pytest.approx([each / sums[-1] for each in sums])


def test_a_share_bounds_its_stages_batches() -> None:
    """l(b) = b + 9 ms, 100 ms for each of two stages. With one GPU 2 l(b) <= 100: b = 41; with four 1.25 l(b) <= 100:
    b = 71."""
    for devices, batch in ((1, 41), (4, 71)):
        pipeline = make_pipeline(0.2, {"a": [], "b": ["a"]}, 128, policy=SPLIT)
        serve(pipeline, {"a": linear(1, 9, 128), "b": linear(1, 9, 128)}, devices)
        for plan in pipeline.stages:
            plan.stage.rate = 1e6
        replan(pipeline, Overhead(0.0), Overhead(0.0))
        assert [(plan.stage.target, plan.stage.ceiling) for plan in pipeline.stages] == [(batch, 128)] * 2


@pytest.mark.parametrize(("policy", "target"), [("nexus", 15), ("naive", 15), ("pard", 15), ("shepherd", 64)])
def test_the_peers_batches(policy: str, target: int) -> None:
    """The common one, or as large as the form may make them."""
    pipeline, tables = shipped("lv", policy)
    serve(pipeline, {plan.name: table for plan, table in zip(pipeline.stages, tables, strict=True)}, 8)
    replan(pipeline, Overhead(0.0), Overhead(0.0))
    assert {plan.stage.target for plan in pipeline.stages} == {target}


def test_a_window_leaves_at_least_what_is_to_come_and_a_margin() -> None:
    """b takes 30 ms, and each way to a device 1, back 0.3."""
    pipeline = make_pipeline(0.4, {"a": [], "b": ["a"]})
    serve(pipeline, {"a": linear(0, 10), "b": linear(0, 30)})
    replan(pipeline, Overhead(0.001), Overhead(0.0003))
    a, b = (plan.stage for plan in pipeline.stages)
    assert (a.remaining, b.remaining) == pytest.approx((0.0313 + 0.0003, 0.0003))
    assert a.reserve >= a.remaining + MARGIN * 0.4
    assert b.reserve == pytest.approx(b.remaining + MARGIN * 0.4)


def test_the_longest_path_counts_in_a_graph() -> None:
    """a (10) -> {b (60), c (20)} -> d (30), SLO 1 s: the long way is 100, the short one 60."""
    graph: dict[str, list[str]] = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}
    tables = {"a": linear(0, 10), "b": linear(0, 60), "c": linear(0, 20), "d": linear(0, 30)}
    pipeline = make_pipeline(1.0, graph, policy=SPLIT)
    serve(pipeline, tables)
    replan(pipeline, Overhead(0.0), Overhead(0.0))
    assert [plan.stage.due_share for plan in pipeline.stages] == pytest.approx([0.1, 0.7, 0.5, 1.0])
    pipeline = make_pipeline(1.0, graph)
    serve(pipeline, tables)
    replan(pipeline, Overhead(0.0), Overhead(0.0))
    assert [plan.stage.remaining for plan in pipeline.stages] == pytest.approx([0.09, 0.03, 0.03, 0.0])


def test_predicted_work_reserves_more_than_the_share_where_it_is_more() -> None:
    """The next stage turned out ten times as slow as anybody planned: what it needs is left to it."""
    pipeline = make_pipeline(0.1, {"a": [], "b": ["a"]})
    slow = linear(0, 10)
    serve(pipeline, {"a": linear(0, 10), "b": slow})
    pipeline.stages[1].stage.granted(4)
    slow.observe(0.0, 4, 0.090)
    replan(pipeline, Overhead(0.0), Overhead(0.0))
    first = pipeline.stages[0].stage
    assert first.remaining == pytest.approx(0.090)
    assert first.reserve >= 0.090


def test_downstream_terms_are_means_of_the_typical_batch() -> None:
    pipeline = make_pipeline(10.0, {"a": [], "b": ["a"]})
    second = linear(10, 5)
    serve(pipeline, {"a": linear(10, 5), "b": second})
    pipeline.stages[1].stage.granted(3)
    for took in (0.030, 0.040, 0.050):
        second.observe(0.0, 3, took)
    replan(pipeline, Overhead(0.0), Overhead(0.0))
    assert pipeline.stages[0].stage.remaining == pytest.approx(0.040)


def test_a_stage_that_nobody_serves_counts_nothing() -> None:
    for policy in ("laxity", SPLIT):
        pipeline = make_pipeline(0.4, {"a": [], "b": ["a"]}, policy=policy)
        serve(pipeline, {"a": linear(0, 10)})
        replan(pipeline, Overhead(0.0), Overhead(0.0))
        a, b = (plan.stage for plan in pipeline.stages)
        assert a.due_share == pytest.approx(1.0)
        assert a.remaining == 0.0
        assert b.table is None


def test_the_slowest_type_of_device_opens_the_windows() -> None:
    pipeline = make_pipeline(1.0, {"a": []})
    fast, slow = linear(0, 10), linear(0, 40)
    stage = pipeline.stages[0].stage
    stage.groups = [DeviceGroup("fast", {stage.key: fast}), DeviceGroup("slow", {stage.key: slow})]
    stage.devices = 2
    replan(pipeline, Overhead(0.0), Overhead(0.0))
    assert stage.table is slow


@pytest.mark.parametrize("policy", ["laxity", SPLIT])
def test_zero_latencies_are_shared_out_without_dividing_by_zero(policy: str) -> None:
    pipeline = make_pipeline(1.0, {"a": [], "b": ["a"]}, policy=policy)
    serve(pipeline, {"a": linear(0, 0), "b": linear(0, 0)})
    replan(pipeline, Overhead(0.0), Overhead(0.0))
    assert [plan.stage.due_share for plan in pipeline.stages] == [1.0, 1.0]
    assert [plan.stage.ceiling for plan in pipeline.stages] == [64, 64]


@pytest.mark.parametrize("rate", [0.0, 5.0, 1000.0])
@pytest.mark.parametrize("profile", [[(1, 0.027), (6, 0.180), (16, 0.520)], [(1, 0.020), (16, 0.320)]])
def test_where_larger_batches_gain_nothing_nobody_is_waited_for(profile: list[tuple[int, float]], rate: float) -> None:
    """Text lines on a CPU: 27 ms alone, 30 ms each in batches of 6. Or just as long for each."""
    pipeline = make_pipeline(5.0, {"a": []}, 16)
    serve(pipeline, {"a": LatencyTable(16, profile)}, 4)
    stage = pipeline.stages[0].stage
    stage.rate = rate
    replan(pipeline, Overhead(0.0), Overhead(0.0))
    assert (stage.target, stage.ceiling) == (1, 1)


def test_an_slo_that_nothing_meets_leaves_batches_of_one() -> None:
    pipeline = make_pipeline(0.001, {"a": [], "b": ["a"]})
    tables = {"a": linear(10, 10), "b": linear(10, 10)}
    assert common_batch(pipeline, list(tables.values())) == 1
    serve(pipeline, tables)
    replan(pipeline, Overhead(0.0), Overhead(0.0))
    assert [plan.stage.target for plan in pipeline.stages] == [1, 1]


def test_a_small_largest_batch_bounds_its_stage_alone() -> None:
    pipeline = make_pipeline(10.0, {"a": [], "b": ["a"]})
    pipeline.stages[1].stage.max_batch = 2
    serve(pipeline, {"a": linear(1, 10), "b": linear(1, 10, 2)})
    for plan in pipeline.stages:
        plan.stage.rate = 1e6
    replan(pipeline, Overhead(0.0), Overhead(0.0))
    assert pipeline.stages[0].stage.target == 64
    assert pipeline.stages[1].stage.target == 2


def test_stages_stand_behind_their_inputs() -> None:
    stage = StagePlan("a", Stage("p@1/a", "", 1, 1), [(0, "")], False, 1)
    with pytest.raises(ValueError, match="stands before its input"):
        Pipeline("p", 1.0, [stage], [("", 0, "")])
