"""What a pipeline can carry on so many GPUs, by its profiles alone: what loads and bounds are stated in.

A policy may form other batches than the planned ones; these figures do not depend on any policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.graph import Graph
from pipelines.profile import LatencyProfile
from pipelines.spec import PipelineSpec


def profiles_of(spec: PipelineSpec, device_type: str = "") -> dict[str, LatencyProfile]:
    """The profiles, on devices of a type, of the stages that have one."""
    return {
        name: LatencyProfile.from_spec(stage.profile, device_type)
        for name, stage in spec.stages.items()
        if stage.profile is not None
    }


def all_profiles(spec: PipelineSpec) -> dict[str, LatencyProfile]:
    """The profile of each stage. Raises ValueError for a stage without one."""
    for name, stage in spec.stages.items():
        if stage.profile is None:
            raise ValueError(
                f"stage {name!r} of pipeline {spec.name!r} has no profile; "
                "write profile: {alpha_ms: ..., beta_ms: ...}"
            )
    return profiles_of(spec)


def planned_batch(spec: PipelineSpec, profiles: Mapping[str, LatencyProfile] | None = None) -> int:
    """The largest batch size, common to all stages, with which twice the longest path fits into the SLO (one batch runs
    while the next one fills: Nexus' rule, SOSP'19); at least 1. ``profiles``: by stage, the spec's own unless given."""
    profiles = profiles_of(spec) if profiles is None else profiles
    graph = Graph(spec)
    low, high = 1, max((stage.max_batch for stage in spec.stages.values()), default=1)
    while low < high:
        middle = (low + high + 1) // 2
        times = {name: profile.latency(min(middle, spec.stages[name].max_batch)) for name, profile in profiles.items()}
        after = graph.longest_after(times)
        if 2.0 * max(times.get(name, 0.0) + after[name] for name in graph.roots) <= spec.slo:
            low = middle
        else:
            high = middle - 1
    return low


def planned_costs(spec: PipelineSpec) -> dict[str, float]:
    """GPU-seconds that each stage with a profile takes per element in planned batches."""
    batch = planned_batch(spec)
    costs = {}
    for name, profile in profiles_of(spec).items():
        size = min(batch, spec.stages[name].max_batch)
        costs[name] = max(profile.latency(size) / size, 1e-6)
    return costs


def capacity(spec: PipelineSpec, gpus: Mapping[str, int]) -> float:
    """Requests per second that the bottleneck stage can run in planned batches, ``gpus`` being each stage's own. Raises
    ValueError for a stage without a profile."""
    all_profiles(spec)
    return min(gpus[name] / cost for name, cost in planned_costs(spec).items())


def pool_capacity(specs: Sequence[PipelineSpec], shares: Sequence[float], gpus: int) -> float:
    """Requests per second of all ``specs`` together on GPUs that serve every stage, ``shares`` being the parts of the
    requests that are each one's (they add up to 1)."""
    work = sum(share * sum(planned_costs(spec).values()) for spec, share in zip(specs, shares, strict=True))
    return gpus / work
