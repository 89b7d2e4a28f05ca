"""Batches planned over whole pipelines, against brute force and by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from broker.engine.batch_plan import BURSTS, BatchPlan, plan_batches
from broker.engine.devices import Device, DeviceGroup
from broker.engine.plan import Pipeline, StagePlan
from broker.engine.predictor import LatencyTable
from broker.engine.stage import Stage
from broker.engine.window import FULL_LOAD, target_batch
from broker.plans import build_pipeline
from pipelines.load import load_spec
from pipelines.profile import LatencyProfile

Profile = tuple[float, float]
"""(alpha, beta) of l(b) = alpha b + beta, in milliseconds."""


def linear(profile: Profile, max_batch: int) -> LatencyTable:
    alpha, beta = profile
    return LatencyTable(max_batch, [(1, (alpha + beta) / 1e3), (2, (2 * alpha + beta) / 1e3)])


class Planned:
    """A pipeline with tables of linear profiles; a chain unless ``parents`` say otherwise."""

    def __init__(
        self, profiles: Sequence[Profile], max_batch: int = 64, *, parents: Sequence[list[int]] | None = None
    ) -> None:
        sources = parents if parents is not None else [[number - 1] for number in range(len(profiles))]
        self.stages = [
            StagePlan(f"s{number}", Stage(f"p@1/s{number}", "", max_batch, 1000), [(s, "") for s in of], False, 1)
            for number, of in enumerate(sources)
        ]
        self.pipeline = Pipeline("p", 10.0, self.stages, [("", len(profiles) - 1, "")])
        self.tables: list[LatencyTable | None] = [linear(profile, max_batch) for profile in profiles]
        self.max_batch = max_batch
        self.bursts = BURSTS

    def alone(self, *devices: int) -> Planned:
        """So many devices of its own for each stage."""
        for plan, count in zip(self.stages, devices, strict=True):
            table = self.tables[plan.stage.depth]
            assert table is not None
            self._give(DeviceGroup("gpu", {plan.stage.key: table}), [plan], count)
        return self

    def shared(self, devices: int) -> Planned:
        """So many devices that serve all stages, which then weigh the same."""
        tables = {plan.stage.key: table for plan, table in zip(self.stages, self.tables, strict=True) if table}
        self._give(DeviceGroup("gpu", tables), self.stages, devices)
        return self

    def _give(self, group: DeviceGroup, plans: list[StagePlan], count: int) -> None:
        for index in range(count):
            group.add(Device(index, "agent", index, "gpu"))
        for plan in plans:
            plan.stage.groups = [group]
            plan.stage.devices = count

    def rate(self, rate: float) -> Planned:
        for plan in self.stages:
            plan.stage.rate = rate
        return self

    def plan(self, budget_ms: float) -> BatchPlan:
        plan = plan_batches(self.pipeline, self.tables, budget_ms / 1e3)
        self.bursts = plan.bursts
        return plan

    def path(self, batches: Sequence[int], rate: float = FULL_LOAD) -> float:
        """Seconds along the longest path: each stage's execution, and the wait for a device or for the batch to
        fill, with the last plan's room for bursts."""
        times = []
        for plan, table, batch in zip(self.stages, self.tables, batches, strict=True):
            if table is None or not plan.stage.devices:
                times.append(0.0)
                continue
            execution = plan.rounds(batch) * table.upper(batch)
            wait = execution / plan.stage.devices * (1.0 if not plan.parents else 1.0 + self.bursts)
            fill = batch / rate if batch > 1 else 0.0
            times.append(execution + max(wait, fill))
        after = self.pipeline.downstream(times)
        return max(times[root] + after[root] for root in self.pipeline.roots)

    def work(self, batches: Sequence[int]) -> float:
        """GPU seconds a request; of stages that weigh the same."""
        total = 0.0
        for plan, table, batch in zip(self.stages, self.tables, batches, strict=True):
            assert table is not None
            total += plan.items_or_one() * table.upper(batch) / batch
        return total

    def combinations(self) -> list[tuple[int, ...]]:
        return list(itertools.product(range(1, self.max_batch + 1), repeat=len(self.stages)))

    def ones(self) -> list[int]:
        return [1] * len(self.stages)


