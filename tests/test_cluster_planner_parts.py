"""What the planner is made of: packing, forecasts, division over shards, water levels, costs."""

from __future__ import annotations

import itertools
import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.planner.costs import Costs, StageCost
from cluster.planner.demand import Demand
from cluster.planner.forecast import Autoregression, Forecast
from cluster.planner.keys import natural, parse_key
from cluster.planner.packing import RARE, Turns, leave, longest_duty
from cluster.planner.paging import PAGING, Sharing
from cluster.planner.scarcity import floor_level, water_level
from cluster.planner.settings import Settings
from cluster.planner.sharding import Wish, divide
from pipelines.profile import LatencyProfile
from pipelines.spec import PipelineSpec, Profile, StageSpec

ALPHA = st.floats(0.1, 20.0)
BETA = st.floats(0.0, 20.0)


def cost(alpha: float, beta: float, part: float, largest: int = 64) -> StageCost:
    profile = LatencyProfile.from_spec(Profile(alpha_ms=alpha, beta_ms=beta))
    return StageCost(profile, largest, largest, part, 1.0, 1.0, 0.0, True)


# ---- keys ------------------------------------------------------------------------------------


def test_keys() -> None:
    assert parse_key("ocr@1234/detect") == ("ocr", "1234", "detect")
    assert sorted(["n10", "n9", "n", "m2", "n9-b"], key=natural) == ["m2", "n", "n9", "n9-b", "n10"]


# ---- packing ---------------------------------------------------------------------------------


@given(ALPHA, BETA, st.floats(0.02, 1.0), st.floats(0.1, 500.0))
def test_the_longest_duty_is_the_longest(alpha: float, beta: float, part: float, rate: float) -> None:
    model = cost(alpha, beta, part)
    every = max(min(part - model.latency(batch), batch / rate) for batch in range(1, model.largest + 1))
    assert longest_duty(model, rate) == pytest.approx(every)


@given(st.lists(st.tuples(ALPHA, BETA, st.floats(0.02, 1.0), st.floats(0.0, 300.0)), min_size=2, max_size=5))
def test_models_that_share_a_device_meet_their_objectives(models: list[tuple[float, float, float, float]]) -> None:
    loads = [(cost(alpha, beta, part), rate) for alpha, beta, part, rate in models]
    busy = Turns(loads).busy()
    if busy is None:
        return
    assert 0.0 <= busy <= 1.0
    duty = min(longest_duty(model, rate) for model, rate in loads)
    often = [(model, rate) for model, rate in loads if duty * rate >= RARE]
    batches = [max(1, math.ceil(duty * rate - 1e-9)) for _, rate in often]
    assert sum(model.latency(batch) for (model, _), batch in zip(often, batches, strict=True)) <= duty + 1e-9
    for (model, rate), batch in zip(often, batches, strict=True):
        assert batch >= duty * rate - 1e-6, "more arrives in a cycle than it runs"
        assert batch <= model.largest
        if batch > 1:  # one that waited for a whole cycle is still in time, but for the batch's last element
            assert duty + model.latency(batch - 1) <= model.part + 1e-9


def test_one_load_alone_always_fits_and_what_nobody_measured_takes_nothing() -> None:
    unknown = StageCost(None, 8, 8, 0.0, 1.0, 1.0, 0.0, True)
    assert Turns([(cost(10, 0, 0.4), 1e6)]).busy() == 1.0
    assert Turns([(unknown, 5.0), (cost(10, 0, 0.4), 10.0)]).busy() == pytest.approx(0.1)


@given(st.lists(st.tuples(ALPHA, BETA, st.floats(0.02, 1.0), st.floats(0.0, 30.0)), min_size=1, max_size=8), st.data())
def test_loads_that_come_one_by_one_take_turns_as_if_reckoned_together(
    models: list[tuple[float, float, float, float]], data: st.DataObject
) -> None:
    loads = [(cost(alpha, beta, part), rate) for alpha, beta, part, rate in models]
    turns = Turns([])
    held: list[tuple[StageCost, float]] = []
    for load in loads:
        expected = Turns([*held, load]).busy()
        assert turns.busy_with(load) == (None if expected is None else pytest.approx(expected))
        if data.draw(st.booleans()):
            turns.add(load)
            held.append(load)
            assert turns.busy() == (None if expected is None else pytest.approx(expected))


