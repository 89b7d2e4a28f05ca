"""Versions of pipelines: which models a unit stands for, and which version is served by which shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

from cluster.planner.costs import Costs
from cluster.planner.fleet import Slot, Unit, UnitId
from cluster.planner.view import ClusterView, DeviceId, Served
from pipelines.spec import PipelineSpec

WEIGHT_STEP = 0.02
"""Shards' parts of the requests are changed when one of them is off by more than this."""


class Rollout:
    """One pipeline: ``base`` is what is served (or is to be, where nothing is yet), ``new`` what is to follow it.
    ``apart``: the new version's models do not fit beside the others and need devices of their own."""

    __slots__ = ("apart", "base", "base_version", "name", "new", "new_version", "served")

    def __init__(self, name: str, wanted: PipelineSpec, served: Served | None, costs: Costs) -> None:
        self.name = name
        self.served = served
        self.base = wanted if served is None else served.spec
        self.base_version = costs.version(self.base)
        self.new_version = costs.version(wanted)
        self.new = wanted if self.new_version != self.base_version else None
        self.apart = False

    def stages(self) -> list[str]:
        """The stages of both versions."""
        return list(dict.fromkeys([*self.base.stages, *(self.new.stages if self.new is not None else ())]))

    def base_key(self, stage: str) -> str | None:
        """The model of a stage that is served or is to be served first."""
        return f"{self.name}@{self.base_version}/{stage}" if stage in self.base.stages else None

    def new_key(self, stage: str) -> str | None:
        """The model of a stage in the version to come."""
        if self.new is None or stage not in self.new.stages:
            return None
        return f"{self.name}@{self.new_version}/{stage}"

    def units(self) -> list[tuple[str, str]]:
        """(stage, the unit's version) of every unit that a shard of this pipeline has."""
        if not self.apart or self.new is None:
            return [(stage, "") for stage in self.stages()]
        return [(stage, "") for stage in self.base.stages] + [(stage, self.new_version) for stage in self.new.stages]

    def keys(self, stage: str, version: str) -> list[str]:
        """The models of a unit; it is ready with the first."""
        base, new = self.base_key(stage), self.new_key(stage)
        if self.apart:
            return [key for key in (new if version else base,) if key is not None]
        return [key for key in (base, new) if key is not None]

    def unit_of(self, key: str, stage: str) -> str | None:
        """The version of the unit that a model of this pipeline belongs to; None where it belongs to none."""
        if key == self.base_key(stage):
            return ""
        if key == self.new_key(stage):
            return self.new_version if self.apart else ""
        return None


class Readiness:
    """What the devices say about models. ``blocked``: those that could not be loaded lately, by device."""

    def __init__(self, view: ClusterView, blocked: Mapping[DeviceId, Set[str]]) -> None:
        self._view = view
        self._blocked = blocked

    def ready(self, key: str, slot: Slot) -> bool:
        return key in self._view.nodes[slot.device[0]].devices[slot.device[1]].ready

    def failed(self, key: str, slot: Slot) -> bool:
        return key in self._blocked.get(slot.device, ())


def capacity(unit: Unit, slot: Slot) -> float:
    """Elements per second that a device can run of a unit, with those beside it busy as well."""
    return unit.costs[slot.kind].rate / max(1, len(slot.units))


