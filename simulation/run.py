"""Simulates pipelines on a cluster of GPUs in virtual time, with the engines that run in production."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from broker.plans import build_pipeline
from laxity.payload import encode
from nodes.emulated import EmulatedModel
from pipelines.capacity import all_profiles, capacity, planned_costs, pool_capacity
from pipelines.graph import Graph
from pipelines.spec import PipelineSpec
from simulation.autoscale import Autoscale, Autoscaler
from simulation.gpu import Delays, Gpu
from simulation.machine import Machine
from simulation.metrics import fluid_bound, latency, rates
from simulation.record import PipelineRecord, Record
from simulation.results import RunResult, Series, StageSeries


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that messages between shard and agents take."""

    control: float = 100e-6
    """Any message, one way."""
    per_request: float = 0.0
    """Beside it, a grant, for each of its requests."""
    response: float = 100e-6
    """A batch's results on their way back."""
    jitter: float = 0.0
    """Up to so much more for each message, drawn evenly."""


class Fault(msgspec.Struct, frozen=True):
    """An agent (one GPU host) that is lost at ``at`` and back at ``back`` (seconds; inf: never)."""

    agent: int
    at: float
    back: float


class Workload(msgspec.Struct, frozen=True):
    """One pipeline, its policy (NAME or NAME:parameter=value,...) and its arrivals in seconds from 0, ascending."""

    spec: PipelineSpec
    policy: str
    arrivals: Any  # npt.NDArray[np.float64]; msgspec has no numpy types


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """The GPUs and how they behave."""

    held: Sequence[Sequence[str]]
    """The model keys (``spec.model_key(stage)``) that each GPU holds; what bounds are reckoned by where the GPUs are
    scaled and hold what the scaler says."""
    gpus_per_agent: int = 8
    jitter: float = 0.0
    """Standard deviation of the logarithm of execution times."""
    stragglers: float = 0.0
    """The part of batches that take ``straggler_factor`` times as long."""
    straggler_factor: float = 5.0
    network: Network = Network()
    faults: Sequence[Fault] = ()
    autoscale: Autoscale | None = None


def simulate(
    workloads: Sequence[Workload],
    cluster: Cluster,
    *,
    seconds: float,
    seed: int = 1,
    trace: str = "",
    progress: Callable[[float], None] | None = None,
    control: Callable[[float, Machine], None] | None = None,
) -> list[RunResult]:
    """Run ``seconds`` of arrivals, then until every request has ended; one result a workload, in order.

    ``control`` is called with the time and the machine after each second; where the GPUs are scaled
    (``Cluster.autoscale``) it must leave the shard's reports to the scaler. Those GPUs begin with what the rate of the
    first second asks for. The same arguments give the same results. ``progress`` is called now and then with the part
    (0 to 1) that is done. Raises ValueError for a stage without a profile and
    :class:`pipelines.policies.PolicyError`.
    """
    started = time.perf_counter()
    whole = max(math.ceil(seconds), 1)
    pipelines, records, answers, places = [], [], {}, {}
    for which, workload in enumerate(workloads):
        spec = workload.spec
        pipelines.append(build_pipeline(spec, workload.policy))
        records.append(PipelineRecord(list(Graph(spec).order), whole))
        for name in spec.stages:
            answers[spec.model_key(name)] = EmulatedModel(spec, name).answer(encode(None))
            places[spec.model_key(name)] = (which, name)
    record = Record(records, places, whole)
    network = cluster.network
    machine = Machine(
        pipelines,
        _gpus(workloads, cluster),
        answers,
        Delays(network.control, network.per_request, network.response, network.jitter),
        cluster.jitter,
        cluster.stragglers,
        cluster.straggler_factor,
        seed,
        record,
    )
    scaler = None
    if cluster.autoscale is not None:
        scaler = Autoscaler(cluster.autoscale, [workload.spec for workload in workloads], machine, record)
        first = min(seconds, 1.0)
        scaler.begin([int(np.searchsorted(workload.arrivals, first)) / first for workload in workloads])
    for fault in cluster.faults:
        machine.lose(f"agent-{fault.agent}", fault.at, fault.back)
    times = np.concatenate([workload.arrivals for workload in workloads])
    which_of = np.repeat(np.arange(len(workloads)), [len(workload.arrivals) for workload in workloads])
    order = np.argsort(times, kind="stable")
    arrivals, which_of = times[order].tolist(), which_of[order].tolist()
    payload = encode(None)
    for second in range(whole):
        machine.run(arrivals, which_of, payload, float(second + 1))
        if control is not None:
            control(float(second + 1), machine)
        if scaler is not None:
            scaler.step(float(second + 1), seconds)
        if progress is not None:
            progress((second + 1) / whole)
    machine.run(arrivals, which_of, payload, math.inf)
    wall = time.perf_counter() - started
    capacities = _capacities(workloads, cluster)
    results = [
        _result(workload, pipeline, cluster, most, seconds, seed, trace, wall)
        for workload, pipeline, most in zip(workloads, records, capacities, strict=True)
    ]
    return results if scaler is None else [_scaled(result, scaler, machine) for result in results]