@given(st.lists(st.tuples(st.floats(0.02, 0.2), st.floats(0.1, 300.0)), min_size=2, max_size=30))
def test_as_few_leave_as_suffices(models: list[tuple[float, float]]) -> None:
    loads = sorted(((cost(1.0, 4.0, part), rate) for part, rate in models), key=lambda load: -load[1])
    count = leave(loads, len(loads) - 1)
    assert Turns(loads[count:]).busy() is not None or count == len(loads) - 1
    assert count == 0 or Turns(loads[count - 1 :]).busy() is None
    assert leave(loads, 1) == (Turns(loads).busy() is None)


# ---- costs -----------------------------------------------------------------------------------


def spec_of(*profiles: Profile | None, executor: str = "emulated", slo: float = 0.4) -> PipelineSpec:
    stages = {}
    for number, profile in enumerate(profiles):
        inputs = [f"s{number - 1}"] if number else ["request"]
        model = None if executor == "emulated" else "m:f"
        stages[f"s{number}"] = StageSpec(executor=executor, model=model, profile=profile, inputs=inputs)
    return PipelineSpec(name="p", slo=slo, stages=stages, output=f"s{len(profiles) - 1}")


def test_costs_are_those_of_the_type() -> None:
    fast = Profile(alpha_ms=1, beta_ms=0, load_ms=500)
    spec = spec_of(Profile(alpha_ms=10, beta_ms=0, load_ms=3000, memory_mb=70, by_type={"A100": fast}))
    costs = Costs(2.0).of(spec, frozenset({"A100", "T4"}), {}, {})
    assert costs["s0", "A100"].rate == pytest.approx(1000.0)
    assert costs["s0", "T4"].rate == pytest.approx(100.0)
    assert (costs["s0", "A100"].load, costs["s0", "T4"].load) == (0.5, 3.0)
    assert costs["s0", "A100"].memory == 70


def test_what_was_measured_counts_unless_the_stage_is_emulated() -> None:
    stated = Profile(alpha_ms=10, beta_ms=0)
    measured = [(1, 0.001), (8, 0.008)]
    for executor, rate in (("emulated", 100.0), ("python", 1000.0)):
        spec = spec_of(stated, executor=executor)
        costs = Costs(2.0).of(spec, frozenset({"gpu"}), {(spec.model_key("s0"), "gpu"): measured}, {})
        assert costs["s0", "gpu"].rate == pytest.approx(rate)
        assert costs["s0", "gpu"].load == 2.0


def test_a_type_that_no_request_could_use_in_time_is_not_used() -> None:
    slow = {"cpu": Profile(alpha_ms=300, beta_ms=0)}
    spec = spec_of(Profile(alpha_ms=150, beta_ms=0, by_type=slow), Profile(alpha_ms=150, beta_ms=0))
    costs = Costs(2.0).of(spec, frozenset({"cpu", "gpu"}), {}, {})
    assert not costs["s0", "cpu"].usable
    assert costs["s0", "gpu"].usable
    assert costs["s1", "cpu"].usable
    assert Costs(2.0).of(spec, frozenset({"cpu"}), {}, {})["s0", "cpu"].usable, "better late than never"


def test_the_parts_of_a_path_make_up_the_objective() -> None:
    spec = spec_of(Profile(alpha_ms=5, beta_ms=3), Profile(alpha_ms=1, beta_ms=1), slo=0.5)
    costs = Costs(2.0).of(spec, frozenset({"gpu"}), {}, {})
    assert costs["s0", "gpu"].part + costs["s1", "gpu"].part == pytest.approx(0.5)


# ---- forecasts -------------------------------------------------------------------------------


def provided(rates: list[float], **settings: float) -> list[float]:
    """What is provided for in each second, by the forecast of ``horizon`` seconds ago."""
    forecast = Forecast(Settings(**settings), 2)
    needs = []
    for rate in rates:
        forecast.observe(rate)
        needs.append(forecast.need)
    return needs


def test_a_rate_that_does_not_change_is_forecast_as_it_is() -> None:
    model = Autoregression(2)
    noise = random.Random(1)
    for _ in range(200):
        model.forecast(noise.uniform(50, 150))
    for _ in range(60):
        forecast = model.forecast(3000.0)
    assert forecast == pytest.approx(3000.0)


def test_a_step_is_followed_at_once_and_not_overshot_for_long() -> None:
    needs = provided([1000.0] * 150 + [3000.0] * 150)
    assert needs[149] == pytest.approx(1000.0, rel=0.01)
    assert needs[150] >= 3000.0
    assert needs[200] == pytest.approx(3000.0, rel=0.05)