# ---- within the budget ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tm", "lv", "ga", "da"])
@pytest.mark.parametrize("rate", [0.0, 5.0, 100.0, 1000.0])
@pytest.mark.parametrize("part", [0.6, 0.9])
def test_the_longest_path_of_a_shipped_pipeline_fits_its_budget(name: str, rate: float, part: float) -> None:
    spec = load_spec(name)
    pipeline = build_pipeline(spec)
    tables: list[LatencyTable | None] = []
    for plan in pipeline.stages:
        stated = spec.stages[plan.name].profile
        assert stated is not None
        tables.append(LatencyTable(plan.stage.max_batch, LatencyProfile.from_spec(stated).pairs()))
        plan.stage.devices = 8
        plan.stage.rate = rate
    budget = part * spec.slo
    plan_of_all = plan_batches(pipeline, tables, budget)
    after = pipeline.downstream(plan_of_all.times)
    longest = max(plan_of_all.times[root] + after[root] for root in pipeline.roots)
    assert 0.0 < longest <= budget
    if rate >= 1000.0:
        assert longest > 0.8 * budget, "a plan of much less than the budget wastes GPUs"
    for batch, ceiling in zip(plan_of_all.targets, plan_of_all.ceilings, strict=True):
        assert 1 <= batch <= ceiling <= 64


profiles = st.tuples(st.integers(1, 30).map(float), st.integers(0, 60).map(float))
GRAPHS: list[list[list[int]]] = [
    [[-1]],
    [[-1], [0]],
    [[-1], [0], [1]],
    [[-1], [0], [0], [1, 2]],
    [[-1], [-1], [0, 1]],
]


@given(
    st.sampled_from(GRAPHS).flatmap(
        lambda graph: st.tuples(
            st.just(graph),
            st.lists(profiles, min_size=len(graph), max_size=len(graph)),
            st.lists(st.integers(1, 9), min_size=len(graph), max_size=len(graph)),
        )
    ),
    st.floats(20.0, 2000.0),
    st.sampled_from([0.0, 3.0, 50.0, 400.0, FULL_LOAD]),
)
def test_the_longest_path_fits_wherever_batches_of_one_do(
    made: tuple[list[list[int]], list[Profile], list[int]], budget: float, rate: float
) -> None:
    graph, of_stages, devices = made
    planned = Planned(of_stages, 32, parents=graph).alone(*devices).rate(rate)
    plan = planned.plan(budget)
    after = planned.pipeline.downstream(plan.times)
    longest = max(plan.times[root] + after[root] for root in planned.pipeline.roots)
    if planned.path(planned.ones()) <= budget / 1e3:
        assert longest <= budget / 1e3
        assert planned.path(plan.targets, rate or 1e-9) <= budget / 1e3 * (1 + 1e-9)
    else:
        assert plan.targets == planned.ones()
    assert all(1 <= target <= ceiling <= 32 for target, ceiling in zip(plan.targets, plan.ceilings, strict=True))


# ---- as little work as can be --------------------------------------------------------------------


@given(
    st.lists(profiles, min_size=1, max_size=3), st.integers(1, 9), st.floats(20.0, 1500.0),
    st.sampled_from([60.0, 400.0, FULL_LOAD]),
)  # fmt: skip
def test_nothing_that_takes_as_long_takes_less_work(
    of_stages: list[Profile], devices: int, budget: float, rate: float
) -> None:
    """Brute force over all combinations: those that take no longer than the plan are no better; and those within the
    budget are not better by more than one step of each stage (the duality gap)."""
    assume(all(rate * (alpha + beta) / 1e3 > 0.5 for alpha, beta in of_stages))
    planned = Planned(of_stages, 7).shared(devices).rate(rate)
    batches = planned.plan(budget).targets
    assume(planned.path(planned.ones(), rate) <= budget / 1e3)
    took, work = planned.path(batches, rate), planned.work(batches)
    gap = sum(
        table.upper(batch) / batch - table.upper(batch + 1) / (batch + 1)
        for table, batch in zip(planned.tables, batches, strict=True)
        if table is not None and batch < planned.max_batch
    )
    for others in planned.combinations():
        if planned.path(others, rate) <= took:
            assert planned.work(others) >= work * (1 - 1e-6)
        if planned.path(others, rate) <= budget / 1e3:
            assert planned.work(others) + gap >= work * (1 - 1e-6)


