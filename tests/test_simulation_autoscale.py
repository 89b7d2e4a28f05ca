"""GPUs that change what they hold while a simulation goes on: by hand, by the planner, and on utilisation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cluster.planner.settings import Settings
from cluster.planner.view import ClusterView, DeviceView, NodeView, Placed
from pipelines import load_spec
from pipelines.load import parse_spec
from pipelines.spec import PipelineSpec
from simulation.arrivals import prepare
from simulation.autoscale import Autoscale
from simulation.machine import Machine
from simulation.results import RunResult
from simulation.run import Cluster, Fault, Network, Workload, simulate
from simulation.scalers import Measured, Reactive, ReactiveScaler

ONE = """
name: one
slo: 500ms
stages:
  only: {executor: emulated, profile: {alpha_ms: 10, beta_ms: 5}, max_batch: 32}
output: only
"""
SLOW = ONE.replace("beta_ms: 5", "beta_ms: 5, load_ms: 3000")
CHAIN = """
name: chain
slo: 500ms
stages:
  first: {executor: emulated, profile: {alpha_ms: 10, beta_ms: 5}, max_batch: 32}
  second: {executor: emulated, profile: {alpha_ms: 3, beta_ms: 20}, inputs: [first], max_batch: 32}
output: second
"""
STEPS = "step:1x15,3x15,1x30"
"""At a mean rate of 300 /s: 200, 600 and 200 /s."""


def spec_of(text: str) -> PipelineSpec:
    return parse_spec(text, file="test.yaml", root="")


def every(gap: float, seconds: float) -> Any:
    return np.arange(gap / 2, seconds, gap)


def scaled(
    spec: PipelineSpec, gpus: int, rate: float, trace: str = STEPS, seed: int = 1, **more: Any
) -> tuple[RunResult, list[int]]:
    """The result, and how many GPUs had a model loaded after each second."""
    source = prepare(trace)
    scaler = more.pop("autoscale", Autoscale())
    cluster = Cluster(held=[[spec.model_key(next(iter(spec.stages)))]] * gpus, autoscale=scaler, **more)
    counts: list[int] = []

    def look(now: float, machine: Machine) -> None:
        counts.append(sum(bool(gpu.ready()) for gpu in machine.gpus))

    arrivals = source.draw(rate, seed)
    (result,) = simulate([Workload(spec, "laxity", arrivals)], cluster, seconds=source.length, seed=seed, control=look)
    assert result.submitted == len(arrivals) == sum(result.outcomes.values())
    assert len(result.series.allocated) == len(result.series.offered)
    assert result.gpu_seconds_allocated == pytest.approx(sum(result.series.allocated))
    assert max(result.series.allocated) <= gpus + 1e-6
    assert result.gpu_seconds_busy <= result.gpu_seconds_allocated + gpus * spec.slo
    return result, counts


def figures(result: RunResult) -> RunResult:
    """Without what the machine that simulates has to do with."""
    fields = {name: getattr(result, name) for name in result.__struct_fields__}
    return RunResult(**{**fields, "wall_seconds": 0.0})


# ---- by hand -------------------------------------------------------------------------------------


def placed_by_hand(todo: dict[float, list[str]], loads: dict[str, float], spec: PipelineSpec) -> tuple[RunResult, Any]:
    """One GPU for 8 s with a request every 50 ms; what it is to hold from which second on. Also its seconds allocated,
    after each second."""
    allocated: list[float] = []
    spent: list[float] = []

    def control(now: float, machine: Machine) -> None:
        allocated.append(machine.gpus[0].allocated(now))
        spent.append(machine.gpus[0].spent_loading)
        if now in todo:
            machine.place(now, "agent-0", 0, todo[now], loads)

    cluster = Cluster(held=[[spec.model_key("only")]], network=Network(control=0.0, response=0.0))
    (result,) = simulate([Workload(spec, "laxity", every(0.05, 8.0))], cluster, seconds=8.0, control=control)
    return result, (allocated, spent[-1])


def test_a_gpu_that_is_taken_its_model_runs_its_batch_to_the_end_and_rests() -> None:
    spec = spec_of(ONE)
    result, (allocated, spent) = placed_by_hand({2.0: [], 5.0: [spec.model_key("only")]}, {}, spec)
    assert result.series.good[:2] == [20, 20]
    assert result.series.good[2:4] == [0, 0]
    assert result.series.good[5:] == [20, 20, 20]
    assert allocated[:2] == [1.0, 2.0]
    # Nothing ran at 2 s: requests come at .025 and .075 and take 15 ms.
    assert allocated[2:5] == [2.0, 2.0, 2.0]
    assert allocated[5:] == [3.0, 4.0, 5.0]
    assert spent == 0.0


def test_loading_takes_its_time() -> None:
    """Placed again at 4 s, loaded at 5.5: the GPU counts from 4 s on; the SLO covers who came from 5 s on."""
    spec = spec_of(ONE)
    key = spec.model_key("only")
    result, (allocated, spent) = placed_by_hand({1.0: [], 4.0: [key]}, {key: 1.5}, spec)
    assert result.series.good[4] == 0
    assert 15 <= result.series.good[5] <= 20
    assert result.series.good[6:] == [20, 20]
    assert allocated == [1.0, 1.0, 1.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert spent == 1.5


def test_a_load_that_is_not_wanted_any_more_is_still_paid_for() -> None:
    spec = spec_of(ONE)
    key = spec.model_key("only")
    result, (allocated, spent) = placed_by_hand({1.0: [], 3.0: [key], 4.0: []}, {key: 1.5}, spec)
    assert sum(result.series.good[2:]) == 0
    assert allocated == [1.0, 1.0, 1.0, 2.0, 2.5, 2.5, 2.5, 2.5]
    assert spent == 1.5


def test_a_batch_that_runs_when_its_model_is_taken_is_counted_to_its_end() -> None:
    """A batch of one takes 1.505 s: it began shortly before 2 s."""
    spec = spec_of(ONE.replace("alpha_ms: 10", "alpha_ms: 1500").replace("500ms", "9s"))
    rests: list[float] = []

    def control(now: float, machine: Machine) -> None:
        if now == 2.0:
            machine.place(now, "agent-0", 0, [], {})
        rests.append(machine.gpus[0].allocated(now))

    cluster = Cluster(held=[[spec.model_key("only")]], network=Network(control=0.0, response=0.0))
    workload = Workload(spec, "naive", np.array([1.9]))
    (result,) = simulate([workload], cluster, seconds=6.0, control=control)
    assert result.outcomes["ok"] == 1
    assert rests == pytest.approx([1.0, 2.0, 3.0, 3.405, 3.405, 3.405])


# ---- the planner ---------------------------------------------------------------------------------


def test_gpus_follow_the_load() -> None:
    spec = spec_of(ONE)
    settings = Settings(patience=10.0)
    result, counts = scaled(spec, 16, 300.0, autoscale=Autoscale(scaler=settings))
    assert result.scaler == "planner"
    # It takes 10.3 ms a request: 200 /s need 2.1 GPUs, 600 /s need 6.2.
    assert 2 <= min(counts) <= max(counts[5:14]) <= 5
    assert 7 <= counts[28] <= 14
    assert counts[-1] < 0.7 * counts[28]
    assert result.drop_rate < 0.06
    assert result.gpu_seconds_allocated < 0.6 * 16 * 60
    assert result.moves >= result.loads >= 4
    assert result.moves_per_hour == pytest.approx(60 * result.moves)
    assert result.gpu_seconds_loading == pytest.approx(1.5 * result.loads)


def test_every_stage_of_a_chain_is_scaled() -> None:
    result, _ = scaled(load_spec("lv"), 32, 500.0)
    assert result.drop_rate < 0.08
    assert result.gpu_seconds_allocated < 0.7 * 32 * 60


def test_a_seed_decides_for_scaled_gpus_too() -> None:
    spec = spec_of(CHAIN)
    shaky: dict[str, Any] = {"jitter": 0.2, "stragglers": 0.02, "network": Network(jitter=0.002)}
    once, again, other = (scaled(spec, 12, 200.0, seed=seed, **shaky)[0] for seed in (5, 5, 6))
    assert figures(once) == figures(again)
    assert figures(once) != figures(other)


@pytest.mark.parametrize("scaler", [Settings(), Reactive(interval=2.0, patience=10.0)])
def test_a_pool_that_is_too_small_is_used_up(scaler: Settings | Reactive) -> None:
    """600 /s need 6.2 GPUs."""
    result, counts = scaled(spec_of(ONE), 4, 300.0, autoscale=Autoscale(scaler=scaler))
    assert counts[25] == 4
    assert result.bound_ratio > 0.5


def test_a_load_time_of_the_profile_goes_first() -> None:
    result, _ = scaled(spec_of(SLOW), 16, 300.0, autoscale=Autoscale(load_seconds=0.5))
    assert result.loads > 0
    assert result.gpu_seconds_loading == pytest.approx(3.0 * result.loads)


def test_slow_loads_are_seen() -> None:
    spec = spec_of(ONE)
    quick, slow = (scaled(spec, 16, 300.0, autoscale=Autoscale(load_seconds=load))[0] for load in (0.5, 8.0))
    assert slow.outcomes["ok"] < quick.outcomes["ok"]


def test_what_a_lost_host_held_is_placed_elsewhere() -> None:
    """Hosts of two GPUs; the one that is filled first is lost for good."""
    result, counts = scaled(
        spec_of(ONE), 16, 300.0, "step:1x40", gpus_per_agent=2, faults=[Fault(0, 15.0, float("inf"))]
    )
    assert counts[15] < counts[13]
    assert counts[25] > counts[15]
    assert sum(result.series.good[25:]) == pytest.approx(sum(result.series.offered[25:]), rel=0.01)


def test_empty_hosts_are_powered_down_and_boot_when_needed() -> None:
    spec = spec_of(ONE)
    settings = Settings(node_patience=5.0, patience=5.0)
    up: list[int] = []
    results = []
    for boot in (0.0, 2.0, 12.0):
        up.clear()

        def look(now: float, machine: Machine) -> None:
            up.append(sum(gpu.up for gpu in machine.gpus))

        source = prepare(STEPS)
        cluster = Cluster(
            held=[[spec.model_key("only")]] * 16,
            gpus_per_agent=2,
            autoscale=Autoscale(scaler=settings, boot=boot),
        )
        (result,) = simulate(
            [Workload(spec, "laxity", source.draw(300.0, 1))], cluster, seconds=source.length, control=look
        )
        results.append(result)
        if boot:
            assert min(up) < max(up[16:]) <= 16
            assert up[14] < 16
        else:
            assert set(up) == {16}
    never, quick, slow = results
    assert never.outcomes["ok"] >= quick.outcomes["ok"] > slow.outcomes["ok"]


def test_pipelines_share_a_pool() -> None:
    """One rises as the other falls: the pool would not do for both at their highest."""
    specs = [spec_of(ONE), spec_of(CHAIN)]
    sources = [prepare("step:1x30,4x30"), prepare("step:4x30,1x30")]
    cluster = Cluster(held=[[specs[0].model_key("only")]] * 12, autoscale=Autoscale())
    arrivals = [source.draw(250.0, seed) for seed, source in enumerate(sources)]
    results = simulate(
        [Workload(spec, "laxity", times) for spec, times in zip(specs, arrivals, strict=True)], cluster, seconds=60.0
    )
    for result, times in zip(results, arrivals, strict=True):
        assert sum(result.outcomes.values()) == len(times)
        assert result.outcomes["ok"] > 0.85 * len(times)
        assert result.gpu_seconds_allocated == results[0].gpu_seconds_allocated
    assert results[0].gpu_seconds_allocated <= 12 * 60


# ---- on utilisation ------------------------------------------------------------------------------


def test_a_reactive_scaler_follows_too() -> None:
    spec = spec_of(ONE)
    reactive = Reactive(interval=1.0, target=0.7, patience=10.0)
    result, counts = scaled(spec, 16, 300.0, autoscale=Autoscale(scaler=reactive))
    assert result.scaler == "reactive"
    assert max(counts[5:14]) < counts[28] <= 12
    assert counts[-1] < counts[28]
    assert result.drop_rate < 0.15


def view_of(held: dict[int, str], loading: dict[int, str], gpus: int = 10) -> ClusterView:
    devices = [DeviceView("emulated", ready=frozenset({held[n]} if n in held else ())) for n in range(gpus)]
    placement = {("agent-0", n): Placed("shard-0", frozenset({key})) for n, key in (held | loading).items()}
    return ClusterView(
        nodes={"agent-0": NodeView("active", devices)},
        shards=["shard-0"],
        pipelines={},
        serving={},
        placement=placement,
    )


def counts_of(scaler: ReactiveScaler, now: float, busy: dict[str, float], view: ClusterView) -> dict[str, int]:
    plan = scaler.decide(now, Measured({"a": 100.0, "b": 10.0}, busy), view)
    counts: dict[str, int] = {}
    for placed in plan.placement.values():
        (key,) = placed.models
        counts[key] = counts.get(key, 0) + 1
    return counts


def reactive(**settings: float) -> ReactiveScaler:
    return ReactiveScaler(Reactive(**settings), {"a": 0.0205, "b": 0.01}, "shard-0")


def test_a_reactive_scaler_begins_with_what_the_rates_ask_for() -> None:
    """2.05 GPUs, which are 3 at 0.7, and one for the 0.1 of the other."""
    assert counts_of(reactive(), 0.0, {}, view_of({}, {})) == {"a": 3, "b": 1}


@pytest.mark.parametrize(
    ("busy", "wanted"),
    [(4.0, 6), (3.2, 5), (3.0, 4), (2.8, 4), (2.6, 4), (1.4, 2), (0.1, 1), (0.0, 1)],
)
def test_a_reactive_scaler_goes_by_utilisation(busy: float, wanted: int) -> None:
    """Four GPUs; within a tenth of 0.7 nothing changes."""
    view = view_of({0: "a", 1: "a", 2: "a", 3: "a", 4: "b"}, {})
    assert counts_of(reactive(), 0.0, {"a": busy, "b": 0.7}, view) == {"a": wanted, "b": 1}


def test_what_is_being_loaded_is_not_asked_for_again() -> None:
    view = view_of({0: "a", 1: "a", 4: "b"}, {2: "a"})
    assert counts_of(reactive(), 0.0, {"a": 2.0, "b": 0.7}, view) == {"a": 3, "b": 1}


def test_a_reactive_scaler_waits_for_its_interval_and_its_patience() -> None:
    scaler = reactive(interval=5.0, patience=20.0)
    many = view_of({0: "a", 1: "a", 2: "a", 3: "a", 4: "b"}, {})
    assert counts_of(scaler, 0.0, {"a": 2.8, "b": 0.7}, many) == {"a": 4, "b": 1}
    for now in (1.0, 2.0, 3.0, 4.0):
        assert counts_of(scaler, now, {"a": 4.0, "b": 0.7}, many) == {"a": 4, "b": 1}
    # Four seconds at 4 and one at 1.5: 17.5 of 20, as 5 GPUs at 0.7.
    assert counts_of(scaler, 5.0, {"a": 1.5, "b": 0.7}, many) == {"a": 5, "b": 1}
    for now in range(6, 25):
        found = counts_of(scaler, float(now), {"a": 0.7, "b": 0.7}, many)["a"]
        assert found == (5 if now % 5 == 0 else 4), "five were wanted within the last 20 s"
    assert [counts_of(scaler, now, {"a": 0.7, "b": 0.7}, many)["a"] for now in (25.0, 30.0)] == [5, 1]


def test_too_few_gpus_are_divided_max_min() -> None:
    view = view_of(dict.fromkeys(range(8), "a") | {8: "b"}, {})
    assert counts_of(reactive(), 0.0, {"a": 8.0, "b": 1.0}, view) == {"a": 8, "b": 2}