def convert(unit: Unit, base: Unit) -> bool:
    """Turn devices of the served version over to the new one, whose models do not fit beside: up to half of them, one
    staying at least; whether there are any for the new one."""
    least = max(1, (len(base.holders) + len(unit.holders)) // 2)
    serving = sum(base.id in slot.ready for slot in base.holders)
    for slot in sorted(base.holders, key=lambda slot: (base.id in slot.ready, -slot.order)):
        covered = sum(capacity(unit, holder) for holder in unit.holders)
        if (unit.holders and covered >= unit.need) or len(base.holders) <= least:
            break
        serves = base.id in slot.ready
        if (serves and serving <= least) or len(slot.units) > 1 or slot.held or not slot.usable or not unit.fits(slot):
            continue
        serving -= serves
        base.holders.remove(slot)
        del slot.units[base.id]
        slot.units[unit.id] = 0.0
        slot.why = "the new version does not fit beside the old one"
        unit.holders.append(slot)
    return bool(unit.holders)


def serve(
    rollout: Rollout, shards: Sequence[str], units: Mapping[UnitId, Unit], view: ClusterView, readiness: Readiness
) -> tuple[Served | None, str]:
    """What is to be served of a pipeline, and what keeps its new version from that ('' if nothing does, or time will
    tell)."""
    present = {} if rollout.served is None else rollout.served.shards
    alive = {shard: weight for shard, weight in present.items() if shard in view.shards}
    why = ""
    if rollout.new is not None and shards:
        parts: dict[str, float] = {}
        for shard in shards:
            part, why = _new_part(rollout, rollout.new, shard, shards, units, readiness)
            if part <= 0.0:
                break
            parts[shard] = part
        if len(parts) == len(shards):
            return Served(rollout.new, _weights(parts, {})), ""
    parts = {shard: _base_part(rollout, shard, shards, units, readiness) for shard in shards}
    ready = {shard: part for shard, part in parts.items() if part > 0.0}
    if rollout.served is None:
        return (Served(rollout.base, _weights(ready, {})), why) if ready else (None, why)
    going = [shard for shard in alive if shard not in parts]
    if not ready or (going and len(ready) < len(parts)):
        return Served(rollout.base, _weights(alive, present)), why  # until those that are to follow are ready
    return Served(rollout.base, _weights(ready, present)), why


def _new_part(
    rollout: Rollout,
    new: PipelineSpec,
    shard: str,
    shards: Sequence[str],
    units: Mapping[UnitId, Unit],
    readiness: Readiness,
) -> tuple[float, str]:
    """The part of the pipeline that a shard can serve with the new version, 0 unless it carries what is needed or all
    its devices have the models; and what is wrong."""
    least = float("inf")
    for stage in new.stages:
        key = str(rollout.new_key(stage))
        unit = units[UnitId(rollout.name, stage, shard, rollout.new_version if rollout.apart else "")]
        slots = [*unit.holders, *unit.leaving]
        working = [slot for slot in unit.holders if not readiness.failed(key, slot)]
        if slots and not working:
            return 0.0, f"{key} could not be loaded on any of its {len(slots)} devices"
        planned = sum(capacity(unit, slot) for slot in working)
        ready = sum(capacity(unit, slot) for slot in working if readiness.ready(key, slot))
        if ready <= 0.0 or ready < min(unit.need, planned):
            return 0.0, ""
        least = min(least, ready / _whole_need(unit, shards, units))
    return least, ""


def _base_part(
    rollout: Rollout, shard: str, shards: Sequence[str], units: Mapping[UnitId, Unit], readiness: Readiness
) -> float:
    """The part of the pipeline that a shard can serve by its weakest stage."""
    least = float("inf")
    for stage in rollout.base.stages:
        unit = units[UnitId(rollout.name, stage, shard)]
        slots: Iterable[Slot] = [*unit.holders, *unit.leaving]
        ready = sum(capacity(unit, slot) for slot in slots if unit.id in slot.ready)
        least = min(least, ready / _whole_need(unit, shards, units))
    return least


def _whole_need(unit: Unit, shards: Sequence[str], units: Mapping[UnitId, Unit]) -> float:
    """What all shards together need of a unit's stage; as much as one device runs where that is not known."""
    total = sum(units[unit.id._replace(shard=shard)].wanted for shard in shards)
    return total if total > 0.0 else unit.best


def _weights(parts: Mapping[str, float], present: Mapping[str, float]) -> dict[str, float]:
    total = sum(parts.values()) or 1.0
    weights = {shard: part / total for shard, part in parts.items()}
    if weights.keys() == present.keys() and all(
        abs(weight - present[shard]) <= WEIGHT_STEP for shard, weight in weights.items()
    ):
        return dict(present)
    return {shard: round(weight, 3) for shard, weight in weights.items()}