def _scaled(result: RunResult, scaler: Autoscaler, machine: Machine) -> RunResult:
    return msgspec.structs.replace(
        result,
        scaler=scaler.name,
        gpu_seconds_allocated=math.fsum(scaler.allocated),
        moves=scaler.moves,
        moves_per_hour=scaler.moves * 3600.0 / result.seconds,
        loads=sum([gpu.loads_begun for gpu in machine.gpus]),
        gpu_seconds_loading=math.fsum([gpu.spent_loading for gpu in machine.gpus]),
        series=msgspec.structs.replace(result.series, allocated=scaler.allocated),
    )


def _capacities(workloads: Sequence[Workload], cluster: Cluster) -> list[float]:
    """What each pipeline's GPUs carry in planned batches; of GPUs that serve several stages a pipeline has the part
    that is its part of the requests."""
    if not any(len(held) > 1 for held in cluster.held):
        return [capacity(workload.spec, _gpus_by_stage(workload, cluster)) for workload in workloads]
    total = sum(len(workload.arrivals) for workload in workloads)
    shares = [len(workload.arrivals) / total if total else 1.0 / len(workloads) for workload in workloads]
    pooled = pool_capacity([workload.spec for workload in workloads], shares, len(cluster.held))
    return [pooled * share for share in shares]


def _gpus_by_stage(workload: Workload, cluster: Cluster) -> dict[str, int]:
    spec = workload.spec
    return {name: sum(spec.model_key(name) in held for held in cluster.held) for name in Graph(spec).order}


def _gpus(workloads: Sequence[Workload], cluster: Cluster) -> list[Gpu]:
    seconds: dict[str, list[float]] = {}
    for workload in workloads:
        for name, profile in all_profiles(workload.spec).items():
            largest = workload.spec.stages[name].max_batch
            seconds[workload.spec.model_key(name)] = [0.0, *(profile.latency(b) for b in range(1, largest + 1))]
    each = cluster.gpus_per_agent
    return [
        Gpu(f"agent-{index // each}", index % each, seconds, list(keys) if cluster.autoscale is None else [])
        for index, keys in enumerate(cluster.held)
    ]


def _result(
    workload: Workload,
    record: PipelineRecord,
    cluster: Cluster,
    most: float,
    seconds: float,
    seed: int,
    trace: str,
    wall: float,
) -> RunResult:
    spec = workload.spec
    names = list(record.stages)
    pooled = any(len(held) > 1 for held in cluster.held)
    offered, bound = fluid_bound(workload.arrivals, seconds, most)
    submitted, good = int(offered.sum()), sum(record.good)
    figures = rates(submitted, good, float(bound.sum()), seconds)
    elements = {name: sum(stage.elements) for name, stage in record.stages.items()}
    batches = {name: sum(stage.batches) for name, stage in record.stages.items()}
    latencies = np.array(record.latencies)
    histogram = np.bincount((latencies * 1e3).astype(int)) if good else np.zeros(0, dtype=int)
    return RunResult(
        policy=workload.policy,
        pipeline=spec.name,
        trace=trace,
        seed=seed,
        gpus=len(cluster.held),
        split=[] if pooled else list(_gpus_by_stage(workload, cluster).values()),
        seconds=seconds,
        capacity_rps=most,
        submitted=submitted,
        **figures._asdict(),
        outcomes=record.outcomes,
        invalid_rate=_ratio(record.invalid, record.busy),
        gpu_seconds_busy=record.busy,
        gpu_seconds_allocated=len(cluster.held) * seconds,
        gpu_seconds_floor=good * sum(planned_costs(spec).values()),
        mean_batch=_ratio(sum(elements.values()), sum(batches.values())),
        mean_batch_by_stage={name: _ratio(elements[name], batches[name]) for name in names},
        latency_ms=latency(latencies),
        drops_by_stage={name: sum(stage.dropped) for name, stage in record.stages.items()},
        latencies_ms=histogram.tolist(),
        series=Series(
            offered=offered.tolist(),
            good=record.good,
            bound=bound.tolist(),
            stages=[
                StageSeries(
                    name=name,
                    dropped=stage.dropped,
                    queued_ms=[1e3 * _ratio(w, n) for w, n in zip(stage.waited, stage.elements, strict=True)],
                    batch=[_ratio(n, b) for n, b in zip(stage.elements, stage.batches, strict=True)],
                    busy=stage.busy,
                )
                for name, stage in record.stages.items()
            ],
        ),
        wall_seconds=wall,
        stage_visits=sum(elements.values()),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