def test_a_ramp_is_anticipated() -> None:
    ramp = [1000.0 + 40.0 * second for second in range(60)]
    needs = provided([1000.0] * 60 + ramp)
    assert all(need >= rate + 40.0 for need, rate in list(zip(needs[60:], ramp, strict=True))[15:])


def test_noise_is_met_with_a_margin_and_less_of_it_with_less() -> None:
    noise = random.Random(2)
    wild, calm = Forecast(Settings(), 2), Forecast(Settings(), 2)
    for _ in range(300):
        wild.observe(noise.gauss(1000, 150))
        calm.observe(noise.gauss(1000, 15))
    assert (wild.kept or 0.0) > 1120
    assert (calm.kept or 0.0) < 1050


def test_so_much_is_missed_as_is_allowed() -> None:
    noise = random.Random(3)
    rates = [max(0.0, noise.gauss(1000, 200)) for _ in range(600)]
    forecast = Forecast(Settings(shortfall=0.02), 1)
    missed = total = 0.0
    before = None
    for rate in rates:
        if before is not None:
            missed += max(0.0, rate - before)
            total += rate
        forecast.observe(rate)
        before = forecast.kept
    assert missed / total < 0.03


def test_noise_is_outwaited_and_a_cycle_is_followed() -> None:
    noise = random.Random(4)
    still, cycle = Forecast(Settings(), 2), Forecast(Settings(), 2)
    kept_still, kept_cycle = [], []
    for second in range(400):
        still.observe(noise.gauss(1000, 150))
        cycle.observe(1000.0 + 300.0 * math.sin(second / 24 * 2 * math.pi))
        kept_still.append(still.kept or 0.0)
        kept_cycle.append(cycle.kept or 0.0)
    changes = sum(abs(after - before) > 50 for before, after in pairwise(kept_still[200:]))
    assert changes < 40
    assert min(kept_cycle[200:]) < 900 < 1290 < max(kept_cycle[200:])


def test_nothing_is_given_back_before_enough_is_known() -> None:
    forecast = Forecast(Settings(patience=20.0), 2)
    for _ in range(10):
        forecast.observe(100.0)
        assert forecast.kept is None
    for _ in range(30):
        forecast.observe(100.0)
    assert forecast.kept == pytest.approx(100.0)


@given(st.lists(st.floats(0.0, 1e6), max_size=60), st.integers(1, 8))
def test_any_rates_make_sense(rates: list[float], horizon: int) -> None:
    forecast = Forecast(Settings(), horizon)
    for rate in rates:
        forecast.observe(rate)
        assert math.isfinite(forecast.need)
        assert forecast.need >= 0.0
        assert forecast.kept is None or forecast.kept >= forecast.need - 1e-6


def test_versions_share_a_pipelines_demand() -> None:
    old, new = spec_of(Profile(alpha_ms=1, beta_ms=1)), spec_of(Profile(alpha_ms=2, beta_ms=1))
    demand = Demand(Settings())
    demand.know({"p": (new, 1.0)})
    for _ in range(30):
        demand.observe({old.model_key("s0"): 60.0, new.model_key("s0"): 40.0})
    assert demand.of("p", ["s0"])["s0"].now == pytest.approx(100.0)


def test_rates_that_come_before_the_pipeline_is_known_count() -> None:
    spec = spec_of(Profile(alpha_ms=1, beta_ms=1))
    demand = Demand(Settings())
    demand.observe({spec.model_key("s0"): 60.0})
    demand.know({"p": (spec, 1.0)})
    assert demand.requests("p") >= 60.0


# ---- shards ----------------------------------------------------------------------------------


def test_a_pipeline_is_divided_so_that_the_fewest_devices_are_needed() -> None:
    settings = Settings(replicas=2)
    division = divide(Wish(1000.0, [40.0, 4.7], True), {}, {}, {}, ["a", "b"], settings)
    assert sum(math.ceil(part * need) for part in division.parts.values() for need in (40.0, 4.7)) <= 45
    assert sum(division.parts.values()) == pytest.approx(1.0)


def test_a_division_that_is_as_good_stays() -> None:
    before = {"a": 0.6, "b": 0.4}
    division = divide(Wish(1000.0, [10.0, 5.0], True), before, before, {}, ["a", "b", "c"], Settings())
    assert (division.parts, division.urgent) == (before, False)


