"""What a model costs on a device of a type: throughput, its part of the SLO, loading and memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cluster.planner.view import Footprint
from pipelines.capacity import planned_batch
from pipelines.graph import Graph
from pipelines.profile import LatencyProfile
from pipelines.spec import PipelineSpec

UNKNOWN_RATE = 1e9
"""Elements per second of a model that nobody has measured yet."""

Measured = Mapping[tuple[str, str], list[tuple[int, float]]]
"""(batch, seconds) by (model key, device type)."""
Footprints = Mapping[tuple[str, str], Footprint]
"""Likewise."""


class StageCost:
    """One model on one type of device. ``rate``: elements per second at the best batch within the plan; ``part``: what
    of the SLO is the stage's, in seconds; ``largest``: its largest batch; ``load``: seconds to load; ``page``: those to
    bring it from the host's memory onto the device; ``memory``: megabytes; ``known``: whether anybody has said or
    measured how long it takes; ``usable``: whether a request can meet its SLO at all if this type runs the stage."""

    __slots__ = ("_latencies", "_profile", "known", "largest", "load", "memory", "page", "part", "rate", "usable")

    def __init__(
        self,
        profile: LatencyProfile | None,
        batch: int,
        largest: int,
        part: float,
        load: float,
        page: float,
        memory: float,
        usable: bool,
    ) -> None:
        self._profile = profile
        self._latencies: dict[int, float] = {}
        self.known = profile is not None
        self.largest = largest
        self.part = part
        self.load = load
        self.page = page
        self.memory = memory
        self.usable = usable
        self.rate = UNKNOWN_RATE
        if profile is not None:
            sizes = {*range(1, min(batch, 8) + 1), *(size for size, _ in profile.pairs() if size <= batch), batch}
            self.rate = min(UNKNOWN_RATE, max(size / max(profile.latency(size), 1e-9) for size in sizes))

    def latency(self, batch: int) -> float:
        """Seconds for a batch; 0 where nothing is known."""
        seconds = self._latencies.get(batch)
        if seconds is None:
            seconds = 0.0 if self._profile is None else self._profile.latency(min(batch, self.largest))
            self._latencies[batch] = seconds
        return seconds


class Costs:
    """The costs of every stage of the specs that it has been told of; what does not change is kept."""

    def __init__(self, load_seconds: float) -> None:
        self._load_seconds = load_seconds
        self._known: dict[
            int, tuple[PipelineSpec, frozenset[str], object, object, dict[tuple[str, str], StageCost]]
        ] = {}
        self._versions: dict[int, tuple[PipelineSpec, str]] = {}

    def version(self, spec: PipelineSpec) -> str:
        """The spec's version, reckoned once for each object."""
        known = self._versions.get(id(spec))
        if known is None:
            known = self._versions[id(spec)] = (spec, spec.version)
        return known[1]

    def keep(self, specs: Iterable[PipelineSpec]) -> None:
        """Forget all other specs."""
        ids = {id(spec) for spec in specs}
        self._known = {key: value for key, value in self._known.items() if key in ids}
        self._versions = {key: value for key, value in self._versions.items() if key in ids}

    def of(
        self, spec: PipelineSpec, types: frozenset[str], measured: Measured, footprints: Footprints
    ) -> dict[tuple[str, str], StageCost]:
        """By (stage, device type)."""
        version = f"{spec.name}@{self.version(spec)}"
        pairs = [(name, kind) for name in spec.stages for kind in types]
        own = {(name, kind): points for name, kind in pairs if (points := measured.get((f"{version}/{name}", kind)))}
        prints = {(name, kind): found for name, kind in pairs if (found := footprints.get((f"{version}/{name}", kind)))}
        known = self._known.get(id(spec))
        if known is not None and known[1:4] == (types, own, prints):
            return known[4]
        costs = self._reckon(spec, types, own, prints)
        self._known[id(spec)] = (spec, types, own, prints, costs)
        return costs

    def _reckon(
        self, spec: PipelineSpec, types: frozenset[str], measured: Measured, footprints: Footprints
    ) -> dict[tuple[str, str], StageCost]:
        """``measured`` and ``footprints`` by (stage, device type)."""
        graph = Graph(spec)
        profiles = {kind: _profiles(spec, kind, measured) for kind in types}
        fastest = {
            name: min(table[name].latency(1) for table in profiles.values() if name in table)
            for name in spec.stages
            if any(name in table for table in profiles.values())
        }
        through = _through(graph, fastest)
        costs: dict[tuple[str, str], StageCost] = {}
        for kind, table in profiles.items():
            batch = planned_batch(spec, table)
            times = {name: profile.latency(min(batch, spec.stages[name].max_batch)) for name, profile in table.items()}
            longest = _through(graph, times)
            for name, stage in spec.stages.items():
                stated = stage.profile.on(kind) if stage.profile is not None else None
                load = self._load_seconds if stated is None or stated.load_ms is None else stated.load_ms / 1e3
                found = footprints.get((name, kind), Footprint(load, 0.0))
                share = times.get(name, 0.0) / longest[name] if longest[name] > 0.0 else 1.0
                slower = table[name].latency(1) - fastest[name] if name in table else 0.0
                costs[name, kind] = StageCost(
                    table.get(name),
                    min(batch, stage.max_batch),
                    stage.max_batch,
                    spec.slo * share,
                    load,
                    found.page_seconds if stated is None or stated.load_ms is None else load,
                    found.memory_mb if stated is None or stated.memory_mb is None else stated.memory_mb,
                    through[name] + slower <= spec.slo,
                )
        for name in spec.stages:
            if not any(costs[name, kind].usable for kind in types):
                for kind in types:
                    costs[name, kind].usable = True  # better late than not at all
        return costs


def _profiles(
    spec: PipelineSpec, kind: str, measured: Mapping[tuple[str, str], list[tuple[int, float]]]
) -> dict[str, LatencyProfile]:
    """By stage. An emulated stage is what its profile says; of others the measured one is the better, and that of
    another type better than none."""
    profiles: dict[str, LatencyProfile] = {}
    for name, stage in spec.stages.items():
        points = measured.get((name, kind))
        if stage.executor != "emulated" and points:
            profiles[name] = LatencyProfile(points)
        elif stage.profile is not None:
            profiles[name] = LatencyProfile.from_spec(stage.profile, kind)
        else:
            others = sorted((other, points) for (stage_name, other), points in measured.items() if stage_name == name)
            if others:
                profiles[name] = LatencyProfile(others[0][1])
    return profiles


def _through(graph: Graph, times: Mapping[str, float]) -> dict[str, float]:
    """For each stage, the longest sum of ``times`` along a path through it."""
    after = graph.longest_after(times)
    before: dict[str, float] = {}
    for name in graph.order:
        before[name] = max((before[parent] + times.get(parent, 0.0) for parent in graph.parents[name]), default=0.0)
    return {name: before[name] + times.get(name, 0.0) + after[name] for name in graph.order}
