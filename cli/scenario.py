"""What a command line asks to be simulated: pipelines, their arrivals, and the GPUs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from cluster.placement import PlacementError, check_split, dedicate, split_gpus
from pipelines import PipelineSpec
from pipelines.capacity import all_profiles, capacity, planned_costs, pool_capacity
from pipelines.policies import POLICIES, parse_policy
from simulation.arrivals import Source, TraceError
from simulation.metrics import Floats
from simulation.run import Fault

T = TypeVar("T")
D = TypeVar("D")


class ScenarioError(ValueError):
    """Something asked for does not fit the rest; the text says what to do."""


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """How many GPUs; either every one serves every stage (``pool``), or each stage has its own: ``split`` of them, in
    the order of the pipelines and their stages, or (None) divided max-min."""

    gpus: int
    split: Sequence[int] | None = None
    pool: bool = False


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """One pipeline and its arrivals: a mean of ``rate`` requests per second, or of ``load`` times what it can carry."""

    spec: PipelineSpec
    source: Source
    load: float | None = None
    rate: float | None = None


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """What one run simulates under any policy; ``specs``, ``traces`` and ``arrivals`` have one entry a pipeline."""

    specs: list[PipelineSpec]
    traces: list[str]
    arrivals: list[Floats]
    held: list[list[str]]
    """The model keys that each GPU holds."""
    seconds: float


def build_scenario(demands: Sequence[Demand], hardware: Hardware, seed: int) -> Scenario:
    """Divide the GPUs, turn loads into rates, and draw the arrivals.

    Without ``split``, GPUs are divided so that all pipelines can carry their ``rate``, or, where loads are given, the
    same rate. A load is a part of what the pipeline's own GPUs carry; of a pool's capacity, at equal rates, each
    pipeline is reckoned an equal part. Raises :class:`ScenarioError`, :class:`simulation.arrivals.TraceError`,
    :class:`cluster.placement.PlacementError`, and ValueError for a stage without a profile.
    """
    lengths = {demand.source.length for demand in demands}
    if len(lengths) > 1:
        told = " and ".join(f"{length:g} s" for length in sorted(lengths))
        raise ScenarioError(
            f"the pipelines' arrivals last {told}, but a run has one length: give --duration, or a --window for each"
        )
    specs = [demand.spec for demand in demands]
    if hardware.pool:
        held = [[spec.model_key(stage) for spec in specs for stage in spec.stages] for _ in range(hardware.gpus)]
        total = pool_capacity(specs, [1 / len(specs)] * len(specs), hardware.gpus)
        carried = [total / len(specs)] * len(specs)
    else:
        counts = _divide(demands, hardware)
        held = dedicate(counts)
        carried = [capacity(spec, {stage: counts[spec.model_key(stage)] for stage in spec.stages}) for spec in specs]
    arrivals = [
        _arrivals(demand, carries, seed if which == 0 else (seed, which))
        for which, (demand, carries) in enumerate(zip(demands, carried, strict=True))
    ]
    return Scenario(
        specs=specs,
        traces=[demand.source.name for demand in demands],
        arrivals=arrivals,
        held=held,
        seconds=lengths.pop(),
    )


def _divide(demands: Sequence[Demand], hardware: Hardware) -> dict[str, int]:
    """GPUs by model key."""
    costs: dict[str, float] = {}
    stages: list[str] = []
    for demand in demands:
        all_profiles(demand.spec)
        for stage, cost in planned_costs(demand.spec).items():
            costs[demand.spec.model_key(stage)] = cost * (demand.rate if demand.rate is not None else 1.0)
            stages.append(stage if len(demands) == 1 else f"{demand.spec.name}.{stage}")
    if hardware.split is not None:
        counts = check_split(stages, hardware.split, hardware.gpus)
        return dict(zip(costs, counts.values(), strict=True))
    if hardware.gpus < len(costs):
        raise PlacementError(
            f"{hardware.gpus} GPUs cannot be divided over {len(costs)} stages; give more, or let every GPU serve every "
            "stage with --pool"
        )
    return split_gpus(costs, hardware.gpus)


def _arrivals(demand: Demand, carried: float, seed: int | Sequence[int]) -> Floats:
    rate = demand.rate
    if rate is None:
        assert demand.load is not None
        rate = demand.load * carried
    arrivals = demand.source.draw(rate, seed)
    if not len(arrivals):
        raise TraceError(
            f"no request falls into {demand.source.length:g} s at {rate:g} per second: raise the rate or take longer"
        )
    return arrivals


def one_each(values: Sequence[T], count: int, option: str, what: str, default: D) -> list[T | D]:
    """``count`` values of an option that was given once for all ``what``, once for each, or not at all."""
    if len(values) not in (0, 1, count):
        raise ScenarioError(
            f"{option} is given {len(values)} times for {count} {what}: give it once for all, or once for each"
        )
    return list(values) if len(values) == count else [values[0] if values else default] * count


def parse_policies(text: str) -> list[str]:
    """['laxity', 'pard:lambda=0.1,history=3'] of 'laxity,pard:lambda=0.1,history=3'; ``all`` stands for ``laxity`` and
    its peers, ``ablations`` for ``pard`` and its variants. Raises :class:`pipelines.policies.PolicyError`."""
    names: list[str] = []
    for part in text.split(","):
        if "=" in part and ":" not in part and names:
            names[-1] += f",{part}"
        elif part == "all":
            names += [name for name in POLICIES if not name.startswith("pard-")]
        elif part == "ablations":
            names += [name for name in POLICIES if name.startswith("pard")]
        else:
            names.append(part)
    for name in names:
        parse_policy(name)
    return names


def parse_loss(text: str, agents: int) -> Fault:
    """The loss of host 2 from second 10 to 20 of '2@10:20'; without ':20' it does not come back."""
    host, _, times = text.partition("@")
    at, colon, back = times.partition(":")
    try:
        fault = Fault(int(host), float(at), float(back) if colon else math.inf)
    except ValueError:
        fault = Fault(-1, math.nan, math.nan)
    if not (fault.agent >= 0 and 0 <= fault.at < fault.back):
        raise ScenarioError(f"a loss is HOST@SECOND or HOST@SECOND:BACK, as in 2@10:20, not {text!r}")
    if fault.agent >= agents:
        raise ScenarioError(f"there is no host {fault.agent} to lose: the GPUs are on hosts 0 to {agents - 1}")
    return fault
