"""What a simulated run comes out as: the figures that are printed, and the series that are plotted."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Latency(msgspec.Struct, frozen=True):
    """Milliseconds from arrival to answer of the requests that were good."""

    p50: float
    p99: float
    p999: float


class StageSeries(msgspec.Struct, frozen=True):
    """One stage, second by second (each list has one entry a second of the run)."""

    name: str
    dropped: list[int]
    """Requests dropped or expired there."""
    queued_ms: list[float]
    """Mean wait of the elements granted in that second; 0 where there were none."""
    batch: list[float]
    """Mean batch granted in that second; 0 where there was none."""
    busy: list[float]
    """GPU-seconds that its batches ran."""


class Series(msgspec.Struct, frozen=True):
    """The run, second by second: requests by the second of their arrival."""

    offered: list[int]
    good: list[int]
    bound: list[float]
    """min(offered, capacity)."""
    stages: list[StageSeries]
    allocated: list[float] = []
    """GPU-seconds that were allocated, of the whole cluster; empty where the GPUs were not scaled."""


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """One pipeline under one policy and trace. Rates are per second of the run's ``seconds``; requests count as good
    (``ok``) when they were answered within their SLO. See PARD (EuroSys'26, section 5) for the metrics."""

    policy: str
    pipeline: str
    trace: str
    seed: int
    gpus: int
    split: list[int]
    """GPUs of each stage, in the order of ``drops_by_stage``; empty where every GPU serves every stage."""
    seconds: float
    capacity_rps: float
    """What the bottleneck stage carries in planned batches."""
    offered_rps: float
    submitted: int
    outcomes: dict[str, int]
    """Requests by outcome."""
    goodput_rps: float
    bound_rps: float
    """The fluid bound: Σ min(offered, capacity) over the seconds."""
    bound_ratio: float
    """Goodput / bound."""
    drop_rate: float
    """Requests that were not good / submitted."""
    avoidable_drop_rate: float
    """The part of the drop rate above what the fluid bound leaves."""
    invalid_rate: float
    """GPU time spent on requests that were not good / all GPU time of the pipeline."""
    gpu_seconds_busy: float
    gpu_seconds_allocated: float
    """GPUs × seconds; where they were scaled, those seconds alone in which a GPU held or was loading something."""
    scaler: str = ""
    """What scaled the GPUs, if anything did: ``planner`` or ``reactive``. What follows is the whole cluster's."""
    moves: int = 0
    """Changes of what a GPU was to hold, after the first placement."""
    moves_per_hour: float = 0.0
    loads: int = 0
    """Models that were loaded by these moves."""
    gpu_seconds_loading: float = 0.0
    """What these loads took."""
    gpu_seconds_floor: float
    """Good requests × Σ l(b)/b over the stages, with planned batches: the busy time that those would take."""
    mean_batch: float
    mean_batch_by_stage: dict[str, float]
    latency_ms: Latency
    drops_by_stage: dict[str, int]
    """Requests that were dropped or expired, by stage; all stages are there, in topological order."""
    latencies_ms: list[int]
    """How many good requests took so many whole milliseconds, by milliseconds from 0."""
    series: Series
    wall_seconds: float
    stage_visits: int
    """Elements that stages ran: what the simulation's own speed is told by."""


def public(result: RunResult) -> dict[str, object]:
    """What ``--json`` prints: everything but the series and the histogram."""
    plain: dict[str, object] = msgspec.to_builtins(result)
    del plain["series"], plain["latencies_ms"]
    return plain


def alike(results: Sequence[RunResult]) -> list[list[RunResult]]:
    """The runs that can be compared with one another, together: those of one pipeline, load and division of GPUs."""
    groups: dict[tuple[object, ...], list[RunResult]] = {}
    for result in results:
        same = (result.pipeline, result.trace, result.seed, result.submitted, result.gpus, *result.split)
        groups.setdefault(same, []).append(result)
    return list(groups.values())