def test_shards_are_given_up_only_when_so_much_is_no_longer_kept() -> None:
    before = {"a": 0.5, "b": 0.5}
    for devices, settled, shards in ((0.6, False, 2), (1.8, True, 2), (0.8, True, 2), (0.6, True, 1)):
        division = divide(Wish(10.0, [devices], settled), before, before, {}, ["a", "b"], Settings())
        assert len(division.parts) == shards


@given(
    st.floats(0.0, 1e5),
    st.lists(st.floats(0.0, 200.0), min_size=1, max_size=6),
    st.integers(1, 8),
    st.integers(1, 4),
)
def test_any_division_is_whole(visits: float, devices: list[float], shards: int, replicas: int) -> None:
    settings = Settings(shard_rate=10_000.0, replicas=replicas)
    names = [f"s{number}" for number in range(shards)]
    parts = divide(Wish(visits, devices, True), {}, {}, {}, names, settings).parts
    assert set(parts) <= set(names)
    assert sum(parts.values()) == pytest.approx(1.0)
    assert all(part > 0.0 for part in parts.values())
    assert len(parts) >= min(shards, math.ceil(visits / settings.shard_rate))


# ---- levels ----------------------------------------------------------------------------------

DEMANDS = st.dictionaries(st.sampled_from("abcd"), st.floats(0.1, 1000.0), min_size=1)


@given(DEMANDS, st.floats(1.0, 100.0))
def test_below_the_level_everything_is_met_and_above_all_get_the_same(
    demands: dict[str, float], devices: float
) -> None:
    work = {name: 0.05 + 0.01 * number for number, name in enumerate(demands)}
    level = water_level(demands, work, devices)
    used = sum(min(demand, level) * work[name] for name, demand in demands.items())
    assert used <= devices * (1 + 1e-6)
    assert level >= max(demands.values()) or used == pytest.approx(devices, rel=1e-3)


@given(DEMANDS, st.floats(1.0, 100.0))
def test_what_is_left_raises_the_lowest(demands: dict[str, float], devices: float) -> None:
    work = {name: 0.05 + 0.01 * number for number, name in enumerate(demands)}
    floor = floor_level(demands, work, devices)
    used = sum(max(demand, floor) * work[name] for name, demand in demands.items())
    assert floor <= 1e-6 or used == pytest.approx(devices, rel=1e-3)


# ---- paging ----------------------------------------------------------------------------------


def test_models_share_what_they_fit_into_whatever_their_load() -> None:
    assert Sharing([(50.0, 9.0), (50.0, 9.0)], 100.0).fits()
    assert not Sharing([(50.0, 9.0), (51.0, 9.0)], 100.0).fits()
    assert Sharing([], 0.0).fits()


def test_the_cheapest_are_paged_beside_those_that_stay() -> None:
    hot, cold = (50.0, 5.0), (30.0, 0.001)
    assert Sharing([hot, *[cold] * 50], 80.0).fits()
    assert not Sharing([hot, *[cold] * 50], 79.0).fits()
    assert not Sharing([hot, *[cold] * 250], 80.0).fits()
    assert not Sharing([hot, hot, *[cold] * 3], 110.0).fits()


@given(st.lists(st.floats(0.0, 0.3), min_size=1, max_size=7), st.integers(10, 150))
def test_of_equal_sizes_they_share_exactly_where_some_choice_of_those_that_stay_allows_it(
    costs: list[float], room: int
) -> None:
    possible = False
    for stay in itertools.product((True, False), repeat=len(costs)):
        paged = [cost for cost, stays in zip(costs, stay, strict=True) if not stays]
        possible |= 20.0 * (sum(stay) + bool(paged)) <= room and math.fsum(sorted(paged)) <= PAGING
    assert Sharing([(20.0, cost) for cost in costs], float(room)).fits() == possible


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 10.0, 20.0, 35.0]), st.sampled_from([0.0, 0.03, 0.07, 0.3])), max_size=9),
    st.integers(0, 150),
)
def test_models_that_come_one_by_one_share_as_if_reckoned_together(needs: list[tuple[float, float]], room: int) -> None:
    sharing = Sharing([], float(room))
    for number, need in enumerate(needs):
        together = Sharing(needs[: number + 1], float(room)).fits()
        assert sharing.fits_with(need) == together
        sharing.add(need)
        assert sharing.fits() == together
