"""Simulated runs: repeatable, nothing lost, and latencies that can be computed by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from laxity.outcomes import Outcome
from pipelines import load_spec
from pipelines.capacity import capacity, pool_capacity
from pipelines.load import parse_spec
from pipelines.policies import POLICIES, PolicyError
from pipelines.spec import PipelineSpec
from simulation.results import RunResult
from simulation.run import Cluster, Fault, Network, Workload, simulate

ONE = """
name: one
slo: 500ms
stages:
  only: {executor: emulated, profile: {alpha_ms: 10, beta_ms: 5}, max_batch: 32}
output: only
"""
CHAIN = """
name: chain
slo: 500ms
stages:
  first: {executor: emulated, profile: {alpha_ms: 10, beta_ms: 5}, max_batch: 32}
  second: {executor: emulated, profile: {alpha_ms: 3, beta_ms: 20}, inputs: [first], max_batch: 32}
output: second
"""
MAP = """
name: many
slo: 500ms
stages:
  split: {executor: emulated, profile: {alpha_ms: 2, beta_ms: 5}, options: {items: 6}, max_batch: 16}
  each: {executor: emulated, profile: {alpha_ms: 2, beta_ms: 5}, inputs: [split.parts], map: true, max_batch: 16}
output: each
"""
FAST = Network(control=0.0, response=0.0)


def spec_of(text: str) -> PipelineSpec:
    return parse_spec(text, file="test.yaml", root="")


def own(spec: PipelineSpec, *counts: int) -> list[list[str]]:
    """So many GPUs of its own for each stage."""
    return [[spec.model_key(name)] for name, count in zip(spec.stages, counts, strict=True) for _ in range(count)]


def poisson(rate: float, seconds: float, seed: int = 1) -> Any:
    generator = np.random.default_rng(seed)
    times = np.cumsum(generator.exponential(1.0 / rate, int(rate * seconds * 1.5) + 20))
    return times[times < seconds]


def run(
    spec: PipelineSpec, cluster: Cluster, arrivals: Any, *, policy: str = "laxity", seconds: float = 3.0, seed: int = 1
) -> RunResult:
    (result,) = simulate([Workload(spec, policy, np.asarray(arrivals))], cluster, seconds=seconds, seed=seed)
    check(result, len(arrivals))
    return result


def check(result: RunResult, submitted: int) -> None:
    """Every request has ended, once, and the accounts agree with one another."""
    assert result.submitted == submitted == sum(result.outcomes.values()) == sum(result.series.offered)
    good = result.outcomes["ok"]
    assert good == sum(result.series.good) == sum(result.latencies_ms)
    assert result.goodput_rps == pytest.approx(good / result.seconds)
    assert sum(result.drops_by_stage.values()) <= result.outcomes["dropped"] + result.outcomes["expired"]
    assert 0.0 <= result.invalid_rate <= 1.0
    assert result.drop_rate == pytest.approx(1 - good / submitted if submitted else 0.0)


def figures(result: RunResult) -> RunResult:
    """Without what the machine that simulates has to do with."""
    fields = {name: getattr(result, name) for name in result.__struct_fields__}
    return RunResult(**{**fields, "wall_seconds": 0.0})


# ---- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["laxity", "naive", "nexus", "pard", "clockwork"])
def test_a_lone_request_takes_its_execution_and_the_network(policy: str) -> None:
    """Grant 1 + 0.5 ms, l(1) = 15, results 2."""
    network = Network(control=0.001, per_request=0.0005, response=0.002)
    spec = spec_of(ONE)
    result = run(spec, Cluster(held=own(spec, 1), network=network), [0.5], policy=policy)
    assert result.outcomes["ok"] == 1
    assert result.latency_ms.p50 == pytest.approx(1.5 + 15 + 2)
    assert result.gpu_seconds_busy == pytest.approx(0.015)
    assert result.series.good == [1, 0, 0]
    assert result.stage_visits == 1


def test_a_lone_request_of_a_chain_takes_both_stages() -> None:
    """1 + 15 + 2 and 1 + 23 + 2."""
    spec = spec_of(CHAIN)
    network = Network(control=0.001, response=0.002)
    result = run(spec, Cluster(held=own(spec, 1, 1), network=network), [0.5])
    assert result.latency_ms.p50 == pytest.approx(18 + 26)
    assert result.gpu_seconds_busy == pytest.approx(0.038)
    assert result.split == [1, 1]


def test_a_batch_takes_the_time_of_its_size() -> None:
    """While the first one runs, until 15 ms, two come after 5 and 6: they end together at 15 + l(2) = 40."""
    spec = spec_of(ONE)
    result = run(spec, Cluster(held=own(spec, 1), network=FAST), [0.5, 0.505, 0.506], policy="naive")
    assert np.flatnonzero(result.latencies_ms).tolist() == [15, 34, 35]
    assert result.mean_batch_by_stage == {"only": 1.5}
    assert result.gpu_seconds_busy == pytest.approx(0.040)


def test_two_after_one_another_on_one_gpu() -> None:
    """The second comes 5 ms after the first and waits for its end: 10 + 15 ms. Its grant is there by then."""
    spec = spec_of(ONE)
    result = run(spec, Cluster(held=own(spec, 1), network=FAST), [0.5, 0.505], policy="naive")
    assert sorted(np.flatnonzero(result.latencies_ms)) == [15, 25]
    two = run(spec, Cluster(held=own(spec, 2), network=FAST), [0.5, 0.505], policy="naive")
    assert np.flatnonzero(two.latencies_ms).tolist() == [15]


def test_every_item_of_a_map_stage_is_run() -> None:
    spec = spec_of(MAP)
    result = run(spec, Cluster(held=own(spec, 1, 2)), [0.1 * number for number in range(20)])
    assert result.outcomes["ok"] == 20
    assert result.stage_visits == 20 + 20 * 6


# ---- the same arguments, the same results --------------------------------------------------------


SHAKY: dict[str, Any] = {
    "jitter": 0.2,
    "stragglers": 0.02,
    "network": Network(jitter=0.002, per_request=20e-6),
}


@pytest.mark.parametrize("policy", ["laxity", "pard", "shepherd"])
def test_a_seed_decides(policy: str) -> None:
    spec = spec_of(CHAIN)
    cluster = Cluster(held=own(spec, 3, 2), faults=[Fault(0, 0.7, 1.2)], gpus_per_agent=2, **SHAKY)
    arrivals = poisson(250.0, 3.0)
    once, again, other = (run(spec, cluster, arrivals, policy=policy, seed=seed) for seed in (5, 5, 6))
    assert figures(once) == figures(again)
    assert figures(once) != figures(other)


def test_without_anything_random_the_seed_does_not_matter() -> None:
    spec = spec_of(CHAIN)
    cluster = Cluster(held=own(spec, 3, 2))
    arrivals = poisson(150.0, 3.0)
    one, other = (run(spec, cluster, arrivals, seed=seed) for seed in (1, 2))
    assert one.latencies_ms == other.latencies_ms
    assert one.gpu_seconds_busy == other.gpu_seconds_busy


@pytest.mark.parametrize("what", [{"jitter": 0.2}, {"stragglers": 0.05}, {"network": Network(jitter=0.005)}])
def test_what_is_random_is_seen(what: dict[str, Any]) -> None:
    spec = spec_of(CHAIN)
    arrivals = poisson(150.0, 3.0)
    steady = run(spec, Cluster(held=own(spec, 3, 2)), arrivals)
    shaken = run(spec, Cluster(held=own(spec, 3, 2), **what), arrivals)
    assert shaken.latencies_ms != steady.latencies_ms
    assert figures(run(spec, Cluster(held=own(spec, 3, 2), **what), arrivals)) == figures(shaken)


def test_a_straggler_takes_its_factor() -> None:
    spec = spec_of(ONE)
    result = run(spec, Cluster(held=own(spec, 1), network=FAST, stragglers=1.0, straggler_factor=4.0), [0.5])
    assert result.latency_ms.p50 == pytest.approx(60)


def test_a_batch_that_hangs_is_killed_and_its_gpu_goes_on() -> None:
    """A third of the batches would take 15 s."""
    spec = spec_of(ONE)
    cluster = Cluster(held=own(spec, 1), stragglers=0.3, straggler_factor=1000.0)
    result = run(spec, cluster, [float(second) for second in range(40)], seconds=40.0)
    assert result.outcomes["ok"] > 10
    assert result.outcomes["ok"] < 35
    assert sum(result.series.good[20:]) > 0
    assert result.invalid_rate > 0.0


# ---- all policies --------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [0.7, 1.5])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_ends_everything(policy: str, load: float) -> None:
    spec = load_spec("lv")
    held = own(spec, 4, 1, 1, 1, 1)
    most = capacity(spec, {name: 4 if number == 0 else 1 for number, name in enumerate(spec.stages)})
    result = run(spec, Cluster(held=held, jitter=0.05), poisson(load * most, 3.0), policy=policy)
    assert result.policy == policy
    assert result.capacity_rps == pytest.approx(most)
    assert result.outcomes["ok"] > 0
    assert result.gpu_seconds_busy > 0.0
    assert set(result.outcomes) == {outcome.value for outcome in Outcome}
    if load < 1.0 and policy in ("laxity", "nexus", "pard", "symphony"):
        assert result.outcomes["ok"] > 0.9 * result.submitted


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_ends_everything_of_a_graph_with_lost_hosts_and_delays(policy: str) -> None:
    spec = load_spec("da")
    cluster = Cluster(
        held=own(spec, *[2] * len(spec.stages)),
        gpus_per_agent=3,
        jitter=0.1,
        stragglers=0.01,
        network=Network(control=0.001, per_request=0.0001, response=0.002, jitter=0.001),
        faults=[Fault(0, 0.5, 1.0), Fault(1, 0.8, 1e18), Fault(0, 1.4, 2.0)],
    )
    result = run(spec, cluster, poisson(100.0, 3.0), policy=policy)
    assert result.submitted > 100


def test_an_unknown_policy() -> None:
    spec = spec_of(ONE)
    with pytest.raises(PolicyError, match="unknown policy 'laxative'"):
        simulate([Workload(spec, "laxative", np.array([0.5]))], Cluster(held=own(spec, 1)), seconds=1.0)


def test_a_stage_without_a_profile(user_pipeline: Callable[..., PipelineSpec]) -> None:
    spec = user_pipeline("def model(values):\n    return values\n")
    with pytest.raises(ValueError, match="has no profile"):
        simulate([Workload(spec, "laxity", np.array([0.5]))], Cluster(held=[]), seconds=1.0)


def test_nobody_comes() -> None:
    spec = spec_of(ONE)
    result = run(spec, Cluster(held=own(spec, 1)), [])
    assert result.goodput_rps == result.gpu_seconds_busy == 0.0
    assert result.bound_ratio == 1.0


# ---- lost hosts ----------------------------------------------------------------------------------


def test_nothing_runs_on_a_host_that_is_lost() -> None:
    spec = spec_of(ONE)
    cluster = Cluster(held=own(spec, 1), faults=[Fault(0, 2.0, 5.0)])
    result = run(spec, cluster, [0.02 * number for number in range(400)], seconds=8.0)
    busy = result.series.stages[0].busy
    assert busy[2:5] == [0.0, 0.0, 0.0]
    assert min(busy[0:2] + busy[5:8]) > 0.0
    # The SLO of half a second covers those who come just before it is back.
    assert sum(result.series.good[2:4]) == 0
    assert sum(result.series.good[5:8]) > 100
    assert result.outcomes["unavailable"] > 0


def test_a_host_that_stays_lost() -> None:
    spec = spec_of(ONE)
    result = run(spec, Cluster(held=own(spec, 1), faults=[Fault(0, 1.0, float("inf"))]), poisson(20.0, 3.0))
    assert result.series.good[0] > 0
    assert result.series.good[1:] == [0, 0]


def test_the_requests_of_a_lost_host_are_run_on_another() -> None:
    """One batch after another runs on each of the two hosts; what the lost one was running is run again."""
    spec = spec_of(ONE)
    arrivals = [0.02 * number for number in range(150)]
    whole = run(spec, Cluster(held=own(spec, 2), gpus_per_agent=1), arrivals, policy="nexus")
    assert whole.outcomes["ok"] == 150
    # Load consolidates on the first: it is busy at 1.005.
    faults = [Fault(0, 1.005, 2.0)]
    result = run(spec, Cluster(held=own(spec, 2), gpus_per_agent=1, faults=faults), arrivals, policy="nexus")
    assert result.outcomes["ok"] == 150
    assert result.stage_visits > 150, "some were run twice"
    assert result.gpu_seconds_busy > whole.gpu_seconds_busy


def test_losing_a_host_again_while_it_is_lost_changes_nothing() -> None:
    """It is back for good when it is back first."""
    spec = spec_of(ONE)
    faults = [Fault(0, 1.0, 2.0), Fault(0, 1.5, 2.5)]
    arrivals = poisson(30.0, 4.0)
    once, twice = (
        run(spec, Cluster(held=own(spec, 1), faults=some), arrivals, seconds=4.0) for some in (faults[:1], faults)
    )
    assert figures(once) == figures(twice)


def test_agents_have_so_many_gpus() -> None:
    """A host of two of four GPUs is lost: half is left."""
    spec = spec_of(ONE)
    counts = []
    for each in (1, 2, 4):
        cluster = Cluster(held=own(spec, 4), gpus_per_agent=each, faults=[Fault(0, 0.0, float("inf"))])
        counts.append(run(spec, cluster, poisson(1000.0, 3.0)).outcomes["ok"])
    assert counts[0] > counts[1] > counts[2] == 0


# ---- several pipelines ---------------------------------------------------------------------------


@pytest.mark.parametrize("policies", [("laxity", "laxity"), ("nexus", "symphony"), ("pard", "pard"), ("shepherd",) * 2])
def test_pipelines_share_gpus(policies: tuple[str, str]) -> None:
    specs = [load_spec("lv"), spec_of(CHAIN)]
    keys = [spec.model_key(name) for spec in specs for name in spec.stages]
    most = pool_capacity(specs, [0.5, 0.5], 8)
    arrivals = [poisson(0.4 * most, 3.0, seed) for seed in (1, 2)]
    workloads = [Workload(spec, policy, times) for spec, policy, times in zip(specs, policies, arrivals, strict=True)]
    cluster = Cluster(held=[keys] * 8, network=Network(per_request=20e-6))
    results = simulate(workloads, cluster, seconds=3.0)
    for result, spec, policy, times in zip(results, specs, policies, arrivals, strict=True):
        check(result, len(times))
        assert (result.pipeline, result.policy, result.gpus, result.split) == (spec.name, policy, 8, [])
        assert set(result.drops_by_stage) == set(spec.stages)
        assert result.outcomes["ok"] > 0
    assert sum(result.gpu_seconds_busy for result in results) <= 8 * 3.6
    assert sum(result.capacity_rps for result in results) == pytest.approx(
        pool_capacity(specs, [len(times) / sum(map(len, arrivals)) for times in arrivals], 8)
    )
    assert [figures(one) for one in simulate(workloads, cluster, seconds=3.0)] == [figures(one) for one in results]


def test_a_pipeline_beside_others_on_gpus_of_their_own_is_not_touched_by_them() -> None:
    one, chain = spec_of(ONE), spec_of(CHAIN)
    arrivals = poisson(60.0, 3.0)
    alone = run(one, Cluster(held=own(one, 2)), arrivals)
    cluster = Cluster(held=[*own(one, 2), *own(chain, 1, 1)])
    beside, _ = simulate(
        [Workload(one, "laxity", arrivals), Workload(chain, "laxity", poisson(400.0, 3.0, 2))], cluster, seconds=3.0
    )
    assert beside.outcomes == alone.outcomes


# ---- the network ---------------------------------------------------------------------------------


def test_delays_cost_as_much_as_they_take() -> None:
    spec = spec_of(CHAIN)
    cluster = functools.partial(Cluster, held=own(spec, 2, 2))
    arrivals = [0.2 * number for number in range(15)]
    median = {
        control: run(spec, cluster(network=Network(control=control, response=control)), arrivals).latency_ms.p50
        for control in (0.0, 0.001, 0.005)
    }
    assert median[0.001] - median[0.0] == pytest.approx(4 * 1.0)
    assert median[0.005] - median[0.0] == pytest.approx(4 * 5.0)


def test_what_each_request_adds_to_a_grant_is_learnt() -> None:
    """1 ms a request: without knowing it batches would come too late for their windows again and again."""
    spec = spec_of(CHAIN)
    network = Network(per_request=0.001)
    result = run(spec, Cluster(held=own(spec, 4, 2), network=network), poisson(200.0, 10.0), seconds=10.0)
    assert result.outcomes["ok"] > 0.97 * result.submitted


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("per_request", [0.0, 0.0005, 0.005])
def test_preemption_with_slow_grants(seed: int, per_request: float) -> None:
    """Bursts behind single requests: shepherd stops batches of which some have not even arrived."""
    spec = spec_of(CHAIN)
    burst = [0.0, *[0.004 + 0.0003 * number for number in range(12)]]
    bursts = (0.1 * np.arange(29)[:, None] + burst).ravel()
    network = Network(control=0.002, per_request=per_request, response=0.001, jitter=0.002)
    cluster = Cluster(held=own(spec, 1, 1), network=network, jitter=0.1)
    result = run(spec, cluster, bursts, policy="shepherd", seed=seed)
    assert result.outcomes["ok"] > 0
    assert result.invalid_rate > 0.0, "stopped batches were in vain"