@given(
    profiles,
    st.integers(1, 64),
    st.floats(10.0, 1000.0),
    st.one_of(st.floats(1.0, 1e5), st.just(FULL_LOAD)),
)
def test_one_stages_batch_is_symphonys(profile: Profile, devices: int, budget: float, rate: float) -> None:
    """Where larger batches are the better ones, the largest feasible one is the best."""
    alpha, beta = profile
    assume(beta > 0.0 and rate * (alpha + beta) / 1e3 > 0.5)
    planned = Planned([profile]).alone(devices).rate(rate)
    (target,) = planned.plan(budget).targets
    table = planned.tables[0]
    assert table is not None
    expected = target_batch(table, devices, rate, budget / 1e3, 64)
    # Where the path takes exactly the budget, rounding decides.
    near = {target_batch(table, devices, rate, budget / 1e3 * factor, 64) for factor in (1 - 1e-9, 1 + 1e-9)}
    assert target in {expected, *near}


def test_a_stage_that_gains_nothing_by_larger_batches_leaves_the_budget_to_others() -> None:
    """30 ms an element, and 1 ms an element and 20: two devices each, 400 ms. The first runs one by one and takes
    45 ms; what is left is l(b) (1 + 4/2) <= 355: b = 98, of 64."""
    planned = Planned([(30.0, 0.0), (1.0, 20.0)]).alone(2, 2)
    plan = planned.plan(400.0)
    assert plan.ceilings == [1, 64]
    assert planned.plan(200.0).ceilings == [1, math.floor((200 - 45) / 3 - 20)]


def test_nearly_nothing_is_worth_nearly_nothing() -> None:
    """Divided by their latencies the first stage would have most of the SLO."""
    planned = Planned([(30.0, 1.0), (1.0, 20.0)]).shared(2)
    first, second = planned.plan(400.0).ceilings
    assert first < 5
    assert second > 20


@pytest.mark.parametrize(
    ("devices", "of_stages"),
    [
        ((1, 4), [(2.0, 20.0), (2.0, 20.0)]),
        ((4, 1), [(2.0, 20.0), (2.0, 20.0)]),
        ((2, 2), [(2.0, 20.0), (2.0, 20.0)]),
        ((3, 1, 2), [(3.0, 30.0), (1.0, 20.0), (5.0, 10.0)]),
    ],
)
@pytest.mark.parametrize("budget", [200.0, 300.0])
def test_the_stage_that_limits_the_throughput_comes_first(
    devices: tuple[int, ...], of_stages: list[Profile], budget: float
) -> None:
    """On no combination within the budget would the devices carry much more than in the planned batches."""
    planned = Planned(of_stages, 40).alone(*devices)

    def limit(batches: Sequence[int]) -> float:
        """GPU seconds a request at the stage that limits the throughput, by its devices."""
        each = zip(planned.tables, batches, devices, strict=True)
        return max(table.upper(batch) / batch / count for table, batch, count in each if table is not None)

    ceilings = planned.plan(budget).ceilings
    assert planned.path(ceilings) <= budget / 1e3
    best = min(limit(batches) for batches in planned.combinations() if planned.path(batches) <= budget / 1e3)
    assert limit(ceilings) <= 1.1 * best


# ---- rates ---------------------------------------------------------------------------------------


def test_a_batch_that_would_not_fill_in_time_is_not_waited_for() -> None:
    """100 requests a second: 1.082 b + 5.204 + 10 b <= 100 ms, b = 8. Of a burst more are taken: on four GPUs
    (1.082 b + 5.204) 5/4 <= 100, b = 69, of 64."""
    plan = Planned([(1.082, 5.204)]).alone(4).rate(100.0).plan(100.0)
    assert (plan.targets, plan.ceilings) == ([8], [64])
    assert plan.times == pytest.approx([(8 * 1.082 + 5.204 + 80) / 1e3])


def test_nobody_waits_for_others_who_are_not_expected() -> None:
    plan = Planned([(1.0, 20.0), (1.0, 20.0)]).alone(4, 4).rate(0.0).plan(400.0)
    assert plan.targets == [1, 1]
    assert min(plan.ceilings) > 8
    assert plan.times == pytest.approx([0.021, 0.021])


def test_requests_that_take_half_a_gpu_one_by_one_are_run_so() -> None:
    """20 ms each: 25 a second are half a GPU."""
    assert Planned([(1.0, 19.0)]).alone(8).rate(24.9).plan(500.0).targets == [1]
    assert Planned([(1.0, 19.0)]).alone(8).rate(25.1).plan(500.0).targets[0] > 1


