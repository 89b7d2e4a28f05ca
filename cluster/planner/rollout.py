"""Versions of pipelines: which models lie on a device for the units it works for, and which version is served."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cluster.planner.costs import Costs
from cluster.planner.fleet import Slot, Unit, UnitId
from cluster.planner.view import ClusterView, Served
from pipelines.spec import PipelineSpec

WEIGHT_STEP = 0.02
"""Shards' parts of the requests are changed when one of them is off by more than this."""


class Rollout:
    """One pipeline: ``base`` is what is served (or is to be, where nothing is yet), ``new`` what is to follow it."""

    __slots__ = ("base", "base_version", "name", "new", "new_version", "served")

    def __init__(self, name: str, wanted: PipelineSpec, served: Served | None, costs: Costs) -> None:
        self.name = name
        self.served = served
        self.base = wanted if served is None else served.spec
        self.base_version = costs.version(self.base)
        self.new: PipelineSpec | None = None
        self.new_version = costs.version(wanted)
        if self.new_version != self.base_version:
            self.new = wanted

    def stages(self) -> list[str]:
        """The stages of both versions."""
        return list(dict.fromkeys([*self.base.stages, *(self.new.stages if self.new is not None else ())]))

    def spec_of(self, stage: str) -> PipelineSpec:
        """The version whose costs count for a stage."""
        return self.base if stage in self.base.stages or self.new is None else self.new

    def base_key(self, stage: str) -> str | None:
        """The model of a stage that is served or is to be served first."""
        return f"{self.name}@{self.base_version}/{stage}" if stage in self.base.stages else None

    def new_key(self, stage: str) -> str | None:
        """The model of a stage in the version to come."""
        if self.new is None or stage not in self.new.stages:
            return None
        return f"{self.name}@{self.new_version}/{stage}"

    def keys(self, stage: str) -> list[str]:
        """The models of a stage, the one that is served first."""
        return [key for key in (self.base_key(stage), self.new_key(stage)) if key is not None]


def ready_capacity(unit: Unit, key: str, view: ClusterView, slots: Iterable[Slot]) -> float:
    """Elements per second that the devices which hold a model ready can run."""
    return sum(unit.costs[slot.kind].rate for slot in slots if key in view.nodes[slot.id[0]].devices[slot.id[1]].ready)


def serve(
    rollout: Rollout, shards: Mapping[str, float], units: Mapping[UnitId, Unit], view: ClusterView
) -> tuple[Served | None, str]:
    """What is to be served of a pipeline, and what keeps the new version from it ('' if nothing does)."""
    why = ""
    if rollout.new is not None:
        parts: dict[str, float] = {}
        for shard in shards:
            part, why = _part(rollout, rollout.new, shard, units, view, enough=True)
            if why:
                break
            parts[shard] = part
        if not why:
            return Served(rollout.new, _weights(parts, {})), ""
    parts = {}
    present = rollout.served.shards if rollout.served is not None else {}
    for shard in dict.fromkeys([*shards, *present]):
        if shard in view.shards:
            part, _ = _part(rollout, rollout.base, shard, units, view, enough=False)
            if part > 0.0 and shard in shards:
                parts[shard] = part
    if not parts:
        if rollout.served is None:
            return None, why
        left = {shard: weight for shard, weight in present.items() if shard in view.shards}
        return Served(rollout.base, left), why
    return Served(rollout.base, _weights(parts, present)), why


def _part(
    rollout: Rollout,
    spec: PipelineSpec,
    shard: str,
    units: Mapping[UnitId, Unit],
    view: ClusterView,
    enough: bool,
) -> tuple[float, str]:
    """The part of the pipeline's need that a shard's ready models of a version can carry by its weakest stage (0: a
    stage is not ready at all), and what lacks. ``enough``: only what carries the need, or all there is, will do."""
    least = float("inf")
    for stage in spec.stages:
        key = rollout.new_key(stage) if spec is rollout.new else rollout.base_key(stage)
        unit = units[UnitId(rollout.name, stage, shard)]
        slots = [*unit.holders, *unit.leaving]
        ready = ready_capacity(unit, str(key), view, slots)
        if ready <= 0.0:
            failed = [slot for slot in slots if key in view.nodes[slot.id[0]].devices[slot.id[1]].failed]
            if slots and len(failed) == len(slots):
                return 0.0, f"{key} cannot be loaded: it failed on {len(failed)} devices"
            return 0.0, f"{key} is being loaded"
        if enough and ready < unit.need:
            waiting = [s for s in slots if not view.nodes[s.id[0]].devices[s.id[1]].failed.intersection({str(key)})]
            if ready < sum(unit.costs[slot.kind].rate for slot in waiting):
                return 0.0, f"{key} is being loaded"
        least = min(least, ready / max(unit.wanted, 1e-9))
    return least, ""


def _weights(parts: Mapping[str, float], present: Mapping[str, float]) -> dict[str, float]:
    total = sum(parts.values())
    weights = {shard: part / total for shard, part in parts.items()}
    if weights.keys() == present.keys() and all(
        abs(weight - present[shard]) <= WEIGHT_STEP for shard, weight in weights.items()
    ):
        return dict(present)
    return {shard: round(weight, 3) for shard, weight in weights.items()}
