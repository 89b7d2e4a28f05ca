"""What a load came to: the figures that are printed and the series that are plotted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from cli.load.tally import Series, StepTally, Tally
from cli.load.traffic import Kind
from cli.quantiles import Quantiles
from laxity.outcomes import Outcome
from simulation.metrics import Floats, fluid_bound, rates

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p999": 99.9}
_CURVE = tuple(1.0 - 10.0 ** (-step / 20.0) for step in range(101))
"""Parts of the requests at which the distribution is told: from 0 to 99.999 %, evenly on a scale of nines."""


class Ends(msgspec.Struct, frozen=True):
    """Requests that were not good: where and how they ended, and what was said of the first."""

    stage: str
    outcome: str
    requests: int
    first: str


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that are told of together. ``offered`` are all that were due, ``submitted`` those that were sent; rates
    are per second of the step's measured seconds. Latencies are of good requests, 0 where there are none."""

    pipeline: str
    slo: float | None = None
    priority: int | None = None
    offered: int
    submitted: int
    unsent: int
    outcomes: dict[str, int]
    offered_rps: float
    goodput_rps: float
    drop_rate: float
    """Requests that were not good / offered."""
    slo_attainment: float
    """Good requests / offered."""
    latency_ms: dict[str, float]
    drops_by_stage: dict[str, int]
    """Requests that were dropped or expired, by stage; all stages are there, as far as they are known."""
    ends: list[Ends]


class Demand(msgspec.Struct, frozen=True):
    """What a step asks for: its name, and one of a mean rate (with its part of the capacity, where that was asked for)
    and a concurrency; neither for recorded traffic."""

    label: str
    rate: float | None = None
    load: float | None = None
    concurrency: int | None = None


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """One step."""

    demand: Demand
    seconds: float
    """Those measured."""
    total: Figures
    pipelines: list[Figures]
    kinds: list[Figures]
    """By pipeline, SLO and priority; empty where that says no more than ``pipelines``."""
    capacity_rps: float | None
    bound_rps: float | None
    bound_ratio: float | None
    avoidable_drop_rate: float | None
    lag_ms: dict[str, float]
    steady: bool | None
    """None where a fixed time was measured."""
    interrupted: bool
    series: Series
    curve: list[tuple[float, float]]
    """(part of the good requests, ms that they took at most)."""


class Measured(msgspec.Struct, frozen=True):
    """What of a step is to be told: intervals [first, last) of its tally, so many seconds in all, from ``begin`` on."""

    first: int
    last: int | None
    begin: float
    seconds: float
    steady: bool | None
    interrupted: bool


def step_result(
    demand: Demand,
    kinds: Sequence[Kind],
    tally: StepTally,
    measured: Measured,
    percentile: float,
    stages: Mapping[str, Sequence[str]],
    arrivals: Floats | None,
    carried: float | None,
) -> StepResult:
    """The figures of a step. ``stages`` are each pipeline's, in order; ``arrivals`` (open loop) and ``carried``
    (requests per second) give the fluid bound where they are known."""
    by_kind = tally.of_intervals(measured.first, measured.last)
    seconds = measured.seconds
    names = list(dict.fromkeys(kind.pipeline for kind in kinds))
    whole = Tally()
    pipelines = []
    for name in names:
        together = Tally()
        for kind, part in zip(kinds, by_kind, strict=True):
            if kind.pipeline == name:
                together.merge(part)
        pipelines.append(_figures(together, seconds, percentile, stages.get(name, ()), pipeline=name))
        whole.merge(together, f"{name}/" if len(names) > 1 else "")
    of_kinds = [
        _figures(part, seconds, percentile, stages.get(kind.pipeline, ()), kind.pipeline, kind.slo, kind.priority)
        for kind, part in zip(kinds, by_kind, strict=True)
    ]
    order = [f"{name}/{stage}" if len(names) > 1 else stage for name in names for stage in stages.get(name, ())]
    total = _figures(whole, seconds, percentile, order, pipeline=", ".join(names))
    bound = None
    if arrivals is not None and carried is not None:
        due = arrivals[(arrivals >= measured.begin) & (arrivals < measured.begin + seconds)] - measured.begin
        bound = rates(
            total.offered, whole.outcomes[Outcome.OK], float(fluid_bound(due, seconds, carried)[1].sum()), seconds
        )
    return StepResult(
        demand=demand,
        seconds=seconds,
        total=total,
        pipelines=pipelines,
        kinds=of_kinds if len(kinds) > len(names) else [],
        capacity_rps=carried,
        bound_rps=bound and bound.bound_rps,
        bound_ratio=bound and bound.bound_ratio,
        avoidable_drop_rate=bound and bound.avoidable_drop_rate,
        lag_ms={
            "p50": _ms(tally.lag, 0.5),
            "p99": _ms(tally.lag, 0.99),
            "max": tally.lag.most / 1e3,
        },
        steady=measured.steady,
        interrupted=measured.interrupted,
        series=tally.series,
        curve=[(part, _ms(whole.latency, part)) for part in _CURVE] if whole.latency.count else [],
    )


def judged_ms(tallies: Sequence[Tally], percentile: float) -> float:
    """The latency, in milliseconds, at the percentile by which a load is judged."""
    together = Quantiles()
    for tally in tallies:
        together.merge(tally.latency)
    return _ms(together, percentile / 100.0)


def public(result: StepResult) -> dict[str, object]:
    """What ``--json`` prints of a step: everything but the series and the curve."""
    plain: dict[str, object] = msgspec.to_builtins(result.demand)
    total: dict[str, object] = msgspec.to_builtins(result.total)
    for name in ("pipeline", "slo", "priority"):
        del total[name]
    rest = {
        name: msgspec.to_builtins(getattr(result, name))
        for name in result.__struct_fields__
        if name not in ("demand", "total", "series", "curve")
    }
    return {**plain, **total, **rest}


def _figures(
    tally: Tally,
    seconds: float,
    percentile: float,
    stages: Sequence[str],
    pipeline: str,
    slo: float | None = None,
    priority: int | None = None,
) -> Figures:
    good = tally.outcomes[Outcome.OK]
    found = rates(tally.offered, good, 0.0, seconds)
    ends = [
        Ends(stage, str(outcome), end.count, end.detail)
        for (stage, outcome), end in sorted(tally.ends.items(), key=lambda item: -item[1].count)
    ]
    drops = dict.fromkeys(stages, 0)
    for end in ends:
        if end.stage and end.outcome in (Outcome.DROPPED, Outcome.EXPIRED):
            drops[end.stage] = drops.get(end.stage, 0) + end.requests
    latency = {name: _ms(tally.latency, part / 100.0) for name, part in PERCENTILES.items()}
    return Figures(
        pipeline=pipeline,
        slo=slo,
        priority=priority,
        offered=tally.offered,
        submitted=tally.submitted,
        unsent=tally.unsent,
        outcomes={str(outcome): count for outcome, count in tally.outcomes.items()},
        offered_rps=found.offered_rps,
        goodput_rps=found.goodput_rps,
        drop_rate=found.drop_rate,
        slo_attainment=1.0 - found.drop_rate,
        latency_ms=latency | {"max": tally.latency.most / 1e3, "judged": _ms(tally.latency, percentile / 100.0)},
        drops_by_stage=drops,
        ends=ends,
    )


def _ms(latencies: Quantiles, part: float) -> float:
    return (latencies.quantile(part) or 0.0) / 1e3