def test_the_ceiling_does_not_depend_on_the_rate() -> None:
    found = {tuple(Planned([(3.0, 20.0)] * 2).alone(3, 3).rate(rate).plan(300.0).ceilings) for rate in (0.0, 9.0, 90.0)}
    assert len(found) == 1


# ---- room for bursts -----------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "bursts", "ceilings"), [(90.0, BURSTS, [6, 4]), (100.0, 0.0, [12, 12])])
def test_no_room_is_left_for_bursts_where_batches_would_be_too_small_for_the_load(
    rate: float, bursts: float, ceilings: list[int]
) -> None:
    """4 b + 20 ms, one device each. With room for bursts 2 l(b) + 5 l(b) <= 280 ms: b = 4 or 5, which carry some 110 a
    second; without it 2 l(b) + 2 l(b) <= 280: b = 12, which carry 176."""
    plan = Planned([(4.0, 20.0), (4.0, 20.0)], 16).alone(1, 1).rate(rate).plan(280.0)
    assert (plan.bursts, plan.ceilings) == (bursts, ceilings)


def test_the_room_stays_where_larger_batches_would_carry_hardly_more() -> None:
    """30 ms each, 1 more for a batch: overloaded either way."""
    assert Planned([(30.0, 1.0), (30.0, 1.0)], 16).alone(1, 1).rate(100.0).plan(500.0).bursts == BURSTS


# ---- special stages ------------------------------------------------------------------------------


def test_zero_latencies_take_everybody_and_wait_for_nobody() -> None:
    for rate in (0.0, 100.0):
        plan = Planned([(0.0, 0.0), (0.0, 0.0)]).alone(1, 1).rate(rate).plan(100.0)
        assert plan.ceilings == [64, 64]
        assert plan.targets == [1, 1]
        assert plan.times == [0.0, 0.0]


def test_a_stage_without_devices_takes_no_time_and_leaves_all_to_the_others() -> None:
    planned = Planned([(1.0, 20.0), (1.0, 20.0)]).alone(2, 2).rate(1e6)
    both = planned.plan(150.0).ceilings
    planned.stages[1].stage.devices = 0
    planned.tables[1] = None
    plan = planned.plan(150.0)
    assert plan.ceilings[0] > both[0]
    assert plan.ceilings[1] == plan.targets[1] == 1
    assert plan.times[1] == 0.0


def test_no_stage_has_devices() -> None:
    planned = Planned([(1.0, 20.0)] * 2)
    planned.tables = [None, None]
    plan = planned.plan(100.0)
    assert (plan.targets, plan.ceilings, plan.times) == ([1, 1], [1, 1], [0.0, 0.0])


def test_what_may_hold_up_a_shared_device_is_waited_for() -> None:
    """Two devices: instead of for half its own execution each stage waits for half of 100 ms, and what lies behind for
    four times as long."""
    planned = Planned([(1.0, 10.0), (1.0, 10.0)]).shared(2).rate(1e6)
    free = planned.plan(500.0)
    planned.stages[0].stage.groups[0].longest = 0.100
    held_up = planned.plan(500.0)
    for number, batch in enumerate(held_up.targets):
        execution = (batch + 10.0) / 1e3
        assert held_up.times[number] == pytest.approx(execution + max(execution, 0.100) / 2 * (1, 1 + BURSTS)[number])
    assert sum(held_up.times) <= 0.5
    assert sum(held_up.targets) <= sum(free.targets)


def test_the_items_of_a_map_stage_are_run_in_rounds() -> None:
    """Twelve items of 10 ms on two devices: one by one in six rounds, 60 ms and the wait for a device, 4/2 as long. In
    batches of 6 and 30 ms: one round."""
    planned = Planned([(0.0, 0.0), (4.0, 6.0)], 64).alone(1, 2).rate(20.0)
    stage = planned.stages[1]
    stage.stage.rate = 240.0
    stage.is_map = True
    stage.note_items(12)
    plan = planned.plan(95.0)
    assert planned.path([64, plan.targets[1]]) <= 0.095
    assert planned.path([64, 1]) > 0.095
    assert plan.targets[1] == 6
    assert plan.times[1] == pytest.approx(0.030 * 3)
